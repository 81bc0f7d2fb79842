"""Codes in blocks along one axis as codes in blocks along the other, by rows or by columns (`kernels.layout`).

2 1/16 bytes are moved for an element. Under the rule `tight` it is `convert.shift`. Under `tile_max`, E4M3 codes of
1x128 blocks are moved four at a time: all codes of a row in a tile of 128 x 128 move by the same number k of binades,
so k * 8 comes off each byte of a word whose code stays a normal number, zeros and NaN stay, and bytes borrow nothing
from their neighbours. Only tiles in which some number falls below the normal ones go through fp32, which rounds them.

Covered: as in `convert`; words need whole tiles of columns (N a multiple of 128), other widths go as under `tight`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from . import tiles
from .codec import as_bytes, decode8, encode8
from .convert import shift
from .launch import launch
from .sass import Specimen
from .tiles import (
    NONE,
    Layout,
    field_of,
    grid_of,
    limited,
    load_scales,
    place,
    store_columns,
    store_scales,
    stored,
    tile_rows,
    within,
)

Tensor = torch.Tensor
TILE = tl.constexpr(128)
WORDS = tl.constexpr(32)  # of four codes in a row of a tile
HIGH = tl.constexpr(-2139062144)  # 0x80808080: the high bit of each byte


@triton.jit
def _move(words, k):
    """Words of four E4M3 codes moved down by k >= 0 binades: those bytes that stay normal numbers, zero or NaN. And
    the high bit of each byte that does not, and is wrong."""
    size = words & 0x7F7F7F7F
    step = tl.minimum(k, 15)
    stays = (size + (0x78 - step * 8) * 0x01010101) & HIGH  # size >= (k + 1) * 8: the exponent field is above k
    nan = (size + 0x01010101) & HIGH
    some = (size + 0x7F7F7F7F) & HIGH
    lanes = ((stays & ~nan) >> 7) & 0x01010101
    return words - lanes * (step * 8), tl.where(k > 0, some & ~stays & ~nan, 0)


@triton.jit
def _round(words, moved, wrong, k):
    """`moved`, with the bytes marked in `wrong` rounded to nearest from `words`."""
    factor = ((127 - tl.minimum(k, 126)) << 23).to(tl.float32, bitcast=True)
    for lane in tl.static_range(4):
        x = decode8(((words >> (8 * lane)) & 255).to(tl.uint8), "e4m3")
        code = encode8(x * factor, "e4m3").to(tl.int32)
        change = (((moved >> (8 * lane)) & 255) ^ code) << (8 * lane)
        moved = tl.where(((wrong >> (8 * lane + 7)) & 1) != 0, moved ^ change, moved)
    return moved


@triton.jit
def _bytes(words):
    """The four bytes of each word as columns: uint8 [R, 4C] of int32 [R, C]."""
    even = tl.join(words & 255, (words >> 16) & 255)
    odd = tl.join((words >> 8) & 255, (words >> 24) & 255)
    lanes = tl.join(even, odd)  # [R, C, 2, 2]: byte 2 i + j at [.., i, j]
    return tl.reshape(lanes.to(tl.uint8), (words.shape[0], words.shape[1] * 4))


@triton.jit
def _turn_words(
    words, scales, offsets, new_codes, new_scales, M, N, W, E, R, tall,
    A: tl.constexpr, B: tl.constexpr, GROUPED: tl.constexpr, LIVE: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    column, tile, batch = grid_of(tall, N // TILE)
    row0, exists, live, first, segment, last = tile_rows(offsets, tile, M, E, GROUPED, LIVE, SEGMENTS, TILE)
    width = N // 4
    at = within(TILE, WORDS, width)
    w = tl.load(place(words, batch, row0, M, width) + column * WORDS + at, live[:, None], other=0)
    scale = load_scales(
        scales, offsets, batch, row0, live, first, segment, column * TILE, M, N, E, M, GROUPED, SEGMENTS, A, TILE, TILE
    )
    field = field_of(scale, A)  # [TILE, 1]
    size = w & 0x7F7F7F7F
    counted = (size + 0x7F7F7F7F) & ~(size + 0x01010101) & HIGH  # neither zero nor NaN
    used = tl.max((counted != 0).to(tl.int32), 1)[:, None]
    top = tl.max(tl.where((used > 0) & (field != 255), field - 127, NONE), 0)[None, :]
    new = limited(top, B)  # [1, 1]
    k = tl.maximum(new - field, 0)
    moved, wrong = _move(w, k)
    if tl.max(tl.max((wrong != 0).to(tl.int32), 1), 0) > 0:
        moved = _round(w, moved, wrong, k)
    moved = tl.where(field == 255, 0x7F7F7F7F, moved)
    if B.COLUMNS:
        to = place(new_codes, batch, 0, N, W)
        store_columns(_bytes(moved), to, row0, last, column * TILE, N, W, TILE, TILE)
    else:
        to = place(new_codes, batch, row0, M, width) + column * WORDS
        tl.store(to + at, moved, exists[:, None])
    store_scales(
        tl.broadcast_to(stored(new, B), (1, TILE)), new_scales, offsets, batch, tile, row0, exists, live, first,
        segment, column * TILE, M, N, E, R, GROUPED, LIVE, SEGMENTS, B, TILE, TILE,
    )  # fmt: skip


def transpose_scaled(
    codes: Tensor, scales: Tensor, offsets: Tensor | None, spec: str, to_spec: str, rule: str = "tight", align: int = 1
) -> tuple[Tensor, Tensor]:
    """Codes [..., M, N] and scales of `to_spec`, the transposed `spec`, as the dialect's `transpose_scaled`."""
    a, b = Layout.of(spec), Layout.of(to_spec, align)
    by_words = rule == "tile_max" and a.ELEM == "e4m3" and (a.BR, a.BC) == (1, 128) and codes.shape[-1] % 128 == 0
    if codes.is_contiguous() and codes.storage_offset() % 4 != 0:
        by_words = False  # no words of four can be read there; a copy would cost as much as the kernel
    if not by_words:
        return shift(codes, scales, offsets, spec, to_spec, align, tight=rule == "tight")
    codes, scales = codes.contiguous(), scales.contiguous()
    *front, M, N = codes.shape
    E = 0 if offsets is None else offsets.shape[0] - 1
    new, new_scales = tiles.empty(codes, to_spec, codes.shape, None if offsets is None else E, align)
    how = tiles.grouping(offsets, [a, b])
    tall = tiles.row_tiles(M, offsets, 128, how["GROUPED"])
    launch(
        _turn_words, (tall * (N // 128) * math.prod(front),), codes.view(torch.int32), as_bytes(scales), offsets,
        new.view(torch.uint8 if b.COLUMNS else torch.int32), as_bytes(new_scales), M, N, tiles.line(new, b), E,
        new_scales.shape[-2], tall, A=a, B=b, num_warps=16, **how,
    )  # fmt: skip
    return new, new_scales


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
            ("F2FP.SATFINITE", "LDG.128", "STG.128"),
            registers=96,
        ),
        Specimen(
            "tile_max [65536, 7168]",
            call((65536, 7168), "tile_max"),
            ("F2FP.SATFINITE", "LDG.128", "STG.128"),
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
