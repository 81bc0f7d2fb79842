"""Scales of blocks from their largest magnitude (amax). A scale is what a code is multiplied with to get its number.

    exact   amax / max of the format, in fp32
    rceil   2^ceil(log2(amax / max)): the smallest power of two with which nothing saturates
    floor   2^(floor(log2 amax) - emax): OCP MX 1.0, section 6.3; the upper part of the binade saturates
    ceil    2^(ceil(log2 amax) - emax): never saturates, wastes up to a bit of range
    even    floor of amax rounded to the element's mantissa bits

Powers of two come from the bits of amax: its exponent, plus one where its mantissa is above a bound (for rceil, the
mantissa of the format's largest number: then amax / max in fp32 has a mantissa above 1, and only then).

fp32 scales are at least 2^-126, so that they and their reciprocals stay normal; E8M0 goes down to 2^-127. An amax that
is not finite makes the scale NaN (0xFF in E8M0), hence the whole block NaN and no other block.
"""

from __future__ import annotations

import math

import torch

from .formats import E4M3, E8M0, MIN_NORMAL, Format
from .spec import QuantSpec

Tensor = torch.Tensor
FP32_MAX = torch.finfo(torch.float32).max
# What an amax or a mantissa must exceed to be an exponent further up, in units of 2^-23.
_ALL = (1 << 23) - 1
NAN_EXPONENT = 1 << 20


def mantissa_bound(fmt: Format, rule: str) -> int:
    """The fraction (23 bits) of amax above which the scale takes the next exponent; see the rules above."""
    M = fmt.mantissa_bits
    if rule == "rceil":
        return (fmt.max_code & ((1 << M) - 1)) << (23 - M)
    if rule == "even":
        return _ALL - (1 << (22 - M))  # half of the last place carries out of the mantissa: the tie is to even
    return 0 if rule == "ceil" else _ALL


def scale_exponents(amax: Tensor, spec: QuantSpec) -> Tensor:
    """int32 exponents T of the scales 2^T for `amax` (fp32, not negative, any shape), before limits of the range.

    Zero and numbers that are not finite get some exponent: the caller knows them by `amax`.
    """
    u = amax.view(torch.int32)
    field, fraction = u >> 23, u & _ALL
    # The fraction of a subnormal number, as a float, is a normal number whose bits say the rest.
    small = fraction.to(torch.float32).view(torch.int32)
    exponent = torch.where(field == 0, (small >> 23) - 127 - 149, field - 127)
    fraction = torch.where(field == 0, small & _ALL, fraction)
    fmt = spec.format
    return exponent - fmt.emax + (fraction > mantissa_bound(fmt, spec.rule))


def least_exponent(spec: QuantSpec) -> int:
    """The smallest exponent of a power-of-two scale."""
    return -127 if spec.scale == "e8m0" else -126


def scales_from_exponents(exponents: Tensor, spec: QuantSpec) -> Tensor:
    """Scales (fp32 or E8M0) of int32 exponents; too small or large ones are limited, `NAN_EXPONENT` is NaN."""
    field = exponents.clamp(least_exponent(spec), 127) + 127
    nan = exponents == NAN_EXPONENT
    if spec.scale == "e8m0":
        return torch.where(nan, 255, field).to(torch.uint8).view(torch.float8_e8m0fnu)
    return torch.where(nan, 0x7FC00000, field << 23).view(torch.float32)


def exponents_of_scales(scales: Tensor, spec: QuantSpec) -> Tensor:
    """int32 exponents of power-of-two scales; `NAN_EXPONENT` where they are not finite.

    fp32 scales below 2^-126 (subnormal ones and the zero that others write behind padding) read as 2^-127.
    """
    if spec.scale == "e8m0":
        byte = scales.view(torch.uint8).to(torch.int32)
        return torch.where(byte == 255, NAN_EXPONENT, byte - 127)
    field = (scales.view(torch.int32) >> 23) & 255
    return torch.where(field == 255, NAN_EXPONENT, field - 127)


def least_scale(spec: QuantSpec) -> float:
    """The smallest scale of the spec's blocks, as a number: unused entries hold it, and blocks of zeros by default."""
    if spec.two_level:
        return E4M3.quantum
    return math.ldexp(1.0, least_exponent(spec)) if spec.is_po2 else MIN_NORMAL


def scales_from_amax(amax: Tensor, spec: QuantSpec) -> Tensor:
    """Scales of blocks whose largest magnitudes are `amax`.

    Args:
        amax: fp32, not negative, one per block, any shape; NaN and infinity mark a block that holds one.
        spec: any spec with one level of scales.

    Returns:
        `spec.scale_dtype`, same shape.
    """
    if spec.eps:
        amax = amax.clamp(min=spec.eps)  # NaN stays NaN
    bad, zero = ~amax.isfinite(), amax == 0
    if spec.is_po2:
        exponents = torch.where(bad, NAN_EXPONENT, scale_exponents(amax, spec))
        exponents = torch.where(zero, 0 if spec.zero == "one" else least_exponent(spec), exponents)
        return scales_from_exponents(exponents, spec)
    scales = (amax / spec.format.max).clamp(MIN_NORMAL, FP32_MAX)
    if spec.zero == "one":
        scales = torch.where(zero, 1.0, scales)
    return torch.where(bad, math.nan, scales)


def two_level_scales(amax: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scales of NVFP4: E4M3(amax of the block / 6 * (448 * 6 / amax of the matrix)) and amax of the matrix / (448 * 6).

    Args:
        amax: fp32 [..., M, C], one per block.

    Returns:
        float8_e4m3fn [..., M, C], never zero, so that small blocks keep their larger elements, and NaN where amax is
        not finite; fp32 [..., 1, 1] over the finite blocks.
    """
    if spec.eps:
        amax = amax.clamp(min=spec.eps)
    bad = ~amax.isfinite()
    rows, columns = amax.shape[-2:]
    finite = torch.nn.functional.pad(torch.where(bad, 0.0, amax), (0, int(columns == 0), 0, int(rows == 0)))
    top = finite.amax((-2, -1), keepdim=True)
    whole = (top / (E4M3.max * spec.format.max)).clamp(min=MIN_NORMAL)
    block = (amax / spec.format.max / whole).clamp(E4M3.quantum, E4M3.max)
    return E4M3.encode(torch.where(bad, math.nan, block)).view(torch.float8_e4m3fn), whole


def scale_values(scales: Tensor, spec: QuantSpec) -> Tensor:
    """fp32 numbers of scales with one level."""
    return E8M0.decode_by_bits(scales.view(torch.uint8)) if spec.scale == "e8m0" else scales
