"""Choices of experts among recorded values: indices, gate matrices, and less usual forms.

The less usual ones are masks with dropped choices, indices past the last expert, and repeated experts. All of them are
indices [N, k] of experts of a bank, where those from E on stand for no expert of the bank. `rest` says what such a
choice contributes: nothing (`null`), or the token itself (`identity`, a zero-computation expert).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from .record import Record, Snap

Tensor = torch.Tensor
Choice = tuple[str, tuple[Snap, ...], Tensor]  # (rest, the values it comes from, indices [N, k])
_MOST = 64  # choices per token


def masks(record: Record, tokens: int, E: int) -> Iterator[Choice]:
    """Masks [.., E] of zeros and ones with at most one choice a token, late ones first.

    A mask is preferred over the index that it was made of, for what the block did to it in between (a capacity,
    padding) may not show on small inputs. A mask with nothing done to it is left to the index.
    """
    for s in reversed(record.snaps):
        v = s.value
        if v.is_floating_point() or v.is_complex() or v.shape[-1:] != (E,) or v.numel() != tokens * E or not v.numel():
            continue
        rows = v.reshape(tokens, E).long()
        plain = s.obj.source != "step" or record.steps[s.obj.step].name in ("one_hot", "scatter", "eq", "__eq__")
        if plain or int(rows.min()) < 0 or int(rows.sum(-1).max()) != 1:
            continue
        yield "null", (s,), mask_indices(rows, 1)


def mask_indices(rows: Tensor, k: int) -> Tensor:
    """Indices [N, k] of the ones in a mask [N, E], and E where there are fewer."""
    kept, idx = rows.topk(k)
    return torch.where(kept > 0, idx, rows.shape[-1])


def unusual(record: Record, tokens: int, E: int) -> Iterator[Choice]:
    """Indices with some past the last expert, and indices that name an expert several times for a token."""
    found: list[Any] = []
    for s in reversed(record.snaps):
        v = s.value
        if v.is_floating_point() or v.is_complex() or v.dtype == torch.bool or v.dim() < 2 or not v.numel():
            continue
        k = v.shape[-1]
        if v.numel() != tokens * k or not 1 < k <= _MOST or int(v.min()) < 0 or int(v.max()) >= 4 * E:
            continue
        rows = v.reshape(tokens, k).long()
        if any(torch.equal(rows, r) for _, r in found):
            continue
        found.append((s, rows))
    apart = [(s, r) for s, r in found if bool((r.sort(-1).values.diff(dim=-1) > 0).all())]
    for s, rows in apart:
        if int(rows.max()) >= E:
            yield "identity", (s,), rows
            yield "null", (s,), rows
    for s, rows in found:
        if not any(s is a for a, _ in apart) and int(rows.max()) < E:
            yield "", (s,), rows


def per_choice(v: Tensor, rows: Tensor, E: int, *, gates: bool) -> Tensor | None:
    """A value [.., k], or with `gates` a matrix [.., E], as one number per choice [N, k]; None where it is neither."""
    tokens, k = rows.shape
    if gates and v.shape[-1:] == (E,) and v.numel() == tokens * E:
        return v.reshape(tokens, E).gather(1, rows.clamp_max(E - 1)).float()
    if not gates and v.numel() == tokens * k and (v.shape[-1:] == (k,) or k == 1):
        return v.reshape(tokens, k).float()
    return None


def by_expert(values: Tensor, chosen: Tensor, width: int) -> Tensor:
    """Coefficients [N, k] summed for each expert of `width`, so that repeated ones can be compared: [N, width]."""
    return values.new_zeros(values.shape[0], width).scatter_add_(1, chosen, values)


def choices(record: Record, tokens: int, E: int) -> Iterator[tuple[tuple[Snap, ...], Tensor]]:
    """Candidates for the experts of every token: the values they come from, and indices [N, k]."""
    whole, single, gates = [], [], []
    for s in distinct(record.snaps):
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


def distinct(snaps: list[Snap]) -> list[Snap]:
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


def given_first(snaps: list[Snap]) -> list[Snap]:
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
    fits = (s for s in record.snaps if s.value.shape[-1:] == (width,) and s.value.numel() == tokens * width)
    return [s for s in fits if sound(s.value)]


def sound(v: Tensor) -> bool:
    """Whether a value is of finite floating numbers."""
    return v.is_floating_point() and bool(v.isfinite().all())


def usual(record: Record, tokens: int, E: int) -> Iterator[tuple[str, tuple[Snap, ...], Tensor]]:
    yield from masks(record, tokens, E)
    yield from (("", *found) for found in choices(record, tokens, E))


def alive_tokens(record: Record, tokens: int, widths: set[int], start: int) -> Tensor:
    """For every token how many later values have something in its row: a dropped token has less."""
    rows = [s.value.reshape(tokens, -1) for d in widths for s in rows_of(record, tokens, d) if s.time >= start]
    return torch.stack([(r != 0).any(-1) for r in rows]).sum(0) if rows else torch.zeros(tokens, dtype=torch.long)


def probe_tokens(rows: Tensor, alive: Tensor) -> Tensor:
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
