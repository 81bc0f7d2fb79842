"""Codes and scales of one spec as those of another, by shifts of exponents, without a wide tensor in memory.

A tile holds whole blocks of both specs. The new scale of a block follows from the numbers in it ("tight") or from the
scales of the blocks it came from ("largest"); then each number is widened, multiplied with a power of two, which is
exact, and rounded to nearest by the hardware's conversion. FP8 to FP8 in the other orientation moves 2 1/16 bytes for
an element, MXFP4 to FP8 or back 1 9/16.

Covered: the rules R11/R12, R15, R16 and R17 of `moefx.precision.convert` for E4M3, E5M2 and E2M1 with blocks of 1, 16,
32, 64 or 128 rows and columns, and widths that are multiples of 16 (others would move byte by byte). R10 and R14, which
leave the codes as they are, and whole rows and columns as blocks are the reference's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from moefx.precision.convert import headroom
from moefx.precision.spec import QuantSpec

from . import tiles
from .codec import as_bytes, decode, encode, magnitude_bits
from .launch import cdiv, launch
from .sass import Specimen
from .tiles import (
    NAN,
    NONE,
    Layout,
    at_elements,
    block_max,
    field_of,
    grid_of,
    limited,
    load_codes,
    load_scales,
    store_codes,
    store_scales,
    stored,
    tile_rows,
)

Tensor = torch.Tensor


@triton.jit
def tight(bits, counts, field, A: tl.constexpr, B: tl.constexpr):
    """Exponents by the rule of B from the largest number of each block, whatever its exponent: numbers are compared
    by exponent and, in the last bits, fraction."""
    key = (bits >> (23 - A.MANTISSA)) + ((field - 254) << A.MANTISSA)
    top = block_max(tl.where(counts, key, NONE), B.BR, B.BC)
    fraction = (top & ((1 << A.MANTISSA) - 1)) << (23 - A.MANTISSA)
    return tl.where(top > NONE, (top >> A.MANTISSA) - B.EMAX + (fraction > B.BOUND).to(tl.int32), NONE)


@triton.jit
def _largest(counts, field, A: tl.constexpr, B: tl.constexpr, HEADROOM: tl.constexpr):
    """The largest exponent among the blocks of A in each block of B, those of zeros and NaN aside."""
    used = at_elements(block_max(counts.to(tl.int32), A.BR, A.BC), A.BR, A.BC)
    top = block_max(tl.where((used > 0) & (field != 255), field - 127, NONE), B.BR, B.BC)
    return tl.where(top > NONE, top - HEADROOM, NONE)


@triton.jit
def shifted(code, x, special, field, new, FROM: tl.constexpr, TO: tl.constexpr):
    """Codes of numbers `x`, which `code` means, once the exponent fields of their scales are `new` and not `field`."""
    k = tl.minimum(tl.maximum(new - field, -126), 126)  # no format spans more binades
    y = x * ((127 - k) << 23).to(tl.float32, bitcast=True)
    y = encode(tl.where((field == 255) | (new == 255), float("nan"), y), TO)  # which E2M1 has as code 0
    return tl.where(special, code, y) if FROM == TO else y


@triton.jit
def _convert(
    codes, scales, offsets, new_codes, new_scales, M, N, W_a, W_b, E, R_a, R_b, tall,
    A: tl.constexpr, B: tl.constexpr, TIGHT: tl.constexpr, HEADROOM: tl.constexpr,
    GROUPED: tl.constexpr, LIVE: tl.constexpr, SEGMENTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    column, tile, batch = grid_of(tall, tl.cdiv(N, BN))
    col0 = column * BN
    row0, exists, live, first, segment, last = tile_rows(offsets, tile, M, E, GROUPED, LIVE, SEGMENTS, BM)
    code = load_codes(codes, batch, row0, live, col0, M, W_a, A, BM, BN)
    scale = load_scales(
        scales, offsets, batch, row0, live, first, segment, col0, M, N, E, R_a, GROUPED, SEGMENTS, A, BM, BN
    )
    field = at_elements(field_of(scale, A), A.BR, A.BC)
    FROM: tl.constexpr = A.ELEM  # strings go from one function to another as constexprs alone
    TO: tl.constexpr = B.ELEM
    x = decode(code, FROM)
    bits = magnitude_bits(x)
    special = bits >= 0x7F800000
    bad = special | (field == 255)
    counts = (bits > 0) & (bad == 0)
    if TIGHT:
        exponent = tight(bits, counts, field, A, B)
    else:
        exponent = _largest(counts, field, A, B, HEADROOM)
    if not B.NAN:  # then the scale says it for the block
        exponent = tl.where(block_max(bad.to(tl.int32), B.BR, B.BC) > 0, NAN, exponent)
    new = limited(exponent, B)
    store_scales(
        stored(new, B), new_scales, offsets, batch, tile, row0, exists, live, first, segment, col0, M, N, E, R_b,
        GROUPED, LIVE, SEGMENTS, B, BM, BN,
    )  # fmt: skip
    y = shifted(code, x, special, field, at_elements(new, B.BR, B.BC), FROM, TO)
    store_codes(y, new_codes, batch, row0, exists, last, col0, M, N, W_b, B, BM, BN)


def shift(
    codes: Tensor, scales: Tensor, offsets: Tensor | None, spec: str, to_spec: str, align: int, tight: bool
) -> tuple[Tensor, Tensor]:
    """Codes [..., M, N] and scales of `to_spec` with new scales by the tight rule, or from the largest old ones."""
    codes, scales = codes.contiguous(), scales.contiguous()
    a, b = QuantSpec.parse(spec), QuantSpec.parse(to_spec)
    layouts = [Layout.of(spec), Layout.of(to_spec, align)]
    *front, M, width = codes.shape
    N, E = width * a.format.per_byte, 0 if offsets is None else offsets.shape[0] - 1
    new, new_scales = tiles.empty(codes, to_spec, (*front, M, N), None if offsets is None else E, align)
    BM, BN = tiles.tile_size(layouts)
    how = tiles.grouping(offsets, layouts)
    tall = tiles.row_tiles(M, offsets, BM, how["GROUPED"])
    # An element needs more registers here than in `quantize`: its number, its key and both exponents.
    launch(
        _convert, (tall * cdiv(N, BN) * math.prod(front),), as_bytes(codes), as_bytes(scales), offsets, as_bytes(new),
        as_bytes(new_scales), M, N, width, tiles.line(new, layouts[1]), E, scales.shape[-2], new_scales.shape[-2], tall,
        A=layouts[0], B=layouts[1], TIGHT=tight, HEADROOM=headroom(a.format, b.format),
        BM=BM, BN=BN, num_warps=min(16, BM * BN // 512), **how,
    )  # fmt: skip
    return new, new_scales


def convert(
    codes: Tensor, scales: Tensor, offsets: Tensor | None, spec: str, to_spec: str, align: int = 1
) -> tuple[Tensor, Tensor]:
    """As the dialect's `convert`. 4-bit codes that become 8-bit ones take the largest scale, all others tight ones."""
    widens = QuantSpec.parse(spec).format.per_byte > QuantSpec.parse(to_spec).format.per_byte
    return shift(codes, scales, offsets, spec, to_spec, align, tight=not widens)


