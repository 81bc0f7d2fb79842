"""What the experts compute, and with which weights: found by value among the numbers that a block left behind.

For a few tokens each way of reading a bank's parameters (which is gate, up and down, their layout, the activation)
gives the outputs f_e(x_t) of the experts. A tensor y of the record is the routed sum if some coefficients c solve
y_t = sum_j c_tj f_{e_tj}(x_t) without residue. Random weights make an accident as good as impossible, and the block's
own way of moving rows about (loops, masks, sorts, one-hot products) does not matter at all. `explain` then finds the
coefficients among the recorded values; certification (`certify`) decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from moefx.dialect.glu import GluKind, glu_reference

from .bank import Bank, Stack
from .choices import masks, unusual
from .record import Record, Snap, objects

Tensor = torch.Tensor
TOLERANCE = 5e-5  # relative; recorded in fp32. The two forms of GELU are nearest, some 2e-4 from each other
_PAIRS = 12  # inputs and weights on them that are tried, the latest weights first
_GATHERED = 512  # rows whose weights are gathered; of more, expert by expert
ACTS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@dataclass(frozen=True)
class Role:
    """A stack in its role. `turned`: stored [E, in, out]."""

    stack: Stack
    turned: bool = False
    bias: Stack | None = None


@dataclass(frozen=True)
class Reading:
    """One way to read a bank: `up` holds gate and up in one or two stacks, in this order unless `swapped`."""

    kind: GluKind
    up: tuple[Role, ...]
    down: Role
    swapped: bool = False

    @property
    def bias(self) -> bool:
        """Whether the products have biases."""
        return self.down.bias is not None or any(r.bias is not None for r in self.up)

    @property
    def names(self) -> frozenset[str]:
        """All parameters that are read."""
        roles = (*self.up, self.down)
        return frozenset(n for r in roles for s in (r.stack, r.bias) if s is not None for n in s.names)


@dataclass
class Fit:
    """The routed sum `y` of a record as experts of `x`: y_t = sum_j c[t, j] f(x_t; idx[t, j])."""

    reading: Reading
    experts: int
    x: Snap
    idx: tuple[Snap, ...]  # one [.., k], or k of [..]; a float one is a gate matrix [.., E] with k nonzeros a row
    y: Snap
    k: int
    c: Tensor
    chosen: Tensor
    scaled: Snap | None = None  # weights [.., k] that multiply the experts' inputs
    rest: str = ""  # what indices from E on contribute: see `choices`
    last: bool = False  # whether no other sum is explained by the same choices and inputs
    choice: Snap | None = None  # expert choice: weights [E, C]; idx is then tokens [E, C], and c is empty


class NoFit(Exception):  # noqa: N818  an answer, not a fault
    """Nothing fitted; the text says what was seen instead."""


def readings(bank: Bank, hidden: int, limits: tuple[tuple[float, float], ...]) -> Iterator[Reading]:
    """All ways to read a bank whose experts take rows of `hidden` features, the usual ones first."""
    gated = [GluKind(a) for a in ACTS]
    joint = [replace(k, interleaved=True) for k in gated]
    clamps = [GluKind("clamp", True, i, *pair) for pair in limits for i in (True, False)]
    plain = [GluKind(a, gated=False) for a in ACTS]
    for *ups, down in itertools.permutations(bank.matrices):
        layouts = [[t for t in (False, True) if s.shape[1 if t else 2] == hidden] for s in ups]
        for turned in itertools.product(*layouts):
            width = sum(s.shape[2 if t else 1] for s, t in zip(ups, turned, strict=True))
            if len(ups) == 2 and len({s.shape[2 if t else 1] for s, t in zip(ups, turned, strict=True)}) > 1:
                continue
            for down_turned in (False, True):
                inner = down.shape[1 if down_turned else 2]
                roles = [Role(s, t) for s, t in zip(ups, turned, strict=True)]
                if width == 2 * inner:
                    kinds = gated if len(ups) == 2 else [*gated, *joint, *clamps]
                    options = [(k, s) for k in kinds for s in (False, True) if not (s and len(ups) == 2)]
                elif width == inner and len(ups) == 1:
                    options = [(k, False) for k in plain]
                else:
                    continue
                for with_bias in _biases(bank, [*roles, Role(down, down_turned)]):
                    for kind, swapped in options:
                        yield Reading(kind, tuple(with_bias[:-1]), with_bias[-1], swapped)


def _biases(bank: Bank, roles: list[Role]) -> Iterator[list[Role]]:
    """Assignments of the bank's vectors to roles, all of them used first."""
    outs = [r.stack.shape[2 if r.turned else 1] for r in roles]
    options = [[None, *(v for v in bank.vectors if v.shape[1] == out)] for out in outs]
    chosen = [c for c in itertools.product(*options) if len({v for v in c if v}) == sum(v is not None for v in c)]
    for c in sorted(chosen, key=lambda c: sum(v is None for v in c)):
        yield [replace(r, bias=v) for r, v in zip(roles, c, strict=True)]


