"""`gram` and `quadratic`: alpha x x^T + beta y of batches, by the blocks on and below the diagonal.

Both are one kernel, for a a = a a^T where a is symmetric: a block of the result is a product of two blocks of rows of
the same matrix. A program computes one block of 128 x 128 and writes it and its transpose; on the diagonal it writes
the lower half and its mirror image as one block, since nothing says in which order a tensor core adds. With
t = ceil(m / 128) blocks a side, t (t + 1) / 2 of t^2 are computed: 0.58 at m = 768, 0.53 at 2048.

128 x 128 x 64 with eight warps leaves registers to the epilogue, which holds the block twice. A gram takes 123 of them,
and three stages 96 KiB of shared memory: two programs share a processor, and one stores while the other multiplies.
The sum with y takes 181 registers, so that a program has the processor for itself, and four stages. Columns of x may be
strided instead of rows (a transposed view).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch
from .sass import Specimen

Tensor = torch.Tensor


@triton.jit
def _symmetric(
    x, y, out, M, N, batch_stride, row_stride, column_stride, alpha, beta,
    BM: tl.constexpr, BK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    # Block (i, j), i >= j, of those numbered row by row; the square root in fp32 may be off by one.
    number, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > number, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= number, i + 1, i)
    j = number - i * (i + 1) // 2

    row, column, at_k = i * BM + tl.arange(0, BM), j * BM + tl.arange(0, BM), tl.arange(0, BK)
    x += batch * batch_stride
    left = x + row.to(tl.int64)[:, None] * row_stride + at_k.to(tl.int64)[None, :] * column_stride
    right = x + column.to(tl.int64)[:, None] * row_stride + at_k.to(tl.int64)[None, :] * column_stride
    acc = tl.zeros((BM, BM), tl.float32)
    for start in range(0, N, BK):
        inside = (start + at_k < N)[None, :]
        a = tl.load(left, mask=(row < M)[:, None] & inside, other=0.0)
        b = tl.load(right, mask=(column < M)[:, None] & inside, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc)
        left += BK * column_stride
        right += BK * column_stride

    acc = acc * alpha
    at = batch * M * M + row.to(tl.int64)[:, None] * M + column[None, :]
    there = (row < M)[:, None] & (column < M)[None, :]
    if ADD:
        acc += beta * tl.load(y + at, mask=there, other=0.0).to(tl.float32)
    block = acc.to(out.dtype.element_ty)
    mirrored = batch * M * M + column.to(tl.int64)[:, None] * M + row[None, :]
    if i == j:
        block = tl.where(row[:, None] >= column[None, :], block, tl.trans(block))
    tl.store(out + at, block, mask=there)
    if i != j:
        tl.store(out + mirrored, tl.trans(block), mask=(column < M)[:, None] & (row < M)[None, :])


def _product(x: Tensor, y: Tensor | None, alpha: float, beta: float, out: Tensor | None) -> Tensor:
    B, M, N = x.shape
    if 1 not in x.stride()[1:]:
        x = x.contiguous()
    out = torch.empty((B, M, M), dtype=x.dtype, device=x.device) if out is None else out
    t = cdiv(M, 128)
    launch(
        _symmetric, (t * (t + 1) // 2, B), x, out if y is None else y, out, M, N, *x.stride(), alpha, beta,
        BM=128, BK=64, ADD=y is not None, num_warps=8, num_stages=3 if y is None else 4,
    )  # fmt: skip
    return out


def gram(x_BMN: Tensor, out: Tensor | None = None) -> Tensor:
    """x x^T of x [B, m, n] bf16 or fp16, in its dtype, equal to its transpose; in `out`, contiguous, if given."""
    return _product(x_BMN, None, 1.0, 0.0, out)


def quadratic(a_BMM: Tensor, b: float, c: float, out: Tensor | None = None) -> Tensor:
    """b a + c a a of symmetric a [B, m, m] bf16 or fp16, in its dtype, equal to its transpose; in `out` as `gram`."""
    a = a_BMM.contiguous()
    return _product(a, a, c, b, out)


def specimens() -> list[Specimen]:
    """Experts of Qwen3-30B-A3B and DeepSeek-V3 by matrices, a transposed view, and an odd one."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    gates: dict[str, Any] = {"has": ("HGMMA", "LDGSTS|UTMALDG", "STG.128"), "lacks": ("HMMA", "STG.U16")}
    two, one = gates | {"registers": 128}, gates | {"registers": 232}
    return [
        Specimen("Qwen3 gate and up", lambda: gram(meta(128, 1536, 2048)), **two),
        Specimen("Qwen3 down", lambda: gram(meta(128, 2048, 768).mT), **two),
        Specimen("Qwen3 quadratic", lambda: quadratic(meta(128, 768, 768), -1.5, 0.5), **one),
        Specimen("DeepSeek-V3 gate and up", lambda: gram(meta(8, 4096, 7168)), **two),
        Specimen("m=304 n=528 fp16", lambda: gram(meta(3, 304, 528, dtype=torch.float16)), **two),
    ]
