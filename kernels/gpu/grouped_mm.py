"""Grouped matrix products in bf16 and fp16, with rows gathered on the way in and a gated activation on the way out.

    y [S, N]     rows of expert e of x [S, K], or x[token] of x [T, K], times w[e] [N, K] transposed
    h, a         the same with N = 2 I, and behind it the activation of its two halves
    g [E, M, N]  per expert, a [rows, M] transposed times b [rows, N]: the gradient of a weight

Elements moved, where weights and rows are read once: S K + E N K + S N, and S I more with an activation. A gathered
product reads T rows, for which a permute and a product move T + 2 S. Sums are in fp32 and rounded once.

A tile of 128 x 256 with 8 warps is the largest that sm_90 multiplies (HGMMA) without spilling, and fills 128 of each
thread's registers with sums; 64 of the depth in 4 stages are 192 KiB of the 227 KiB of shared memory. Loads are by
pointers, because rows are gathered one by one, and overlap with the products (LDGSTS).

Rows of an expert do not fill its last tile: half a tile per expert is computed for nobody. Few rows per expert
therefore take tiles of 64 rows. What the sizes do on a device is not yet measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from .activation import EXACT, constants, glu_value
from .launch import cdiv, launch, processors
from .sass import Specimen
from .schedule import in_bands, rows_of, tiles_until

Tensor = torch.Tensor
BAND = 8  # tiles of rows that take turns on one tile of columns, so that what is read stays in L2


@triton.jit
def _sources(token, rows, live):
    """Rows of x that the rows of a tile are, and whether they are any."""
    if token is None:
        return rows.to(tl.int64), live
    else:  # a return behind the branch would be compiled for both
        source = tl.load(token + rows, mask=live, other=-1).to(tl.int64)
        return source, source >= 0


@triton.jit
def _load(at, inner, outer, K, N, WHOLE_K: tl.constexpr, WHOLE_N: tl.constexpr):
    """A tile of weights [depth, columns]; masks only where a side is no multiple of its tile."""
    if WHOLE_K and WHOLE_N:
        tile = tl.load(at)
    elif WHOLE_K:
        tile = tl.load(at, mask=(outer < N)[None, :], other=0.0)
    elif WHOLE_N:
        tile = tl.load(at, mask=(inner < K)[:, None], other=0.0)
    else:
        tile = tl.load(at, mask=(inner < K)[:, None] & (outer < N)[None, :], other=0.0)
    return tile


@triton.jit
def _grouped_mm(
    x, token, w, offsets, y, S, N, K, E, x_row, w_expert, w_n, w_k,
    BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
    WHOLE_K: tl.constexpr, WHOLE_N: tl.constexpr,
):  # fmt: skip
    until = tiles_until(offsets, S, E, BE, BM)
    m_tiles, n_tiles = tl.max(until, 0), tl.cdiv(N, BN)
    depth = tl.arange(0, BK)
    for tile in range(tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0)):
        m, n = in_bands(tile, m_tiles, n_tiles, BAND)
        expert, first, end = rows_of(m, until, offsets, S, E, BM)
        rows, cols = first + tl.arange(0, BM), n * BN + tl.arange(0, BN)
        live = rows < end
        source, held = _sources(token, rows, live)
        x_rows, w_cols = x + source * x_row, w + expert.to(tl.int64) * w_expert + cols * w_n
        a_at, b_at = x_rows[:, None] + depth[None, :], w_cols[None, :] + (depth * w_k)[:, None]
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, tl.where(expert < E, K, 0), BK):  # rows of nobody stay zero
            use = held[:, None] if WHOLE_K else held[:, None] & (depth < K - k)[None, :]
            a = tl.load(a_at, mask=use, other=0.0)
            b = _load(b_at, depth, cols, K - k, N, WHOLE_K, WHOLE_N)
            acc = tl.dot(a, b, acc)
            a_at += BK
            b_at += BK * w_k
        y_rows = y + rows.to(tl.int64) * N
        out = acc.to(y.dtype.element_ty)
        tl.store(y_rows[:, None] + cols[None, :], out, mask=live[:, None] & (cols < N)[None, :])


@triton.jit
def _grouped_mm_glu(
    x, token, w, offsets, w_rows, h, a, S, I, K, E, x_row, w_expert, w_n, w_k,
    ACT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
    WHOLE_K: tl.constexpr, WHOLE_N: tl.constexpr,
):  # fmt: skip
    until = tiles_until(offsets, S, E, BE, BM)
    m_tiles, n_tiles = tl.max(until, 0), tl.cdiv(I, BN)
    depth = tl.arange(0, BK)
    for tile in range(tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0)):
        m, n = in_bands(tile, m_tiles, n_tiles, BAND)
        expert, first, end = rows_of(m, until, offsets, S, E, BM)
        rows, cols = first + tl.arange(0, BM), n * BN + tl.arange(0, BN)
        live = rows < end
        source, held = _sources(token, rows, live)
        x_rows, w_cols = x + source * x_row, w + expert.to(tl.int64) * w_expert + cols * w_n
        half = I.to(tl.int64) * w_n
        gate, up = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
        x_at, w_at = x_rows[:, None] + depth[None, :], w_cols[None, :] + (depth * w_k)[:, None]
        for k in range(0, tl.where(expert < E, K, 0), BK):
            use = held[:, None] if WHOLE_K else held[:, None] & (depth < K - k)[None, :]
            x_tile = tl.load(x_at, mask=use, other=0.0)
            gate = tl.dot(x_tile, _load(w_at, depth, cols, K - k, I, WHOLE_K, WHOLE_N), gate)
            up = tl.dot(x_tile, _load(w_at + half, depth, cols, K - k, I, WHOLE_K, WHOLE_N), up)
            x_at += BK
            w_at += BK * w_k
        kept = live[:, None] & (cols < I)[None, :]
        gate, up = gate.to(h.dtype.element_ty), up.to(h.dtype.element_ty)
        h_at = h + rows.to(tl.int64)[:, None] * (2 * I) + cols[None, :]
        tl.store(h_at, gate, mask=kept)
        tl.store(h_at + I, up, mask=kept)
        # The activation reads h as it is stored, so that the backward, which reads h, differentiates this function.
        act = glu_value(gate.to(tl.float32), up.to(tl.float32), ACT, LIMIT, ALPHA)
        if w_rows is not None:
            act = act * tl.load(w_rows + rows, mask=live, other=0.0).to(tl.float32)[:, None]
        tl.store(a + rows.to(tl.int64)[:, None] * I + cols[None, :], act.to(a.dtype.element_ty), mask=kept)


@triton.jit
def _grouped_wgrad(
    a, a_token, b, b_token, offsets, g, M, N, a_row, b_row,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
    WHOLE_M: tl.constexpr, WHOLE_N: tl.constexpr,
):  # fmt: skip
    m_tiles, n_tiles = tl.cdiv(M, BM), tl.cdiv(N, BN)
    expert = tl.program_id(0) // (m_tiles * n_tiles)
    m, n = in_bands(tl.program_id(0) % (m_tiles * n_tiles), m_tiles, n_tiles, BAND)
    ms, ns = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    end = tl.load(offsets + expert + 1)
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(tl.load(offsets + expert), end, BK):
        rows = first + tl.arange(0, BK)
        live = rows < end
        a_rows, a_held = _sources(a_token, rows, live)
        b_rows, b_held = _sources(b_token, rows, live)
        a_use = a_held[:, None] if WHOLE_M else a_held[:, None] & (ms < M)[None, :]
        b_use = b_held[:, None] if WHOLE_N else b_held[:, None] & (ns < N)[None, :]
        a_tile = tl.load(a + (a_rows * a_row)[:, None] + ms[None, :], mask=a_use, other=0.0)
        b_tile = tl.load(b + (b_rows * b_row)[:, None] + ns[None, :], mask=b_use, other=0.0)
        acc = tl.dot(tl.trans(a_tile), b_tile, acc)
    at = g + (expert.to(tl.int64) * M + ms)[:, None] * N + ns[None, :]
    tl.store(at, acc.to(g.dtype.element_ty), mask=(ms < M)[:, None] & (ns < N)[None, :])


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of a program's tile, and Triton's options for it."""

    BM: int
    BN: int
    BK: int = 64
    num_warps: int = 8
    num_stages: int = 4

    def options(self) -> dict[str, Any]:
        """As keywords of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def tile_of(rows: int, columns: int, aligned: bool) -> Tile:
    """The tile of a product with that many rows per expert.

    128 rows waste 64 per expert, which is a quarter of the work at 256 rows and more below; 64 rows waste half of that,
    and feed the tensor cores at half the reuse of a weight. Operands whose rows are not of 16 bytes are loaded by the
    element, through registers: a small tile leaves room for them.
    """
    if not aligned:
        return Tile(64, 64, 32, num_stages=2)
    if columns <= 128:
        return Tile(64, 128, num_warps=4)
    BM = 128 if rows >= 192 else 64
    return Tile(BM, 256, num_warps=BM // 16)  # sums take 128 registers of a thread


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _dense_weights(w: Tensor) -> Tensor:
    """Weights in which one of the last two axes is dense, as parameters and their transposes are."""
    return w if 1 in w.stride()[1:] else w.contiguous()


def _aligned(*tensors: Tensor) -> bool:
    """Whether Triton knows that rows begin at multiples of 16 bytes: it tells strides by 16 elements from others."""
    steps = (s for t in tensors for s in t.stride() if s != 1)
    return all(s % 16 == 0 for s in steps) and all(t.data_ptr() % 16 == 0 for t in tensors)


def _grid(S: int, E: int, columns: int, tile: Tile, device: torch.device) -> tuple[int]:
    """Programs: one per processor (a tile takes most of its shared memory), and no more than tiles there can be."""
    most = (cdiv(S, tile.BM) + E) * cdiv(columns, tile.BN)  # each expert, and nobody, may own a tile that is not full
    return (min(most, processors(device)) if S else 0,)


def grouped_mm(x_SK: Tensor, w_ENK: Tensor, offsets: Tensor) -> Tensor:
    """`moefx::grouped_mm`: rows of x [S, K] times their expert's weight [N, K], rows of nobody zero."""
    return _product(x_SK, None, w_ENK, offsets)


