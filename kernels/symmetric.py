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


def _supports(x: Tensor, *_: float) -> bool:
    followed = torch.is_grad_enabled() and x.requires_grad
    m, n = x.shape[-2:]
    return x.dtype in (torch.bfloat16, torch.float16) and m >= LEAST_ROWS and m % 16 == n % 16 == 0 and not followed


registry.register_triton("gram", "symmetric:gram", _supports)
registry.register_triton("quadratic", "symmetric:quadratic", _supports)


@registry.register("gram", "reference", lambda *_: True)
def _gram(x_BMN: Tensor) -> Tensor:
    return torch.bmm(x_BMN, x_BMN.mT)


@registry.register("quadratic", "reference", lambda *_: True)
def _quadratic(a_BMM: Tensor, b: float, c: float) -> Tensor:
    return torch.baddbmm(a_BMM, a_BMM, a_BMM, beta=b, alpha=c)


def gram(x_BMN: Tensor) -> Tensor:
    """x x^T [B, m, m] in the dtype of x, summed in fp32 (float64 for float64)."""
    out: Tensor = registry.dispatch("gram", x_BMN)
    return out


def quadratic(a_BMM: Tensor, b: float, c: float) -> Tensor:
    """b a + c a a [B, m, m] of symmetric matrices, in the dtype of a."""
    out: Tensor = registry.dispatch("quadratic", a_BMM, b, c)
    return out
