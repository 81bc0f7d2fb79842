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

from .bank import Bank
from .choices import (
    alive_tokens,
    distinct,
    given_first,
    per_choice,
    probe_tokens,
    rows_of,
    same,
    sound,
    unusual,
    usual,
)
from .reading import Evaluator, Reading, readings
from .record import Record, Snap, objects

Tensor = torch.Tensor
TOLERANCE = 5e-5  # relative; recorded in fp32. The two forms of GELU are nearest, some 2e-4 from each other
_PAIRS = 12  # inputs and weights on them that are tried, the latest weights first


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


def fit(
    block: nn.Module,
    record: Record,
    bank: Bank,
    limits: tuple[tuple[float, float], ...] = (),
    known: set[Reading] | None = None,
) -> Iterator[Fit]:
    """All routed sums in a record that experts of the bank explain, most complete ones first; `NoFit` if none does.

    `known`: readings that an earlier record of the block left possible; no others are tried. An empty set is filled
    with those of this record. Square matrices alone can be read in hundreds of ways, and one must serve all records.
    """
    evaluate = Evaluator(block)
    allowed, seen = frozenset(known or ()), set() if known is None or known else known
    stage = "no tensor holds the experts' inputs"
    start = first_use(record, bank)
    sizes = sizes_of(record, bank)
    # What the experts read exists before any of their parameters is touched, and their sum afterwards.
    inputs = {n: [s for s in distinct(given_first(rows_of(record, *n))) if s.time < start] for n in sizes}
    likely: dict[Snap, list[Reading]] = {}

    def able(x: Snap, width: int) -> list[Reading]:
        if x not in likely:
            options = [r for r in readings(bank, width, limits) if not allowed or r in allowed]
            likely[x] = _spanning(evaluate, options, bank.experts, x, [s for s in record.snaps if s.time >= start])
            seen.update(likely[x])
        return likely[x]

    for weighted, kinds in ((False, usual), (False, unusual), (True, usual)):
        for n in [n for n in sizes if inputs[n]]:
            stage = max(stage, "no tensor chooses experts for tokens", key=_STAGES.index)
            alive = alive_tokens(record, n[0], {d for s in bank.matrices for d in s.shape[1:]}, start)
            for rest, source, rows in kinds(record, n[0], bank.experts):
                stage = _STAGES[2]
                pick = probe_tokens(rows, alive)
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


