"""`overlap` and its backward: squared cosines between the activations of one token's experts.

A program takes 64 rows, the choices of 64 / k tokens with k filled up to a power of two, gathers them by their slots,
block by block of I, and multiplies the tile by its own transpose: one product gives the lengths (its diagonal), the
inner products of a token's rows (blocks along the diagonal), and some of different tokens, which are not looked at.
That wastes tensor-core work and no memory: of a gathered tile, which is both operands, every row is read once.

Bytes: forward b S I + 8 T k; backward b 2 S I read, the second time mostly from L2, and b S I written. With
c_ev = G_ev / (|z_e| |z_v|) and c_ee = 0 the gradient is one more product with the same rows,

    dz_e = sum_v m_ev z_v,    m_ev = 4 dout c_ev / (|z_e| |z_v|),    m_ee = -4 dout sum_v c_ev^2 / |z_e|^2

bf16 rows are multiplied as they are, exactly, in fp32 accumulators. m is split in two bf16 numbers, whose sum has 16
bits: the two products cost less than the reading of z, and a gradient that is a difference of near terms needs them.
fp32 and fp16 rows take fp32 products. A row longer than 1.8e19, whose square is no fp32 number, makes its token NaN
here and zero in the reference.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch
from .sass import Specimen

Tensor = torch.Tensor
_ROWS = 64  # the least that one warp group multiplies at a time
_FILL = 4096  # elements that a program of `_zero_unheld` writes at a time


@triton.jit
def _gram(
    z, row, held, I, eps2,
    KP: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Cosines [BM, BM] of rows of one token, 1/|z| as a column and as a row, and |z|^2 as a column."""
    at_I = tl.arange(0, BI)
    gram = tl.zeros((BM, BM), tl.float32)
    for start in range(0, I, BI):
        inside = held[:, None] & (start + at_I < I)[None, :]
        tile = tl.load(z + row[:, None] * I + start + at_I[None, :], mask=inside, other=0.0)
        if WIDE:
            tile = tile.to(tl.float32)
            gram = tl.dot(tile, tl.trans(tile), gram, input_precision="ieee")
        else:
            gram = tl.dot(tile, tl.trans(tile), gram)
    at = tl.arange(0, BM)
    itself = at[:, None] == at[None, :]
    square = tl.where(itself, gram, 0.0)
    square_col, square_row = tl.sum(square, 1)[:, None], tl.sum(square, 0)[None, :]
    # Not tl.maximum, which drops NaN.
    col = tl.rsqrt(tl.where(square_col < eps2, eps2, square_col))
    row_ = tl.rsqrt(tl.where(square_row < eps2, eps2, square_row))
    together = (at[:, None] // KP == at[None, :] // KP) & (at[:, None] != at[None, :])
    return tl.where(together, gram * col * row_, 0.0), col, row_, square_col


@triton.jit
def _rows(slot, T, K, KP: tl.constexpr, BM: tl.constexpr):
    """Of this program's rows: the token, the row of z (int64), and whether there is one."""
    at = tl.arange(0, BM)
    token, choice = tl.program_id(0) * (BM // KP) + at // KP, at % KP
    row = tl.load(slot + token.to(tl.int64) * K + choice, mask=(token < T) & (choice < K), other=-1).to(tl.int64)
    return token, row, row >= 0


@triton.jit
def _overlap(
    z, slot, out, T, K, I, eps2,
    KP: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    _, row, held = _rows(slot, T, K, KP, BM)
    cos, _, _, _ = _gram(z, row, held, I, eps2, KP, BM, BI, WIDE)
    total = tl.sum(tl.reshape(tl.sum(cos * cos, 1), (BM // KP, KP)), 1)
    token = tl.program_id(0) * (BM // KP) + tl.arange(0, BM // KP)
    tl.store(out + token, total, mask=token < T)


@triton.jit
def _overlap_backward(
    dout, z, slot, dz, is_held, T, K, I, eps2,
    KP: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    token, row, held = _rows(slot, T, K, KP, BM)
    tl.store(is_held + row, tl.full((BM,), 1, tl.uint8), mask=held)
    cos, col, row_, square = _gram(z, row, held, I, eps2, KP, BM, BI, WIDE)
    d = tl.load(dout + token, mask=token < T, other=0.0).to(tl.float32)[:, None]
    itself, at_I = tl.arange(0, BM)[:, None] == tl.arange(0, BM)[None, :], tl.arange(0, BI)
    # A row shorter than eps is divided by eps, not by its length: nothing to take away along it.
    along = tl.where(square > eps2, tl.sum(cos * cos, 1)[:, None], 0.0)
    m = 4 * d * col * (tl.where(itself, -along, cos) * row_)
    # Not even NaN reaches other tokens: zero in m between them, and zero in the tile, where zero times NaN were NaN.
    m = tl.where(token[:, None] == token[None, :], m, 0.0)
    sound = held[:, None] & (square < float("inf"))
    high = m.to(tl.bfloat16)
    low = (m - high.to(tl.float32)).to(tl.bfloat16)
    for start in range(0, I, BI):
        at = row[:, None] * I + start + at_I[None, :]
        inside = (start + at_I < I)[None, :]
        tile = tl.load(z + at, mask=sound & inside, other=0.0)
        if WIDE:
            grad = tl.dot(m, tile.to(tl.float32), input_precision="ieee")
        else:
            grad = tl.dot(high, tile, tl.dot(low, tile))
        tl.store(dz + at, grad.to(dz.dtype.element_ty), mask=held[:, None] & inside)


@triton.jit
def _zero_unheld(dz, is_held, S, I, BS: tl.constexpr, BI: tl.constexpr):
    """Zeros in the rows that no choice holds: alignment padding, other ranks' rows."""
    row = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    at_I = tl.program_id(1) * BI + tl.arange(0, BI)
    empty = tl.load(is_held + row, mask=row < S, other=1) == 0
    zero = tl.zeros((BS, BI), dz.dtype.element_ty)
    tl.store(dz + row[:, None] * I + at_I[None, :], zero, mask=empty[:, None] & (at_I < I)[None, :])


def _constants(z: Tensor, k: int, backward: bool = False) -> dict[str, Any]:
    # 64 x 128 bf16 is 16 KiB: four stages leave room for three programs on a multiprocessor, and 256 contiguous bytes
    # of a row are gathered at a time. The backward, which holds the cosines while it multiplies, takes half of that to
    # save registers. fp32 products go through registers, where a tile of 32 columns is what fits.
    wide = z.dtype != torch.bfloat16
    shape = {"KP": triton.next_power_of_2(k), "BM": _ROWS, "BI": 32 if wide else 64 if backward else 128, "WIDE": wide}
    return {**shape, "num_warps": 8 if wide else 4, "num_stages": 2 if wide else 4}


def overlap(z_SI: Tensor, slot_Tk: Tensor, eps: float = 1e-12) -> Tensor:
    """See `moefx.dialect.overlap`: z [S, I] bf16, fp16 or fp32, slot [T, k] with -1 for dropped -> [T] fp32."""
    (T, k), I = slot_Tk.shape, z_SI.shape[1]
    out = torch.empty(T, dtype=torch.float32, device=z_SI.device)
    c = _constants(z_SI, k)
    grid = (cdiv(T, c["BM"] // c["KP"]),)
    launch(_overlap, grid, z_SI.contiguous(), slot_Tk.contiguous(), out, T, k, I, eps * eps, **c)
    return out


def overlap_backward(dout_T: Tensor, z_SI: Tensor, slot_Tk: Tensor, eps: float = 1e-12) -> Tensor:
    """Gradient of `overlap` with respect to z, in its dtype; zero in rows that no choice holds."""
    (T, k), (S, I) = slot_Tk.shape, z_SI.shape
    dz = torch.empty((S, I), dtype=z_SI.dtype, device=z_SI.device)
    held = torch.zeros(S, dtype=torch.uint8, device=z_SI.device)
    c = _constants(z_SI, k, backward=True)
    tensors = (dout_T.contiguous(), z_SI.contiguous(), slot_Tk.contiguous(), dz, held)
    launch(_overlap_backward, (cdiv(T, c["BM"] // c["KP"]),), *tensors, T, k, I, eps * eps, **c)
    bi = min(triton.next_power_of_2(I), 512)
    bs = _FILL // bi
    launch(_zero_unheld, (cdiv(S, bs), cdiv(I, bi)), dz, held, S, I, BS=bs, BI=bi, num_warps=4)
    return dz


def specimens() -> list[Specimen]:
    """Qwen3-30B-A3B, DeepSeek-V3, Qwen3-Next (k = 10), and odd sizes in fp32."""

    def calls(T: int, k: int, I: int, dtype: torch.dtype) -> tuple[Any, Any]:
        z = torch.empty((T * k, I), dtype=dtype, device="meta")
        slot = torch.empty((T, k), dtype=torch.int64, device="meta")
        dout = torch.empty(T, device="meta")
        return lambda: overlap(z, slot), lambda: overlap_backward(dout, z, slot)

    found, bf16 = [], torch.bfloat16
    for name, T, k, I in (("Qwen3", 8192, 8, 768), ("DeepSeek-V3", 8192, 8, 2048), ("k=10", 8192, 10, 512)):
        forward, backward = calls(T, k, I, bf16)
        gates: dict[str, Any] = {"has": ("HGMMA", "LDGSTS"), "lacks": ("HMMA",)}
        found.append(Specimen(f"{name} bf16", forward, registers=128, **gates))
        found.append(Specimen(f"{name} bf16 backward", backward, registers=192, **gates))
    forward, backward = calls(4001, 6, 1100, torch.float32)
    found.append(Specimen("k=6 fp32", forward, has=("FFMA",), lacks=("HMMA",)))
    found.append(Specimen("k=6 fp32 backward", backward, has=("FFMA",), lacks=("HMMA",)))
    return found