class Evaluator:
    """Expert outputs of single rows, with the parameters of the recorded block."""

    def __init__(self, block: nn.Module) -> None:
        self.params = dict(block.named_parameters(remove_duplicate=False))
        self._pre: dict[tuple[int, int, bool, Role], Tensor] = {}
        self._kept: list[Tensor] = []

    def _rows(self, stack: Stack, experts: Tensor) -> Tensor:
        """Parameters of the given experts [R, ...] without building the whole stack."""
        if len(stack.names) == 1:
            return stack.gather(lambda n: self.params[n].detach())[experts].float()
        return torch.stack([self.params[stack.names[e]].detach().float() for e in experts.tolist()])

    def _linear(self, x: Tensor, role: Role, experts: Tensor) -> Tensor:
        if experts.numel() > _GATHERED:
            out = role.stack.shape[2 if role.turned else 1]
            y = x.new_zeros(len(x), out, dtype=torch.float32)
            for e in experts.unique():
                mine = (experts == e).nonzero()[:, 0]
                w = self._rows(role.stack, e[None])[0]
                y[mine] = x[mine].float() @ (w if role.turned else w.t())
            return y if role.bias is None else y + self._rows(role.bias, experts)
        w = self._rows(role.stack, experts)
        y = torch.einsum("ri,rio->ro", x, w) if role.turned else torch.einsum("ri,roi->ro", x, w)
        return y if role.bias is None else y + self._rows(role.bias, experts)

    def __call__(self, reading: Reading, x: Tensor, rows: Tensor, pick: Tensor | None = None) -> Tensor:
        """f_e(x) of input rows x [N, k, H] and experts [N, k], for all or the picked tokens: [n, k, H].

        Without a k: x [R, H] and experts [R] give [R, H].
        """
        xs, chosen = (x, rows) if pick is None else (x[pick], rows[pick])
        flat, experts = xs.reshape(-1, x.shape[-1]), chosen.reshape(-1)
        parts = []
        for role in reading.up:  # shared by all activations, so kept
            key = (id(x), id(rows), pick is None, role)
            if key not in self._pre:
                self._kept += [x, rows]
                self._pre[key] = self._linear(flat, role, experts)
            parts.append(self._pre[key])
        h = torch.cat(parts, -1)
        if reading.swapped:
            if reading.kind.interleaved:
                h = h.view(*h.shape[:-1], -1, 2).flip(-1).flatten(-2)
            else:
                h = torch.cat(h.chunk(2, -1)[::-1], -1)
        z = self._linear(glu_reference(h, None, str(reading.kind)), reading.down, experts)
        return z.view(*chosen.shape, z.shape[-1])


