"""Codes in blocks along one axis as codes in blocks along the other, by rows or by columns (`kernels.layout`).

2 1/16 bytes are moved for an element. E4M3 codes of blocks along rows, which every recipe turns, take `_turn`; the rest
is `convert.shift`.

A tile is 128 x 128 codes for 128 threads. fp16 holds every E4M3 number exactly with room to spare: a tile's numbers,
relative to its largest scale, are multiples of 2^-24 below 2^16 if rows differ by less than HEAD + 15 = 22 binades. So
three instructions on pairs do what four on single fp32 numbers did: codes to fp16, times a power of two for the row,
times one for the column, and back, rounded by the hardware (fp16 rounds before that only what is far below the smallest
code).

A thread has 8 columns of 16 rows that follow each other, in 16 loads of 8 bytes, all issued before the first is used:
what it writes of a column is 16 bytes, and no code passes through shared memory. Two threads of a warp share a column,
so that each store fills whole sectors of 32 bytes. Those 16 rows are 16 tensors to the compiler, which so has no say in
where they lie. 256 threads with 64 codes each need two thirds more instructions. Four programs fit on a multiprocessor
with 128 registers: one loads while others store.

Tiles for which that does not hold go through `_turn_slowly`, 16 columns at a time, so that few registers are needed:
those with NaN or infinite scales, rows further apart, a column whose largest number is more than 2^-14 below the tile's
largest scale or, under `tile_max`, a largest scale whose row does not use it (E4M3 numbers under `rceil` do).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from . import tiles
from .codec import as_bytes, decode8, magnitude_bits
from .convert import shift, shifted, tight
from .launch import cdiv, launch
from .sass import Specimen
from .tiles import (
    NONE,
    Layout,
    at_elements,
    field_of,
    grid_of,
    limited,
    place,
    store_columns,
    store_scales,
    store_unused_scales,
    stored,
    tile_rows,
    within,
)

Tensor = torch.Tensor
TILE = tl.constexpr(128)
DEEP = tl.constexpr(16)  # rows of a thread
PIECE = tl.constexpr(16)  # columns
HEAD = tl.constexpr(7)  # binades from 448 up to fp16's largest number
INFINITY = tl.constexpr(0x7C00)  # fp16, as all below
FULL = tl.constexpr(0x7700)  # 224 * 2^HEAD: what is larger has the tile's largest scale
SMALL = tl.constexpr(0x2000)  # 2^-7: below, no power of two in fp16 lifts a number to 224


@triton.jit
def _power(exponent):
    """2^exponent in fp16, from -14 to 15."""
    return ((exponent + 15) << 10).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _joined(xs, LEVELS: tl.constexpr):
    """Of 2^LEVELS tensors one with as many axes of two behind theirs, without moving any element."""
    for level in tl.static_range(LEVELS):
        pairs = ()
        for i in tl.static_range(2 ** (LEVELS - level - 1)):
            pairs += (tl.join(xs[i], xs[i + 2 ** (LEVELS - level - 1)]),)
        xs = pairs
    return xs[0]


@triton.jit
def _split(x, LEVELS: tl.constexpr):
    """The 2^LEVELS tensors that were joined."""
    xs = (x,)
    for level in tl.static_range(LEVELS):
        low, high = (), ()
        for i in tl.static_range(2**level):
            a, b = tl.split(xs[i])
            low += (a,)
            high += (b,)
        xs = low + high
    return xs


@triton.jit
def _fields(scales, rows, col0, N, C: tl.constexpr, A: tl.constexpr):
    """Exponent fields of the scales of rows 4 i + r, four [32, C]; C = 4 names that of each 32 columns."""
    at = tl.arange(0, C)[None, :] * 32
    fields = ()
    for r in tl.static_range(4):
        row = (4 * tl.arange(0, TILE // 4) + r)[:, None]
        scale = tl.load(scales + row * tl.cdiv(N, A.BC) + at // A.BC, (row < rows) & (col0 + at < N), other=0)
        fields += (field_of(scale, A),)
    return fields


@triton.jit
def _by_row(s):
    """What rows have for each 32 columns [128, 4], as 16 tensors [4, 16, 2, 1] that go with `_turn`'s."""
    x = tl.permute(tl.reshape(s, (4, 2, 2, 2, 2, 2, 4)), (0, 6, 1, 2, 3, 4, 5))
    x = tl.broadcast_to(tl.expand_dims(x, 2), (4, 4, 4, 2, 2, 2, 2, 2))
    return _split(tl.reshape(x, (4, 16, 2, 1, 2, 2, 2, 2)), 4)


@triton.jit
def _times(xs, factors):
    ys = ()
    for r in tl.static_range(DEEP):
        ys += (xs[r] * factors[r],)
    return ys


