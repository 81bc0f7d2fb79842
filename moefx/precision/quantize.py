"""Quantize a tensor to codes and block scales, dequantize it, measure the loss.

Definition, not speed: this is what kernels are compared with, though it stays within a few passes over memory. An
element's code is round(x * 1/s) for a power-of-two scale s, where the product is exact, and round(fl32(x / s))
otherwise, ties to even, limited to the largest number of the format.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from moefx.errors import InputError

from .blocks import Blocks, Rows
from .formats import E4M3
from .scaling import least_scale, scale_values, scales_from_amax, two_level_scales
from .spec import QuantSpec

Tensor = torch.Tensor


class TwoLevel(NamedTuple):
    """Scales whose value is the product of two."""

    block: Tensor  # float8_e4m3fn [..., M, C]
    matrix: Tensor  # fp32 [..., 1, 1]


Scales = Tensor | TwoLevel


def fp32_scales(scales: Scales, spec: QuantSpec) -> Tensor:
    """The numbers that codes are multiplied with, fp32 [..., R, C]."""
    if isinstance(scales, TwoLevel):
        return E4M3.decode(scales.block.view(torch.uint8)) * scales.matrix
    return scales if spec.two_level else scale_values(scales, spec)


def check_scales(scales: Scales, spec: QuantSpec, shape: torch.Size, rows: Rows | None) -> None:
    """Raise `InputError` unless `scales` are those of a tensor of `shape`."""
    block = scales.block if isinstance(scales, TwoLevel) else scales
    want = spec.scale_shape(shape, None if rows is None else rows.offsets.shape[0] - 1)
    if isinstance(scales, TwoLevel) and not spec.two_level:
        raise InputError(f"{spec} has one level of scales")
    # Graphs carry the product of two levels as one fp32 tensor.
    dtype = torch.float32 if spec.two_level and not isinstance(scales, TwoLevel) else spec.scale_dtype
    if block.dtype != dtype or tuple(block.shape) != want:
        raise InputError(
            f"scales do not belong to {spec} codes of shape {tuple(shape)}",
            why=f"got {block.dtype} {tuple(block.shape)}, want {dtype} {want}",
        )


def quantize(
    x: Tensor,
    spec: QuantSpec | str,
    *,
    offsets: Tensor | None = None,
    generator: torch.Generator | None = None,
    amax: Tensor | None = None,
) -> tuple[Tensor, Scales]:
    """Codes and scales of `x`.

    Args:
        x: [..., M, N] fp32, bf16, fp16, or float64 (rounded to fp32 first), any strides, any size, also zero.
        spec: how to quantize.
        offsets: int32 [E+1]: rows of expert e are offsets[e]:offsets[e+1]. No block crosses an expert; rows of nobody
            get code 0 and influence nothing.
        generator: of the random numbers of a spec with `sr`.
        amax: fp32, what `delayed` specs take instead of the measured largest magnitude, in the shape of the scales or
            broadcastable to it.

    Returns:
        codes in the format's storage dtype, [..., M, N] (two 4-bit codes in a byte: [..., M, ceil(N/2)]); scales of
        `spec.scale_dtype`, [..., ceil(M/br), ceil(N/bc)], with `offsets` as `QuantSpec.scale_shape` says: block row of
        row r of expert e is sum of ceil(m_e' / br) over e' < e, plus (r - offsets[e]) // br; entries without rows hold
        the smallest scale. `TwoLevel` for a spec with two levels.

    A NaN or infinity makes the scale of its block NaN, so that the block reads back as NaN and the others as they are.

    Raises:
        InputError: a dtype, shape or offsets that cannot be used; `amax` missing or unasked for.
        RecipeError: the spec does not parse.
    """
    spec = QuantSpec.parse(spec)
    if not x.dtype.is_floating_point or x.dtype.itemsize < 2 or x.dim() < 2:
        raise InputError("only floating-point tensors [..., M, N] can be quantized", why=f"{x.dtype} {tuple(x.shape)}")
    if (amax is not None) != spec.delayed:
        todo = "pass amax, the largest magnitude of earlier steps" if spec.delayed else "leave amax out"
        raise InputError(f"{spec} {'takes' if spec.delayed else 'measures'} the largest magnitude", todo=todo)
    rows = Rows.of(offsets, x.shape[-2], x.shape, x.device)
    blocks = Blocks.of(spec, x.shape, rows)
    x = x.detach().to(torch.float32).contiguous()
    if rows is not None:
        x = torch.where(rows.live[:, None], x, 0.0)
    top = (
        blocks.amax(x.abs()) if amax is None else amax.abs().to(torch.float32).expand(*x.shape[:-2], blocks.R, blocks.C)
    )
    scales = _scales(top.contiguous(), spec, blocks)
    s = fp32_scales(scales, spec)
    scaled = blocks.combine(torch.mul, x, 1.0 / s) if spec.is_po2 else blocks.combine(torch.div, x, s)
    codes = spec.format.encode(scaled, round="sr" if spec.stochastic else "rne", generator=generator)
    if rows is not None:  # a row of nobody has no block: the scale that it was multiplied with may be NaN
        codes = torch.where(rows.live[:, None], codes, 0)
    return spec.format.store(codes), scales


def _scales(amax: Tensor, spec: QuantSpec, blocks: Blocks) -> Scales:
    unused = blocks.unused()
    if not spec.two_level:
        scales = scales_from_amax(amax, spec)
        return scales if unused is None else with_least(scales, unused, least_scale(spec))
    block, matrix = two_level_scales(amax, spec)
    return TwoLevel(block if unused is None else with_least(block, unused, least_scale(spec)), matrix)


def with_least(scales: Tensor, unused: Tensor, least: float) -> Tensor:
    """`scales`, where `unused` the smallest one, which is `least`."""
    if scales.dtype == torch.float32:
        return torch.where(unused, least, scales)
    code = 0 if scales.dtype == torch.float8_e8m0fnu else 1  # 2^-127, and the smallest number of E4M3
    return torch.where(unused, code, scales.view(torch.uint8)).view(scales.dtype)


def dequantize(
    codes: Tensor,
    scales: Scales,
    spec: QuantSpec | str,
    *,
    dtype: torch.dtype = torch.float32,
    offsets: Tensor | None = None,
    width: int | None = None,
) -> Tensor:
    """Numbers of codes and scales made by `quantize` with the same `spec` and `offsets`.

    Args:
        codes, scales: as `quantize` returns them; of two levels of scales also their product, fp32 [..., R, C].
        dtype: of the result; the product code * scale is made in fp32 (exact for powers of two within its range).
        width: N, needed for 4-bit codes of an odd number of columns: packed, they do not show it.

    Returns:
        [..., M, N] of `dtype`. Rows of nobody read as zero.

    Raises:
        InputError: codes or scales that do not belong to the spec or to each other.
    """
    spec = QuantSpec.parse(spec)
    raw = spec.format.load(codes, width)
    if raw.dim() < 2:
        raise InputError("codes are [..., M, N]", why=f"got {tuple(codes.shape)}")
    rows = Rows.of(offsets, raw.shape[-2], raw.shape, raw.device)
    check_scales(scales, spec, raw.shape, rows)
    x = Blocks.of(spec, raw.shape, rows).combine(torch.mul, spec.format.decode(raw), fp32_scales(scales, spec))
    if rows is not None:
        x = torch.where(rows.live[:, None], x, 0.0)
    return x.to(dtype)


def quality(
    x: Tensor, codes: Tensor, scales: Scales, spec: QuantSpec | str, offsets: Tensor | None = None
) -> dict[str, float]:
    """What quantizing `x` [..., M, N] to `codes` and `scales` lost. For logs: it waits for the device.

    Returns:
        underflow: share of the nonzero elements whose code is zero.
        saturation: share of the elements that are larger than their block can hold.
        sqnr_db: 10 log10 of the signal's power over that of the error; infinity without error.
        scale_spread: for blocks within rows, the largest number of binades between the scales of one column of blocks
            within 128 rows (of one expert), blocks of zeros aside: what a conversion to blocks along columns must
            bridge. Otherwise 0.

    Blocks with NaN or infinity and rows of nobody do not count.
    """
    spec = QuantSpec.parse(spec)
    x = x.detach().to(torch.float32)
    raw = spec.format.load(codes, x.shape[-1])
    rows = Rows.of(offsets, x.shape[-2], x.shape, x.device)
    blocks = Blocks.of(spec, x.shape, rows)
    check_scales(scales, spec, x.shape, rows)
    y = dequantize(codes, scales, spec, offsets=offsets, width=x.shape[-1])
    s = fp32_scales(scales, spec)
    counted = y.isfinite() & x.isfinite()
    if rows is not None:
        counted = counted & rows.live[:, None]
    nonzero = counted & (x != 0)
    zero_code = spec.format.decode(raw) == 0
    above = counted & (blocks.combine(torch.div, x.abs(), s) > spec.format.max * (1 + 2.0**-22))
    x64, error = torch.where(counted, x, 0.0).double(), torch.where(counted, y - x, 0.0).double()
    signal, noise = float(x64.square().sum()), float(error.square().sum())
    return {
        "underflow": _share(nonzero & zero_code, nonzero),
        "saturation": _share(above, counted),
        "sqnr_db": 10 * math.log10(signal / noise) if signal and noise else math.inf if not noise else -math.inf,
        "scale_spread": _spread(zero_code, s, spec, blocks) if spec.axis == -1 else 0.0,
    }


def _share(some: Tensor, of: Tensor) -> float:
    return int(some.sum()) / max(int(of.sum()), 1)


@lru_cache
def double_quantization(spec: str, to_spec: str, size: int = 512) -> tuple[float, float]:
    """Relative L2 error of normal numbers [size, size] quantized under `to_spec`: at once, and by way of `spec`."""
    x = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    through = dequantize(*quantize(x, spec), spec, dtype=torch.bfloat16).float()
    once, twice = (dequantize(*quantize(t, to_spec), to_spec) for t in (x, through))
    return float((once - x).norm() / x.norm()), float((twice - x).norm() / x.norm())


def _spread(zero_code: Tensor, s: Tensor, spec: QuantSpec, blocks: Blocks) -> float:
    tile = Blocks.of(QuantSpec("e4m3", "128x1", "po2", "rceil"), zero_code.shape, blocks.rows)
    used = (blocks.amax((~zero_code).to(torch.float32)) > 0) & s.isfinite()
    exponent = s.log2()
    low = float(torch.finfo(torch.float32).min)
    high = tile.amax_of_rows(torch.where(used, exponent, low), low)
    least = -tile.amax_of_rows(torch.where(used, -exponent, low), low)
    return float(torch.where(high > low, high - least, 0.0).max()) if high.numel() else 0.0
