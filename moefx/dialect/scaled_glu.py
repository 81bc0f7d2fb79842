"""The activation with its casts: what it reads may be codes, and what it writes is codes.

    glu_quantize(h, w, offsets, kind, specs, h_specs, align)
        -> codes, scales of the activation per spec, then of h per h_spec
    glu_backward_quantize(da, h, h_scales, w, offsets, kind, h_spec, specs, act_specs, align)
        -> dw, then codes and scales of dh per spec, then of the recomputed activation per act_spec

Defined as the wide op, rounded to the dtype of `h` (of `da` in the backward), then quantized: fusing changes no bit.
With `h_scales` the pre-activations come as codes under `h_spec`, which `glu_quantize` wrote in the forward. One launch
emits both orientations of a value from one tile (FP8-Flow, arXiv 2511.02302, fuses the rows alone).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

import moefx.kernels.glu_quantize  # noqa: F401  registers the GPU provider before the reference
from moefx.kernels.layout import check_promise
from moefx.precision.quantize import dequantize

from ._op import define
from .glu import GluKind
from .glu import _check as check_glu
from .scaled import _no_context, check_specs, encode, encoded_fake, groups_of, training_only, value_shape

Tensor = torch.Tensor
ops = torch.ops.moefx


def _forward(
    h: Tensor,
    w: Tensor | None,
    offsets: Tensor | None,
    kind: str,
    specs: Sequence[str],
    h_specs: Sequence[str],
    align: int = 1,
) -> list[Tensor]:
    return encode(ops.glu(h, w, kind), specs, offsets, align) + encode(h, h_specs, offsets, align)


def _forward_fake(
    h: Tensor,
    w: Tensor | None,
    offsets: Tensor | None,
    kind: str,
    specs: Sequence[str],
    h_specs: Sequence[str],
    align: int = 1,
) -> list[Tensor]:
    a = h.new_empty(h.shape[0], _act_width(h.shape[1], kind))
    E = groups_of(offsets)
    return encoded_fake(a, specs, E, align) + encoded_fake(h, h_specs, E, align)


def _act_width(width: int, kind: str) -> int:
    return width // 2 if GluKind.parse(kind).gated else width


def _check_forward(
    h: Tensor,
    w: Tensor | None,
    offsets: Tensor | None,
    kind: str,
    specs: Sequence[str],
    h_specs: Sequence[str],
    align: int = 1,
) -> None:
    check_specs("glu_quantize", *specs, *h_specs)
    check_promise("glu_quantize", offsets, align)
    check_glu(h, w, kind)


glu_quantize = define(
    "glu_quantize",
    "(Tensor h, Tensor? w, Tensor? offsets, str kind, str[] specs, str[] h_specs, int align=1) -> Tensor[]",
    reference=_forward,
    fake=_forward_fake,
    check=_check_forward,
    setup=_no_context,
    backward=training_only("glu_quantize"),
    codes=True,
)


def _backward(
    da: Tensor,
    h: Tensor,
    h_scales: Tensor | None,
    w: Tensor | None,
    offsets: Tensor | None,
    kind: str,
    h_spec: str,
    specs: Sequence[str],
    act_specs: Sequence[str],
    align: int = 1,
) -> list[Tensor]:
    wide = h if h_scales is None else dequantize(h, h_scales, h_spec, dtype=da.dtype, offsets=offsets)
    dh, dw = ops.glu_backward(da, wide, w, kind)
    act = encode(ops.glu(wide, w, kind), act_specs, offsets, align) if act_specs else []
    return [dw, *encode(dh, specs, offsets, align), *act]


def _backward_fake(
    da: Tensor,
    h: Tensor,
    h_scales: Tensor | None,
    w: Tensor | None,
    offsets: Tensor | None,
    kind: str,
    h_spec: str,
    specs: Sequence[str],
    act_specs: Sequence[str],
    align: int = 1,
) -> list[Tensor]:
    shape = h.shape if h_scales is None else value_shape(h, h_spec)
    dh, a, E = da.new_empty(shape), da.new_empty(da.shape), groups_of(offsets)
    dw = da.new_empty(0) if w is None else w.new_empty(w.shape)
    return [dw, *encoded_fake(dh, specs, E, align), *encoded_fake(a, act_specs, E, align)]


def _check_backward(
    da: Tensor,
    h: Tensor,
    h_scales: Tensor | None,
    w: Tensor | None,
    offsets: Tensor | None,
    kind: str,
    h_spec: str,
    specs: Sequence[str],
    act_specs: Sequence[str],
    align: int = 1,
) -> None:
    check_specs("glu_backward_quantize", *specs, *act_specs, *([h_spec] if h_scales is not None else []))
    check_promise("glu_backward_quantize", offsets, align)
    shape = tuple(h.shape if h_scales is None else value_shape(h, h_spec))
    factor = 2 if GluKind.parse(kind).gated else 1

    def got() -> str:
        return f"glu_backward_quantize: {kind!r} of h {shape}, but da is {tuple(da.shape)}"

    torch._check(len(shape) == 2 and da.dim() == 2, got)
    torch._check(shape[0] == da.shape[0] and shape[1] == factor * da.shape[1], got)
    if w is not None:
        torch._check(w.shape == da.shape[:1], lambda: f"{got()} and w {tuple(w.shape)}, not [S]")


glu_backward_quantize = define(
    "glu_backward_quantize",
    "(Tensor da, Tensor h, Tensor? h_scales, Tensor? w, Tensor? offsets, str kind, str h_spec, str[] specs,"
    " str[] act_specs, int align=1) -> Tensor[]",
    reference=_backward,
    fake=_backward_fake,
    check=_check_backward,
    setup=_no_context,
    backward=training_only("glu_backward_quantize"),
    codes=True,
)
