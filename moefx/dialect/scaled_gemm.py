"""Grouped products of quantized operands: fprop and dgrad (`scaled_grouped_mm`), and wgrad.

Each operand is codes and scales under a spec of its own; the product is computed as if both were dequantized to fp32
and multiplied with fp32 accumulation, and rounded once to `dtype`. That is the definition; a kernel that keeps the
operands narrow differs from it by the order of its sums. Autocast does not touch it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import moefx.kernels.scaled_grouped_mm  # noqa: F401  registers the GPU provider before the references
from moefx.kernels.layout import check_promise
from moefx.precision.quantize import dequantize

from ._op import autocast, define
from .scaled import _no_context, check_specs, encode, encoded_fake, groups_of, training_only, value_shape

Tensor = torch.Tensor
ops = torch.ops.moefx


def _check(x: Tensor, xs: Tensor, w: Tensor, ws: Tensor, offsets: Tensor, x_spec: str, w_spec: str, _: object) -> None:
    K, L = value_shape(x, x_spec)[-1], value_shape(w, w_spec)[-1]
    torch._check(x.dim() == 2 and w.dim() == 3, lambda: f"scaled_grouped_mm: x {tuple(x.shape)}, w {tuple(w.shape)}")
    torch._check(K == L, lambda: f"scaled_grouped_mm: x has {K} columns of {x_spec}, w has {L} of {w_spec}")
    torch._check(offsets.shape[0] == w.shape[0] + 1, lambda: f"scaled_grouped_mm: offsets are {tuple(offsets.shape)}")


def _mm(
    x: Tensor, xs: Tensor, w: Tensor, ws: Tensor, offsets: Tensor, x_spec: str, w_spec: str, dtype: torch.dtype
) -> Tensor:
    x_SK = dequantize(x, xs, x_spec, offsets=offsets)
    y: Tensor = ops.grouped_mm(x_SK, dequantize(w, ws, w_spec), offsets)
    return y.to(dtype)


scaled_grouped_mm = define(
    "scaled_grouped_mm",
    "(Tensor x, Tensor x_scales, Tensor w, Tensor w_scales, Tensor offsets, str x_spec, str w_spec, ScalarType dtype)"
    " -> Tensor",
    reference=_mm,
    fake=lambda x, xs, w, ws, offsets, x_spec, w_spec, dtype: x.new_empty(x.shape[0], w.shape[1], dtype=dtype),
    check=_check,
    setup=_no_context,
    backward=training_only("scaled_grouped_mm"),
)
autocast("scaled_grouped_mm", lambda args, dtype: args)


def _check_wgrad(
    a: Tensor, as_: Tensor, b: Tensor, bs: Tensor, offsets: Tensor, a_spec: str, b_spec: str, dtype: torch.dtype,
    align: int = 1,
) -> None:  # fmt: skip
    def got() -> str:
        return f"scaled_grouped_wgrad: a [S, M] is {tuple(a.shape)}, b [S, N] is {tuple(b.shape)}"

    torch._check(a.dim() == 2 and b.dim() == 2, got)
    torch._check(a.shape[0] == b.shape[0], got)
    check_promise("scaled_grouped_wgrad", offsets, align)


def _mm_quantize(
    x: Tensor, xs: Tensor, w: Tensor, ws: Tensor, offsets: Tensor, x_spec: str, w_spec: str, dtype: torch.dtype,
    specs: Sequence[str],
) -> list[Tensor]:  # fmt: skip
    y: Tensor = ops.scaled_grouped_mm(x, xs, w, ws, offsets, x_spec, w_spec, dtype)
    return [y, *encode(y, specs, offsets)]


def _mm_quantize_fake(
    x: Tensor, xs: Tensor, w: Tensor, ws: Tensor, offsets: Tensor, x_spec: str, w_spec: str, dtype: torch.dtype,
    specs: Sequence[str],
) -> list[Tensor]:  # fmt: skip
    y = x.new_empty(x.shape[0], w.shape[1], dtype=dtype)
    return [y, *encoded_fake(y, specs, groups_of(offsets))]


def _check_epilogue(*args: Any) -> None:
    _check(*args[:8])
    check_specs("scaled_grouped_mm_quantize", *args[8])


# The product and, from its epilogue, codes of it: the wide result for the next op, the codes to be kept.
scaled_grouped_mm_quantize = define(
    "scaled_grouped_mm_quantize",
    "(Tensor x, Tensor x_scales, Tensor w, Tensor w_scales, Tensor offsets, str x_spec, str w_spec, ScalarType dtype,"
    " str[] specs) -> Tensor[]",
    reference=_mm_quantize,
    fake=_mm_quantize_fake,
    check=_check_epilogue,
    setup=_no_context,
    backward=training_only("scaled_grouped_mm_quantize"),
)


def _wgrad(
    a: Tensor,
    as_: Tensor,
    b: Tensor,
    bs: Tensor,
    offsets: Tensor,
    a_spec: str,
    b_spec: str,
    dtype: torch.dtype,
    align: int = 1,
) -> Tensor:
    a_SM, b_SN = (dequantize(c, s, t, offsets=offsets) for c, s, t in ((a, as_, a_spec), (b, bs, b_spec)))
    g: Tensor = ops.grouped_wgrad(a_SM, b_SN, offsets)
    return g.to(dtype)


def _wgrad_fake(
    a: Tensor,
    as_: Tensor,
    b: Tensor,
    bs: Tensor,
    offsets: Tensor,
    a_spec: str,
    b_spec: str,
    dtype: torch.dtype,
    align: int = 1,
) -> Tensor:
    M, N = value_shape(a, a_spec)[-1], value_shape(b, b_spec)[-1]
    return a.new_empty(offsets.shape[0] - 1, M, N, dtype=dtype)


# g[e] = a[rows of e].T @ b[rows of e]: both operands are contracted over rows.
scaled_grouped_wgrad = define(
    "scaled_grouped_wgrad",
    "(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor offsets, str a_spec, str b_spec, ScalarType dtype,"
    " int align=1) -> Tensor",
    reference=_wgrad,
    fake=_wgrad_fake,
    check=_check_wgrad,
    setup=_no_context,
    backward=training_only("scaled_grouped_wgrad"),
)
autocast("scaled_grouped_wgrad", lambda args, dtype: args)
