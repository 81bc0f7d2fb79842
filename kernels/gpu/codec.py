"""What quantizing kernels share: scales from largest magnitudes and codes from numbers, bit for bit those of
`moefx.precision` (`scaling.scales_from_amax`, `Format.encode`), with rounding left to the hardware's conversion.

A spec becomes a few constants (`constants`), so that one kernel serves every element format and rule. E4M3, E5M2 and
E2M1 elements; scales that are powers of two (fp32 or E8M0), or fp32 by division.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from moefx.precision.formats import MIN_NORMAL
from moefx.precision.scaling import least_exponent, mantissa_bound
from moefx.precision.spec import QuantSpec


@lru_cache
def constants(spec: str) -> dict[str, Any]:
    """The constexprs by which a kernel knows a spec with one level of scales."""
    s = QuantSpec.parse(spec)
    return {
        "ELEM": s.elem,  # "e4m3", "e5m2", "e2m1"
        "EMAX": s.format.emax,
        "BOUND": mantissa_bound(s.format, s.rule) if s.is_po2 else 0,
        "LEAST": least_exponent(s),
        "MAX": s.format.max,
        "EPS": s.eps,
        "ZERO_ONE": s.zero == "one",
        "PO2": s.is_po2,
        "BYTES": s.scale == "e8m0",  # scales are stored as the exponent's byte
    }


def as_bytes(t: torch.Tensor) -> torch.Tensor:
    """8-bit tensors of any dtype as uint8, for kernels that move codes."""
    return t.view(torch.uint8) if t.element_size() == 1 else t


@triton.jit
def po2_field(
    amax, EMAX: tl.constexpr, BOUND: tl.constexpr, LEAST: tl.constexpr, EPS: tl.constexpr, ZERO_ONE: tl.constexpr
):
    """The exponent field, T + 127, of the power-of-two scale 2^T of blocks with the largest magnitudes `amax` (fp32).

    255 where amax is not finite. A maximum over a block ignores NaN on a GPU: take it over the bits of the magnitudes
    (`magnitude_bits`), under which NaN is above everything.
    """
    if EPS > 0:
        amax = tl.where(amax < EPS, EPS, amax)
    # Numbers below the normal ones have scales below the smallest, as EMAX is at least 2: no need to know by how much.
    u = amax.to(tl.int32, bitcast=True)
    field = tl.maximum(((u + (0x7FFFFF - BOUND)) >> 23) - EMAX, LEAST + 127)  # a fraction above BOUND carries
    if ZERO_ONE:
        field = tl.where(u == 0, 127, field)
    return tl.where(u >= 0x7F800000, 255, field)


@triton.jit
def magnitude_bits(x):
    """int32 whose order is that of |x| (fp32), with infinity and NaN on top."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def inverse(field):
    """2^-T (fp32) of an exponent field T + 127 that `po2_field` gives, which is below 254; NaN of 255."""
    return tl.where(field == 255, 0x7FC00000, (254 - field) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_value(field):
    """2^T (fp32) of an exponent field T + 127; NaN of 255."""
    bits = tl.where(field == 255, 0x7FC00000, tl.where(field == 0, 0x400000, field << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def normal_scale(field):
    """`scale_value` of a field above 0, as those of scales that are stored in fp32 are."""
    return tl.where(field == 255, 0x7FC00000, field << 23).to(tl.float32, bitcast=True)


@triton.jit
def f32_scale(amax, MAX: tl.constexpr, EPS: tl.constexpr, ZERO_ONE: tl.constexpr):
    """The fp32 scale amax / MAX, limited to normal numbers; NaN where amax is not finite."""
    if EPS > 0:
        amax = tl.where(amax < EPS, EPS, amax)
    scale = tl.math.div_rn(amax, tl.full(amax.shape, MAX, tl.float32))
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
    if ZERO_ONE:
        scale = tl.where(amax == 0, 1.0, scale)
    return tl.where(amax.to(tl.int32, bitcast=True) >= 0x7F800000, float("nan"), scale)


@triton.jit
def encode8(x, ELEM: tl.constexpr):
    """uint8 codes of fp32 numbers in E4M3 or E5M2: nearest, ties to even, limited to the largest number; NaN is NaN."""
    if ELEM == "e4m3":
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    x = tl.where(x > 57344.0, 57344.0, tl.where(x < -57344.0, -57344.0, x))
    return x.to(tl.float8e5).to(tl.uint8, bitcast=True)


@triton.jit
def decode8(code, ELEM: tl.constexpr):
    """fp32 numbers of uint8 codes in E4M3 or E5M2."""
    if ELEM == "e4m3":
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return code.to(tl.float8e5, bitcast=True).to(tl.float32)


@triton.jit
def encode4(x):
    """uint8 codes 0..15 of fp32 numbers in E2M1: nearest, ties to even, limited to 6; NaN, which it lacks, is 0."""
    sign = (x.to(tl.int32, bitcast=True) >> 28) & 8
    size = tl.minimum(tl.abs(x), 6.0)
    u = size.to(tl.int32, bitcast=True)
    normal = ((u + 0x1FFFFF + ((u >> 22) & 1)) >> 22) - 252  # exponent and one bit of the fraction, from 1 = code 2 on
    # Below 1 the steps are halves: they are the last place of a sum with 2^22.
    small = (size + 4194304.0).to(tl.int32, bitcast=True) & 3
    code = tl.where(size < 1.0, small, normal) | sign
    return tl.where(x == x, code, 0).to(tl.uint8)


@triton.jit
def decode4(code):
    """fp32 numbers of uint8 codes 0..15 in E2M1."""
    c = code.to(tl.int32)
    size = c & 7
    u = tl.where(size > 1, (size << 22) + 0x3F000000, size * 0x3F000000)  # code 1 is 0.5
    return (u | ((c & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def pack4(code):
    """uint8 [R, C/2] of 4-bit codes [R, C]: the even column in the low nibble."""
    low, high = tl.split(tl.reshape(code, (code.shape[0], code.shape[1] // 2, 2)))
    return low | (high << 4)


@triton.jit
def unpack4(byte):
    """4-bit codes [R, 2C] of bytes [R, C]."""
    return tl.reshape(tl.join(byte & 15, byte >> 4), (byte.shape[0], byte.shape[1] * 2))


@triton.jit
def encode(x, ELEM: tl.constexpr):
    """uint8 codes of fp32 numbers in any of the three formats, one in a byte."""
    if ELEM == "e2m1":
        return encode4(x)
    else:
        return encode8(x, ELEM)


@triton.jit
def decode(code, ELEM: tl.constexpr):
    """fp32 numbers of uint8 codes in any of the three formats, one in a byte."""
    if ELEM == "e2m1":
        return decode4(code)
    else:
        return decode8(code, ELEM)


assert MIN_NORMAL == 1.1754943508222875e-38  # the literal in `f32_scale`
