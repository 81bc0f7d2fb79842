"""Activation checkpointing inside the model: passes see into its regions, which are computed again in the backward."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import moefx

from . import reference as ref
from .profile import nightly

DIALECT = ("experts", "route", "plan_permute", "grouped_mm", "glu", "unpermute")


def checkpointed(model: Any, **options: Any) -> Any:
    """transformers' own switch, with the kind of checkpointing that torch recommends."""
    model.gradient_checkpointing_enable({"use_reentrant": False, **options})
    return model


def counts(gm: Any) -> dict[str, int]:
    """How often each op of the dialect stands in a graph."""
    names = [str(n.target).removeprefix("moefx.").partition(".")[0] for n in gm.graph.nodes]
    return {op: names.count(op) for op in DIALECT}


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable")
@pytest.mark.parametrize("logits", [True, nightly(False)])
def test_a_checkpointed_model_is_rewritten_like_a_plain_one_and_keeps_less(logits: bool) -> None:
    plain = ref.tiny(num_hidden_layers=2, output_router_logits=logits)
    model = checkpointed(ref.tiny(num_hidden_layers=2, output_router_logits=logits))
    a, b = ref.optimize(plain), ref.optimize(model, verify=True)
    assert {p.name: p.matched for p in a.report.passes} == {p.name: p.matched for p in b.report.passes}
    assert counts(a.graphs["joint"]) == counts(b.graphs["joint"])
    assert counts(b.graphs["joint"])["grouped_mm"] > 0
    assert counts(b.graphs["backward"])["glu"] == 2 > counts(a.graphs["backward"])["glu"]  # computed again
    assert 0 < b.report.memory["saved_bytes"] < a.report.memory["saved_bytes"] / 2
    want, got = ref.step(model, ref.batch()), ref.step(b, ref.batch())
    ref.assert_same(got, want)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable")
@pytest.mark.parametrize("codegen", ["eager", nightly("inductor")])
def test_dropout_in_a_checkpointed_region_draws_the_same_masks_again(codegen: str) -> None:
    model = checkpointed(ref.tiny(attention_dropout=0.5))
    opt = ref.optimize(model, codegen=codegen)
    want, got = ref.step(model, ref.batch(), seed=3), ref.step(opt, ref.batch(), seed=3)
    ref.assert_same(got, want)
    other = ref.step(opt, ref.batch(), seed=4)
    assert ref.differ(other, got)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable")
def test_recipes_reach_the_experts_of_a_checkpointed_model() -> None:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128}
    opts = [ref.optimize(m, recipe="fp8_flow") for m in (ref.tiny(**sizes), checkpointed(ref.tiny(**sizes)))]
    assert opts[0].report.casts["before"] == opts[1].report.casts["before"] == 12
    plain, other = (ref.step(opt, ref.batch()) for opt in opts)
    for name, g in plain.grads.items():
        assert torch.equal(g, other.grads[name]), name


class Wrapped(nn.Module):
    """`checkpoint` called by hand, one region inside another."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner, self.options = ref.Block(), options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def part(y: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner.moe, y.tanh(), use_reentrant=False)

        return checkpoint(part, x, use_reentrant=False, **self.options).square().mean()


def test_nested_regions_of_ones_own() -> None:
    model, x = Wrapped(), torch.randn(2, 8, ref.HIDDEN)
    opt = moefx.optimize(model, (x,), codegen="eager", verify=True)
    assert "tag_activation_checkpoint" not in opt.graphs["captured"].code
    model(x).backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    opt(x).backward()
    for n, p in model.named_parameters():
        assert ref.error(p.grad, want[n]) <= 1e-5, n


def test_a_policy_of_ones_own_around_experts_is_refused() -> None:
    policy = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    with pytest.raises(moefx.CaptureError, match=r"policy of its own[\s\S]*moe\.experts[\s\S]*without context_fn"):
        moefx.optimize(Wrapped(context_fn=policy), (torch.randn(2, 8, ref.HIDDEN),), codegen="eager")


def test_other_models_keep_what_they_kept() -> None:
    opt = ref.optimize(ref.tiny())
    assert not [n for n in opt.graphs["joint"].graph.nodes if "moefx_checkpoint" in (n.meta.get("custom") or {})]
