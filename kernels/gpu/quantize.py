"""Codes and scales of a matrix under one spec or two, from one read of it.

A tile holds whole blocks, so that a program sees the largest magnitudes of all its blocks, and writes their scales and
codes at once: b bytes are read for an element (2 for bf16), and 1 1/32 written for each spec of FP8 with 128 elements
in a block, 17/32 for MXFP4. Blocks of several rows start at experts, and so do tiles (`tiles`).

Where codes are written by columns, a thread reads 8 columns of rows 4 i to 4 i + 3, so that four rows of a column are
one word on the way through shared memory. It has 64 elements, and at most 128 registers for two specs, 80 for one: two
programs of 256 threads fit on a multiprocessor, or more. With 32 elements for each of 512 threads, one program did, and
an element took half as many instructions again.

Covered: E4M3, E5M2 and E2M1; blocks of 1, 16, 32, 64 or 128 rows and columns; one level of scales, rounding to nearest.
Whole rows, columns or matrices as blocks, two levels, and stochastic rounding are the reference's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from . import tiles
from .codec import as_bytes, encode, magnitude_bits
from .launch import cdiv, launch
from .sass import Specimen
from .tiles import (
    Layout,
    at_elements,
    block_max,
    grid_of,
    interleaved,
    place,
    scales_of,
    store_codes,
    store_scales,
    store_unused_scales,
    tile_rows,
    within,
)

Tensor = torch.Tensor


@triton.jit
def _emit(
    x, codes, scales, offsets, batch, tile, row0, exists, live, first, segment, last, col0, M, N, W, E, R,
    GROUPED: tl.constexpr, LIVE: tl.constexpr, SEGMENTS: tl.constexpr,
    SPEC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write codes and scales of a tile `x` (fp32, zero where nothing is) under one spec."""
    top = block_max(magnitude_bits(x), SPEC.BR, SPEC.BC).to(tl.float32, bitcast=True)
    scale, factor = scales_of(top, SPEC)
    factor = at_elements(factor, SPEC.BR, SPEC.BC)
    ELEM: tl.constexpr = SPEC.ELEM  # strings go from one function to another as constexprs alone
    if SPEC.PO2:
        code = encode(x * factor, ELEM)
    else:
        code = encode(tl.math.div_rn(x, factor), ELEM)
    store_codes(code, codes, batch, row0, exists, last, col0, M, N, W, SPEC, BM, BN)
    store_scales(
        scale, scales, offsets, batch, tile, row0, exists, live, first, segment, col0, M, N, E, R,
        GROUPED, LIVE, SEGMENTS, SPEC, BM, BN,
    )  # fmt: skip