def choices(record: Record, tokens: int, E: int) -> Iterator[tuple[tuple[Snap, ...], Tensor]]:
    """Candidates for the experts of every token: the values they come from, and indices [N, k]."""
    whole, single, gates = [], [], []
    for s in _distinct(record.snaps):
        v = s.value
        if v.is_complex():
            continue
        if not v.is_floating_point() and v.dtype != torch.bool and v.numel() and v.numel() % tokens == 0:
            k = v.numel() // tokens
            if k > E or int(v.min()) < 0 or int(v.max()) >= E or int(v.max()) == int(v.min()):
                continue
            if v.dim() == 1 or (v.shape[-1] != k):
                if k == 1:
                    single.append(s)
                continue
            rows = v.reshape(tokens, k)
            if k > 1 and not (rows.sort(-1).values.diff(dim=-1) > 0).all():
                continue
            whole.append((s, rows))
        elif v.is_floating_point() and v.dim() >= 2 and v.shape[-1] == E and v.numel() == tokens * E:
            count = (v != 0).reshape(tokens, E).sum(-1)
            if 0 < int(count.max()) < E and bool((count == count.max()).all()):
                gates.append((s, v.reshape(tokens, E).topk(int(count.max())).indices))
    for s, rows in reversed(whole):
        yield (s,), rows.long()
    for s in single:
        yield (s,), s.value.reshape(tokens, 1).long()
    for r in (2, 3):
        for some in itertools.combinations(single[:6], r):
            rows = torch.stack([s.value.reshape(tokens).long() for s in some], -1)
            if (rows.sort(-1).values.diff(dim=-1) > 0).all():
                yield some, rows
    for s, rows in gates:
        yield (s,), rows


def _distinct(snaps: list[Snap]) -> list[Snap]:
    """Snaps of different values; of equal ones the first."""
    kept: list[Snap] = []
    alike: dict[tuple[int, bool], list[tuple[list[float], Snap]]] = {}
    for s in snaps:
        # A few numbers tell nearly all values apart, at a fraction of the cost of comparing them whole.
        few = s.value.reshape(-1)[:3].tolist() if not s.value.dtype.is_complex else []
        others = alike.setdefault((s.value.numel(), s.value.is_floating_point()), [])
        if not any(_alike(few, f) and same(s.value, o.value) for f, o in others):
            kept.append(s)
            others.append((few, s))
    return kept


def _alike(a: list[float], b: list[float]) -> bool:
    return not any(abs(x - y) > 1e-4 * abs(y) + 1e-4 for x, y in zip(a, b, strict=True))


