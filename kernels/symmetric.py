"""Symmetric products of Muon's polar factor, for batches of matrices; the CUDA provider is in `gpu/symmetric.py`.

    gram(x [B, m, n]) = x x^T                    quadratic(a [B, m, m], b, c) = b a + c a a,    a symmetric

The kernel computes the blocks on and below the diagonal and writes each twice, so that its results equal their
transposes bit for bit. It covers bf16 and fp16 from 256 rows on, where at most three of four blocks are left, with
sizes that 16 divides, for whole vectors. Others, and what autograd is to follow, are whole products of torch. Not yet
measured on a GPU.
"""

from __future__ import annotations

import torch

from . import registry

Tensor = torch.Tensor
LEAST_ROWS = 256
SHARED = 98_304  # bytes of shared memory that a tile takes as compiled for ROCm


def _supports(x: Tensor, *_: object) -> bool:
    followed = torch.is_grad_enabled() and x.requires_grad
    m, n = x.shape[-2:]
    whole = m >= LEAST_ROWS and m % 16 == n % 16 == 0
    return x.dtype in (torch.bfloat16, torch.float16) and whole and not followed and registry.holds(x, SHARED)


registry.register_triton("gram", "symmetric:gram", _supports)
registry.register_triton("quadratic", "symmetric:quadratic", _supports)


@registry.register("gram", "reference", lambda *_: True)
def _gram(x_BMN: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.bmm(x_BMN, x_BMN.mT, out=out)


@registry.register("quadratic", "reference", lambda *_: True)
def _quadratic(a_BMM: Tensor, b: float, c: float, out: Tensor | None = None) -> Tensor:
    return torch.baddbmm(a_BMM, a_BMM, a_BMM, beta=b, alpha=c, out=out)


def gram(x_BMN: Tensor, out: Tensor | None = None) -> Tensor:
    """x x^T [B, m, m] in the dtype of x, summed in fp32 (float64 for float64); in `out`, contiguous, if given."""
    found: Tensor = registry.dispatch("gram", x_BMN, out)
    return found


def quadratic(a_BMM: Tensor, b: float, c: float, out: Tensor | None = None) -> Tensor:
    """b a + c a a [B, m, m] of symmetric matrices, in the dtype of a; `out` as of `gram`."""
    found: Tensor = registry.dispatch("quadratic", a_BMM, b, c, out)
    return found
