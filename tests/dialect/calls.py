"""One realistic call of every op, for the checks that are the same for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from moefx.dialect import OPS, route
from moefx.precision.quantize import quantize

from . import oracles
from .oracles import Routing, Tensor, ops, randn

H, I = 6, 5

# Blocks of two keep the tensors tiny and are several; blocks of 128 are all of a row, and of an expert.
PAIRS, COLUMN_PAIRS, FP4 = "e4m3 1x2 po2/rceil", "e4m3 2x1 po2/rceil", "e2m1 1x2 e8m0/rceil"
ROW, COLUMN, SQUARE = "e4m3 1x128 po2/rceil", "e4m3 128x1 po2/rceil", "e4m3 128x128 po2/rceil"
DELAYED = "e4m3 tensor f32/exact delayed"
GROUPED = "bias | groups 2 keep 1 by top2sum fill -inf | top2 unsorted | sum + 1e-20 | x 2.5 | per-expert"
# Ops of training graphs, which have no gradient: they write codes and scales, or dtypes that they are told.
TRAINING = (
    "quantize",
    "dequantize",
    "permute_scaled",
    "transpose_scaled",
    "convert",
    "scaled_grouped_mm",
    "scaled_grouped_mm_quantize",
    "scaled_grouped_wgrad",
    "glu_quantize",
    "glu_backward_quantize",
    "quantize_delayed",
    "gather_amax",
)
CONSTANT = ("token_route", "plan", "choice_plan", "inject_seed")  # integers, or a number: nothing to differentiate


@dataclass(frozen=True)
class Call:
    """Arguments of one op; `grads` are the positions of the tensors that it is differentiable in."""

    op: str
    args: tuple[Any, ...]
    grads: tuple[int, ...] = ()

    @property
    def default(self) -> Any:
        return getattr(ops, self.op).default

    def __call__(self, *args: Any) -> Any:
        return getattr(ops, self.op)(*(args or self.args))

    def differentiable(self) -> tuple[Any, ...]:
        """Fresh arguments that require grad where the op has one to give."""

        def fresh(position: int, a: Any) -> Any:
            if isinstance(a, list):
                return [fresh(position, t) for t in a]
            return a.detach().clone().requires_grad_(position in self.grads) if isinstance(a, Tensor) else a

        return tuple(fresh(i, a) for i, a in enumerate(self.args))


def encoded(x: Tensor, spec: str, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales; never of two negative numbers in a byte, which may be 255, the poison of integers."""
    codes, scales = quantize(x.abs() if spec == FP4 else x, spec, offsets=offsets)
    assert isinstance(scales, Tensor)
    return codes, scales


