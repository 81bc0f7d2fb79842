"""Kernels that are wrong on purpose, one for each gate of `moefx.kernels.gpu.sass`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from moefx.kernels.gpu.launch import launch
from moefx.kernels.gpu.sass import Specimen


@triton.jit
def product(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    sums = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        x = tl.load(a + m[:, None] * K + (start + k)[None, :])
        y = tl.load(b + n[:, None] * K + (start + k)[None, :])
        sums = tl.dot(x, tl.trans(y), sums)
    tl.store(c + m[:, None] * N + n[None, :], sums.to(tl.bfloat16))


@triton.jit
def adding(x, y, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.atomic_add(y + at % 16, tl.load(x + at))


@triton.jit
def truncating(x, y, B: tl.constexpr):
    """E4M3 codes by cutting bits off: neither rounded nor saturated."""
    at = tl.program_id(0) * B + tl.arange(0, B)
    bits = tl.load(x + at).to(tl.int32, bitcast=True)
    tl.store(y + at, ((bits >> 24) & 0x80 | (((bits >> 20) & 0x7FF) - (120 << 3)) & 0x7F).to(tl.uint8))


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _product(BM: int, BN: int, BK: int, **options: int) -> Any:
    M = N = K = 4096
    a, b, c = _meta(M, K), _meta(N, K), _meta(M, N)
    grid = (M // BM, N // BN)
    return lambda: launch(product, grid, a, b, c, M, N, K, BM=BM, BN=BN, BK=BK, **options)


def specimens() -> list[Specimen]:
    """Each named by the gate that it must fail; "good" fails none."""
    x, sums = _meta(1 << 20, dtype=torch.float32), _meta(16, dtype=torch.float32)
    codes = _meta(1 << 20, dtype=torch.uint8)
    has, lacks = ("HGMMA", "LDGSTS|UTMALDG"), ("HMMA",)
    return [
        Specimen("good", _product(128, 128, 64, num_warps=8, num_stages=3), has, lacks),
        Specimen("spills", _product(256, 256, 64, num_warps=4, num_stages=3), targets=("sm_90",)),
        Specimen("registers", _product(128, 128, 64, num_warps=8, num_stages=3), registers=64, targets=("sm_90",)),
        Specimen("shared", _product(128, 256, 128, num_warps=8, num_stages=4), targets=("sm_90",)),
        Specimen("HGMMA", _product(128, 64, 64, num_warps=2, num_stages=3), ("HGMMA",), targets=("sm_90",)),
        Specimen("HMMA", _product(64, 64, 64, num_warps=2, num_stages=3), (), lacks, targets=("sm_90",)),
        Specimen("LDGSTS", _product(128, 128, 64, num_warps=8, num_stages=1), has, targets=("sm_90",)),
        Specimen("atomics", lambda: launch(adding, (1024,), x, sums, B=1024), targets=("sm_90",)),
        Specimen(
            "F2FP.SATFINITE",
            lambda: launch(truncating, (1024,), x, codes, B=1024),
            ("F2FP.SATFINITE",),
            targets=("sm_90",),
        ),
    ]