def permute_grouped_mm(x_TK: Tensor, token_S: Tensor, slot_Tk: Tensor, w_ENK: Tensor, offsets: Tensor) -> Tensor:
    """`moefx::permute_grouped_mm`: the same of rows x[token]; rows without a token are zero."""
    return _product(x_TK, token_S, w_ENK, offsets)


def _product(x: Tensor, token_S: Tensor | None, w: Tensor, offsets: Tensor) -> Tensor:
    x, w = _dense(x), _dense_weights(w)
    E, N, K = w.shape
    S = x.shape[0] if token_S is None else token_S.shape[0]
    y_SN = x.new_empty(S, N)
    t = tile_of(S // max(E, 1), N, _aligned(x, w, y_SN))
    launch(
        _grouped_mm, _grid(S, E, N, t, x.device), x, token_S, w, offsets, y_SN, S, N, K, E, x.stride(0), *w.stride(),
        BE=triton.next_power_of_2(E + 1), BM=t.BM, BN=t.BN, BK=t.BK, BAND=BAND,
        WHOLE_K=K % t.BK == 0, WHOLE_N=N % t.BN == 0, **t.options(),
    )  # fmt: skip
    return y_SN


def permute_grouped_mm_glu(
    x_TK: Tensor, token_S: Tensor, slot_Tk: Tensor, w: Tensor, offsets: Tensor, w_rows_S: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    """`moefx::permute_grouped_mm_glu`: h [S, 2I] of rows x[token], and the activation [S, I] of its halves."""
    x, w = _dense(x_TK), _dense_weights(w)
    (E, width, K), S = w.shape, token_S.shape[0]
    I = width // 2
    h, a = x.new_empty(S, width), x.new_empty(S, I)
    whole = tile_of(S // max(E, 1), width, _aligned(x, w, h, a))
    t = replace(whole, BN=whole.BN // 2)  # a half each for gate and up
    k = constants(kind)
    launch(
        _grouped_mm_glu, _grid(S, E, I, t, x.device), x, token_S, w, offsets,
        None if w_rows_S is None else w_rows_S.contiguous(), h, a, S, I, K, E, x.stride(0), *w.stride(),
        ACT=k["ACT"], LIMIT=k["LIMIT"], ALPHA=k["ALPHA"],
        BE=triton.next_power_of_2(E + 1), BM=t.BM, BN=t.BN, BK=t.BK, BAND=BAND,
        WHOLE_K=K % t.BK == 0, WHOLE_N=I % t.BN == 0, **t.options(), **EXACT,
    )  # fmt: skip
    return h, a


def grouped_wgrad(a_SM: Tensor, b_SN: Tensor, offsets: Tensor) -> Tensor:
    """`moefx::grouped_wgrad`: per expert, a [rows, M] transposed times b [rows, N]; empty experts get zeros."""
    return _gradient(a_SM, None, b_SN, None, offsets)


def permute_grouped_wgrad(
    dy_SM: Tensor, x_TK: Tensor, token_S: Tensor, slot_Tk: Tensor, offsets: Tensor, flip: bool = False
) -> Tensor:
    """`moefx::permute_grouped_wgrad`: the gradient [E, M, K] from rows x[token], or [E, K, M] if `flip`."""
    if flip:
        return _gradient(x_TK, token_S, dy_SM, None, offsets)
    return _gradient(dy_SM, None, x_TK, token_S, offsets)


def _gradient(a: Tensor, a_token: Tensor | None, b: Tensor, b_token: Tensor | None, offsets: Tensor) -> Tensor:
    a, b = _dense(a), _dense(b)
    E, M, N = offsets.shape[0] - 1, a.shape[1], b.shape[1]
    g_EMN = a.new_empty(E, M, N)
    t = tile_of(M, N, _aligned(a, b, g_EMN))
    if a_token is not None or b_token is not None:
        # Tokens are loaded ahead of the rows that they name, which takes half of the stages.
        t = replace(t, num_stages=2 * t.num_stages - 1)
    # One program per tile, not a loop over tiles: experts differ in depth, and the device's scheduler evens that out.
    launch(
        _grouped_wgrad, (E * cdiv(M, t.BM) * cdiv(N, t.BN),), a, a_token, b, b_token, offsets, g_EMN, M, N,
        a.stride(0), b.stride(0), BM=t.BM, BN=t.BN, BK=t.BK, BAND=BAND,
        WHOLE_M=M % t.BM == 0, WHOLE_N=N % t.BN == 0, **t.options(),
    )  # fmt: skip
    return g_EMN


def specimens() -> list[Specimen]:
    """Products of Qwen3-30B-A3B, DeepSeek-V3 and gpt-oss at 8192 tokens, and of sizes that fit no tile."""
    found = []
    for name, T, H, I, E, k in (
        ("Qwen3", 8192, 2048, 768, 128, 8), ("DeepSeek-V3", 8192, 7168, 2048, 256, 8), ("odd", 999, 333, 77, 6, 3),
        ("few rows", 256, 2048, 768, 128, 8), ("gpt-oss", 8192, 2880, 2880, 32, 4), ("narrow", 4096, 1040, 48, 16, 2),
    ):  # fmt: skip
        made = _specimens(name, T, H, I, E, k)
        found += made if name in ("Qwen3", "odd", "gpt-oss") else made[:1] + made[3:4]
    return found


def _specimens(name: str, T: int, H: int, I: int, E: int, k: int) -> list[Specimen]:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    S, ints = T * k, torch.int64
    x, rows, h, act = empty(T, H), empty(S, H), empty(S, 2 * I), empty(S, I)
    up, down, up_kn = empty(E, 2 * I, H), empty(E, H, I), empty(E, H, 2 * I).mT
    token, slot, w_rows = empty(S, dtype=ints), empty(T, k, dtype=ints), empty(S)
    offsets = empty(E + 1, dtype=torch.int32)
    even = name != "odd"
    has = ("HGMMA", "LDGSTS") if even else ("HGMMA",)
    calls = {
        "up": lambda: grouped_mm(rows, up, offsets),
        "dgrad of up": lambda: grouped_mm(h, up.mT, offsets),
        "wgrad of up": lambda: grouped_wgrad(h, rows, offsets),
        "gathered up, silu": lambda: permute_grouped_mm_glu(x, token, slot, up, offsets, w_rows, "silu"),
        "up stored [in, out]": lambda: grouped_mm(rows, up_kn, offsets),
        "down": lambda: grouped_mm(act, down, offsets),
        "gathered up": lambda: permute_grouped_mm(x, token, slot, up, offsets),
        "gathered up stored [in, out], gelu": lambda: permute_grouped_mm_glu(
            x, token, slot, up_kn, offsets, None, "gelu_tanh"
        ),
        "gathered wgrad": lambda: permute_grouped_wgrad(h, x, token, slot, offsets),
        "gathered wgrad, flipped": lambda: permute_grouped_wgrad(h, x, token, slot, offsets, True),
    }
    return [Specimen(f"{name} {what}", call, has=has, lacks=("HMMA",)) for what, call in calls.items()]
