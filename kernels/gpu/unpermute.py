"""Rows of experts back to tokens: the sum over a token's k rows, and the gradients of that sum.

`unpermute` reads k rows and writes one, (S + T) H elements: one program for each token and block of columns, with 16
bytes a thread and row and the loads of all rows in flight before the first is added. Sums are in fp32, in the order of
the choices, so that no atomics are needed and every run gives the same bits.

`unpermute_backward` reads a token's row of `dout` once, its k rows of `y`, and writes k rows: (T + 2 S) H elements. One
program holds a token's k inner products <dout, y> to their end, so that they are deterministic as well. As in
`permute`, rows without a token are searched for and zeroed by programs of their own.

What is in flight: up to eight rows, 128 bytes a thread; at 64 registers, 128 KiB a multiprocessor (backward: at 96, 80
KiB). Not yet measured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch
from .sass import TARGETS, Specimen

Tensor = torch.Tensor
THREADS = 128
ROWS = 64  # rows that a program searches for those without a token


@triton.jit
def _unpermute(
    y, slot, w, out, T, WEIGHTED: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (H + BLOCK - 1) // BLOCK
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    t = (tl.program_id(0) // blocks * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    for j in tl.range(0, K, loop_unroll_factor=UNROLL):
        row = tl.load(slot + t * K + j, mask=t < T, other=-1)
        held = row >= 0
        v = tl.load(y + row[:, None] * H + col, mask=held[:, None] & (col < H), other=0.0).to(tl.float32)
        if WEIGHTED:
            # A dropped pair has weight zero whatever `w` holds: a NaN there must not spread.
            v *= tl.load(w + t * K + j, mask=held, other=0.0).to(tl.float32)[:, None]
        total += v
    tl.store(out + t[:, None] * H + col, total.to(out.dtype.element_ty), mask=(t < T)[:, None] & (col < H))


@triton.jit
def _unpermute_backward(
    dout, y, token, slot, w, dy, dw, T, S, K: tl.constexpr, KB: tl.constexpr, H: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    if pid < T:
        for top in range(0, K, KB):
            j = top + tl.arange(0, KB)
            row = tl.load(slot + pid * K + j, mask=j < K, other=-1)
            weight = tl.load(w + pid * K + j, mask=row >= 0, other=0.0).to(tl.float32)
            inner = tl.zeros([KB, BLOCK // VECTOR], tl.float32)
            for left in range(0, H, BLOCK):
                col = left + tl.arange(0, BLOCK)
                mask = (row >= 0)[:, None] & (col < H)[None, :]
                at = row[:, None] * H + col[None, :]
                d = tl.load(dout + pid * H + col, mask=col < H, other=0.0).to(tl.float32)[None, :]
                v = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
                tl.store(dy + at, (d * weight[:, None]).to(dy.dtype.element_ty), mask=mask)
                # What one thread holds of a row is added at once: VECTOR times fewer sums to carry along.
                inner += tl.sum(tl.reshape(d * v, [KB, BLOCK // VECTOR, VECTOR]), 2)
            # d may hold NaN or infinity: a dropped pair gets zero, not their product with nothing
            total = tl.where(row >= 0, tl.sum(inner, 1), 0.0)
            tl.store(dw + pid * K + j, total.to(dw.dtype.element_ty), mask=j < K)
    else:
        first = (pid - T) * ROWS
        rows = first + tl.arange(0, ROWS)
        if tl.min(tl.load(token + rows, mask=rows < S, other=0), 0) < 0:
            for row in range(first, tl.minimum(first + ROWS, S)):
                if tl.load(token + row) < 0:
                    for left in range(0, H, BLOCK):
                        col = left + tl.arange(0, BLOCK)
                        tl.store(dy + row * H + col, tl.zeros([BLOCK], dy.dtype.element_ty), mask=col < H)


def unpermute(y_SH: Tensor, token_S: Tensor, order_S: Tensor, slot_Tk: Tensor, w_Tk: Tensor | None) -> Tensor:
    """Per token, the (weighted) sum over its k rows in fp32; slots marked -1 add nothing."""
    (T, k), H = slot_Tk.shape, y_SH.shape[1]
    out_TH = y_SH.new_empty(T, H)
    tile = THREADS * 16 // y_SH.element_size()
    block = min(tile, triton.next_power_of_2(max(H, 1)))
    while block * y_SH.element_size() > 512 and cdiv(H, block) * block * 8 > H * 9:
        block //= 2  # at most an eighth of a row's threads lie behind its end
    launch(
        _unpermute, (cdiv(T, tile // block) * cdiv(H, block),),
        y_SH.contiguous(), slot_Tk.contiguous(), y_SH if w_Tk is None else w_Tk.contiguous(), out_TH, T,
        K=k, WEIGHTED=w_Tk is not None, H=H, BLOCK=block, TOKENS=tile // block, UNROLL=min(max(k, 1), 8), num_warps=4,
        maxnreg=64,  # left to itself, the compiler takes 34 to 40, and waits for rows two by two
    )  # fmt: skip
    return out_TH


def unpermute_backward(
    dout_TH: Tensor, y_SH: Tensor, token_S: Tensor, order_S: Tensor, slot_Tk: Tensor, w_Tk: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows of `dout` times their weights, and per pair the inner product of its rows of `dout` and `y`."""
    (T, k), (S, H) = slot_Tk.shape, y_SH.shape
    dy_SH, dw_Tk = y_SH.new_empty(S, H), w_Tk.new_empty(T, k)
    # At a time, 16 bytes a thread of each of up to eight rows: `dout` then has the layout of one row of them, and
    # nothing goes through shared memory before the last sums.
    vector = 16 // y_SH.element_size()
    block = min(THREADS * vector, max(triton.next_power_of_2(H), 32 * vector))
    kb = min(triton.next_power_of_2(max(k, 1)), 8)
    launch(
        _unpermute_backward, (T + cdiv(S, ROWS),),
        dout_TH.contiguous(), y_SH.contiguous(), token_S.contiguous(), slot_Tk.contiguous(), w_Tk.contiguous(),
        dy_SH, dw_Tk, T, S, K=k, KB=kb, H=H, BLOCK=block, VECTOR=vector, ROWS=ROWS,
        num_warps=block // vector // 32,
    )  # fmt: skip
    return dy_SH, dw_Tk


