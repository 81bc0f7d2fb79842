"""Choices of experts in less usual forms: masks with dropped choices, indices past the last expert, repeated experts.

All of them are indices [N, k] of experts of a bank, where those from E on stand for no expert of the bank. `rest` says
what such a choice contributes: nothing (`null`), or the token itself (`identity`, a zero-computation expert).
"""

from __future__ import annotations

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


def by_expert(values: Tensor, chosen: Tensor, width: int) -> Tensor:
    """Coefficients [N, k] summed for each expert of `width`, so that repeated ones can be compared: [N, width]."""
    return values.new_zeros(values.shape[0], width).scatter_add_(1, chosen, values)
