"""Gradients of weights from quantized operands.

    g [E, M, N]  per expert, a [rows, M] transposed times b [rows, N], both operands in blocks along rows

What it does with scales is what `scaled_grouped_mm` does: a block of the depth is one product from zero.

The depth is rows, and the fp8 tensor cores (QGMMA) read both operands with the depth contiguous. Two layouts are taken:

- Both operands by columns, where rows of experts begin at multiples of 16 (`kernels.layout`): QGMMA. Without that
  promise, 16 bytes of a column could not be loaded at once, and nothing ahead.
- By rows, to which a single operand by columns is copied: codes become fp16, exactly, on their way through registers,
  and HGMMA multiplies them at half the rate, with loads as asynchronous as before.

Bytes: S (M + N) codes, 1/32 of that for scales, and the gradients.

A tile of 128 x 128 is computed by four warps in two halves of 64 rows where both operands are by columns, of whole
tiles and on sm_90, for the reasons that `scaled_grouped_mm` gives: two programs share a processor. Scales differ from
column to column, so that a product is multiplied twice (row, then column: the order in which nothing spills), and each
thread needs 32 of them: they are loaded coalesced, one by a thread, and exchanged through shared memory, for each half
anew. Elsewhere eight warps and four stages; 256 x 128, or half as many threads, spills there. What the sizes do on a
device is not yet measured.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from moefx.kernels.layout import ALIGN, empty_codes, lies_by_columns
from moefx.precision.spec import QuantSpec

from .codec import as_bytes
from .launch import cdiv, is_hopper, launch
from .sass import Specimen
from .scaled_grouped_mm import BAND, BN, at_block, blocks_of, depth_of, load_column_scale, load_scale
from .schedule import blocks_before, in_bands

Tensor = torch.Tensor
BM = 128


@triton.jit
def _tile_of(offsets, M, N, BAND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Of this program: expert, its first row and the one behind its last, first row and column of the gradient."""
    m_tiles, n_tiles = tl.cdiv(M, BM), tl.cdiv(N, BN)
    expert = tl.program_id(0) // (m_tiles * n_tiles)
    m, n = in_bands(tl.program_id(0) % (m_tiles * n_tiles), m_tiles, n_tiles, BAND)
    return expert, tl.load(offsets + expert), tl.load(offsets + expert + 1), m * BM, n * BN