def _spanning(evaluate: Evaluator, options: list[Reading], E: int, x: Snap, sums: list[Snap]) -> list[Reading]:
    """The readings by which some later value is a combination of all experts' outputs (and the token) at a few tokens.

    Whatever chooses the experts, a routed sum is; so most readings are out before any choice is tried. Experts that are
    too many or too large for that are not tested.
    """
    rows = x.value.reshape(-1, x.value.shape[-1]).float()
    some = torch.arange(0, len(rows), max(1, len(rows) // 5), device=rows.device)
    few, later = rows[some], {width: _later(sums, len(rows), width, some) for width in {r.down.out for r in options}}

    def spans(reading: Reading) -> bool:
        roles, width = (*reading.up, reading.down), reading.down.out
        if width <= E + 1 or len(some) * max(torch.Size(r.stack.shape).numel() for r in roles) > _FEW:
            return True
        if (b := later[width]) is None:
            return False
        z = evaluate.everywhere(reading, few)
        if not bool(z.isfinite().all()):
            return True
        a = (torch.cat([z, few[:, None]], 1) if width == few.shape[-1] else z).transpose(1, 2)
        scale = TOLERANCE * b.norm(dim=1).amax(0, keepdim=True)
        possible = torch.ones_like(scale, dtype=torch.bool)
        for part in (slice(1), slice(1, None)):  # one token is enough to tell most readings
            possible = possible & (least_squares(a[part], b[part], 1e-9)[1] <= scale).all(0)
            if not possible.any():
                return False
        return True

    return [r for r in options if spans(r)]


def _later(sums: list[Snap], tokens: int, width: int, some: Tensor) -> Tensor | None:
    """All values [n, width, y] that could be sums, at some tokens."""
    ys = [s.value for s in sums if s.value.numel() == tokens * width and s.value.shape[-1] == width]
    ys = [y.reshape(tokens, -1).double() for y in ys if y.is_floating_point() and bool(y.isfinite().all())]
    ys = [y[some] for y in ys if bool(y.norm() > 0)]
    return torch.stack(ys, -1) if ys else None


_FEW = 1 << 24  # numbers in the weights that a test of all experts may gather


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


def _inputs(x: Snap, scaled: Snap | None, rows: Tensor, E: int) -> Tensor:
    """Input rows of the experts, one per choice: [N, k, H]."""
    tokens, k = rows.shape
    values = x.value.reshape(tokens, 1, -1).float().expand(tokens, k, -1)
    factors = None if scaled is None else _factors(scaled, rows, E)
    return values if factors is None else values * factors[..., None]


def _factors(s: Snap, rows: Tensor, E: int) -> Tensor | None:
    """What a gate matrix [.., E] or a value [.., k] says of every choice."""
    found = per_choice(s.value, rows, E, gates=True)
    return per_choice(s.value, rows, E, gates=False) if found is None else found


def _scaled(record: Record, inputs: list[Snap], rows: Tensor, E: int, start: int) -> Iterator[tuple[Snap, Snap]]:
    """Inputs that are multiplied by weights before the experts see them."""
    # Of equal values the last: that is the one in the dtype that the experts' inputs have.
    for s in distinct([s for s in reversed(record.snaps) if s.time < start]):
        v = s.value
        if sound(v) and _factors(s, rows, E) is not None and not bool((v == 1).all()):
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


def sizes_of(record: Record, bank: Bank) -> list[tuple[int, int]]:
    """(tokens, features) that the block's inputs and the bank allow."""
    widths = {d for s in bank.matrices for d in s.shape[1:]}
    given = [s.value for s in record.snaps if s.obj.source == "input" and s.time < 0]
    counts = {v.numel() // max(1, v.shape[-1]) for v in given if v.dim() > 1}
    counts |= {o.tensor.numel() for o in record.inputs if not o.tensor.is_floating_point()}
    return [(n, d) for n in sorted(counts, reverse=True) for d in sorted(widths) if n > 0]


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
    ys = [s for s in rows_of(record, tokens, width) if s.time >= start]
    if not ys or width <= k:
        return []
    b = torch.stack([s.value.reshape(tokens, width)[pick].float() for s in ys], -1)
    good = residues(z.transpose(1, 2), b)[1]
    found: list[Fit] = []
    for i, y in enumerate(ys):
        if not good[i] or any(f.y.obj is y.obj and same(y.value, f.y.value) for f in found):
            continue
        full = outputs(None)
        c, fine = residues(full.transpose(1, 2), y.value.reshape(tokens, width, 1).float())
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


def residues(a: Tensor, b: Tensor) -> tuple[Tensor, list[bool]]:
    """Coefficients [n, k, y] of b [n, D, y] in terms of a [n, D, k], and for which y nothing is left over."""
    if not bool(a.isfinite().all()):
        return torch.zeros(*a.shape[::2], b.shape[-1]), [False] * b.shape[-1]
    c, left = least_squares(a, b)
    size = b.double().norm(dim=1)
    scale = size.amax(0, keepdim=True)
    fine = (left <= TOLERANCE * scale) & (scale > 1e-6)
    filled = (size > 1e-6 * scale).sum(0) >= min(2, a.shape[0])
    return c.float(), (fine.all(0) & filled).tolist()


def least_squares(a: Tensor, b: Tensor, rcond: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Coefficients [n, k, y] in float64 of b [n, D, y] in terms of a [n, D, k], and the norms of what is left [n, y].

    Repeated experts, and choices that contribute nothing, leave the rank short: this solver (CPU only) allows for it.
    """
    a, b = a.double(), b.double()
    c: Tensor = torch.linalg.lstsq(a.cpu(), b.cpu(), rcond=rcond, driver="gelsd").solution.to(a.device)
    return c, (a @ c - b).norm(dim=1)