@triton.jit
def _over_all(a, b, c, d, LARGEST: tl.constexpr):
    """The largest element, or the smallest, of four matrices."""
    n: tl.constexpr = a.shape[0] * a.shape[1]
    if LARGEST:
        return tl.max(tl.reshape(tl.maximum(tl.maximum(a, b), tl.maximum(c, d)), (n,)), 0)
    else:
        return tl.min(tl.reshape(tl.minimum(tl.minimum(a, b), tl.minimum(c, d)), (n,)), 0)


@triton.jit
def _larger(a, b):
    """The larger magnitude; NaN if either is."""
    return tl.maximum(tl.abs(a), tl.abs(b), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _bits(xs):
    """The largest magnitudes of 16 matrices, as integers that order them, NaN above infinity."""
    for level in tl.static_range(4):
        halves = ()
        for i in tl.static_range(2 ** (3 - level)):
            halves += (_larger(xs[i], xs[i + 2 ** (3 - level)]),)
        xs = halves
    return xs[0].to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _codes(x):
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def _store_columns(ys, codes, row0, last, col0, N, W):
    """As `tiles.store_columns`: one 16-byte store for each of a thread's columns, two threads to a sector."""
    y = tl.permute(tl.reshape(_joined(ys, 4), (4, 16, 2, 8, DEEP)), (0, 2, 4, 1, 3))
    ys = _split(tl.reshape(y, (4, 32, 16, 2, 2, 2)), 3)
    row = 32 * tl.arange(0, 4)[:, None, None] + tl.arange(0, 32)[None, :, None]
    column = 8 * tl.arange(0, 16)[None, None, :]
    inside = (row < (last - row0 + 15) // 16 * 16) & (col0 + column < N)
    to = codes + col0.to(tl.int64) * W + row0 // 16 * 16 + row + column * W
    for j in tl.static_range(8):
        tl.store(to + j * W.to(tl.int64), _codes(ys[j]), inside)


@triton.jit
def _piece(codes, scales, piece, row0, rows, col0, N, A: tl.constexpr):
    """Columns of a tile, of one block: codes, their numbers, which are special, which count, and exponent fields."""
    row, column = tl.arange(0, TILE)[:, None], piece * PIECE + tl.arange(0, PIECE)[None, :]
    code = tl.load(codes + row * N + column, (row < rows) & (col0 + column < N), other=0)
    at = piece * PIECE // A.BC
    scale = tl.load(scales + row * tl.cdiv(N, A.BC) + at, (row < rows) & (col0 + piece * PIECE < N), other=0)
    x, field = decode8(code, "e4m3"), field_of(scale, A)
    special = magnitude_bits(x) >= 0x7F800000
    return code, x, special, (x != 0) & (special | (field == 255) == 0), field


@triton.jit
def _turn_slowly(
    codes, scales, offsets, new_codes, new_scales, batch, tile, row0, rows, exists, live, first, segment, last, col0,
    M, N, W, E, R,
    A: tl.constexpr, B: tl.constexpr, TIGHT: tl.constexpr,
    GROUPED: tl.constexpr, LIVE: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """A tile with anything in it."""
    ELEM: tl.constexpr = A.ELEM  # strings go from one function to another as constexprs alone
    pieces = tl.cdiv(tl.minimum(N - col0, TILE), PIECE)  # not known before: the loop stays one, and registers few
    if not TIGHT:
        used = tl.zeros((TILE, 1), tl.int32)
        field = tl.zeros((TILE, 1), tl.int32)
        for piece in range(pieces):
            _, _, _, counts, field = _piece(codes, scales, piece, row0, rows, col0, N, A)
            used = tl.maximum(used, tl.max(counts.to(tl.int32), 1)[:, None])
        largest = tl.max(tl.where(used > 0, field - 127, NONE), 0)[None, :]
    for piece in range(pieces):
        code, x, special, counts, field = _piece(codes, scales, piece, row0, rows, col0, N, A)
        if TIGHT:
            new = limited(tight(magnitude_bits(x), counts, field, A, B), B)
        else:
            new = tl.broadcast_to(limited(largest, B), (1, PIECE))
        y = shifted(code, x, special, field, at_elements(new, B.BR, 1), ELEM, ELEM)
        column = col0 + piece * PIECE
        if B.COLUMNS:
            store_columns(y, place(new_codes, batch, 0, N, W), row0, last, column, N, W, TILE, PIECE)
        else:
            inside = exists[:, None] & (column + tl.arange(0, PIECE) < N)[None, :]
            tl.store(place(new_codes, batch, row0, M, W) + column + within(TILE, PIECE, W), y, inside)
        store_scales(
            stored(new, B), new_scales, offsets, batch, tile, row0, exists, live, first, segment, column, M, N, E, R,
            GROUPED, LIVE, SEGMENTS, B, TILE, PIECE,
        )  # fmt: skip


@triton.jit
def _turn(
    codes, scales, offsets, new_codes, new_scales, M, N, W, E, R, tall,
    A: tl.constexpr, B: tl.constexpr, TIGHT: tl.constexpr,
    GROUPED: tl.constexpr, LIVE: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    LOWEST: tl.constexpr = max(B.FLOOR, B.LEAST) + 127
    column, tile, batch = grid_of(tall, tl.cdiv(N, TILE))
    col0 = column * TILE
    row0, exists, live, first, segment, last = tile_rows(offsets, tile, M, E, GROUPED, LIVE, SEGMENTS, TILE)
    rows = last - row0
    if GROUPED:
        if rows <= 0:
            store_unused_scales(
                new_scales, offsets, batch, tile, col0, M, N, E, R, GROUPED, SEGMENTS, B, TILE, TILE
            )  # fmt: skip
            return
        rows = tl.where((segment >= 1) & (segment <= E), rows, 0)
    codes = place(codes, batch, row0, M, N) + col0
    scales = place(scales, batch, row0, M, tl.cdiv(N, A.BC)) + col0 // A.BC
    fields = _fields(scales, rows, col0, N, 4, A)
    # [4, 16, 2, 8]: warp, columns 8 j to 8 j + 7, rows 16 i to 16 i + 15 of which each tensor has one
    top_row = 32 * tl.arange(0, 4)[:, None, None, None] + DEEP * tl.arange(0, 2)[None, None, :, None]
    at_column = 8 * tl.arange(0, 16)[None, :, None, None] + tl.arange(0, 8)[None, None, None, :]
    left = tl.where(col0 + at_column < N, rows, 0) - top_row
    step = N.to(tl.int64)
    at = codes + top_row * N + at_column
    xs = ()
    for r in tl.static_range(DEEP):
        code = tl.load(at + r * step, r < left, other=0)
        xs += (code.to(tl.float8e4nv, bitcast=True).to(tl.float16),)
    # Where a row has one scale, each warp reads all for itself, and needs no barrier.
    own = fields if A.BC == 32 else _fields(scales, rows, col0, N, 1, A)
    base = _over_all(own[0], own[1], own[2], own[3], True)
    field = tl.reshape(tl.permute(_joined(fields, 2), (0, 2, 3, 1)), (TILE, 4))
    base = tl.maximum(base, LOWEST)
    slow = base >= 254  # one more, by which "ceil" may exceed it, would be no number
    if TIGHT:  # noqa: SIM102  the one is known to the compiler, the other on the device
        if _over_all(own[0], own[1], own[2], own[3], False) < base - (HEAD + 14):
            far = _times(xs, _by_row(tl.where(base - field > HEAD + 14, 1.0, 0.0).to(tl.float16)))
            slow = slow | (tl.max(tl.reshape(_bits(far), (TILE * TILE // DEEP,)), 0) > 0)
    xs = _times(xs, _by_row(_power(-tl.minimum(base - field, HEAD + 14) + HEAD)))
    top = _bits(xs)
    if TIGHT:
        top = tl.max(top, 2)
        if B.BR > 32:
            top = tl.max(top, 0)
        top = tl.reshape(top, (TILE // B.BR, TILE))
        # Numbers of a column become at most 448: times 2^(EMAX + 15 - e), or as much as the smallest scale allows.
        some = tl.where(top == 0, -(1 << 20), top)
        e = (some + (0x3FF - (B.BOUND >> 13))) >> 10  # exponent field, one more where the fraction is above the bound
        up = tl.minimum(-e + (B.EMAX + 15 + HEAD), base - LOWEST)
        new = base - up
        if B.ZERO_ONE:
            new = tl.where(top == 0, max(127, LOWEST), new)
        factor = tl.reshape(_power(tl.minimum(up, 15 + HEAD) - HEAD), (TILE // B.BR, 16, 1, 8))
        known = (tl.where(top == 0, SMALL, top) - SMALL).to(tl.uint32)
        slow = slow | (tl.max(tl.max(known, 1), 0) > INFINITY - SMALL)
    else:
        new = tl.broadcast_to(base, (1, TILE))
        factor = _power(tl.zeros((1, 1, 1, 1), tl.int32) - HEAD)
        top = tl.max(tl.reshape(top, (TILE * TILE // DEEP,)), 0)
        slow = slow | (top <= FULL) | (top > INFINITY)
    if slow:
        _turn_slowly(
            codes, scales, offsets, new_codes, new_scales, batch, tile, row0, rows, exists, live, first, segment, last,
            col0, M, N, W, E, R, A, B, TIGHT, GROUPED, LIVE, SEGMENTS,
        )  # fmt: skip
    else:
        ys = ()
        for r in tl.static_range(DEEP):
            ys += (xs[r] * factor,)
        if B.COLUMNS:
            _store_columns(ys, place(new_codes, batch, 0, N, W), row0, last, col0, N, W)
        else:
            to = place(new_codes, batch, row0, M, W) + col0 + top_row * W + at_column
            for r in tl.static_range(DEEP):
                tl.store(to + r * W, _codes(ys[r]), (top_row + r < last - row0) & (col0 + at_column < N))
        store_scales(
            stored(new, B), new_scales, offsets, batch, tile, row0, exists, live, first, segment, col0, M, N, E, R,
            GROUPED, LIVE, SEGMENTS, B, TILE, TILE,
        )  # fmt: skip


def transpose_scaled(
    codes: Tensor, scales: Tensor, offsets: Tensor | None, spec: str, to_spec: str, rule: str = "tight", align: int = 1
) -> tuple[Tensor, Tensor]:
    """Codes [..., M, N] and scales of `to_spec`, the transposed `spec`, as the dialect's `transpose_scaled`."""
    a, b = Layout.of(spec), Layout.of(to_spec, align)
    if not _turns(a, b, rule, codes.shape[-1]):
        return shift(codes, scales, offsets, spec, to_spec, align, tight=rule == "tight")
    codes, scales = codes.contiguous(), scales.contiguous()
    *front, M, N = codes.shape
    E = 0 if offsets is None else offsets.shape[0] - 1
    new, new_scales = tiles.empty(codes, to_spec, codes.shape, None if offsets is None else E, align)
    how = tiles.grouping(offsets, [a, b])
    tall = tiles.row_tiles(M, offsets, 128, how["GROUPED"])
    launch(
        _turn, (tall * cdiv(N, 128) * math.prod(front),), as_bytes(codes), as_bytes(scales), offsets, as_bytes(new),
        as_bytes(new_scales), M, N, tiles.line(new, b), E, new_scales.shape[-2], tall,
        A=a, B=b, TIGHT=rule == "tight", num_warps=4,
        maxnreg=128, **how,
    )  # fmt: skip
    return new, new_scales


def _turns(a: Layout, b: Layout, rule: str, N: int) -> bool:
    """Whether `_turn` covers it: blocks of 32 or 128, under `tile_max` of 128, which share one scale in a tile."""
    sizes = {(1, 128, 128, 1), (1, 32, 32, 1)} if rule == "tight" else {(1, 128, 128, 1)}
    return a.ELEM == b.ELEM == "e4m3" and (a.BR, a.BC, b.BR, b.BC) in sizes and N % 16 == 0


def specimens() -> list[Specimen]:
    """Activations of Qwen3-30B-A3B and DeepSeek-V3 under both rules, and sizes that divide nothing."""
    row, column = "e4m3 1x128 po2/rceil eps=1e-10", "e4m3 128x1 po2/rceil eps=1e-10"

    def call(
        shape: tuple[int, ...], rule: str, experts: int = 0, specs: tuple[str, str] = (row, column), align: int = 1
    ) -> Callable[[], object]:
        def run() -> object:
            x = torch.empty(shape, device="meta")
            offsets = torch.empty(experts + 1, dtype=torch.int32, device="meta") if experts else None
            return transpose_scaled(*tiles.empty(x, specs[0], shape, experts or None), offsets, *specs, rule, align)

        return run

    wide = ("F2FP.SATFINITE", "LDG.128|LDG.64")
    mx = ("e4m3 1x32 e8m0/rceil", "e4m3 32x1 e8m0/rceil")
    return [
        Specimen(
            "tile_max [65536, 2048]",
            call((65536, 2048), "tile_max", 128),
            ("F2FP.SATFINITE", "LDG.128|LDG.64", "STG.128|STG.64"),
            registers=96,
        ),
        Specimen(
            "tile_max [65536, 7168]",
            call((65536, 7168), "tile_max"),
            ("F2FP.SATFINITE", "LDG.128|LDG.64", "STG.128|STG.64"),
            registers=96,
        ),
        Specimen("tight [65536, 2048]", call((65536, 2048), "tight", 128), wide),
        Specimen("tight mxfp8 [65536, 2048]", call((65536, 2048), "tight", 128, mx), wide),
        Specimen("back again [65536, 2048]", call((65536, 2048), "tight", 128, (column, row)), wide),
        Specimen(
            "tile_max by columns [65536, 2048]",
            call((65536, 2048), "tile_max", 128, align=16),
            (*wide, "STG.128"),
            ("STG.U8",),
        ),
        Specimen(
            "tight by columns [65536, 2048]",
            call((65536, 2048), "tight", 128, align=16),
            (*wide, "STG.128"),
            ("STG.U8",),
        ),
        Specimen("tight mxfp8 by columns", call((65536, 2048), "tight", 128, mx, align=32), (*wide, "STG.128")),
        Specimen("odd tile_max [1001, 784]", call((1001, 784), "tile_max", 7), wide),
    ]
