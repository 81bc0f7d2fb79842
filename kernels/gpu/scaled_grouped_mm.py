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

Tiles. fp8 products have sums of their own before they are added, so a tile takes twice the registers of its sums: 64
and 64 in each of 256 threads for 128 x 128, which leaves a processor to one program. Its eight warps meet at every
barrier, and nothing is multiplied while they scale and add. On sm_90 four warps therefore compute the tile as two
halves of 64 rows, of which the second's products take the first's registers: 128 sums, 64 products, and 63 for all
else. That spills unless loads have no masks of rows and columns, and 32-bit addresses within a tile. Three stages of
128 of the depth are 96 KiB: two programs share a processor, and one multiplies while the other adds, at the traffic of
128 x 128 (two tiles of 64 x 128 would read half as much again). It takes N and K of whole tiles; others, decoded
operands, and sm_100, where this spills, keep eight warps, and four stages. What the sizes do on a device is not yet
measured.
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
from .launch import cdiv, is_hopper, launch, processors
from .sass import Specimen
from .schedule import in_bands, rows_of, tiles_until

Tensor = torch.Tensor
BAND = 8
BN = 128


@triton.jit
def load_scale(at, mask, BYTES: tl.constexpr):
    """Scales as fp32; `BYTES`: exponents of powers of two. Without a mask, all are there."""
    if BYTES:
        return scale_value(tl.load(at, mask, None if mask is None else 0).to(tl.int32))
    else:
        return tl.load(at, mask, None if mask is None else 0.0)


@triton.jit
def load_column_scale(at, mask, BYTES: tl.constexpr, AGAIN: tl.constexpr):
    """Scales of columns, of which each thread of a product needs a quarter: 32 in four warps.

    Those load one each, decode it, and exchange them through shared memory. Bytes would be exchanged before they are
    decoded, 32 in each thread, but for a maximum of equals, behind which the compiler does not look. `AGAIN`: as they
    were loaded before; .ca is the default and yet another instruction, lest all be kept in registers.
    """
    CACHE: tl.constexpr = ".ca" if AGAIN else ""
    if BYTES:
        s = scale_value(tl.load(at, mask, None if mask is None else 0, cache_modifier=CACHE).to(tl.int32))
        bits = s.to(tl.int32, bitcast=True)
        return tl.max(tl.join(bits, bits), 1).to(tl.float32, bitcast=True)
    else:
        return tl.load(at, mask, None if mask is None else 0.0, cache_modifier=CACHE)


@triton.jit
def at_block(index, SIZE: tl.constexpr):
    """Block of an index; all are in one where SIZE is 0."""
    if SIZE == 0:
        return index * 0
    else:
        return index // SIZE


@triton.jit
def _codes(at, inside, WHOLE: tl.constexpr):
    """A tile of codes; zero outside, if there is an outside."""
    if WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _weights(at, inside, held, WHOLE_K: tl.constexpr, WHOLE_N: tl.constexpr):
    """The same of a side that may end in two directions. Where columns are contiguous, none may stand for another."""
    if WHOLE_K:
        return _codes(at, held, WHOLE_N)
    elif WHOLE_N:
        return _codes(at, inside, False)
    else:
        return _codes(at, inside & held, False)


