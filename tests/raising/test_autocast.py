"""Hand-written layers under a surrounding autocast: recognised as without it, and proven inside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moefx
from moefx.models.moe_lm import MoELM
from tests import reference as ref

LOW = torch.bfloat16


def model(idiom: str) -> MoELM:
    return MoELM(64, 32, 24, 1, 2, 4, 2, idiom).train()


def loss(out: Any) -> torch.Tensor:
    found: torch.Tensor = out["loss"]
    return found


def step(module: nn.Module, *, autocast: bool = True) -> ref.Step:
    def run(**inputs: Any) -> Any:
        with torch.autocast("cpu", LOW, enabled=autocast):
            return module(**inputs)

    class Under(nn.Module):
        named_parameters = module.named_parameters
        zero_grad = module.zero_grad
        forward = staticmethod(run)

    return ref.step(Under(), ref.batch(), loss)


@pytest.mark.parametrize("idiom", ["A3", "C", "E1"])
@pytest.mark.parametrize("inside", [True, False], ids=["optimized_inside", "optimized_outside"])
def test_a_block_is_raised_and_computes_what_autocast_makes_of_the_original(idiom: str, inside: bool) -> None:
    original = model(idiom)
    with torch.autocast("cpu", LOW, enabled=inside):
        opt = moefx.optimize(original, ref.batch(), codegen="eager", strict=True)
    got, want, wide = step(opt), step(original), step(original, autocast=False)
    low = next(v.program for v in reversed(opt._variants.values()))
    assert sum("experts" in str(n.target) or "grouped_mm" in str(n.target) for n in low.fw_graph.graph.nodes)
    assert ref.error(got.value, want.value) <= 1e-3
    for name, g in want.grads.items():
        # As far from float32 as the original is: the same products are rounded.
        mine, its = (ref.error(s.grads[name], wide.grads[name]) for s in (got, want))
        assert mine <= max(1.5 * its, 2e-2), name
        assert got.grads[name].dtype == torch.float32
        assert g is None or its <= 0.2
    assert ref.error(got.value, wide.value) > 0.0
    if inside:
        (block,) = opt.report.to_dict()["blocks"]
        assert {"float32", "bfloat16", "autocast to bfloat16"} == set(block["certificate"]["errors"])


class Noisy(nn.Module):
    """Drops out inside its experts, and loops over those that were hit."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 8), nn.SiLU(), nn.Dropout(0.5), nn.Linear(8, 16)) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, chosen = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e in chosen.unique().tolist():
            token, nth = torch.where(chosen == e)
            out.index_add_(0, token, self.experts[e](x[token]) * w[token, nth, None])
        return out


def test_a_model_that_cannot_be_captured_says_why_its_block_was_not_raised() -> None:
    with pytest.raises(moefx.CaptureError, match=r"\(Noisy\) was not raised: .*random numbers") as caught:
        moefx.optimize(Noisy(), (torch.randn(8, 16),), codegen="eager")
    assert "test_autocast.py" in str(caught.value.where)
    assert "for e in chosen.unique().tolist()" in str(caught.value.where)
    assert "loop over hit experts" in str(caught.value.todo)


def test_a_model_that_fails_is_not_told_that_its_arguments_have_no_names() -> None:
    def broken(out: Any) -> Any:
        raise ValueError("broken")

    original = model("C")
    original.norm.register_forward_hook(lambda module, args, out: broken(out))
    with pytest.raises(moefx.InputError, match="broken") as caught:
        moefx.optimize(original, ref.batch(), codegen="eager")
    assert "names no argument" not in str(caught.value)
