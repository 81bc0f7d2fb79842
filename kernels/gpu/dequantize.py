"""The numbers of codes and scales: 1 1/32 bytes read for an element of FP8 (17/32 of MXFP4), and one element written.

Covered: E4M3, E5M2 and E2M1; blocks of 1, 16, 32, 64 or 128 rows and columns; every format of scales, where two levels
come as their product. Whole rows, columns or matrices as blocks are the reference's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from moefx.precision.spec import QuantSpec

from . import tiles
from .codec import as_bytes, decode
from .launch import cdiv, launch
from .sass import Specimen
from .tiles import Layout, at_elements, grid_of, load_codes, load_scales, place, tile_rows, value_of, within

Tensor = torch.Tensor


@triton.jit
def _dequantize(
    codes, scales, offsets, out, M, N, W, E, R, tall,
    SPEC: tl.constexpr, GROUPED: tl.constexpr, LIVE: tl.constexpr, SEGMENTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    column, tile, batch = grid_of(tall, tl.cdiv(N, BN))
    col0 = column * BN
    row0, exists, live, first, segment, _ = tile_rows(offsets, tile, M, E, GROUPED, LIVE, SEGMENTS, BM)
    code = load_codes(codes, batch, row0, live, col0, M, W, SPEC, BM, BN)  # 0 in rows of nobody
    scale = load_scales(
        scales, offsets, batch, row0, live, first, segment, col0, M, N, E, R, GROUPED, SEGMENTS, SPEC, BM, BN
    )
    ELEM: tl.constexpr = SPEC.ELEM  # strings go from one function to another as constexprs alone
    x = decode(code, ELEM) * at_elements(value_of(scale, SPEC), SPEC.BR, SPEC.BC)
    inside = exists[:, None] & (col0 + tl.arange(0, BN) < N)[None, :]
    tl.store(place(out, batch, row0, M, N) + col0 + within(BM, BN, N), x.to(out.dtype.element_ty), inside)


def dequantize(codes: Tensor, scales: Tensor, offsets: Tensor | None, spec: str, dtype: torch.dtype) -> Tensor:
    """Numbers [..., M, N] of `dtype` (fp32, bf16, fp16), as the dialect's `dequantize`; rows of nobody are zero."""
    codes, scales = codes.contiguous(), scales.contiguous()
    layout, (*front, M, width) = Layout.of(spec), codes.shape
    N = width * QuantSpec.parse(spec).format.per_byte
    out = codes.new_empty((*front, M, N), dtype=dtype)
    BM, BN = tiles.tile_size([layout])
    how = tiles.grouping(offsets, [layout])
    tall = tiles.row_tiles(M, offsets, BM, how["GROUPED"])
    E = 0 if offsets is None else offsets.shape[0] - 1
    launch(
        _dequantize, (tall * cdiv(N, BN) * math.prod(front),), as_bytes(codes), as_bytes(scales), offsets, out, M, N,
        width, E, scales.shape[-2], tall, SPEC=layout, BM=BM, BN=BN, num_warps=BM * BN // 1024, **how,
    )  # fmt: skip
    return out


def specimens() -> list[Specimen]:
    """Activations of Qwen3-30B-A3B and DeepSeek-V3, weights, and sizes that divide nothing."""

    def call(
        shape: tuple[int, ...], spec: str, experts: int = 0, dtype: torch.dtype = torch.bfloat16
    ) -> Callable[[], object]:
        def run() -> object:
            x = torch.empty(shape, device="meta")
            offsets = torch.empty(experts + 1, dtype=torch.int32, device="meta") if experts else None
            return dequantize(*tiles.empty(x, spec, shape, experts or None), offsets, spec, dtype)

        return run

    wide = ("LDG.128|LDG.64", "STG.128")
    return [
        Specimen("rows of experts [65536, 2048]", call((65536, 2048), "e4m3 1x128 po2/rceil", 128), wide, registers=64),
        Specimen("columns [65536, 7168]", call((65536, 7168), "e4m3 128x1 po2/rceil", 256), wide, registers=96),
        Specimen("weights", call((128, 1536, 2048), "e4m3 128x128 po2/rceil"), wide, registers=64),
        Specimen("mxfp4", call((65536, 2048), "e2m1 1x32 e8m0/rceil", 128), wide, registers=64),
        Specimen("e5m2 to fp32", call((8192, 2048), "e5m2 1x128 f32/exact", 0, torch.float32), wide, registers=64),
        Specimen("odd", call((1001, 777), "e4m3 128x1 po2/rceil", 7)),
    ]
