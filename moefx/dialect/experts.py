"""`moefx.experts`: all routed experts of a layer in one op, a marker that raising emits and `expand_experts` rewrites.

    experts(x [T,H], idx [T,k], w [T,k], weights, spec) -> y [T,H]
    expert_choice(x [T,H], token [E,C], w [E,C], weights, spec) -> y [T,H]

In the second one experts choose: expert e takes the C different tokens token[e]; tokens that none takes are zero.

`weights` holds the up (or fused gate-and-up) weight, its bias if any, the down weight, its bias if any. The spec string
says how to read them, so a printed graph can be read: the glu kind, then `nk` for [E, out, in] or `kn` for
[E, in, out], then `bias`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from moefx.errors import InputError

from ._op import LIB
from .glu import GluKind

Tensor = torch.Tensor
ops = torch.ops.moefx


@dataclass(frozen=True)
class ExpertsSpec:
    """How the weights of one expert bank are read. Prints as `silu | nk` or `interleaved clamp(7,1.702) | kn bias`."""

    glu: GluKind
    layout: str = "nk"
    bias: bool = False

    @staticmethod
    @lru_cache
    def parse(text: str) -> ExpertsSpec:
        """Inverse of `str(spec)`; raises `InputError` for anything that it would not print."""
        kind, bar, rest = text.partition(" | ")
        words = rest.split(" ")
        if not bar or words[0] not in ("nk", "kn") or words[1:] not in ([], ["bias"]):
            todo = "write '<glu kind> | nk' or '<glu kind> | kn', with ' bias' behind if biased"
            raise InputError(f"unreadable experts spec {text!r}", todo=todo)
        return ExpertsSpec(GluKind.parse(kind), words[0], len(words) == 2)

    def __str__(self) -> str:
        return f"{self.glu} | {self.layout}{' bias' if self.bias else ''}"


def expand(x_TH: Tensor, idx_Tk: Tensor, w_Tk: Tensor, weights: Sequence[Tensor], spec: str) -> Tensor:
    """The definition of `experts` in dialect ops; `expand_experts` writes the same nodes into a graph."""
    E = weights[0].shape[0]
    return _routed(x_TH, ops.plan(idx_Tk, E, 1), w_Tk, weights, spec)


def expand_choice(x_TH: Tensor, token_EC: Tensor, w_EC: Tensor, weights: Sequence[Tensor], spec: str) -> Tensor:
    """The definition of `expert_choice` in dialect ops, likewise."""
    T, E = x_TH.shape[0], token_EC.shape[0]
    w_TE = w_EC.new_zeros(T, E).scatter(0, token_EC.t(), w_EC.t())
    return _routed(x_TH, ops.choice_plan(token_EC, T, 1), w_TE, weights, spec)


def _routed(x_TH: Tensor, plan: tuple[Tensor, ...], w_Tk: Tensor, weights: Sequence[Tensor], spec: str) -> Tensor:
    s = ExpertsSpec.parse(spec)
    if len(weights) != (4 if s.bias else 2):
        need = "up, up bias, down, down bias" if s.bias else "up, down"
        raise InputError(f"experts got {len(weights)} weights for spec {spec!r}", todo=f"pass {need}")
    up, *rest = weights
    up_bias, down, down_bias = (rest[0], rest[1], rest[2]) if s.bias else (None, rest[0], None)
    if s.layout == "kn":
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    token, order, slot, offsets = plan
    h = ops.grouped_mm(ops.permute(ops.dispatch(x_TH), token, slot), up, offsets)
    if up_bias is not None:
        h = ops.grouped_bias(h, up_bias, offsets)
    y = ops.grouped_mm(ops.glu(h, None, str(s.glu)), down, offsets)
    if down_bias is not None:
        y = ops.grouped_bias(y, down_bias, offsets)
    out: Tensor = ops.combine(ops.unpermute(y, token, order, slot, w_Tk))
    return out


LIB.define("experts(Tensor x, Tensor idx, Tensor w, Tensor[] weights, str spec) -> Tensor")
LIB.impl("experts", expand, "CompositeImplicitAutograd")
experts = torch.ops.moefx.experts
LIB.define("expert_choice(Tensor x, Tensor token, Tensor w, Tensor[] weights, str spec) -> Tensor")
LIB.impl("expert_choice", expand_choice, "CompositeImplicitAutograd")
expert_choice = torch.ops.moefx.expert_choice
