"""Parts of experts among the recorded rows: first products, activations and outputs of (token, expert) pairs.

Rows are compared by direction, so that weights do not matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from .bank import Bank
from .choices import choices, distinct, rows_of
from .fit import TOLERANCE, first_use, least_squares, sizes_of
from .reading import Evaluator, Reading, Role, readings
from .record import Obj, Record, Snap, objects

Tensor = torch.Tensor
_LARGEST = 1 << 25  # elements of rows to search
_WORK = 5e9  # operations for the products of one run
_NARROW = 4  # rows of fewer features have the direction of another one too easily
PRODUCTS = frozenset(
    {
        "linear",
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "bmm",
        "mm",
        "einsum",
        "addmm",
        "baddbmm",
        "_grouped_mm",
        "grouped_mm",
        "bilinear",
    }
)
ADDS = frozenset(
    {"add", "add_", "__add__", "__radd__", "__iadd__", "index_add", "index_add_", "scatter_add", "scatter_add_"}
    | {"__setitem__", "index_put", "index_put_", "addcmul", "addcmul_", "lerp"}
)
MOVES = frozenset(
    {
        "view",
        "reshape",
        "__getitem__",
        "index_select",
        "transpose",
        "permute",
        "flatten",
        "unflatten",
        "unsqueeze",
        "squeeze",
        "expand",
        "contiguous",
        "T",
        "mT",
        "gather",
        "to",
        "float",
        "clone",
        "chunk",
        "split",
        "unbind",
        "stack",
        "cat",
        "index_copy",
        "index_copy_",
        "__setitem__",
        "repeat",
        "repeat_interleave",
        "expand_as",
        "view_as",
        "movedim",
        "swapaxes",
        "narrow",
        "select",
        "index_put",
        "index_put_",
        "embedding",
        "detach",
        "type_as",
    }
)


class TooLargeError(Exception):
    """Looking would take too long."""


class Pool:
    """The rows that a block computed, along any axis of the right size, found again by direction."""

    def __init__(self, snaps: Sequence[Snap]) -> None:
        self.values = [s.value for s in snaps if s.value.is_floating_point() and s.value.dim() > 1]
        self.kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def _rows(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        if width not in self.kept:
            axes = [(v, a) for v in self.values for a in range(v.dim()) if v.shape[a] == width]
            if sum(v.numel() for v, _ in axes) > _LARGEST:
                raise TooLargeError
            rows = torch.cat([torch.zeros(0, width), *(v.movedim(a, -1).reshape(-1, width).float() for v, a in axes)])
            size = rows.norm(dim=-1)
            rows = directions(rows[(size > 1e-8) & size.isfinite()])
            at = mix(width, 1)[:, 0]
            keys, order = (rows @ at).abs().sort()
            self.kept[width] = rows[order], keys, at
        return self.kept[width]

    def holds(self, wanted: Tensor) -> Tensor:
        """For each row of `wanted` [R, D] whether a multiple of it was computed."""
        rows, keys, at = self._rows(wanted.shape[-1])
        found = torch.zeros(len(wanted), dtype=torch.bool)
        if not len(rows) or wanted.shape[-1] < _NARROW:
            return found
        q = directions(wanted.float())
        place = torch.searchsorted(keys, (q @ at).abs().contiguous())
        for step in range(-4, 4):
            other = rows[(place + step).clamp(0, len(rows) - 1)]
            found |= torch.minimum((other - q).norm(dim=-1), (other + q).norm(dim=-1)) < TOLERANCE
        return found


def mix(width: int, count: int) -> Tensor:
    """Random combinations of features, the same every time."""
    drawn = torch.randn(width, count, generator=torch.Generator().manual_seed(0), device="cpu") * width**-0.5
    moved: Tensor = drawn.to(torch.get_default_device())
    return moved


def directions(rows: Tensor) -> Tensor:
    """Rows of length one."""
    size: Tensor = rows.norm(dim=-1, keepdim=True)
    return rows / size.clamp(min=1e-30)


@dataclass
class Table:
    """What a run computed of the experts `rows` [N, k] of its tokens.

    `first` products, `hidden` activations and `outputs` are [N, k]: whether they are among the recorded rows.
    """

    x: Snap
    rows: Tensor
    dense: bool
    roles: dict[Role, Tensor]
    first: Tensor
    hidden: Tensor
    outputs: Tensor
    reading: Reading | None = None
    z: Tensor | None = None  # f_e(x_t), [N, k, D]

    @property
    def score(self) -> tuple[float, ...]:
        return tuple(float(t.float().mean()) for t in (self.outputs, self.hidden, self.first))


@dataclass
class Run:
    """A record with what was found in it."""

    record: Record
    bank: Bank
    limits: tuple[tuple[float, float], ...]
    evaluate: Evaluator
    tables: list[Table] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.work = 0.0
        self.start = first_use(self.record, self.bank)
        self.pool = Pool([s for s in self.record.snaps if s.time >= self.start])
        for n, width in sizes_of(self.record, self.bank):
            xs = [s for s in distinct(rows_of(self.record, n, width)) if s.time < self.start][-8:]
            options = [(rows, False) for _, rows in choices(self.record, n, self.bank.experts)][:6]
            every = torch.arange(self.bank.experts).expand(n, -1)
            for x in xs:
                for rows, dense in options:
                    self.tables += self._look(x, rows, width, dense)
            try:
                self.tables += [t for x in xs for t in self._look(x, every, width, True)]
            except TooLargeError:  # a choice may be known: then all experts are not needed
                self.tables = [t for t in self.tables if not t.dense]
                self.work = 0.0

    def product(self, role: Role, x: Tensor, experts: Tensor) -> Tensor:
        """Rows [R, in] times the matrices of their experts; `TooLargeError` when all this becomes too much."""
        self.work += 2.0 * len(x) * math.prod(role.stack.shape[1:])
        if self.work > _WORK:
            raise TooLargeError
        return self.evaluate.linear(x, role, experts)

    def _look(self, x: Snap, rows: Tensor, width: int, dense: bool) -> Iterator[Table]:
        n, k = rows.shape
        experts = rows.reshape(-1)
        flat = x.value.reshape(n, 1, width).float().expand(n, k, width).reshape(-1, width)
        made: dict[Role, Tensor] = {}
        found: dict[Role, Tensor] = {}
        for role in roles_of(self.bank, width):
            made[role] = self.product(role, flat, experts)
            there = self.pool.holds(made[role]).view(n, k)
            if bool(there.any()):
                found[role] = there
        none = torch.zeros(n, k, dtype=torch.bool)
        best = max(found.values(), key=lambda f: int(f.sum()), default=none)
        yield Table(x, rows, dense, found, best, none, none)
        for reading in readings(self.bank, width, self.limits):
            if any(r not in found for r in reading.up):
                continue
            first = torch.stack([found[r] for r in reading.up]).all(0)
            a = reading.activation([made[r] for r in reading.up])
            hidden = self.pool.holds(a).view(n, k)
            z, outputs = None, none
            if bool(hidden.any()):
                z = self.product(reading.down, a, experts)
                outputs, z = self.pool.holds(z).view(n, k), z.view(n, k, -1)
            yield Table(x, rows, dense, found, first, hidden, outputs, reading, z)

    def partial(self, y: Snap) -> bool:
        """Whether something that experts computed is added to a value later on, as loops do until they are through."""
        names = self.bank.names
        theirs: set[Obj] = set()
        for step in self.record.steps:
            given = objects((step.args, step.kwargs))
            if not any(o in theirs or (o.source == "state" and o.name in names) for o in given):
                continue
            theirs.update(objects(step.out))
            theirs.update(step.writes)
            if step.index > y.time and step.name in ADDS and any(o.storage == y.obj.storage for o in given):
                others = [o for o in given if o.storage != y.obj.storage and o.tensor.numel()]
                if any(o in theirs for o in others):
                    return True
        return False

    def best(self, dense: bool, reading: Reading | str | None = "any") -> Table | None:
        """The table of which most was computed; with reading None, of first products alone."""
        some = [t for t in self.tables if t.dense == dense and reading in ("any", t.reading)]
        return max(some, key=lambda t: t.score, default=None)


def roles_of(bank: Bank, width: int) -> Iterator[Role]:
    for role in (Role(s, turned) for s in bank.matrices for turned in (False, True)):
        if role.into == width:
            for bias in (None, *(v for v in bank.vectors if v.shape[1] == role.out)):
                yield replace(role, bias=bias)


def solved_tokens(z: Tensor, ys: list[Tensor]) -> tuple[int, int]:
    """For how many tokens the best of `ys` is a sum of z [N, k, D]; and of all k of them, with no weight of zero."""
    b = torch.stack(ys, -1)
    c, left = least_squares(z.transpose(1, 2), b)
    size = b.norm(dim=1)
    fine = (left <= TOLERANCE * size) & (size > 1e-6 * size.amax(0))
    full = (c.abs() > 1e-4 * c.abs().amax((0, 1))).all(1)
    return int(fine.sum(0).max()), int((fine & full).sum(0).max())
