"""The operands of the tests on a GPU are what the ops take: tried on a CPU, at their smallest size."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import cases as gpu


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DEVICE", "cpu")


@pytest.mark.parametrize("kind", gpu.ROUTINGS)
@pytest.mark.parametrize("op", sorted(gpu.OPERANDS))
def test_operands(op: str, kind: str) -> None:
    args = gpu.OPERANDS[op](kind, 33, 256, 128, 8, 3)
    out = getattr(torch.ops.moefx, op)(*args)
    for t in [out] if isinstance(out, torch.Tensor) else out:
        assert t.device.type == "cpu"


def test_the_adversarial_routing_has_a_hot_expert_empty_ones_and_dropped_pairs() -> None:
    idx = gpu.routing("adversarial", 70, 16, 4)
    counts = idx.flatten().bincount(minlength=17)
    assert counts[15] >= 70 - 10
    assert (counts[4:15] == 0).all()
    assert counts[16] == 10
