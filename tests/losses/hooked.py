"""The losses of a transformers model as people compute them without a compiler: forward hooks, and loops.

The hooks see what routers and experts are called with; activations are computed again from these and the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from tests.family import zoo
from tests.losses import loops

Tensor = torch.Tensor


def swiglu(experts: Any, x: Tensor, e: int) -> tuple[Tensor, Tensor]:
    """Activation and output of one expert of the common layout."""
    gate, up = F.linear(x, experts.gate_up_proj[e]).chunk(2)
    z = F.silu(gate) * up
    return z, F.linear(z, experts.down_proj[e])


def gpt_oss(experts: Any, x: Tensor, e: int) -> tuple[Tensor, Tensor]:
    """The same for gpt-oss: [in, out] weights, biases, interleaved and clamped."""
    h = x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
    gate, up = h[::2].clamp(max=experts.limit), h[1::2].clamp(-experts.limit, experts.limit)
    z = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
    return z, z @ experts.down_proj[e] + experts.down_proj_bias[e]


# Score of the router, and one expert.
FAMILIES: dict[str, tuple[str, Callable[[Any, Tensor, int], tuple[Tensor, Tensor]]]] = {
    "qwen3_moe": ("softmax", swiglu),
    "deepseek_v3": ("sigmoid", swiglu),
    "gpt_oss": ("softmax", gpt_oss),
}


def run(name: str, model: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[Any, list[loops.Layer]]:
    """The model's output, and every MoE layer as the loops want it."""
    entry, (score, expert) = zoo.get(name), FAMILIES[name]
    routers, layers = list[Any](), list[loops.Layer]()
    mask = inputs.get("attention_mask")

    def router(module: Any, args: Any) -> None:
        routers.append((module, args[0]))

    def experts(module: Any, args: Any) -> None:
        x, idx = args[0].reshape(-1, args[0].shape[-1]), args[1].reshape(-1, args[1].shape[-1]).tolist()
        gate, seen = routers[-1]
        logits = F.linear(seen.reshape(-1, seen.shape[-1]), gate.weight, getattr(gate, "bias", None))
        rows = [[expert(module, x[t], e) for e in chosen] for t, chosen in enumerate(idx)]
        z, y = ([[r[i] for r in row] for row in rows] for i in (0, 1))
        layers.append(loops.Layer(logits, idx, score, z, y, [] if mask is None else mask.flatten().bool().tolist()))

    hooks = []
    for module in model.modules():
        hook = {entry.router: router, entry.experts: experts}.get(type(module).__name__)
        if hook is not None:
            hooks.append(module.register_forward_pre_hook(hook))
    try:
        return model(**inputs), layers
    finally:
        for h in hooks:
            h.remove()
