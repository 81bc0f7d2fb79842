"""Grouped products of quantized operands, and, behind one, codes of its result.

    y [S, N]     rows of expert e of x [S, K] times w[e] [N, K] transposed: fprop, and dgrad with w a transposed view

Scales are taken out of the sum: a block of the depth (128, or 32 for MX) is one product of codes from zero, which is
multiplied by both scales and added in fp32. That is what keeps fp8 products usable on sm_90, whose fp8 tensor cores
add in about 14 bits; and it needs no scale to be a power of two. Scales of whole rows, columns or matrices are applied
once, at the end. The scale of a block is the fp32 product of the operands' two, so it over- or underflows where a
product of the blocks' largest values would.

Which tensor-core instruction. Those for fp8 (QGMMA) read both operands with the depth contiguous: x [S, K], and w
[E, N, K] as a forward product finds it. The `orient_codes` pass sees to it that dgrad does, too. A w that is only a
view the other way is decoded: codes become fp16, exactly, on their way through registers, and are multiplied by HGMMA
at half the rate, with loads as asynchronous as before. Left to itself Triton keeps QGMMA for it, but loads it without
LDGSTS and scatters it to shared memory byte by byte.

Bytes of y: S K + E N K codes, 1/32 of that for scales (1/32 + 1/4096 with square blocks of w), S N out.

A tile of 128 x 128 x 128 holds 64 sums and 64 products in each of 256 threads; 256 x 128, or half as many threads,
spills. Four stages are 128 KiB of shared memory. What the sizes do on a device is not yet measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from moefx.precision.scaling import least_scale
from moefx.precision.spec import QuantSpec

from . import codec
from .codec import as_bytes, encode8, f32_scale, inverse, magnitude_bits, po2_field, scale_value
from .launch import cdiv, launch, processors
from .sass import Specimen
from .schedule import in_bands, rows_of, tiles_until

Tensor = torch.Tensor
BAND = 8
BN = 128


@triton.jit
def load_scale(at, mask, BYTES: tl.constexpr):
    """Scales as fp32; `BYTES`: exponents of powers of two."""
    if BYTES:
        return scale_value(tl.load(at, mask=mask, other=0).to(tl.int32))
    else:
        return tl.load(at, mask=mask, other=0.0)


@triton.jit
def at_block(index, SIZE: tl.constexpr):
    """Block of an index; all are in one where SIZE is 0."""
    if SIZE == 0:
        return index * 0
    else:
        return index // SIZE


@triton.jit
def _scaled_grouped_mm(
    x, xs, w, ws, offsets, y, codes, scales, S, N, K, E, x_row, w_expert, w_n, w_k, xs_row, xs_k, ws_expert, ws_n,
    ws_k, least,
    BE: tl.constexpr, BAND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, XR: tl.constexpr,
    XC: tl.constexpr, WR: tl.constexpr, WC: tl.constexpr, XS_BYTES: tl.constexpr, WS_BYTES: tl.constexpr,
    WIDEN: tl.constexpr, WHOLE_K: tl.constexpr, ELEM: tl.constexpr, EMAX: tl.constexpr, BOUND: tl.constexpr,
    LEAST: tl.constexpr, MAX: tl.constexpr, EPS: tl.constexpr, ZERO_ONE: tl.constexpr, PO2: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    """XR x XC and WR x WC are the blocks of the operands, 0 for all of an axis; the rest is `codec.constants`."""
    until = tiles_until(offsets, S, E, BE, BM)
    m_tiles, n_tiles = tl.max(until, 0), tl.cdiv(N, BN)
    for tile in range(tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0)):
        m, n = in_bands(tile, m_tiles, n_tiles, BAND)
        expert, first, end = rows_of(m, until, offsets, S, E, BM)
        rows, cols = first + tl.arange(0, BM), n * BN + tl.arange(0, BN)
        live, w_cut = rows < end, cols < N
        x_cut = live & (expert < E)  # what rows of nobody hold is not looked at
        x_rows, w_cols = x + rows.to(tl.int64) * x_row, w + expert.to(tl.int64) * w_expert + cols.to(tl.int64) * w_n
        xs_rows = xs + (rows.to(tl.int64) if XR == 1 else expert + rows * 0) * xs_row
        ws_cols, ws_cut = ws + expert.to(tl.int64) * ws_expert, expert < E
        if WR == BN:  # one scale for the tile
            ws_cols += n * ws_n
        else:
            ws_cols, ws_cut = ws_cols + at_block(cols, WR) * ws_n, ws_cut & w_cut
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, tl.where(expert < E, K, 0), BK):
            ks = k + tl.arange(0, BK)
            x_use = x_cut[:, None] if WHOLE_K else x_cut[:, None] & (ks < K)[None, :]
            w_use = w_cut[None, :] if WHOLE_K else w_cut[None, :] & (ks < K)[:, None]
            a = tl.load(x_rows[:, None] + ks[None, :], mask=x_use, other=0.0)
            b = tl.load(w_cols[None, :] + (ks * w_k)[:, None], mask=w_use, other=0.0)
            if WIDEN:
                p = tl.dot(a.to(tl.float16), b.to(tl.float16))
            else:
                p = tl.dot(a, b)
            if XC > 0 and WC > 0 and WR == BN:
                sx = load_scale(xs_rows + k // XC * xs_k, x_cut, XS_BYTES)
                sw = load_scale(ws_cols + k // WC * ws_k, ws_cut, WS_BYTES)
                p = p * (sx * sw)[:, None]
            else:
                if XC > 0:
                    p = p * load_scale(xs_rows + k // XC * xs_k, x_cut, XS_BYTES)[:, None]
                if WC > 0:
                    sw = load_scale(ws_cols + k // WC * ws_k, ws_cut, WS_BYTES)
                    p = p * (sw if WR == BN else sw[None, :])
            acc += p
        if XC == 0:
            acc = acc * load_scale(xs_rows, x_cut, XS_BYTES)[:, None]
        if WC == 0:
            acc = acc * load_scale(ws_cols, ws_cut, WS_BYTES)[None, :]
        kept = live[:, None] & w_cut[None, :]
        at = rows.to(tl.int64)[:, None] * N + cols[None, :]
        out = acc.to(y.dtype.element_ty)
        tl.store(y + at, out, mask=kept)
        if codes is not None:  # of the result as it is stored, a tile wide being a block wide
            v = out.to(tl.float32)
            top = tl.max(magnitude_bits(v), 1).to(tl.float32, bitcast=True)
            if PO2:
                field = po2_field(top, EMAX, BOUND, LEAST, EPS, ZERO_ONE)
                code, s = encode8(v * inverse(field)[:, None], ELEM), scale_value(field)
            else:
                s = f32_scale(top, MAX, EPS, ZERO_ONE)
                code = encode8(tl.math.div_rn(v, tl.broadcast_to(s[:, None], v.shape)), ELEM)
            tl.store(codes + at, code, mask=kept)
            s_at = scales + rows.to(tl.int64) * n_tiles + n
            if BYTES:
                tl.store(s_at, tl.where(expert < E, field, 0).to(tl.uint8), mask=live)
            else:
                tl.store(s_at, tl.where(expert < E, s, least), mask=live)


def blocks_of(spec: str) -> tuple[int, int]:
    """Rows and columns of a block, 0 for all of them."""
    s = QuantSpec.parse(spec)
    return s.br or 0, s.bc or 0


def depth_of(*blocks: int) -> int:
    """Depth of a step: the smallest block along it, and no more than 128."""
    return min(128, *(b for b in (*blocks, 128) if b))


def scaled_grouped_mm(
    x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, offsets: Tensor, x_spec: str, w_spec: str,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`moefx::scaled_grouped_mm`: codes x [S, K] times their expert's codes w [N, K], rows of nobody zero."""
    return _mm(x, x_scales, w, w_scales, offsets, x_spec, w_spec, dtype, None)[0]


