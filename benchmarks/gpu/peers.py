"""MoE layers and permutes of other projects for `benchmarks.gpu`, as far as they are installed; none is a dependency.

    pip install liger-kernel            pip install transformer-engine[pytorch]
    pip install git+https://github.com/shawntan/scattermoe       SonicMoE: its README (Hopper and newer)

Each takes rows and a router of its own shape (softmax, top-k, renormalised), as Qwen3-MoE's. What cannot be imported is
noted in `missing` and left out; a peer whose interface has changed since this was written fails with its own error.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor
LAYERS = {"liger": "liger_kernel.transformers.fused_moe", "scattermoe": "scattermoe.mlp", "sonicmoe": "sonicmoe"}
MOVER, MOVER_MODULE = "transformer_engine", "transformer_engine.pytorch"
MOVES = ("permute", "unpermute")  # the ops that it has, too


def imported(name: str, missing: set[str]) -> Any:
    """The module, or None, and its package noted as missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        missing.add(name.partition(".")[0])
        return None


class ScatterMoE(nn.Module):
    """ScatterMoE's experts (arXiv 2403.08245) behind a router like Qwen3-MoE's."""

    def __init__(self, mlp: nn.Module, hidden: int, experts: int, k: int) -> None:
        super().__init__()
        self.gate, self.experts, self.k = nn.Linear(hidden, experts, bias=False), mlp, k

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, H] to [B, S, H]."""
        rows = x.flatten(0, -2)
        p, idx = self.gate(rows).softmax(-1, dtype=torch.float32).topk(self.k)
        out: Tensor = self.experts(rows, (p / p.sum(-1, keepdim=True)).to(x.dtype), idx)
        return out.view_as(x)


def layer(
    name: str, shape: tuple[int, ...], device: str, block: Callable[[], nn.Module], missing: set[str]
) -> nn.Module | None:
    """A peer's layer in bf16 with weights like `block`'s, transformers' own of this shape (T, H, I, E, k)."""
    _, H, I, E, k = shape
    theirs = imported(LAYERS[name], missing)
    if theirs is None:
        return None
    made: nn.Module
    if name == "liger":
        made = theirs.LigerFusedMoE(block())
        return made
    if name == "scattermoe":
        made = ScatterMoE(theirs.GLUMLP(H, I, E, k, activation=nn.SiLU()), H, E, k)
    else:
        swiglu = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
        made = theirs.MoE(E, k, H, I, activation_function=swiglu, add_bias=False, std=H**-0.5)
    made = made.to(device).bfloat16().train()
    for p in made.parameters():
        nn.init.normal_(p, std=H**-0.5)
    return made


def moves(op: str, operands: Any, missing: set[str]) -> Callable[[], Any] | None:
    """Transformer Engine's permute or unpermute of the same tokens, by a mask [T, E] as Megatron-LM calls it."""
    te = imported(MOVER_MODULE, missing)
    if te is None:
        return None
    x, idx = operands.x, operands.idx
    mask = torch.zeros(len(x), operands.E, dtype=torch.int32, device=x.device).scatter_(1, idx, 1)

    def permute() -> Any:
        return te.moe_permute(x, mask, num_out_tokens=idx.numel(), map_type="mask")

    if op == "permute":
        return permute
    rows, back = permute()
    return lambda: te.moe_unpermute(rows, back, restore_shape=x.shape, map_type="mask")
