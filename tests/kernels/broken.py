"""Kernels that are wrong on purpose, one for each gate of `moefx.kernels.gpu.sass`, beside good ones that pass it."""

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
def described(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """`product` with tiles that the copy engine brings; descriptors made on the device are handed over by atomics."""
    x = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BM, BK])
    y = tl.make_tensor_descriptor(b, [N, K], [K, 1], [BN, BK])
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    sums = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        sums = tl.dot(x.load([m, start]), y.load([n, start]).T, sums)
    tl.store(c + (m + tl.arange(0, BM))[:, None] * N + (n + tl.arange(0, BN))[None, :], sums.to(tl.bfloat16))


@triton.jit
def copying(x, y, of_x, of_y, B: tl.constexpr):
    """16 bytes at a time where both offsets are multiples of 16, a number at a time otherwise."""
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + of_y + at, tl.load(x + of_x + at))


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


def _product(BM: int, BN: int, BK: int, kernel: Any = product, dtype: torch.dtype = torch.bfloat16, **how: int) -> Any:
    M = N = K = 4096
    a, b, c = _meta(M, K, dtype=dtype), _meta(N, K, dtype=dtype), _meta(M, N)
    grid = (M // BM, N // BN)
    return lambda: launch(kernel, grid, a, b, c, M, N, K, BM=BM, BN=BN, BK=BK, **how)


def _copy(dtype: torch.dtype, of_x: int, of_y: int) -> Any:
    x, y = _meta(1 << 20, dtype=dtype), _meta(1 << 20, dtype=dtype)
    return lambda: launch(copying, (64,), x, y, of_x, of_y, B=4096)


def specimens() -> list[Specimen]:
    """Each named by the gate that it must fail, and after a comma by what is special; "good" ones fail none."""
    x, sums = _meta(1 << 20, dtype=torch.float32), _meta(16, dtype=torch.float32)
    codes = _meta(1 << 20, dtype=torch.uint8)
    has, lacks = ("HGMMA", "LDGSTS|UTMALDG"), ("HMMA",)
    fp8, fp32, hopper = torch.float8_e4m3fn, torch.float32, ("sm_90",)
    vectors = ("LDG.128", "STG.128")
    every = ("sm_90", "sm_100", "gfx942", "gfx950")
    return [
        Specimen("good", _product(128, 128, 64, num_warps=8, num_stages=3), has, lacks),
        Specimen("good, fp8", _product(128, 128, 128, dtype=fp8, num_warps=8, num_stages=3), ("QGMMA", has[1]), lacks),
        Specimen("good, copy", _copy(fp32, 16, 16), vectors),
        Specimen("good, copy of bytes", _copy(torch.uint8, 16, 16), vectors, ("STG.U8",), targets=hopper),
        Specimen("spills", _product(256, 256, 64, num_warps=4, num_stages=3), targets=hopper),
        Specimen("registers", _product(128, 128, 64, num_warps=8, num_stages=3), registers=64, targets=hopper),
        Specimen("shared", _product(128, 256, 128, num_warps=8, num_stages=4), targets=hopper),
        Specimen("HGMMA", _product(64, 64, 64, num_warps=2, num_stages=3), ("HGMMA",)),
        Specimen("QGMMA", _product(64, 64, 64, dtype=fp8, num_warps=2, num_stages=3), ("QGMMA",)),
        Specimen("HMMA", _product(64, 64, 64, num_warps=2, num_stages=3), (), lacks, targets=hopper),
        Specimen("LDGSTS", _product(128, 128, 64, num_warps=8, num_stages=1), has),
        Specimen("UTMALDG", _product(128, 128, 64, num_warps=8, num_stages=3), ("UTMALDG",), targets=hopper),
        Specimen(
            "atomics, descriptors", _product(128, 128, 64, described, num_warps=8, num_stages=3), ("UTMALDG",),
            targets=hopper,
        ),
        Specimen("LDG.128", _copy(fp32, 3, 16), vectors),
        Specimen("STG.128", _copy(fp32, 16, 3), vectors),
        Specimen("STG.U8", _copy(torch.uint8, 16, 3), lacks=("STG.U8",), targets=hopper),
        Specimen("atomics", lambda: launch(adding, (1024,), x, sums, B=1024), targets=every),
        Specimen("F2FP.SATFINITE", lambda: launch(truncating, (1024,), x, codes, B=1024), ("F2FP.SATFINITE",)),
    ]  # fmt: skip
