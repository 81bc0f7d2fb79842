"""Tiles of a matrix [M, N] whose rows may belong to experts, and the blocks of a spec in them.

Blocks of several rows start anew at each expert's first row, so a tile must, too. Nobody on the host knows where that
is: the grid has M // BM + E + 2 rows of tiles, enough for any offsets. Segment 0 are the rows in front of the first
expert, 1..E the experts, E+1 the rows behind. Segment s, whose rows begin at b, owns the tiles from b // BM + s on:
that is at least one tile for each BM rows or part of them, and no sum over the segments before is needed to know it. A
program compares its number with all of these, counts, and ends where it has no rows. The offsets are read by 32 lanes,
the same in each warp, so that sums over them need no barrier (the sums of a tensor as wide as the program took 23).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from moefx.kernels.layout import by_columns, empty_codes
from moefx.precision.scaling import scale_exponents
from moefx.precision.spec import QuantSpec

from . import codec
from .codec import f32_scale, inverse, normal_scale, pack4, po2_field, scale_value, unpack4
from .launch import cdiv

Tensor = torch.Tensor
_NONE = -(1 << 22)  # below every exponent of a scale and every key of a number
NONE = tl.constexpr(_NONE)
NAN = tl.constexpr(1 << 20)  # the exponent of a scale that is NaN


@dataclass(frozen=True)
class Layout:
    """A spec as constants of a kernel: those of `codec.constants`, and the block's rows and columns."""

    BR: int
    BC: int
    ELEM: str
    EMAX: int
    BOUND: int
    LEAST: int
    MAX: float
    EPS: float
    ZERO_ONE: bool
    PO2: bool
    BYTES: bool
    MANTISSA: int
    NAN: bool
    FLOOR: int  # what `eps` keeps exponents of scales above, or NONE
    COLUMNS: bool  # codes lie by columns (`kernels.layout`)

    @staticmethod
    @lru_cache
    def of(text: str, align: int = 1) -> Layout:
        """The layout of a spec whose blocks have 1, 16, 32, 64 or 128 rows and columns, as written under `align`."""
        spec = QuantSpec.parse(text)
        assert spec.br is not None
        assert spec.bc is not None
        fmt = spec.format
        floor = int(scale_exponents(torch.tensor(spec.eps), spec)) if spec.eps else _NONE
        known = codec.constants(text)
        return Layout(
            spec.br,
            spec.bc,
            MANTISSA=fmt.mantissa_bits,
            NAN=fmt.has_nan,
            FLOOR=floor,
            COLUMNS=by_columns(spec, align),
            **known,
        )


def grouping(offsets: Tensor | None, layouts: Sequence[Layout]) -> dict[str, Any]:
    """Constexprs of a kernel: whether rows belong to experts, whether tiles start at them, and how offsets are read."""
    return {
        "LIVE": offsets is not None,
        "GROUPED": offsets is not None and any(s.BR > 1 for s in layouts),
        "SEGMENTS": segments(offsets),
    }


def segments(offsets: Tensor | None) -> int:
    """The constexpr SEGMENTS: bounds of experts, 0 without."""
    return 0 if offsets is None else offsets.shape[0]


def tile_size(layouts: Sequence[Layout]) -> tuple[int, int]:
    """Rows and columns of a tile; each thread gets 32 of its elements, four 16-byte loads of bf16, or 64.

    128 columns of bf16 are two full cache lines of a row. 32 rows suffice where no block is higher: more programs, and
    less left over at the end of an expert. Higher blocks of at most 64 columns take tiles of 64, for the same reason.
    """
    BM = max(32, *(s.BR for s in layouts))
    BN = 64 if BM > 32 and all(s.BC <= 64 for s in layouts) else 128
    return BM, BN


def empty(like: Tensor, text: str, shape: Sequence[int], groups: int | None, align: int = 1) -> tuple[Tensor, Tensor]:
    """Memory for codes and scales of a tensor of `shape`."""
    spec = QuantSpec.parse(text)
    return empty_codes(like, spec, shape, align), like.new_empty(
        spec.scale_shape(shape, groups), dtype=spec.scale_dtype
    )


def line(codes: Tensor, layout: Layout) -> int:
    """Bytes from a row of codes to the next, or, where they lie by columns, from a column to the next."""
    step: int = codes.stride(-1 if layout.COLUMNS else -2)
    return step


def row_tiles(M: int, offsets: Tensor | None, BM: int, grouped: bool) -> int:
    """Rows of tiles of BM rows that a grid needs."""
    return M // BM + offsets.shape[0] + 1 if grouped and offsets is not None else cdiv(M, BM)