@triton.jit
def _quarter(x, r, rows, inside, N, BM: tl.constexpr, BN: tl.constexpr):
    """Rows 4 i + r of a tile."""
    row = (4 * tl.arange(0, BM // 4) + r)[:, None]
    return tl.load(x + row * N + tl.arange(0, BN)[None, :], (row < rows) & inside, other=0.0)


@triton.jit
def _tile(x, batch, row0, live, rows, col0, M, N, BM: tl.constexpr, BN: tl.constexpr, QUADS: tl.constexpr):
    """fp32 [BM, BN] of a tile, zero where nothing is; with QUADS, each thread has four rows of a column."""
    inside = (col0 + tl.arange(0, BN) < N)[None, :]
    p = place(x, batch, row0, M, N) + col0
    if QUADS:
        return interleaved(
            _quarter(p, 0, rows, inside, N, BM, BN), _quarter(p, 1, rows, inside, N, BM, BN),
            _quarter(p, 2, rows, inside, N, BM, BN), _quarter(p, 3, rows, inside, N, BM, BN),
        ).to(tl.float32)  # fmt: skip
    else:
        return tl.load(p + within(BM, BN, N), live[:, None] & inside, other=0.0).to(tl.float32)


@triton.jit
def _quantize(
    x, offsets, codes_a, scales_a, codes_b, scales_b, M, N, W_a, W_b, E, R_a, R_b, tall,
    A: tl.constexpr, B: tl.constexpr, GROUPED: tl.constexpr, LIVE: tl.constexpr, SEGMENTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    column, tile, batch = grid_of(tall, tl.cdiv(N, BN))
    col0 = column * BN
    row0, exists, live, first, segment, last = tile_rows(offsets, tile, M, E, GROUPED, LIVE, SEGMENTS, BM)
    rows = last - row0
    if GROUPED:
        if rows <= 0:
            store_unused_scales(scales_a, offsets, batch, tile, col0, M, N, E, R_a, GROUPED, SEGMENTS, A, BM, BN)
            if B is not None:
                store_unused_scales(scales_b, offsets, batch, tile, col0, M, N, E, R_b, GROUPED, SEGMENTS, B, BM, BN)
            return
        rows = tl.where((segment >= 1) & (segment <= E), rows, 0)
    wide = _tile(x, batch, row0, live, rows, col0, M, N, BM, BN, QUADS)
    _emit(
        wide, codes_a, scales_a, offsets, batch, tile, row0, exists, live, first, segment, last, col0, M, N, W_a, E,
        R_a, GROUPED, LIVE, SEGMENTS, A, BM, BN,
    )  # fmt: skip
    if B is not None:
        if QUADS:  # read once more, from the cache: kept in registers, it would spill
            wide = _tile(x, batch, row0, live, rows, col0, M, N, BM, BN, QUADS)
        _emit(
            wide, codes_b, scales_b, offsets, batch, tile, row0, exists, live, first, segment, last, col0, M, N, W_b,
            E, R_b, GROUPED, LIVE, SEGMENTS, B, BM, BN,
        )  # fmt: skip


def quantize(x: Tensor, offsets: Tensor | None, specs: Sequence[str], align: int = 1) -> list[Tensor]:
    """Codes and scales of `x` under each spec in turn, as the dialect's `quantize`.

    Args:
        x: [..., M, N] fp32, bf16 or fp16.
        offsets: int32 [E+1] or None; with offsets `x` is a matrix.
        specs: any number of specs; two share a read of `x`.
        align: rows of experts begin and end at multiples of it; see `kernels.layout`.
    """
    x, out = x.contiguous(), []
    # Where rows are not aligned, elements are loaded one by one, and two specs need more registers than there are.
    together = 2 if x.shape[-1] % 16 == 0 else 1
    for at in range(0, len(specs), together):
        out += _pair(x, offsets, specs[at : at + together], align)
    return out


def _pair(x: Tensor, offsets: Tensor | None, specs: Sequence[str], align: int) -> list[Tensor]:
    """Codes and scales under one spec, or two."""
    M, N = x.shape[-2:]
    E = 0 if offsets is None else offsets.shape[0] - 1
    layouts = [Layout.of(s, align) for s in specs]
    BM, BN = tiles.tile_size(layouts)
    how = tiles.grouping(offsets, layouts)
    tall, across = tiles.row_tiles(M, offsets, BM, how["GROUPED"]), cdiv(N, BN)
    out = [t for s in specs for t in tiles.empty(x, s, x.shape, None if offsets is None else E, align)]
    a, b = out[:2], out[-2:]
    quads = any(s.COLUMNS for s in layouts)
    few = {"maxnreg": 80 if x.element_size() == 2 and len(layouts) == 1 else 128} if quads else {}
    if not quads and BM * BN <= 8192 and x.element_size() == 2 and N % 16 == 0 and how["GROUPED"]:
        few = {"maxnreg": 80}  # left to itself, the compiler of Triton 3.6 spills 8 bytes at 64
    launch(
        _quantize, (tall * across * math.prod(x.shape[:-2]),), x, offsets, *map(as_bytes, a + b), M, N,
        tiles.line(a[0], layouts[0]), tiles.line(b[0], layouts[-1]), E, a[1].shape[-2], b[1].shape[-2], tall,
        A=layouts[0], B=layouts[1] if len(layouts) == 2 else None, BM=BM, BN=BN, QUADS=quads,
        num_warps=BM * BN // (2048 if quads else 1024), **few, **how,
    )  # fmt: skip
    return out


def specimens() -> list[Specimen]:
    """Activations of Qwen3-30B-A3B and DeepSeek-V3, weights, and sizes that divide nothing."""
    row, col, square = (f"e4m3 {block} po2/rceil eps=1e-10" for block in ("1x128", "128x1", "128x128"))
    mx, mx_col = "e4m3 1x32 e8m0/rceil", "e4m3 32x1 e8m0/rceil"
    full = ("F2FP.SATFINITE", "LDG.128")
    aligned = (*full, "STG.128")

    def call(
        shape: tuple[int, ...], specs: list[str], experts: int = 0, dtype: torch.dtype = torch.bfloat16, align: int = 1
    ) -> Callable[[], object]:
        def run() -> object:
            x = torch.empty(shape, dtype=dtype, device="meta")
            offsets = torch.empty(experts + 1, dtype=torch.int32, device="meta") if experts else None
            return quantize(x, offsets, specs, align)

        return run

    return [
        Specimen("rows bf16 [8192, 2048]", call((8192, 2048), [row]), full, registers=64),
        Specimen("rows of experts bf16 [65536, 768]", call((65536, 768), [row], 128), full, registers=64),
        Specimen("rows and columns [65536, 2048]", call((65536, 2048), [row, col], 128), has=full),
        Specimen("rows and columns [65536, 7168] fp32", call((65536, 7168), [row, col], 256, torch.float32), has=full),
        Specimen("columns [65536, 2048]", call((65536, 2048), [col], 128), has=full),
        Specimen("rows, and columns by columns", call((65536, 2048), [row, col], 128, align=16), aligned, ("STG.U8",)),
        Specimen("mxfp8, columns by columns", call((65536, 2048), [mx, mx_col], 128, align=16), has=aligned),
        Specimen("weights by columns", call((128, 1536, 2048), [mx_col], align=16), has=aligned),
        Specimen("odd, by columns", call((1001, 784), [row, col], 7, align=16), aligned, ("STG.U8",)),
        Specimen("weights [128, 1536, 2048]", call((128, 1536, 2048), [square]), full, registers=80),
        Specimen("weights by rows [128, 1536, 2048]", call((128, 1536, 2048), [row, square]), full, registers=80),
        Specimen("e5m2, divided", call((8192, 2048), ["e5m2 1x128 f32/exact"]), has=full),
        Specimen("mxfp8", call((65536, 2048), [mx, mx_col], 128), has=full),
        Specimen(
            "mxfp4", call((65536, 2048), ["e2m1 1x32 e8m0/rceil"], 128), has=("LDG.128",), lacks=("F2FP.SATFINITE",)
        ),
        Specimen("odd", call((1001, 777), [row, col], 7)),
        Specimen("odd weights", call((3, 1001, 777), [square])),
    ]
