"""Grouped products that gather their rows: `permute` in front, and `glu` behind, without the rows in between.

    permute_grouped_mm      grouped_mm(permute(x, token, slot), w, offsets)                  y [S, N]
    permute_grouped_mm_glu  that as h [S, 2I], and glu(h, w_rows, kind)                       h, a [S, I]
    permute_grouped_wgrad   grouped_wgrad(dy, permute(x, token, slot), offsets)              g [E, M, K]

Each is defined by the ops that it stands for, to the last bit: `a` is computed from `h` as it is rounded. What they are
for is memory: x [T, K] is kept for the backward and read by rows, and S rows of it are never written.
"""

from __future__ import annotations

from typing import Any

import torch

import moefx.kernels.grouped_mm  # noqa: F401  registers its providers before the references

from ._op import autocast, define
from .gemm import _cast
from .gemm import _check as check_product
from .glu import GluKind

Tensor = torch.Tensor
ops = torch.ops.moefx


def _rows_like(x: Tensor, token: Tensor) -> Tensor:
    torch._check(x.dim() == 2 and token.dim() == 1, lambda: f"x [T, K] is {tuple(x.shape)}, token is {token.shape}")
    return x.new_empty(token.shape[0], x.shape[1], device="meta")


def _check(x: Tensor, token: Tensor, slot: Tensor, w: Tensor, offsets: Tensor) -> None:
    check_product(_rows_like(x, token), w, offsets)


def _permute_grouped_mm(x_TK: Tensor, token_S: Tensor, slot_Tk: Tensor, w_ENK: Tensor, offsets: Tensor) -> Tensor:
    y_SN: Tensor = ops.grouped_mm(ops.permute(x_TK, token_S, slot_Tk), w_ENK, offsets)
    return y_SN


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor, x: Tensor, token: Tensor, slot: Tensor, w: Tensor, offsets: Tensor) -> list[Any]:
    """Gradients of the five operands of a gathered product."""
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dx = ops.unpermute(ops.grouped_mm(dy, w.transpose(1, 2), offsets), token, token, slot, None)
    if ctx.needs_input_grad[3]:
        dw = ops.permute_grouped_wgrad(dy, x, token, slot, offsets)
    return [dx, None, None, dw, None]


permute_grouped_mm = define(
    "permute_grouped_mm",
    "(Tensor x, Tensor token, Tensor slot, Tensor w, Tensor offsets) -> Tensor",
    reference=_permute_grouped_mm,
    fake=lambda x, token, slot, w, offsets: x.new_empty(token.shape[0], w.shape[1]),
    check=_check,
    setup=_setup,
    backward=lambda ctx, dy: tuple(_gradients(ctx, dy, *ctx.saved_tensors)),
)


def _check_glu(
    x: Tensor, token: Tensor, slot: Tensor, w: Tensor, offsets: Tensor, w_rows: Tensor | None, kind: str
) -> None:
    _check(x, token, slot, w, offsets)
    k = GluKind.parse(kind)
    torch._check(k.gated and not k.interleaved, lambda: f"permute_grouped_mm_glu: {kind!r} has no halves")
    torch._check(w.shape[1] % 2 == 0, lambda: f"permute_grouped_mm_glu: w [E, 2I, K] is {tuple(w.shape)}")
    if w_rows is not None:
        torch._check(w_rows.shape == token.shape, lambda: f"w_rows is {tuple(w_rows.shape)}, not {tuple(token.shape)}")


def _permute_grouped_mm_glu(
    x: Tensor, token: Tensor, slot: Tensor, w: Tensor, offsets: Tensor, w_rows: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    h_S2I = ops.permute_grouped_mm(x, token, slot, w, offsets)
    return h_S2I, ops.glu(h_S2I, w_rows, kind)


def _glu_fake(x: Tensor, token: Tensor, slot: Tensor, w: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(token.shape[0], w.shape[1]), x.new_empty(token.shape[0], w.shape[1] // 2)


def _glu_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *operands, w_rows, ctx.kind = inputs
    ctx.save_for_backward(*operands, w_rows, output[0])


def _glu_backward(ctx: Any, dh: Tensor, da: Tensor) -> tuple[Any, ...]:
    *operands, w_rows, h = ctx.saved_tensors
    dh_of_a, dw_rows = ops.glu_backward(da, h, w_rows, ctx.kind)
    return *_gradients(ctx, dh + dh_of_a, *operands), None if w_rows is None else dw_rows, None


permute_grouped_mm_glu = define(
    "permute_grouped_mm_glu",
    "(Tensor x, Tensor token, Tensor slot, Tensor w, Tensor offsets, Tensor? w_rows, str kind) -> (Tensor, Tensor)",
    reference=_permute_grouped_mm_glu,
    fake=_glu_fake,
    check=_check_glu,
    setup=_glu_setup,
    backward=_glu_backward,
)


def _check_wgrad(dy: Tensor, x: Tensor, token: Tensor, slot: Tensor, offsets: Tensor, flip: bool = False) -> None:
    def got() -> str:
        return f"permute_grouped_wgrad: dy [S, M] is {tuple(dy.shape)} {dy.dtype}, x [T, K] {tuple(x.shape)} {x.dtype}"

    torch._check(dy.dim() == 2 and x.dim() == 2 and dy.dtype == x.dtype, got)
    torch._check(dy.shape[:1] == token.shape, lambda: f"{got()}, token [S] is {tuple(token.shape)}")


def _permute_grouped_wgrad(
    dy_SM: Tensor, x_TK: Tensor, token_S: Tensor, slot_Tk: Tensor, offsets: Tensor, flip: bool = False
) -> Tensor:
    x_SK = ops.permute(x_TK, token_S, slot_Tk)
    pair = (x_SK, dy_SM) if flip else (dy_SM, x_SK)
    g: Tensor = ops.grouped_wgrad(*pair, offsets)
    return g


def _wgrad_fake(dy: Tensor, x: Tensor, token: Tensor, slot: Tensor, offsets: Tensor, flip: bool = False) -> Tensor:
    sides = (x.shape[1], dy.shape[1]) if flip else (dy.shape[1], x.shape[1])
    return dy.new_empty(offsets.shape[0] - 1, *sides)


def _wgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.flip = inputs
    ctx.save_for_backward(*tensors)


def _wgrad_backward(ctx: Any, dg: Tensor) -> tuple[Any, ...]:
    dy, x, token, slot, offsets = ctx.saved_tensors
    dg_EMK = dg.transpose(1, 2) if ctx.flip else dg
    ddy = ops.permute_grouped_mm(x, token, slot, dg_EMK, offsets)
    dx = ops.unpermute(ops.grouped_mm(dy, dg_EMK.transpose(1, 2), offsets), token, token, slot, None)
    return ddy, dx, None, None, None, None


# `flip`: the gradient [E, K, M] of a parameter that is stored [E, in, out].
permute_grouped_wgrad = define(
    "permute_grouped_wgrad",
    "(Tensor dy, Tensor x, Tensor token, Tensor slot, Tensor offsets, bool flip=False) -> Tensor",
    reference=_permute_grouped_wgrad,
    fake=_wgrad_fake,
    check=_check_wgrad,
    setup=_wgrad_setup,
    backward=_wgrad_backward,
)

for _name in ("permute_grouped_mm", "permute_grouped_mm_glu"):
    autocast(_name, lambda args, dtype: (_cast(args[0], dtype), *args[1:3], _cast(args[3], dtype), *args[4:]))
