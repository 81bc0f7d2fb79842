"""Modules registered in several places: layers that share a router, a table, their experts, or all they have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moefx
from moefx.models.moe_lm import IDIOMS

H, I, E, K = 8, 12, 4, 2


class Rotary(nn.Module):
    """A buffer that all layers share, as rotary embeddings are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequency", torch.rand(H))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.frequency.cos()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rotary, self.norm, self.moe = Rotary(), nn.LayerNorm(H), IDIOMS["A2"](H, I, E, K)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.moe(self.rotary(self.norm(x)))
        return out


class Net(nn.Module):
    """Two layers, of which the second has something of the first."""

    def __init__(self, shared: str) -> None:
        super().__init__()
        first, second = Layer(), Layer()
        if shared == "router":
            second.moe.gate = first.moe.gate
        elif shared == "experts":
            second.moe.experts = first.moe.experts
        elif shared == "rotary":
            second.rotary = first.rotary
        self.layers = nn.ModuleList([first, first if shared == "layer" else second])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def tensors(model: nn.Module) -> dict[str, Any]:
    return {n: t for f in (model.named_parameters, model.named_buffers) for n, t in f(remove_duplicate=False)}


@pytest.mark.parametrize("shared", ["rotary", "router", "experts", "layer"])
def test_a_module_in_two_places_is_one_module(shared: str) -> None:
    torch.manual_seed(0)
    model, x = Net(shared), torch.randn(2, 7, H)
    original = copy.deepcopy(model)
    before = tensors(model)
    opt = moefx.optimize(model, (x,), codegen="eager")
    loss, expected = opt(x), original(x)
    for out in (loss, expected):
        out.backward()
    assert all(b["raised"] for b in opt.report.blocks)
    torch.testing.assert_close(loss, expected)
    for (name, p), q in zip(opt.named_parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")
    after = tensors(model)
    assert after.keys() == before.keys()
    assert all(after[n] is t for n, t in before.items())  # tracing swaps them, and puts each back in its place
    torch.testing.assert_close(model(x), expected.detach(), check_stride=False, rtol=1e-6, atol=0)