def specimens() -> list[Specimen]:
    """Rows of Qwen3-30B-A3B and DeepSeek-V3 with eight experts a token, narrow rows, odd ones, and expert choice."""

    def operands(T: int, k: int, H: int, dtype: torch.dtype, w: torch.dtype) -> tuple[Tensor, ...]:
        y = torch.empty(T * k, H, dtype=dtype, device="meta")
        row = torch.empty(T * k, dtype=torch.int64, device="meta")
        return y, row, row, row.view(T, k), torch.empty(T, k, dtype=w, device="meta")

    def specimen(name: str, call: Callable[[], object], k: int, H: int) -> Specimen:
        has = ("LDG.128", "STG.128") if H % 8 == 0 else ()
        targets = tuple(TARGETS) if k == 8 else ("sm_90", "sm_100")
        return Specimen(f"{name} k={k} H={H}", call, has=has, registers=104, targets=targets)

    def back(T: int, k: int, H: int, dtype: torch.dtype, w: torch.dtype = torch.float32) -> Specimen:
        y, *rest = operands(T, k, H, dtype, w)
        return specimen(f"backward {str(dtype)[6:]} T={T}", partial(unpermute_backward, y[:T], y, *rest), k, H)

    def forth(T: int, k: int, H: int, dtype: torch.dtype, weighted: bool = True) -> Specimen:
        y, token, order, slot, w = operands(T, k, H, dtype, torch.float32)
        return specimen(
            f"{str(dtype)[6:]} T={T}", partial(unpermute, y, token, order, slot, w if weighted else None), k, H
        )

    bf16, fp32 = torch.bfloat16, torch.float32
    return [
        forth(8192, 8, 2048, bf16), forth(8192, 8, 7168, bf16, False), forth(8192, 8, 2048, fp32),
        forth(8191, 3, 333, bf16), forth(8192, 64, 2048, bf16),
        back(8192, 8, 2048, bf16), back(8192, 8, 7168, bf16, bf16), back(8192, 8, 2048, fp32),
        back(8191, 3, 333, bf16), back(8192, 64, 2048, bf16),
    ]  # fmt: skip