def calls(r: Routing, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """Every op on one routing; keys say what varies beside the op."""
    (T, k), S, E = r.idx.shape, r.rows, r.E
    x, y, w = randn(T, H, dtype=dtype), randn(S, H, dtype=dtype, seed=1), randn(T, k, dtype=dtype, seed=2)
    rows, dout = randn(S, dtype=dtype, seed=3), randn(T, H, dtype=dtype, seed=4)
    up, down = randn(E, 2 * I, H, dtype=dtype, seed=5), randn(E, H, I, dtype=dtype, seed=6)
    h, da, bias = (
        randn(S, 2 * I, dtype=dtype, seed=7),
        randn(S, I, dtype=dtype, seed=8),
        randn(E, H, dtype=dtype, seed=9),
    )
    seed_T, loss = randn(T, dtype=torch.promote_types(dtype, torch.float32), seed=14), randn(1, dtype=dtype, seed=15)[0]
    up_bias = randn(E, 2 * I, dtype=dtype, seed=10)
    maps = r.token, r.order, r.slot
    ends, clamp = r.offsets, "interleaved clamp(7,1.702)"
    codes, columns = encoded(y, ROW, ends), encoded(y, COLUMN, ends)
    f = route.NAMES[dtype]
    correction, per_expert = randn(4, seed=12) / 4, 1 + randn(4, dtype=dtype, seed=13) / 8
    logits, dw_T2 = randn(T, 4, dtype=dtype, seed=11), randn(T, 2, dtype=dtype, seed=16)
    two, wide_T4 = logits.topk(2, -1).indices, randn(T, 4, dtype=seed_T.dtype, seed=17)
    # One of the three chosen lies outside the kept group, and its weight is the fill.
    limit, masked = (2, 1, "top2sum", -torch.inf), ("softmax", "scores", "sum", 1e-2, 2.5, 2, 1, "max", 0.0)
    three = ops.topk_route(logits, None, 3, *masked[:5], None, *masked[5:], True)[1]
    dw_T3 = randn(T, 3, dtype=dtype, seed=18)
    gptoss = [up.mT.contiguous(), up_bias, down.mT.contiguous(), bias]
    chosen = torch.stack([(torch.arange(min(T, 2)) + e) % max(T, 1) for e in range(r.E)])
    w_EC = randn(*chosen.shape, dtype=dtype, seed=12)
    found = {
        "plan": Call("plan", (r.idx, E, r.align)),
        "choice_plan": Call("choice_plan", (chosen, T, r.align)),
        "permute": Call("permute", (x, r.token, r.slot), (0,)),
        "unpermute": Call("unpermute", (y, *maps, None), (0,)),
        "unpermute_weighted": Call("unpermute", (y, *maps, w), (0, 4)),
        "unpermute_backward": Call("unpermute_backward", (dout, y, *maps, w), (0, 1, 5)),
        "gather_weights": Call("gather_weights", (w, r.order), (0,)),
        "scatter_weights": Call("scatter_weights", (rows, r.order, T, k), (0,)),
        "plan_permute": Call("plan_permute", (x, r.idx, E, r.align), (0,)),
        "grouped_mm": Call("grouped_mm", (y, up, r.offsets), (0, 1)),
        "grouped_wgrad": Call("grouped_wgrad", (h, y, r.offsets), (0, 1)),
        "permute_grouped_mm": Call("permute_grouped_mm", (x, r.token, r.slot, up, ends), (0, 3)),
        "permute_grouped_mm_glu": Call("permute_grouped_mm_glu", (x, r.token, r.slot, up, ends, None, "silu"), (0, 3)),
        "permute_grouped_mm_glu_weighted": Call(
            "permute_grouped_mm_glu", (x, r.token, r.slot, up, ends, rows, "gelu_tanh"), (0, 3, 5)
        ),
        "permute_grouped_wgrad": Call("permute_grouped_wgrad", (h, x, r.token, r.slot, ends), (0, 1)),
        "permute_grouped_wgrad_flipped": Call("permute_grouped_wgrad", (h, x, r.token, r.slot, ends, True), (0, 1)),
        "grouped_bias": Call("grouped_bias", (y, bias, r.offsets), (0, 1)),
        "group_sum": Call("group_sum", (y, r.offsets), (0,)),
        "glu": Call("glu", (h, None, "silu"), (0,)),
        "glu_weighted": Call("glu", (h, rows, "interleaved clamp(7,1.702)"), (0, 1)),
        "glu_plain": Call("glu", (h, rows, "plain relu2"), (0, 1)),
        "glu_backward": Call("glu_backward", (da, h, None, "silu"), (0, 1)),
        "glu_backward_weighted": Call("glu_backward", (da, h, rows, "gelu"), (0, 1, 2)),
        "glu_backward_again": Call("glu_backward_again", (da, h, None, "silu"), (0, 1)),
        "glu_backward_again_weighted": Call("glu_backward_again", (da, h, rows, "gelu"), (0, 1, 2)),
        "overlap": Call("overlap", (y, r.slot, 1e-12), (0,)),
        "overlap_backward": Call("overlap_backward", (seed_T, y, r.slot, 1e-12), (0, 1)),
        "inject": Call("inject", (x, loss), (0,)),
        "inject_seed": Call("inject_seed", (x, torch.float32)),
        "experts": Call("experts", (x, r.idx, w, [up, down], "silu | nk"), (0, 2, 3)),
        "experts_gptoss": Call("experts", (x, r.idx, w, gptoss, "interleaved clamp(7,1.702) | kn bias"), (0, 2, 3)),
        "expert_choice": Call("expert_choice", (x, chosen, w_EC, [up, down], "silu | nk"), (0, 2, 3)),
        "route": Call("route", (randn(T, 4, dtype=dtype, seed=11), None, None, f"softmax {f} | top2 | sum"), (0,)),
        "route_deepseek": Call(
            "route", (randn(T, 4, dtype=dtype, seed=11), correction, per_expert, f"sigmoid {f} | {GROUPED}"), (0, 2)
        ),
        "topk_route": Call("topk_route", (logits, None, 2, "softmax", "scores", "sum", 0.0, 1.5, None), (0,)),
        "topk_route_biased": Call(
            "topk_route", (logits, correction, 2, "sigmoid", "scores", "clamp", 1e-3, 1.0, None), (0,)
        ),
        "topk_route_groups": Call(
            "topk_route", (logits, correction, 2, "sigmoid", "scores", "sum", 1e-20, 2.5, None, *limit, False), (0,)
        ),
        "topk_route_masked": Call("topk_route", (logits, None, 3, *masked[:5], None, *masked[5:], True), (0,)),
        "topk_route_backward": Call(
            "topk_route_backward", (dw_T2, None, logits, two, "sqrtsoftplus", "softmax"), (0, 2)
        ),
        "topk_route_backward_both": Call(
            "topk_route_backward", (dw_T2, wide_T4, logits, two, "softmax", "sum", 1e-2, 2.5), (0, 1, 2)
        ),
        "topk_route_backward_masked": Call(
            "topk_route_backward", (dw_T3, wide_T4, logits, three, *masked[:1], *masked[2:]), (0, 1, 2)
        ),
        "token_route": Call("token_route", ([randn(1, T, 4, dtype=dtype, seed=11), correction],)),
        "dispatch": Call("dispatch", (x,), (0,)),
        "combine": Call("combine", (x,), (0,)),
        "quantize": Call("quantize", (y, ends, [PAIRS, COLUMN_PAIRS, SQUARE])),
        "quantize_fp4": Call("quantize", (y.abs(), None, [FP4])),
        "dequantize": Call("dequantize", (*columns, ends, COLUMN, dtype)),
        "dequantize_fp4": Call("dequantize", (*encoded(up, FP4), None, FP4, dtype)),
        "permute_scaled": Call("permute_scaled", (*encoded(x, PAIRS), r.token, r.slot)),
        "permute_scaled_fp4": Call("permute_scaled", (*encoded(x, FP4), r.token, r.slot)),
        "transpose_scaled": Call("transpose_scaled", (*encoded(y, PAIRS, ends), ends, PAIRS, COLUMN_PAIRS)),
        "transpose_scaled_square": Call("transpose_scaled", (*encoded(up, SQUARE), None, SQUARE, SQUARE)),
        "convert": Call("convert", (*encoded(y, FP4, ends), ends, FP4, ROW)),
        "convert_smaller": Call("convert", (*codes, ends, ROW, PAIRS)),
        "scaled_grouped_mm": Call("scaled_grouped_mm", (*codes, *encoded(up, SQUARE), ends, ROW, SQUARE, dtype)),
        "scaled_grouped_mm_fp4": Call("scaled_grouped_mm", (*codes, *encoded(up, FP4), ends, ROW, FP4, dtype)),
        "scaled_grouped_mm_quantize": Call(
            "scaled_grouped_mm_quantize", (*codes, *encoded(up, SQUARE), ends, ROW, SQUARE, dtype, [PAIRS])
        ),
        "scaled_grouped_wgrad": Call(
            "scaled_grouped_wgrad", (*encoded(h, COLUMN, ends), *columns, ends, COLUMN, COLUMN, dtype)
        ),
        "glu_quantize": Call("glu_quantize", (h, rows, ends, "silu", [ROW, COLUMN], [PAIRS])),
        "glu_quantize_plain": Call("glu_quantize", (h, None, None, "plain relu2", [FP4], [])),
        "glu_backward_quantize": Call(
            "glu_backward_quantize", (da, h, None, rows, ends, "silu", "", [PAIRS, COLUMN_PAIRS], [COLUMN])
        ),
        "glu_backward_quantize_codes": Call(
            "glu_backward_quantize", (da, *encoded(h, PAIRS), None, ends, clamp, PAIRS, [ROW], [])
        ),
    }
    past = torch.tensor([3.0, 0.5])
    found["quantize_delayed"] = Call("quantize_delayed", (y, ends, past, [DELAYED]))
    found["gather_amax"] = Call("gather_amax", ([past[0], past[1]], [2, 0], 4))
    assert {c.op for c in found.values()} == set(OPS)
    return found


NAMES = tuple(calls(oracles.CASES["balanced"]))
each_call = pytest.mark.parametrize("name", NAMES)
DIFFERENTIABLE = tuple(n for n, c in calls(oracles.CASES["balanced"]).items() if c.op not in (*TRAINING, *CONSTANT))
each_differentiable = pytest.mark.parametrize("name", DIFFERENTIABLE)
each_training = pytest.mark.parametrize(
    "name", [n for n, c in calls(oracles.CASES["balanced"]).items() if c.op in TRAINING]
)