@triton.jit
def _promoted(
    acc, a, b, sx, sw, held,
    XC: tl.constexpr, WC: tl.constexpr, ONE: tl.constexpr, XS_BYTES: tl.constexpr, WS_BYTES: tl.constexpr,
    WIDEN: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Sums and one block of the depth: its product from zero, times the scales at `sx` and `sw`."""
    if WIDEN:
        p = tl.dot(a.to(tl.float16), b.to(tl.float16))
    else:
        p = tl.dot(a, b)
    if XC > 0 and WC > 0 and ONE:
        p = p * (load_scale(sx, None, XS_BYTES) * load_scale(sw, None, WS_BYTES))[:, None]
    else:
        if XC > 0:
            p = p * load_scale(sx, None, XS_BYTES)[:, None]
        if WC > 0:
            if ONE:
                p = p * load_scale(sw, None, WS_BYTES)
            else:
                p = p * load_column_scale(sw, held, WS_BYTES, AGAIN)[None, :]
    return acc + p


@triton.jit
def _finish(
    acc, top, first, end, held, cols, n, n_tiles, N, sx, sw, y, codes, scales, least,
    BM: tl.constexpr, XC: tl.constexpr, WC: tl.constexpr, XS_BYTES: tl.constexpr, WS_BYTES: tl.constexpr,
    ELEM: tl.constexpr, EMAX: tl.constexpr, BOUND: tl.constexpr, LEAST: tl.constexpr, MAX: tl.constexpr,
    EPS: tl.constexpr, ZERO_ONE: tl.constexpr, PO2: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Write those of BM rows from `top` on that are of this tile, and their codes; `held`: an expert has them."""
    rows = top + tl.arange(0, BM)
    live = (rows >= first) & (rows < end)
    if XC == 0:
        acc = acc * load_scale(sx, live & held, XS_BYTES)[:, None]
    if WC == 0:
        acc = acc * load_scale(sw, (cols < N) & held, WS_BYTES)[None, :]
    kept = live[:, None] & (cols < N)[None, :]
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
            tl.store(s_at, tl.where(held, field, 0).to(tl.uint8), mask=live)
        else:
            tl.store(s_at, tl.where(held, s, least), mask=live)


@triton.jit
def _scaled_grouped_mm(
    x, xs, w, ws, offsets, y, codes, scales, S, N, K, E, x_row, w_expert, w_n, w_k, xs_row, xs_k, ws_expert, ws_n,
    ws_k, least,
    BE: tl.constexpr, BAND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TWICE: tl.constexpr,
    XR: tl.constexpr, XC: tl.constexpr, WR: tl.constexpr, WC: tl.constexpr, XS_BYTES: tl.constexpr,
    WS_BYTES: tl.constexpr, WIDEN: tl.constexpr, WHOLE_K: tl.constexpr, WHOLE_N: tl.constexpr,
    ELEM: tl.constexpr, EMAX: tl.constexpr, BOUND: tl.constexpr, LEAST: tl.constexpr, MAX: tl.constexpr,
    EPS: tl.constexpr, ZERO_ONE: tl.constexpr, PO2: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """XR x XC and WR x WC are the blocks of the operands, 0 for all of an axis; the rest is `codec.constants`."""
    TALL: tl.constexpr = 2 * BM if TWICE else BM
    until = tiles_until(offsets, S, E, BE, TALL)
    m_tiles, n_tiles = tl.max(until, 0), tl.cdiv(N, BN)
    depth = tl.arange(0, BK)
    for tile in range(tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0)):
        m, n = in_bands(tile, m_tiles, n_tiles, BAND)
        expert, first, end = rows_of(m, until, offsets, S, E, TALL)
        # Rows of others are multiplied and not stored, so that loads need no mask; in tiles that might reach behind the
        # last row of all, an expert's last stands for those behind it. 32 bits do within a tile, and take less room.
        row, col, top = tl.arange(0, BM), tl.arange(0, BN), first
        if TWICE:
            top = tl.minimum(first, S - TALL)
        else:
            row = tl.minimum(row, end - first - 1)
        x_tile, w_tile = x + top.to(tl.int64) * x_row, w + expert.to(tl.int64) * w_expert + n.to(tl.int64) * BN * w_n
        x_at, w_at = row[:, None] * x_row + depth[None, :], col[None, :] * w_n + depth[:, None] * w_k
        sx_tile = xs + (top if XR == 1 else expert).to(tl.int64) * xs_row
        sw_tile = ws + expert.to(tl.int64) * ws_expert
        sx_at = row * xs_row if XR == 1 else row * 0
        if WR == BN:  # one scale for the tile
            sw_at = n * ws_n
        else:
            sw_at = at_block(n * BN + col, WR) * ws_n
        w_held = None if WHOLE_N else n * BN + col < N
        acc = tl.zeros((BM, BN), tl.float32)
        if TWICE:
            acc_2, sx_2 = tl.zeros((BM, BN), tl.float32), BM * xs_row if XR == 1 else 0
        for k in range(0, tl.where(expert < E, K, 0), BK):  # rows of nobody stay zero
            inside = depth < K - k
            b = _weights(w_tile + k * w_k + w_at, inside[:, None], col[None, :] < N - n * BN, WHOLE_K, WHOLE_N)
            a = _codes(x_tile + k + x_at, inside[None, :], WHOLE_K)
            sx, sw = sx_tile, sw_tile
            if XC > 0:
                sx += k // XC * xs_k
            if WC > 0:
                sw += k // WC * ws_k
            at_w = sw + sw_at
            acc = _promoted(
                acc, a, b, sx + sx_at, at_w, w_held, XC, WC, WR == BN, XS_BYTES, WS_BYTES, WIDEN, False
            )  # fmt: skip
            if TWICE:
                a = _codes(x_tile + BM * x_row + k + x_at, inside[None, :], WHOLE_K)
                acc_2 = _promoted(
                    acc_2, a, b, sx + sx_2 + sx_at, at_w, w_held, XC, WC, WR == BN, XS_BYTES, WS_BYTES, WIDEN, True
                )  # fmt: skip
        cols = n * BN + tl.arange(0, BN)
        _finish(
            acc, top, first, end, expert < E, cols, n, n_tiles, N, sx_tile + sx_at, sw_tile + sw_at, y, codes, scales,
            least, BM, XC, WC, XS_BYTES, WS_BYTES, ELEM, EMAX, BOUND, LEAST, MAX, EPS, ZERO_ONE, PO2, BYTES,
        )  # fmt: skip
        if TWICE:
            _finish(
                acc_2, top + BM, first, end, expert < E, cols, n, n_tiles, N, sx_tile + sx_2 + sx_at, sw_tile + sw_at,
                y, codes, scales, least,
                BM, XC, WC, XS_BYTES, WS_BYTES, ELEM, EMAX, BOUND, LEAST, MAX, EPS, ZERO_ONE, PO2, BYTES,
            )  # fmt: skip


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
    # A tile of 128 rows wastes 64 per expert, which hurts where experts have few. Scales of columns, and those for
    # every 32 of the depth, take registers, which half a tile leaves. Two programs of four warps share a processor.
    hopper = is_hopper(x.device)
    twice = hopper and not widen and not few and K % BK == 0 and N % BN == 0
    BM = 64 if twice or few or BK < 128 or (WC > 0 and WR != BN) else 128
    warps = 4 if BM == 64 and ((few and BK == 128) or (hopper and not widen)) else 8
    stages = 3 if widen or (twice and BK == 128) else 4
    programs = processors(x.device) * (2 if warps == 4 else 1)
    tall = 2 * BM if twice else BM
    xs, ws = as_bytes(x_scales), as_bytes(w_scales)
    launch(
        _scaled_grouped_mm, (min(programs, (cdiv(S, tall) + E) * cdiv(N, BN)) if S else 0,), x, xs, w, ws, offsets, y,
        *out, S, N, K, E, x.stride(0), *w.stride(), *xs.stride(), *ws.stride(), least,
        BE=triton.next_power_of_2(E + 1), BAND=BAND, BM=BM, BN=BN, BK=BK, XR=XR, XC=XC, WR=WR, WC=WC,
        XS_BYTES=xs.dtype == torch.uint8, WS_BYTES=ws.dtype == torch.uint8, WIDEN=widen,
        WHOLE_K=K % BK == 0, WHOLE_N=N % BN == 0, TWICE=twice, **constants, num_warps=warps, num_stages=stages,
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
            ("fprop mx", lambda: fprop(_MX, _MX), "QGMMA", 255),
            ("dgrad mx", lambda: dgrad(_MX, _MX), "QGMMA", 255),
            ("dgrad mx, decoded", lambda: dgrad(_MX, _MX, False), "HGMMA", 255),
            ("fprop of columns", lambda: fprop(_ROW, "e4m3 1x128 po2/rceil"), "QGMMA", 255),
            ("fprop rows", lambda: fprop(row, row), "QGMMA", 255),
            ("dgrad rows", lambda: dgrad(row, row), "QGMMA", 255),
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