def specimens() -> list[Specimen]:
    """Activations of Qwen3-30B-A3B and DeepSeek-V3, and sizes that divide nothing."""
    fp8, fp8_column, fp4 = "e4m3 1x128 po2/rceil", "e4m3 128x1 po2/rceil", "e2m1 1x32 e8m0/rceil"

    def call(shape: tuple[int, ...], spec: str, to_spec: str, experts: int = 0, align: int = 1) -> Callable[[], object]:
        def run() -> object:
            x = torch.empty(shape, device="meta")
            offsets = torch.empty(experts + 1, dtype=torch.int32, device="meta") if experts else None
            return convert(*tiles.empty(x, spec, shape, experts or None), offsets, spec, to_spec, align)

        return run

    wide = ("F2FP.SATFINITE", "LDG.128|LDG.64")
    return [
        Specimen("fp8 to mxfp4 [65536, 2048]", call((65536, 2048), fp8, fp4, 128), wide[1:], registers=64),
        Specimen("mxfp4 to fp8 rows [65536, 2048]", call((65536, 2048), fp4, fp8, 128), wide, registers=64),
        Specimen("mxfp4 to fp8 columns [65536, 7168]", call((65536, 7168), fp4, fp8_column, 256), wide),
        Specimen(
            "mxfp4 to fp8 by columns [65536, 7168]", call((65536, 7168), fp4, fp8_column, 256, 32), (*wide, "STG.128")
        ),
        Specimen("mxfp8 to fp8 [65536, 2048]", call((65536, 2048), "e4m3 1x32 e8m0/rceil", fp8), wide),
        Specimen("odd [1001, 784]", call((1001, 784), fp4, fp8_column, 7), wide[:1]),
    ]
