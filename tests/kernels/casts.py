"""What tests of casts share: matrices with everything in them, offsets, and comparison with the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from moefx.precision.quantize import quantize

from .interpreter import assert_same_bits

ROW, COLUMN, SQUARE = (f"e4m3 {block} po2/rceil" for block in ("1x128", "128x1", "128x128"))
MX, MX_COLUMN, MXFP4 = "e4m3 1x32 e8m0/rceil", "e4m3 32x1 e8m0/rceil", "e2m1 1x32 e8m0/rceil"
# Rows in front of the first expert and behind the last, an empty one, one of one row, several tiles, a whole one.
OFFSETS = [3, 3, 4, 137, 265, 290]
ROWS = 300


def values(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 20.0, seed: int = 0) -> torch.Tensor:
    """Numbers over many binades, rows of zeros, -0, and a few that are not finite."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=gen) * torch.exp2(
        torch.rand((*shape[:-1], 1), generator=gen) * spread - spread / 2
    )
    x[..., 5::37, :] = 0.0
    x[..., :, 3::19] *= -0.0
    if x.numel() > 4096:
        x.view(-1)[torch.tensor([700, 1900, 3300])] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    return x.to(dtype)


def offsets(*ends: int) -> torch.Tensor:
    return torch.tensor(ends or OFFSETS, dtype=torch.int32)


@contextmanager
def poisoned(monkeypatch: pytest.MonkeyPatch, byte: int) -> Iterator[None]:
    """Within, memory that `new_empty` gives holds this byte everywhere."""
    new_empty = torch.Tensor.new_empty

    def filled(self: torch.Tensor, *args: Any, **kw: Any) -> torch.Tensor:
        out = new_empty(self, *args, **kw)
        if out.numel():
            out.view(torch.uint8).fill_(byte)
        return out

    with monkeypatch.context() as m:
        m.setattr(torch.Tensor, "new_empty", filled)
        yield


def same(got: Any, want: Any, what: str = "") -> None:
    """Equal tensors, all NaN alike in those that are not bytes of 4-bit codes."""
    for g, w in zip(got, want, strict=True):
        byte = torch.float8_e8m0fnu
        assert g.dtype == w.dtype, what
        assert_same_bits(*(t.view(torch.uint8) if t.dtype == byte else t for t in (g, w)), what)


def check(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any], want: Any, what: str = "") -> None:
    """`run` gives `want`, and writes every element of it: its outputs hold something else before."""
    with poisoned(monkeypatch, 0xA5):
        got = run()
    same(got, want, what)


def coded(spec: str, shape: tuple[int, ...], groups: torch.Tensor | None = None, **kw: Any) -> Any:
    """Codes and scales of `values`."""
    return quantize(values(*shape, **kw), spec, offsets=groups)
