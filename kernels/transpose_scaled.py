"""The providers of `transpose_scaled`: Triton's for what `casts.shifts` covers, and one on the CPU for `tile_max`.

On the CPU, exponents are subtracted, four codes at a time.

Under `tile_max` all codes of a row in a tile move by the same number k of binades, so that k * 0x08080808 comes off a
word of four E4M3 codes at once. That is exact where every code stays a normal number (exponent field above k) and none
is NaN: no byte borrows from its neighbour. The other words go the scalar way, in integers, rounding to nearest even.
"""

from __future__ import annotations

from typing import Any

import torch

from moefx.precision.convert import tile_max
from moefx.precision.spec import QuantSpec

from .casts import shifts
from .layout import laid_out
from .registry import register, register_triton

Tensor = torch.Tensor
_LANES = 0x08080808  # one exponent step in each of four bytes
_NAN = 0x7F


def shift_codes(codes: Tensor, k: Tensor) -> Tensor:
    """E4M3 codes (uint8) of numbers in scales that are 2^k times as large, k >= 0, any shape; ties to even."""
    c = codes.to(torch.int32)
    sign, e, m = c & 0x80, (c >> 3) & 15, c & 7
    significand = torch.where(e > 0, 8 + m, m)
    place = e.clamp(min=1) - k  # exponent field that the number would have, were there negative ones
    drop = (1 - place).clamp(0, 30)
    kept = significand >> drop
    rest, half = significand - (kept << drop), (1 << drop) >> 1
    up = (rest > half) | ((rest == half) & (drop > 0) & (kept & 1 == 1))
    small = kept + up  # 8 is the smallest normal number: its code is 8, too
    normal = (place >= 1) & (e > 0)
    magnitude = torch.where(normal, (place << 3) | m, small)
    keep = (k == 0) | ((c & _NAN) == _NAN)
    return torch.where(keep, c, sign | magnitude).to(torch.uint8)


def shift_words(words: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Words of four codes (int32) moved by k in 0..15, and whether that is exact for each."""
    lanes = words[..., None].view(torch.uint8)
    normal = (lanes & 0x78) >= ((k[..., None] + 1) << 3)
    ok = (normal & ((lanes & _NAN) != _NAN)).all(-1)
    return words - k * _LANES, ok | (k == 0)


def _supports(
    codes: Tensor, scales: Tensor, offsets: Any, spec: str, to_spec: str, rule: str = "tight", align: int = 1
) -> bool:
    a, b = QuantSpec.parse(spec), QuantSpec.parse(to_spec)
    whole = a.bc is not None and a.br == 1 and a.bc % 4 == 0 and codes.dim() == 2 and codes.shape[1] % a.bc == 0
    same = a.elem == b.elem == "e4m3" and a.scale == b.scale == "po2" and a.transposed().block == b.block
    return rule == "tile_max" and codes.device.type == "cpu" and codes.numel() > 0 and whole and same


@register("transpose_scaled", "torch_words", _supports)
def transpose_scaled_cpu(
    codes: Tensor, scales: Tensor, offsets: Tensor | None, spec: str, to_spec: str, rule: str = "tight", align: int = 1
) -> tuple[Tensor, Tensor]:
    """Codes [S, N] of 1xB blocks as codes of Bx1 blocks, and the largest scale of each tile."""
    raw, new_scales, k_SC = tile_max(codes.view(torch.uint8), scales, spec, to_spec, offsets)
    words = raw.contiguous().view(torch.int32)
    per_block = words.shape[1] // k_SC.shape[1]
    k = k_SC.repeat_interleave(per_block, 1)
    out, exact = shift_words(words, k.clamp(max=15))
    exact &= k <= 15
    slow = (~exact).nonzero(as_tuple=True)
    out[slow] = shift_codes(words[slow][:, None].view(torch.uint8), k[slow][:, None]).view(torch.int32)[:, 0]
    return laid_out(out.view(torch.uint8).view(codes.dtype), to_spec, align), new_scales


register_triton(
    "transpose_scaled",
    "transpose_scaled:transpose_scaled",
    lambda codes, scales, offsets, spec, to_spec, rule="tight", align=1: shifts(codes, offsets, spec, to_spec),
)