@triton.jit
def _scales_at(scales, offsets, expert, columns, row, BE: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Scales of columns in the first block of an expert: blocks of rows begin anew at each, and scales of whole columns
    have one row per expert."""
    block = blocks_before(offsets, expert, BE, R) if R > 0 else expert
    return scales + at_block(columns, C) + block.to(tl.int64) * row


@triton.jit
def _scaled(p, as_at, bs_at, r, as_row, bs_row, m_cut, n_cut,
            AR: tl.constexpr, BR: tl.constexpr, AS_BYTES: tl.constexpr, BS_BYTES: tl.constexpr,
            AGAIN: tl.constexpr = False):  # fmt: skip
    """The product of a step that begins `r` rows into the expert, times the scales of its blocks."""
    if AR > 0:
        p = p * load_scale(as_at + r // AR * as_row, m_cut, AS_BYTES)[:, None]
    if BR > 0:
        p = p * load_column_scale(bs_at + r // BR * bs_row, n_cut, BS_BYTES, AGAIN)[None, :]
    return p


@triton.jit
def _store(acc, as_, bs, expert, ms, ns, g, M, N,
           AR: tl.constexpr, BR: tl.constexpr, AS_BYTES: tl.constexpr, BS_BYTES: tl.constexpr):  # fmt: skip
    m_cut, n_cut = ms < M, ns < N
    if AR == 0:
        acc = acc * load_scale(as_, m_cut, AS_BYTES)[:, None]
    if BR == 0:
        acc = acc * load_scale(bs, n_cut, BS_BYTES)[None, :]
    out = g + (expert.to(tl.int64) * M + ms)[:, None] * N + ns[None, :]
    tl.store(out, acc.to(g.dtype.element_ty), mask=m_cut[:, None] & n_cut[None, :])


@triton.jit
def _turned_wgrad(
    a, as_, b, bs, offsets, g, M, N, a_column, b_column, as_row, bs_row,
    BE: tl.constexpr, BAND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, AR: tl.constexpr,
    AC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, AS_BYTES: tl.constexpr, BS_BYTES: tl.constexpr,
    WHOLE: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    TALL: tl.constexpr = 2 * BM if TWICE else BM
    expert, start, end, m0, n0 = _tile_of(offsets, M, N, BAND, TALL, BN)
    m, n, row = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    as_at = _scales_at(as_, offsets, expert, m0 + m, as_row, BE, AR, AC)
    bs_at = _scales_at(bs, offsets, expert, n0 + n, bs_row, BE, BR, BC)
    m_cut, n_cut = None, None
    if not WHOLE:  # the last column stands for those behind it, which are not stored
        m_cut, n_cut = m0 + m < M, n0 + n < N
        m, n = tl.minimum(m, M - m0 - 1), tl.minimum(n, N - n0 - 1)
    # By dividing, the compiler is told that columns of the expert begin and end at multiples of 16 bytes. 32 bits do
    # within a tile, and take fewer registers.
    first = start // 16 * 16
    count = end // 16 * 16 - first
    a += m0.to(tl.int64) * a_column + first
    b += n0.to(tl.int64) * b_column + first
    a_at, b_at = m[:, None] * a_column + row[None, :], n[None, :] * b_column + row[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    if TWICE:
        acc_2 = tl.zeros((BM, BN), tl.float32)
    for r in range(0, count, BK):
        use = row < count - r
        b_tile = tl.load(b + r + b_at, mask=use[:, None], other=0.0)
        a_tile = tl.load(a + r + a_at, mask=use[None, :], other=0.0)
        p = tl.dot(a_tile, b_tile)
        acc += _scaled(p, as_at, bs_at, r, as_row, bs_row, m_cut, n_cut, AR, BR, AS_BYTES, BS_BYTES)
        if TWICE:
            a_tile = tl.load(a + BM * a_column + r + a_at, mask=use[None, :], other=0.0)
            p = tl.dot(a_tile, b_tile)
            # Scales of b anew, and by another instruction, lest the compiler keep 32 of them in each thread and spill.
            acc_2 += _scaled(p, as_at + BM, bs_at, r, as_row, bs_row, m_cut, n_cut, AR, BR, AS_BYTES, BS_BYTES, True)
    ms, ns = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
    _store(acc, as_at, bs_at, expert, ms, ns, g, M, N, AR, BR, AS_BYTES, BS_BYTES)
    if TWICE:
        _store(acc_2, as_at + BM, bs_at, expert, ms + BM, ns, g, M, N, AR, BR, AS_BYTES, BS_BYTES)


@triton.jit
def _scaled_grouped_wgrad(
    a, as_, b, bs, offsets, g, M, N, a_row, b_row, as_row, bs_row,
    BE: tl.constexpr, BAND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, AR: tl.constexpr,
    AC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, AS_BYTES: tl.constexpr, BS_BYTES: tl.constexpr,
):  # fmt: skip
    expert, start, end, m0, n0 = _tile_of(offsets, M, N, BAND, BM, BN)
    ms, ns = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
    m_cut, n_cut = ms < M, ns < N
    as_at = _scales_at(as_, offsets, expert, ms, as_row, BE, AR, AC)
    bs_at = _scales_at(bs, offsets, expert, ns, bs_row, BE, BR, BC)
    acc = tl.zeros((BM, BN), tl.float32)
    row, count = tl.arange(0, BK), end - start
    a_at, b_at = a + start.to(tl.int64) * a_row + ms[None, :], b + start.to(tl.int64) * b_row + ns[None, :]
    a_at, b_at = a_at + row[:, None] * a_row, b_at + row[:, None] * b_row
    # The fp16 tile of `a` is carried from step to step: a first operand that is neither loaded nor carried is handed to
    # the tensor cores in registers, for which Triton transposes it byte by byte (300 and more PRMT a step).
    a_wide = tl.load(a_at, mask=(row < count)[:, None] & m_cut[None, :], other=0.0).to(tl.float16)
    for r in range(0, count, BK):
        b_tile = tl.load(b_at, mask=(row < count - r)[:, None] & n_cut[None, :], other=0.0)
        a_at += BK * a_row
        b_at += BK * b_row
        a_next = tl.load(a_at, mask=(row < count - r - BK)[:, None] & m_cut[None, :], other=0.0)
        p = tl.dot(tl.trans(a_wide), b_tile.to(tl.float16))
        a_wide = a_next.to(tl.float16)
        acc += _scaled(p, as_at, bs_at, r, as_row, bs_row, m_cut, n_cut, AR, BR, AS_BYTES, BS_BYTES)
    _store(acc, as_at, bs_at, expert, ms, ns, g, M, N, AR, BR, AS_BYTES, BS_BYTES)


def scaled_grouped_wgrad(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor, a_spec: str, b_spec: str,
    dtype: torch.dtype, align: int = 1,
) -> Tensor:  # fmt: skip
    """`moefx::scaled_grouped_wgrad`: per expert, codes a [rows, M] transposed times b [rows, N]; zeros of no rows."""
    E, M, N = offsets.shape[0] - 1, a.shape[1], b.shape[1]
    g = a.new_empty(E, M, N, dtype=dtype)
    (AR, AC), (BR, BC) = blocks_of(a_spec), blocks_of(b_spec)
    as_, bs = as_bytes(a_scales).contiguous(), as_bytes(b_scales).contiguous()
    BK = depth_of(AR, BR)
    kernel, axis, rows, warps, stages = _scaled_grouped_wgrad, 0, BM, 8, 4
    more: dict[str, bool] = {}
    if align % ALIGN == 0 and lies_by_columns(a) and lies_by_columns(b):
        whole = M % BM == 0 and N % BN == 0
        twice = whole and AC in (0, 1) and is_hopper(g.device)
        kernel, axis, more = _turned_wgrad, 1, {"WHOLE": whole, "TWICE": twice}
        if twice:
            rows, warps, stages = BM // 2, 4, 3 if BK == 128 else 4
    else:
        a, b = a.contiguous(), b.contiguous()
    # One program per tile, not a loop over tiles: experts differ in depth, and the device's scheduler evens that out.
    launch(
        kernel, (E * cdiv(M, BM) * cdiv(N, BN),), a, as_, b, bs, offsets, g, M, N,
        a.stride(axis), b.stride(axis), as_.stride(0), bs.stride(0), BE=triton.next_power_of_2(E + 1), BAND=BAND,
        BM=rows, BN=BN, BK=BK, AR=AR, AC=AC, BR=BR, BC=BC, AS_BYTES=as_.dtype == torch.uint8,
        BS_BYTES=bs.dtype == torch.uint8, **more, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return g


def specimens() -> list[Specimen]:
    """The built-in recipes' at the sizes of Qwen3-30B-A3B and DeepSeek-V3, and of sizes that fit no tile."""
    block, mx = "e4m3 128x1 po2/rceil eps=1e-10", "e4m3 32x1 e8m0/rceil"
    column, tensor, wide = "e4m3 column f32/exact", "e4m3 tensor f32/exact", "e5m2 tensor f32/exact"
    qwen, deepseek, odd = (65536, 1536, 2048, 128), (65536, 4096, 7168, 256), (2997, 160, 336, 6)
    asked: tuple[tuple[str, tuple[int, ...], str, str, bool, int], ...] = (
        ("Qwen3", qwen, block, block, True, 255),
        ("DeepSeek-V3", deepseek, block, block, True, 255),
        ("odd", odd, block, block, True, 255),
        ("Qwen3 mx", qwen, mx, mx, True, 255),
        ("Qwen3 columns", qwen, column, column, True, 255),
        ("Qwen3, decoded", qwen, block, block, False, 255),
        ("odd, decoded", odd, block, block, False, 255),
        ("Qwen3 mx, decoded", qwen, mx, mx, False, 224),
        ("Qwen3 columns, decoded", qwen, column, column, False, 200),
        ("Qwen3 tensor e5m2, decoded", qwen, wide, tensor, False, 255),
    )
    return [_specimen(*a) for a in asked]


def _specimen(name: str, sizes: tuple[int, ...], a_spec: str, b_spec: str, turned: bool, registers: int) -> Specimen:
    (S, M, N, E), align = sizes, 16 if turned else 1
    offsets = torch.empty(E + 1, dtype=torch.int32, device="meta")

    def coded(spec: str, width: int) -> tuple[Tensor, Tensor]:
        s = QuantSpec.parse(spec)
        scales = torch.empty(s.scale_shape((S, width), E), dtype=s.scale_dtype, device="meta")
        return empty_codes(offsets, spec, (S, width), align), scales

    def call() -> Any:
        return scaled_grouped_wgrad(*coded(a_spec, M), *coded(b_spec, N), offsets, a_spec, b_spec, torch.float32, align)

    # Without a scale in between, the compiler may leave the sum over blocks to the tensor cores; those for fp8, which
    # are too coarse for it, must not get it.
    has = ("QGMMA", "FFMA|FADD", "LDGSTS.128") if turned else ("HGMMA", "LDGSTS")
    return Specimen(name, call, has=has, lacks=("HMMA", *(("HGMMA",) if turned else ())), registers=registers)
