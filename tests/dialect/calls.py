"""One realistic call of every op, for the checks that are the same for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from moefx.dialect import OPS

from . import oracles
from .oracles import Routing, Tensor, ops, randn

H, I = 6, 5


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
    up_bias = randn(E, 2 * I, dtype=dtype, seed=10)
    maps = r.token, r.order, r.slot
    gptoss = [up.mT.contiguous(), up_bias, down.mT.contiguous(), bias]
    found = {
        "plan": Call("plan", (r.idx, E, r.align)),
        "permute": Call("permute", (x, r.token, r.slot), (0,)),
        "unpermute": Call("unpermute", (y, *maps, None), (0,)),
        "unpermute_weighted": Call("unpermute", (y, *maps, w), (0, 4)),
        "unpermute_backward": Call("unpermute_backward", (dout, y, *maps, w), (0, 1, 5)),
        "gather_weights": Call("gather_weights", (w, r.order), (0,)),
        "scatter_weights": Call("scatter_weights", (rows, r.order, T, k), (0,)),
        "plan_permute": Call("plan_permute", (x, r.idx, E, r.align), (0,)),
        "grouped_mm": Call("grouped_mm", (y, up, r.offsets), (0, 1)),
        "grouped_wgrad": Call("grouped_wgrad", (h, y, r.offsets), (0, 1)),
        "grouped_bias": Call("grouped_bias", (y, bias, r.offsets), (0, 1)),
        "group_sum": Call("group_sum", (y, r.offsets), (0,)),
        "glu": Call("glu", (h, None, "silu"), (0,)),
        "glu_weighted": Call("glu", (h, rows, "interleaved clamp(7,1.702)"), (0, 1)),
        "glu_plain": Call("glu", (h, rows, "plain relu2"), (0, 1)),
        "glu_backward": Call("glu_backward", (da, h, None, "silu"), (0, 1)),
        "glu_backward_weighted": Call("glu_backward", (da, h, rows, "gelu"), (0, 1, 2)),
        "experts": Call("experts", (x, r.idx, w, [up, down], "silu | nk"), (0, 2, 3)),
        "experts_gptoss": Call("experts", (x, r.idx, w, gptoss, "interleaved clamp(7,1.702) | kn bias"), (0, 2, 3)),
    }
    assert {c.op for c in found.values()} == set(OPS)
    return found


NAMES = tuple(calls(oracles.CASES["balanced"]))
each_call = pytest.mark.parametrize("name", NAMES)
each_differentiable = pytest.mark.parametrize("name", [n for n in NAMES if n != "plan"])
