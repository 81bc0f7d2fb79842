"""Grouped matrix products: forward (and dgrad), wgrad, and the per-expert bias.

Shapes: S rows sorted by expert, `offsets` int32 [E+1]; weights are [E, N, K] with any strides, so a parameter stored
[E, K, N] is passed as a transposed view. Rows behind the last offset are defined: zero.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

import moefx.kernels.grouped_bias
import moefx.kernels.grouped_mm  # noqa: F401  both register their providers before the references

from ._op import autocast, define

Tensor = torch.Tensor


def _check(x: Tensor, w: Tensor, offsets: Tensor) -> None:
    def got() -> str:
        return f"grouped_mm: x [S, K] is {tuple(x.shape)} {x.dtype}, w [E, N, K] is {tuple(w.shape)} {w.dtype}"

    torch._check(x.dim() == 2 and w.dim() == 3, got)
    torch._check(x.shape[1] == w.shape[2], got)
    torch._check(x.dtype == w.dtype, got)
    torch._check(offsets.shape[0] == w.shape[0] + 1, lambda: f"{got()}, offsets [E + 1] is {tuple(offsets.shape)}")


def _check_wgrad(a: Tensor, b: Tensor, offsets: Tensor) -> None:
    def got() -> str:
        return f"grouped_wgrad: a [S, M] is {tuple(a.shape)} {a.dtype}, b [S, N] is {tuple(b.shape)} {b.dtype}"

    torch._check(a.dim() == 2 and b.dim() == 2, got)
    torch._check(a.shape[0] == b.shape[0], got)
    torch._check(a.dtype == b.dtype, got)


def _check_bias(y: Tensor, bias: Tensor, offsets: Tensor) -> None:
    def got() -> str:
        return f"grouped_bias: y [S, N] is {tuple(y.shape)}, bias [E, N] is {tuple(bias.shape)}"

    torch._check(y.dim() == 2 and bias.dim() == 2, got)
    torch._check(y.shape[1] == bias.shape[1], got)
    torch._check(offsets.shape[0] == bias.shape[0] + 1, lambda: f"{got()}, offsets [E + 1] is {tuple(offsets.shape)}")


def _grouped_mm(x_SK: Tensor, w_ENK: Tensor, offsets: Tensor) -> Tensor:
    y_SN = x_SK.new_zeros(x_SK.shape[0], w_ENK.shape[1])
    ends = offsets.tolist()
    for e in range(w_ENK.shape[0]):
        y_SN[ends[e] : ends[e + 1]] = x_SK[ends[e] : ends[e + 1]] @ w_ENK[e].t()
    return y_SN


def _grouped_mm_fake(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


def _grouped_mm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, w, offsets = ctx.saved_tensors
    dx = torch.ops.moefx.grouped_mm(dy, w.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    dw = torch.ops.moefx.grouped_wgrad(dy, x, offsets) if ctx.needs_input_grad[1] else None
    return dx, dw, None


grouped_mm = define(
    "grouped_mm",
    "(Tensor x, Tensor w, Tensor offsets) -> Tensor",
    reference=_grouped_mm,
    fake=_grouped_mm_fake,
    check=_check,
    setup=_grouped_mm_setup,
    backward=_grouped_mm_backward,
)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == torch.float64 else t.to(dtype)  # autocast leaves float64 alone


autocast("grouped_mm", lambda args, dtype: (_cast(args[0], dtype), _cast(args[1], dtype), args[2]))


def _grouped_wgrad(a_SM: Tensor, b_SN: Tensor, offsets: Tensor) -> Tensor:
    ends = offsets.tolist()
    return torch.stack([a_SM[s:e].t() @ b_SN[s:e] for s, e in itertools.pairwise(ends)])


def _grouped_wgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_wgrad_backward(ctx: Any, dg: Tensor) -> tuple[Any, ...]:
    a, b, offsets = ctx.saved_tensors
    return torch.ops.moefx.grouped_mm(b, dg, offsets), torch.ops.moefx.grouped_mm(a, dg.transpose(1, 2), offsets), None


# g[e] = a[rows of e].T @ b[rows of e]: the gradient dy.T @ x of a parameter [E, N, K], x.T @ dy of one [E, K, N].
grouped_wgrad = define(
    "grouped_wgrad",
    "(Tensor a, Tensor b, Tensor offsets) -> Tensor",
    reference=_grouped_wgrad,
    fake=lambda a, b, offsets: a.new_empty(offsets.shape[0] - 1, a.shape[1], b.shape[1]),
    check=_check_wgrad,
    setup=_grouped_wgrad_setup,
    backward=_grouped_wgrad_backward,
)


def _row_expert(offsets: Tensor, S: int) -> Tensor:
    """Expert of each row, E for rows behind the last offset."""
    return torch.bucketize(torch.arange(S, device=offsets.device), offsets[1:].long(), right=True)


def _add_bias(y_SN: Tensor, bias_EN: Tensor, offsets: Tensor) -> Tensor:
    expert_S = _row_expert(offsets, y_SN.shape[0])
    dead = expert_S >= bias_EN.shape[0]
    added = y_SN + bias_EN.index_select(0, expert_S.clamp_max(bias_EN.shape[0] - 1)).to(y_SN.dtype)
    return torch.where(dead[:, None], y_SN, added)


def _add_bias_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, offsets = inputs
    ctx.save_for_backward(offsets)
    ctx.bias_dtype = bias.dtype


def _add_bias_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    (offsets,) = ctx.saved_tensors
    db = torch.ops.moefx.group_sum(dy, offsets).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
    return dy, db, None


grouped_bias = define(
    "grouped_bias",
    "(Tensor y, Tensor bias, Tensor offsets) -> Tensor",
    reference=_add_bias,
    fake=lambda y, bias, offsets: y.new_empty(y.shape),
    check=_check_bias,
    setup=_add_bias_setup,
    backward=_add_bias_backward,
)


def _group_sum(y_SN: Tensor, offsets: Tensor) -> Tensor:
    E = offsets.shape[0] - 1
    wide = torch.promote_types(y_SN.dtype, torch.float32)
    total = torch.zeros(E + 1, y_SN.shape[1], dtype=wide, device=y_SN.device)
    return total.index_add_(0, _row_expert(offsets, y_SN.shape[0]), y_SN.to(wide))[:E].to(y_SN.dtype)


def _group_sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, offsets = inputs
    ctx.save_for_backward(offsets)
    ctx.rows = y.shape[0]


def _group_sum_backward(ctx: Any, ds: Tensor) -> tuple[Any, ...]:
    (offsets,) = ctx.saved_tensors
    return torch.ops.moefx.grouped_bias(ds.new_zeros(ctx.rows, ds.shape[1]), ds, offsets), None


# Sum of the rows of each expert [S, N] -> [E, N], accumulated in fp32: the gradient of a per-expert bias.
group_sum = define(
    "group_sum",
    "(Tensor y, Tensor offsets) -> Tensor",
    reference=_group_sum,
    fake=lambda y, offsets: y.new_empty(offsets.shape[0] - 1, y.shape[1]),
    setup=_group_sum_setup,
    backward=_group_sum_backward,
)