def scaled_grouped_mm_quantize(
    x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, offsets: Tensor, x_spec: str, w_spec: str,
    dtype: torch.dtype, specs: Sequence[str],
) -> list[Tensor]:  # fmt: skip
    """`moefx::scaled_grouped_mm_quantize` for one spec of blocks 1x128: y, its codes and their scales."""
    (spec,) = specs
    return _mm(x, x_scales, w, w_scales, offsets, x_spec, w_spec, dtype, spec)


def _mm(
    x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, offsets: Tensor, x_spec: str, w_spec: str,
    dtype: torch.dtype, spec: str | None,
) -> list[Tensor]:  # fmt: skip
    S, (E, N, K) = x.shape[0], w.shape
    y = x.new_empty(S, N, dtype=dtype)
    made, least = [y], 0.0
    out: tuple[Tensor | None, Tensor | None] = (None, None)
    constants = dict.fromkeys(codec.constants(x_spec))
    if spec is not None:
        s = QuantSpec.parse(spec)
        made += [x.new_empty(S, N, dtype=s.format.storage), x.new_empty(S, cdiv(N, BN), dtype=s.scale_dtype)]
        out, least, constants = (as_bytes(made[1]), as_bytes(made[2])), least_scale(s), codec.constants(spec)
    (XR, XC), (WR, WC) = blocks_of(x_spec), blocks_of(w_spec)
    BK, widen, few = depth_of(XC, WC), w.stride(2) != 1, S < 192 * E
    # A tile of 128 rows wastes 64 per expert, which hurts where experts have few. Scales for every 32 of the depth take
    # registers, which half a tile leaves. Programs per processor: as many as shared memory and registers hold.
    BM = 64 if few or BK < 128 else 128
    warps, stages = 4 if few and BK == 128 else 8, 3 if widen else 4
    programs = processors(x.device) * (2 if warps == 4 else 1)
    xs, ws = as_bytes(x_scales), as_bytes(w_scales)
    launch(
        _scaled_grouped_mm, (min(programs, (cdiv(S, BM) + E) * cdiv(N, BN)) if S else 0,), x, xs, w, ws, offsets, y,
        *out, S, N, K, E, x.stride(0), *w.stride(), *xs.stride(), *ws.stride(), least,
        BE=triton.next_power_of_2(E + 1), BAND=BAND, BM=BM, BN=BN, BK=BK, XR=XR, XC=XC, WR=WR, WC=WC,
        XS_BYTES=xs.dtype == torch.uint8, WS_BYTES=ws.dtype == torch.uint8, WIDEN=widen,
        WHOLE_K=K % BK == 0, **constants, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return made


_ROW, _TILE = (f"e4m3 {block} po2/rceil eps=1e-10" for block in ("1x128", "128x128"))
_MX = "e4m3 1x32 e8m0/rceil"


def specimens() -> list[Specimen]:
    """Products of the built-in recipes at the sizes of Qwen3-30B-A3B and DeepSeek-V3, and of sizes that fit no tile."""
    found = []
    for name, T, H, I, E, k in (
        ("Qwen3", 8192, 2048, 768, 128, 8), ("DeepSeek-V3", 8192, 7168, 2048, 256, 8), ("odd", 999, 336, 80, 6, 3),
        ("few rows", 256, 2048, 768, 128, 8),
    ):  # fmt: skip
        found += _specimens(name, T * k, H, I, E)
    return found


def _specimens(name: str, S: int, H: int, I: int, E: int) -> list[Specimen]:
    bf16, offsets = torch.bfloat16, torch.empty(E + 1, dtype=torch.int32, device="meta")

    def coded(spec: str, *shape: int, rows: bool = False) -> tuple[Tensor, Tensor]:
        s = QuantSpec.parse(spec)
        scales = torch.empty(s.scale_shape(shape, E if rows else None), dtype=s.scale_dtype, device="meta")
        return torch.empty(*shape, dtype=s.format.storage, device="meta"), scales

    def fprop(x: str, w: str) -> Any:
        return scaled_grouped_mm(*coded(x, S, H, rows=True), *coded(w, E, 2 * I, H), offsets, x, w, bf16)

    def dgrad(x: str, w: str, copied: bool = True) -> Any:
        codes, scales = coded(str(QuantSpec.parse(w).transposed()), E, 2 * I, H)
        turned = coded(w, E, H, 2 * I)[0] if copied else codes.mT  # scales of a copy are a view still
        return scaled_grouped_mm(*coded(x, S, 2 * I, rows=True), turned, scales.mT, offsets, x, w, bf16)

    def coded_fprop() -> Any:
        x, w = coded(_ROW, S, H, rows=True), coded(_TILE, E, 2 * I, H)
        return scaled_grouped_mm_quantize(*x, *w, offsets, _ROW, _TILE, bf16, [_ROW])

    made: list[tuple[str, Any, str, int]] = [
        ("fprop", lambda: fprop(_ROW, _TILE), "QGMMA", 255),
        ("fprop, codes of it", coded_fprop, "QGMMA", 255),
        ("dgrad", lambda: dgrad(_ROW, _TILE), "QGMMA", 255),
        ("dgrad, decoded", lambda: dgrad(_ROW, _TILE, False), "HGMMA", 255),
    ]
    if name == "Qwen3":
        tensor, row = (f"e4m3 {block} f32/exact" for block in ("tensor", "row"))
        wide = "e5m2 tensor f32/exact"
        made += [
            ("fprop mx", lambda: fprop(_MX, _MX), "QGMMA", 216),
            ("dgrad mx", lambda: dgrad(_MX, _MX), "QGMMA", 216),
            ("dgrad mx, decoded", lambda: dgrad(_MX, _MX, False), "HGMMA", 255),
            ("fprop rows", lambda: fprop(row, row), "QGMMA", 220),
            ("dgrad rows", lambda: dgrad(row, row), "QGMMA", 220),
            ("dgrad tensor e5m2", lambda: dgrad(wide, tensor), "QGMMA", 255),
            ("dgrad tensor e5m2, decoded", lambda: dgrad(wide, tensor, False), "HGMMA", 250),
        ]
    # Without a scale in between, the compiler may leave the sum over blocks to the tensor cores; those for fp8, which
    # are too coarse for it, must not get it.
    other = {"QGMMA": ("HMMA", "HGMMA"), "HGMMA": ("HMMA",)}
    return [
        Specimen(
            f"{name} {what}", call, has=(op, "LDGSTS.128", *(("FFMA|FADD",) if op == "QGMMA" else ())), lacks=other[op],
            registers=registers,
        )
        for what, call, op, registers in made
    ]  # fmt: skip