@triton.jit
def find_segment(offsets, tile, E, SEGMENTS: tl.constexpr, BM: tl.constexpr):
    """The segment that owns a tile, among SEGMENTS + 1, E of them experts; see above. Two steps of a search in 32 or
    more parts: segments begin at ever higher tiles."""
    lane = tl.arange(0, 32 if SEGMENTS <= 1024 else 128)
    STEP: tl.constexpr = 1 if SEGMENTS <= 32 else 32 if SEGMENTS <= 1024 else 128
    found = 0
    if STEP > 1:
        i = lane * STEP + (STEP - 1)
        begin = tl.load(offsets + i, mask=i <= E, other=0x7FFFFFFF).to(tl.int32)
        found = STEP * tl.sum((begin < (tile - i) * BM).to(tl.int32), 0)
    i = found + lane
    begin = tl.load(offsets + i, mask=i <= E, other=0x7FFFFFFF).to(tl.int32)
    return found + tl.sum((begin < (tile - i) * BM).to(tl.int32), 0)  # begin // BM + i + 1 <= tile


@triton.jit
def count_blocks(offsets, segment, E, SEGMENTS: tl.constexpr, BR: tl.constexpr):
    """Blocks of BR rows of the experts before a segment."""
    LANES: tl.constexpr = 32 if SEGMENTS <= 160 else triton.next_power_of_2(SEGMENTS)
    blocks = tl.zeros((LANES,), tl.int32)
    for at in tl.static_range(0, SEGMENTS - 1, LANES):
        i = at + tl.arange(0, LANES)
        before = (i < E) & (i + 1 < segment)
        begin = tl.load(offsets + i, mask=before, other=0).to(tl.int32)
        end = tl.load(offsets + i + 1, mask=before, other=0).to(tl.int32)
        blocks += ((end - begin + (BR - 1)).to(tl.uint32) // BR).to(tl.int32)
    return tl.sum(blocks, 0)


@triton.jit
def tile_rows(offsets, tile, M, E, GROUPED: tl.constexpr, LIVE: tl.constexpr, SEGMENTS: tl.constexpr, BM: tl.constexpr):
    """Where a tile is: its first row, masks [BM] of the rows that exist and of those that belong to an expert, the
    first row of its segment, the segment, and the row behind its last. A tile without rows begins there or behind."""
    if GROUPED:
        segment = find_segment(offsets, tile, E, SEGMENTS, BM)
        first = tl.load(offsets + segment - 1, mask=segment > 0, other=0).to(tl.int32)
        last = tl.load(offsets + segment, mask=segment <= E, other=M).to(tl.int32)
        row0 = first + (tile - segment - first // BM) * BM
        exists = row0 + tl.arange(0, BM) < last
        live = exists & (segment >= 1) & (segment <= E)
    else:
        segment, first, row0, last = 0, 0, tile * BM, M
        row = row0 + tl.arange(0, BM)
        exists = row < M
        live = exists
        if LIVE:
            live = live & (row >= tl.load(offsets)) & (row < tl.load(offsets + E))
    return row0, exists, live, first, segment, last


@triton.jit
def block_rows(
    offsets, row0, live, first, segment, M, E,
    GROUPED: tl.constexpr, SEGMENTS: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The first row of blocks in a tile, among all, and a mask [BM / BR] of those that exist."""
    if BR == 1:
        return row0, live
    else:
        top = row0 + tl.arange(0, BM // BR) * BR  # first row of each block
        if GROUPED:
            before = count_blocks(offsets, segment, E, SEGMENTS, BR)
            last = tl.load(offsets + segment, mask=(segment >= 1) & (segment <= E), other=0).to(tl.int32)
            return before + (row0 - first) // BR, top < last
        else:
            return row0 // BR, top < M


@triton.jit
def may_have_unused_block_rows(offsets, tile, E, BM: tl.constexpr, BR: tl.constexpr):
    """Whether this tile's program may find rows of blocks that no expert needs: not among the first, as many as the
    experts' rows make at the least."""
    rows = tl.load(offsets + E).to(tl.int32) - tl.load(offsets).to(tl.int32)
    return (tile + 1) * BM > rows // BR * BR


@triton.jit
def unused_block_rows(offsets, tile, M, E, SEGMENTS: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr):
    """Where this tile's program looks for rows of blocks that no expert needs, and a mask [BM / BR] of them."""
    used = count_blocks(offsets, E + 1, E, SEGMENTS, BR)
    first = tile * (BM // BR)
    block = first + tl.arange(0, BM // BR)
    return first, (block >= used) & (block < M // BR + E)


@triton.jit
def place(p, batch, row, rows, width):
    """Pointer to the start of a row of the matrix `batch` [rows, width]. From there on, 32 bits count."""
    return p + (batch.to(tl.int64) * rows + row) * width


@triton.jit
def grid_of(tall, width):
    """Of this program: column of tiles, row of tiles (among `tall`), matrix. Neighbours are next to each other."""
    p = tl.program_id(0).to(tl.uint32)  # divided without a look at signs
    width, tall = width.to(tl.uint32), tall.to(tl.uint32)
    return (p % width).to(tl.int32), (p // width % tall).to(tl.int32), (p // width // tall).to(tl.int32)


@triton.jit
def within(R: tl.constexpr, C: tl.constexpr, width):
    """Offsets [R, C] from a tile's first element in a matrix of `width` columns."""
    return tl.arange(0, R)[:, None] * width + tl.arange(0, C)[None, :]


@triton.jit
def interleaved(x0, x1, x2, x3):
    """Rows 4 i, 4 i + 1, 4 i + 2 and 4 i + 3 of one matrix from four, [R, C] each: [4 R, C], without moving any."""
    both = tl.join(tl.join(x0, x2), tl.join(x1, x3))  # [R, C, 2, 2]: row 2 j + k at [.., j, k]
    return tl.reshape(tl.permute(both, (0, 2, 3, 1)), (4 * x0.shape[0], x0.shape[1]))


@triton.jit
def block_max(x, BR: tl.constexpr, BC: tl.constexpr):
    """The largest element of each block of a tile: [BM / BR, BN / BC]."""
    if BC > 1:
        x = tl.max(tl.reshape(x, (x.shape[0], x.shape[1] // BC, BC)), 2)
    if BR > 1:
        x = tl.max(tl.reshape(x, (x.shape[0] // BR, BR, x.shape[1])), 1)
    return x


@triton.jit
def at_elements(s, BR: tl.constexpr, BC: tl.constexpr):
    """What blocks have [R, C], at their elements [R * BR, C * BC]."""
    if BR > 1:
        s = tl.reshape(tl.broadcast_to(s[:, None, :], (s.shape[0], BR, s.shape[1])), (s.shape[0] * BR, s.shape[1]))
    if BC > 1:
        s = tl.reshape(tl.broadcast_to(s[:, :, None], (s.shape[0], s.shape[1], BC)), (s.shape[0], s.shape[1] * BC))
    return s


@triton.jit
def scales_of(top, SPEC: tl.constexpr):
    """Of blocks with the largest magnitudes `top` (fp32): the scales as stored, and what elements are divided by, or,
    of powers of two, multiplied with."""
    if SPEC.PO2:
        field = po2_field(top, SPEC.EMAX, SPEC.BOUND, SPEC.LEAST, SPEC.EPS, SPEC.ZERO_ONE)
        return stored(field, SPEC), inverse(field)
    else:
        scale = f32_scale(top, SPEC.MAX, SPEC.EPS, SPEC.ZERO_ONE)
        return scale, scale


@triton.jit
def stored(field, SPEC: tl.constexpr):
    """Power-of-two scales as stored, from their exponent fields."""
    if SPEC.BYTES:
        return field.to(tl.uint8)
    else:
        return normal_scale(field)


@triton.jit
def limited(exponent, SPEC: tl.constexpr):
    """Exponent fields of power-of-two scales from exponents: NONE for blocks of zeros, NAN, and within the range."""
    if SPEC.ZERO_ONE:
        exponent = tl.where(exponent == NONE, 0, exponent)
    bounded = tl.minimum(tl.maximum(tl.maximum(exponent, SPEC.FLOOR), SPEC.LEAST), 127)
    return tl.where(exponent == NAN, 255, bounded + 127)


@triton.jit
def field_of(scale, SPEC: tl.constexpr):
    """Exponent fields of stored power-of-two scales; 255 of what is not finite."""
    if SPEC.BYTES:
        return scale.to(tl.int32)
    else:
        return (scale.to(tl.int32, bitcast=True) >> 23) & 255


@triton.jit
def value_of(scale, SPEC: tl.constexpr):
    """fp32 numbers of stored scales."""
    if SPEC.BYTES:
        return scale_value(scale.to(tl.int32))
    else:
        return scale


@triton.jit
def store_columns(code, codes, row0, last, col0, end_column, W, BM: tl.constexpr, BN: tl.constexpr):
    """Write a tile of codes by columns, W bytes from one to the next, into the matrix at `codes`.

    Its first row and the one behind the last are multiples of 16, as the compiler is told by dividing, so that 16 bytes
    are written at once. Behind the last row of all, there is memory for as many.
    """
    row, column = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    inside = (row < (last - row0 + 15) // 16 * 16) & (col0 + column < end_column)
    tl.store(codes + col0.to(tl.int64) * W + row0 // 16 * 16 + row + column * W, code, inside)


@triton.jit
def store_codes(
    code, codes, batch, row0, exists, last, col0, M, N, W, SPEC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Write a tile of codes, one in a byte, as `SPEC` keeps them: rows (or columns) of W bytes.

    W comes from the host, where it is seen to be a multiple of 16: otherwise bytes would move one by one.
    """
    if SPEC.COLUMNS:
        store_columns(code, place(codes, batch, 0, N, W), row0, last, col0, N, W, BM, BN)
    elif SPEC.ELEM == "e2m1":
        inside = exists[:, None] & (col0 // 2 + tl.arange(0, BN // 2) < W)[None, :]
        p = place(codes, batch, row0, M, W) + col0 // 2
        tl.store(p + within(BM, BN // 2, W), pack4(code), inside)
    else:
        inside = exists[:, None] & (col0 + tl.arange(0, BN) < W)[None, :]
        tl.store(place(codes, batch, row0, M, W) + col0 + within(BM, BN, W), code, inside)


@triton.jit
def load_codes(codes, batch, row0, live, col0, M, W, SPEC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """A tile of codes, one in a byte, from rows of W bytes; 0 where there is none."""
    if SPEC.ELEM == "e2m1":
        inside = live[:, None] & (col0 // 2 + tl.arange(0, BN // 2) < W)[None, :]
        p = place(codes, batch, row0, M, W) + col0 // 2
        return unpack4(tl.load(p + within(BM, BN // 2, W), inside, other=0))
    else:
        inside = live[:, None] & (col0 + tl.arange(0, BN) < W)[None, :]
        return tl.load(place(codes, batch, row0, M, W) + col0 + within(BM, BN, W), inside, other=0)


@triton.jit
def load_scales(
    scales, offsets, batch, row0, live, first, segment, col0, M, N, E, R,
    GROUPED: tl.constexpr, SEGMENTS: tl.constexpr, SPEC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Scales of a tile's blocks, as stored; 0 where there is none."""
    C = tl.cdiv(N, SPEC.BC)
    c0 = col0 // SPEC.BC
    inside = (c0 + tl.arange(0, BN // SPEC.BC) < C)[None, :]
    block0, real = block_rows(offsets, row0, live, first, segment, M, E, GROUPED, SEGMENTS, BM, SPEC.BR)
    p = place(scales, batch, block0, R, C) + c0
    return tl.load(p + within(BM // SPEC.BR, BN // SPEC.BC, C), real[:, None] & inside, other=0)


@triton.jit
def store_scales(
    scale, scales, offsets, batch, tile, row0, exists, live, first, segment, col0, M, N, E, R,
    GROUPED: tl.constexpr, LIVE: tl.constexpr, SEGMENTS: tl.constexpr,
    SPEC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write the scales of a tile's blocks, and the smallest one for rows of nobody and where no block is."""
    C = tl.cdiv(N, SPEC.BC)
    c0 = col0 // SPEC.BC
    inside = (c0 + tl.arange(0, BN // SPEC.BC) < C)[None, :]
    at = within(BM // SPEC.BR, BN // SPEC.BC, C)
    least = stored(tl.full((1, 1), SPEC.LEAST + 127, tl.int32), SPEC)
    block0, real = block_rows(offsets, row0, live, first, segment, M, E, GROUPED, SEGMENTS, BM, SPEC.BR)
    if SPEC.BR == 1 and LIVE:
        scale = tl.where(live[:, None], scale, least)
        real = exists
    tl.store(place(scales, batch, block0, R, C) + c0 + at, scale, real[:, None] & inside)
    store_unused_scales(
        scales, offsets, batch, tile, col0, M, N, E, R, GROUPED, SEGMENTS, SPEC, BM, BN
    )  # fmt: skip


@triton.jit
def store_unused_scales(
    scales, offsets, batch, tile, col0, M, N, E, R,
    GROUPED: tl.constexpr, SEGMENTS: tl.constexpr, SPEC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write the smallest scale where no block is: a share of that for each tile, with rows or without."""
    if SPEC.BR > 1 and GROUPED:  # noqa: SIM102  the one is known to the compiler, the other on the device
        if may_have_unused_block_rows(offsets, tile, E, BM, SPEC.BR):
            C = tl.cdiv(N, SPEC.BC)
            c0 = col0 // SPEC.BC
            inside = (c0 + tl.arange(0, BN // SPEC.BC) < C)[None, :]
            block0, unused = unused_block_rows(offsets, tile, M, E, SEGMENTS, BM, SPEC.BR)
            fill = stored(tl.full((BM // SPEC.BR, BN // SPEC.BC), SPEC.LEAST + 127, tl.int32), SPEC)
            at = within(BM // SPEC.BR, BN // SPEC.BC, C)
            tl.store(place(scales, batch, block0, R, C) + c0 + at, fill, unused[:, None] & inside)
