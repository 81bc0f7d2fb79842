"""Options of optimizers and of their groups: which of two numbers counts, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moefx.optim import AdamW, Muon, Soap, param_groups

Tensor = torch.Tensor


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model() -> nn.Module:
    """Matrices, biases and a norm."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 8))


# -- weight decay ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "make", "default"),
    [("muon", Muon, 0.1), ("soap", Soap, 0.01), ("adamw", AdamW, 0.1), ("adamw", torch.optim.AdamW, 0.01)],
)
def test_decay_is_the_optimizers_unless_the_groups_say_it(algorithm: str, make: Any, default: float) -> None:
    def decays(given: float | None, **options: float) -> set[tuple[bool, float]]:
        groups = param_groups(model(), algorithm=algorithm, weight_decay=given, verbose=False)
        made = make(groups, lr=1e-3, **options).param_groups
        return {(g["role"] in ("norm", "bias"), g["weight_decay"]) for g in made}

    assert decays(None) == {(True, 0.0), (False, default)}
    assert decays(None, weight_decay=0.0) == {(True, 0.0), (False, 0.0)}
    assert decays(None, weight_decay=0.4) == {(True, 0.0), (False, 0.4)}
    assert decays(0.3, weight_decay=0.4) == {(True, 0.0), (False, 0.3)}
    assert decays(0.0, weight_decay=0.4) == {(True, 0.0), (False, 0.0)}


@pytest.mark.parametrize("decay", [0.0, 0.4])
def test_decay_of_the_optimizer_is_what_weights_get(decay: float) -> None:
    net = model()
    matrices = [p for p in net.parameters() if p.ndim == 2]
    alone = [nn.Parameter(p.detach().clone()) for p in matrices]
    optimizers = [Muon(x, lr=0.1, weight_decay=decay) for x in (param_groups(net, verbose=False), alone)]
    for p, q in zip(matrices, alone, strict=True):
        p.grad, q.grad = random(*p.shape), random(*p.shape)
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(matrices, alone, strict=True))


def test_the_table_says_whose_decay_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    param_groups(model())
    assert "optimizer's" in capsys.readouterr().err
    param_groups(model(), weight_decay=0.25)
    shown = capsys.readouterr().err
    assert "optimizer's" not in shown
    assert "0.25" in shown
