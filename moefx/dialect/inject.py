"""A loss joins the backward of a model that returns none: `inject(y, loss)` is y, and in the backward loss gets a 1.

    inject(y [..], loss []) -> y [..]                   dy as it comes, d loss = 1 wherever dy comes

The seed is an op of its own that reads dy: a backward that does not go through y does not go through the loss either,
and a constant would let the partitioner compute the loss's gradients in the forward.
Source: Megatron-LM's auto-scaler and DeepSeek's AddAuxiliaryLoss do the same in eager mode.
"""

from __future__ import annotations

from typing import Any

import torch

from ._op import define

Tensor = torch.Tensor


def _check(y: Tensor, loss: Tensor) -> None:
    torch._check(loss.dim() == 0, lambda: f"inject: the loss has shape {tuple(loss.shape)}, not []")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype = inputs[1].dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return dy, torch.ops.moefx.inject_seed(dy, ctx.dtype) if ctx.needs_input_grad[1] else None


inject = define(
    "inject",
    "(Tensor y, Tensor loss) -> Tensor",
    reference=lambda y, loss: y.clone(memory_format=torch.contiguous_format),
    fake=lambda y, loss: y.new_empty(y.shape),
    check=_check,
    setup=_setup,
    backward=_backward,
)
inject_seed = define(
    "inject_seed",
    "(Tensor dy, ScalarType dtype) -> Tensor",
    reference=lambda dy, dtype: dy.new_ones((), dtype=dtype),
    fake=lambda dy, dtype: dy.new_empty((), dtype=dtype),
    setup=lambda ctx, inputs, output: None,
    backward=lambda ctx, d: (None, None),  # a constant
)