def _given_first(snaps: list[Snap]) -> list[Snap]:
    """The block's inputs before other values: what a submodule wrote into one is read from it when that has run."""
    return sorted(snaps, key=lambda s: s.obj.source != "input")


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two values hold the same numbers in the same order, up to rounding, whatever their shapes."""
    if a.numel() != b.numel() or a.is_floating_point() != b.is_floating_point() or a.dtype.is_complex:
        return False
    a, b = a.reshape(-1), b.reshape(-1)
    if not a.is_floating_point():
        return bool((a == b).all())
    return bool(torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-6, equal_nan=True))


def rows_of(record: Record, tokens: int, width: int) -> list[Snap]:
    """Finite floating values that are one row of `width` per token."""
    fits = (s for s in record.snaps if s.value.is_floating_point() and s.value.shape[-1:] == (width,))
    return [s for s in fits if s.value.numel() == tokens * width and bool(s.value.isfinite().all())]


def fit(block: nn.Module, record: Record, bank: Bank, limits: tuple[tuple[float, float], ...] = ()) -> Iterator[Fit]:
    """All routed sums in a record that experts of the bank explain, most complete ones first; `NoFit` if none does."""
    evaluate = Evaluator(block)
    stage = "no tensor holds the experts' inputs"
    start = first_use(record, bank)
    sizes = _sizes(record, bank)
    # What the experts read exists before any of their parameters is touched, and their sum afterwards.
    inputs = {
        n: [s for s in _distinct(_given_first(rows_of(record, *n))) if s.time < start and _finite(s)] for n in sizes
    }
    likely: dict[Snap, list[Reading]] = {}

    def able(x: Snap, width: int) -> list[Reading]:
        if x not in likely:
            sums = [s for s in record.snaps if s.time >= start]
            likely[x] = [r for r in readings(bank, width, limits) if _spans(evaluate, r, bank.experts, x, sums)]
        return likely[x]

    for weighted, kinds in ((False, _usual), (False, unusual), (True, _usual)):
        for n in [n for n in sizes if inputs[n]]:
            stage = max(stage, "no tensor chooses experts for tokens", key=_STAGES.index)
            alive = _alive(record, n[0], {d for s in bank.matrices for d in s.shape[1:]}, start)
            for rest, source, rows in kinds(record, n[0], bank.experts):
                stage = _STAGES[2]
                pick = _probe(rows, alive)
                plain: list[tuple[Snap, Snap | None]] = [(x, None) for x in inputs[n]]
                pairs = _scaled(record, inputs[n], rows, bank.experts, start)
                for x, scaled in itertools.islice(pairs, _PAIRS) if weighted else plain:
                    x_rows = _inputs(x, scaled, rows, bank.experts)
                    for reading in readings(bank, n[1], limits) if weighted else able(x, n[1]):
                        given = (record, bank, source, rows, x, scaled, x_rows, pick, start, rest)
                        found = _sums(evaluate, reading, *given)
                        if found:
                            found.sort(key=lambda f: (-int((f.c.abs() > TOLERANCE).sum()), f.y.time))
                            yield from found[:-1]
                            yield replace(found[-1], last=True)
                            break
    for n in sizes:
        for x in inputs[n]:
            for reading in able(x, n[1]):
                found = _chosen_tokens(evaluate, reading, record, bank, x)
                if found:
                    yield found[0]
                    return
    raise NoFit(stage)


def _spans(evaluate: Evaluator, reading: Reading, E: int, x: Snap, sums: list[Snap]) -> bool:
    """Whether some later value is a combination of all experts' outputs (and the token) at a few tokens.

    Whatever chooses the experts, a routed sum is; so most readings are out before any choice is tried. Experts that are
    too many or too large for that are not tested.
    """
    rows = x.value.reshape(-1, x.value.shape[-1]).float()
    some = torch.arange(0, len(rows), max(1, len(rows) // 5), device=rows.device)
    roles = (*reading.up, reading.down)
    if len(some) * max(torch.Size(r.stack.shape).numel() for r in roles) > _FEW:
        return True
    z = evaluate(
        reading, rows[:, None].expand(-1, E, -1)[some], torch.arange(E, device=rows.device).expand(len(some), E)
    )
    if z.shape[-1] <= E + 1 or not bool(z.isfinite().all()):
        return True
    a = torch.cat([z, rows[some, None]], 1) if z.shape[-1] == rows.shape[-1] else z
    ys = [s.value for s in sums if s.value.numel() == len(rows) * z.shape[-1] and s.value.shape[-1] == z.shape[-1]]
    ys = [y.reshape(len(rows), -1).double() for y in ys if y.is_floating_point() and bool(y.isfinite().all())]
    ys = [y[some] for y in ys if bool(y.norm() > 0)]
    if not ys:
        return False
    b = torch.stack(ys, -1).cpu()
    a = a.transpose(1, 2).double().cpu()
    left = (a @ torch.linalg.lstsq(a, b, rcond=1e-9, driver="gelsd").solution - b).norm(dim=1)
    return bool((left <= TOLERANCE * b.norm(dim=1).amax(0, keepdim=True)).all(0).any())


_FEW = 1 << 24  # numbers in the weights that a test of all experts may gather


def _usual(record: Record, tokens: int, E: int) -> Iterator[tuple[str, tuple[Snap, ...], Tensor]]:
    yield from masks(record, tokens, E)
    yield from (("", *found) for found in choices(record, tokens, E))


_STAGES = (
    "no tensor holds the experts' inputs",
    "no tensor chooses experts for tokens",
    "no sum of experts' outputs is among the values that it computes",
)


def first_use(record: Record, bank: Bank) -> int:
    """The first step that reads a parameter of the bank."""
    names = bank.names
    uses = (
        s.index
        for s in record.steps
        if any(o.source == "state" and o.name in names for o in objects((s.args, s.kwargs)))
    )
    return next(uses, len(record.steps))


def _finite(s: Snap) -> bool:
    return bool(s.value.isfinite().all())


def _inputs(x: Snap, scaled: Snap | None, rows: Tensor, E: int) -> Tensor:
    """Input rows of the experts, one per choice: [N, k, H]."""
    tokens, k = rows.shape
    values = x.value.reshape(tokens, 1, -1).float().expand(tokens, k, -1)
    return values if scaled is None else values * _factors(scaled, rows, E)[..., None]


def _factors(s: Snap, rows: Tensor, E: int) -> Tensor:
    """Values [.., k] or a gate matrix [.., E] as [N, k]."""
    tokens, k = rows.shape
    if s.value.numel() == tokens * E and s.value.shape[-1] == E:
        return s.value.reshape(tokens, E).gather(1, rows.clamp_max(E - 1)).float()
    return s.value.reshape(tokens, k).float()


def _scaled(record: Record, inputs: list[Snap], rows: Tensor, E: int, start: int) -> Iterator[tuple[Snap, Snap]]:
    """Inputs that are multiplied by weights before the experts see them."""
    tokens, k = rows.shape
    # Of equal values the last: that is the one in the dtype that the experts' inputs have.
    for s in _distinct([s for s in reversed(record.snaps) if s.time < start]):
        v = s.value
        fits = (v.numel() == tokens * k and (v.shape[-1] == k or k == 1)) or (
            v.numel() == tokens * E and v.shape[-1] == E
        )
        if v.is_floating_point() and fits and bool(v.isfinite().all()) and not bool((v == 1).all()):
            for x in inputs:
                yield x, s


def _chosen_tokens(evaluate: Evaluator, reading: Reading, record: Record, bank: Bank, x: Snap) -> list[Fit]:
    """Routed sums in which every expert takes the C tokens that it likes best."""
    E = bank.experts
    rows = x.value.reshape(-1, x.value.shape[-1]).float()
    for s in record.snaps:
        v = s.value
        if v.is_floating_point() or v.dim() != 2 or v.shape[0] != E or v.dtype == torch.bool or not v.numel():
            continue
        if int(v.min()) < 0 or int(v.max()) >= len(rows) or not (v.sort(-1).values.diff(dim=-1) > 0).all():
            continue
        flat, experts = v.reshape(-1).long(), torch.arange(E, device=v.device).repeat_interleave(v.shape[1])
        z = evaluate(reading, rows[flat], experts)
        for w in reversed(record.snaps):
            if not w.value.is_floating_point() or w.value.shape != v.shape:
                continue
            y = torch.zeros(len(rows), z.shape[1], device=v.device).index_add_(
                0, flat, z * w.value.reshape(-1, 1).float()
            )
            sums = rows_of(record, len(rows), z.shape[1])
            match = [o for o in sums if o.time >= 0 and _near(o.value.reshape(y.shape).float(), y)]
            if match:
                last = [o for o in match if o.obj is match[0].obj][-1]
                none = torch.zeros(len(rows), 0)
                return [Fit(reading, E, x, (s,), last, v.shape[1], none, none.long(), choice=w)]
    return []


def _near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= TOLERANCE * b.norm()) and bool(b.norm() > 0)


def _sizes(record: Record, bank: Bank) -> list[tuple[int, int]]:
    """(tokens, features) that the block's inputs and the bank allow."""
    widths = {d for s in bank.matrices for d in s.shape[1:]}
    given = [s.value for s in record.snaps if s.obj.source == "input" and s.time < 0]
    counts = {v.numel() // max(1, v.shape[-1]) for v in given if v.dim() > 1}
    counts |= {o.tensor.numel() for o in record.inputs if not o.tensor.is_floating_point()}
    return [(n, d) for n in sorted(counts, reverse=True) for d in sorted(widths) if n > 0]


def _alive(record: Record, tokens: int, widths: set[int], start: int) -> Tensor:
    """For every token how many later values have something in its row: a dropped token has less."""
    rows = [s.value.reshape(tokens, -1) for d in widths for s in rows_of(record, tokens, d) if s.time >= start]
    return torch.stack([(r != 0).any(-1) for r in rows]).sum(0) if rows else torch.zeros(tokens, dtype=torch.long)


def _probe(rows: Tensor, alive: Tensor) -> Tensor:
    """A few tokens that were not dropped and that between them choose many experts."""
    order: list[int] = []
    seen: set[int] = set()
    chosen, most = rows.tolist(), int(alive.max())
    tokens = sorted(range(len(rows)), key=(-alive.cpu()).tolist().__getitem__)
    for t in tokens:
        if not seen.issuperset(chosen[t]) and (int(alive[t]) == most or len(order) < 3):
            order.append(t)
            seen.update(chosen[t])
    rest = [t for t in tokens if t not in order]
    return torch.tensor(sorted((order + rest)[:6]))


def _sums(
    evaluate: Evaluator,
    reading: Reading,
    record: Record,
    bank: Bank,
    source: tuple[Snap, ...],
    rows: Tensor,
    x: Snap,
    scaled: Snap | None,
    x_rows: Tensor,
    pick: Tensor,
    start: int,
    rest: str,
) -> list[Fit]:
    tokens, k = rows.shape
    real = rows.clamp_max(bank.experts - 1) if rest else rows

    def outputs(pick: Tensor | None) -> Tensor:
        z = evaluate(reading, x_rows, real, pick)
        if not rest:
            return z
        none = x_rows if rest == "identity" else torch.zeros_like(x_rows)
        past, none = (rows >= bank.experts, none) if pick is None else (rows[pick] >= bank.experts, none[pick])
        return torch.where(past[..., None], none, z) if none.shape == z.shape else z

    z = outputs(pick)
    width = z.shape[-1]
    ys = [s for s in rows_of(record, tokens, width) if s.time >= start and _finite(s)]
    if not ys or width <= k or not bool(z.isfinite().all()):
        return []
    b = torch.stack([s.value.reshape(tokens, width)[pick].float() for s in ys], -1)
    good = _residues(z.transpose(1, 2), b)[1]
    found: list[Fit] = []
    for i, y in enumerate(ys):
        if not good[i] or any(f.y.obj is y.obj and same(y.value, f.y.value) for f in found):
            continue
        full = outputs(None)
        c, fine = _residues(full.transpose(1, 2), y.value.reshape(tokens, width, 1).float())
        if fine[0]:
            # The same object may be written again with nothing new, by experts without rows: the last time counts.
            y = [s for s in ys if s.obj is y.obj and same(s.value, y.value)][-1]
            if scaled is not None:
                # Small inputs make coefficients inexact; here each must be one, and that can be tested.
                if not _near(full.sum(1), y.value.reshape(tokens, width).float()):
                    continue
                c = torch.ones_like(c)
            found.append(Fit(reading, bank.experts, x, source, y, k, c[..., 0], rows, scaled, rest))
    return found


def _residues(a: Tensor, b: Tensor) -> tuple[Tensor, list[bool]]:
    """Coefficients [n, k, y] of b [n, D, y] in terms of a [n, D, k], and for which y nothing is left over."""
    if not bool(a.isfinite().all()):
        return torch.zeros(*a.shape[::2], b.shape[-1]), [False] * b.shape[-1]
    # Repeated experts, and choices that contribute nothing, leave the rank short: this solver (CPU only) allows for it.
    c = torch.linalg.lstsq(a.double().cpu(), b.double().cpu(), rcond=1e-6, driver="gelsd").solution.to(a.device)
    left = (a.double() @ c - b).norm(dim=1)
    size = b.double().norm(dim=1)
    scale = size.amax(0, keepdim=True)
    fine = (left <= TOLERANCE * scale) & (scale > 1e-6)
    filled = (size > 1e-6 * scale).sum(0) >= min(2, a.shape[0])
    return c.float(), (fine.all(0) & filled).tolist()
