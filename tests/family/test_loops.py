"""Models of transformers whose experts are loops, raised by value: loss and gradients equal to the original's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import moefx

from ..profile import nightly, often
from . import loops
from .compare import Step, eval_step, gradient_error, relative, rng_faults, structure_faults, train_step

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


@pytest.fixture(scope="module", params=loops.NAMES)
def case(request: pytest.FixtureRequest) -> tuple[loops.Loop, nn.Module, moefx.OptimizedModule]:
    entry = loops.get(request.param)
    model = loops.build(entry)
    return entry, model, moefx.optimize(model, loops.batch(entry), codegen="eager")


def faults(got: Step, want: Step) -> list[str]:
    """What differs: structure, outputs by more than 1e-5, gradients by more than 1e-4, each relative in norm."""
    found = structure_faults(got, want) + rng_faults(got, want)
    for key, w in want.leaves.items():
        if isinstance(w, torch.Tensor) and w.is_floating_point() and not (r := relative(got.leaves[key], w)) <= 1e-5:
            found.append(f"{key} is off by {r:.1e}")
    if not (r := gradient_error(got, want)) <= 1e-4:
        found.append(f"a gradient is off by {r:.1e}")
    return found


def test_every_block_is_raised_with_a_certificate(case: Any) -> None:
    entry, _, opt = case
    blocks = {b["path"]: b for b in opt.report.blocks}
    assert {p: b["idiom"] for p, b in blocks.items() if b["raised"]} == entry.idioms
    assert {p for p, b in blocks.items() if not b["raised"]} == set(entry.left)
    for path, b in blocks.items():
        if path in entry.idioms:
            assert b["certificate"]["cases"] > 0
            assert b["error"] < 1e-4
        else:
            assert b["reason"]
    targets = [str(n.target) for n in opt.graphs["captured"].graph.nodes]
    assert sum(t.startswith("moefx.experts") for t in targets) == len(entry.idioms)


def test_training_step_equals_the_original(case: Any) -> None:
    entry, model, opt = case
    for seed in (1, 2):
        inputs = loops.batch(entry, seed)
        want = train_step(model, inputs)
        assert faults(train_step(opt, inputs), want) == []
        assert len(want.grads) > 10


def test_three_steps_follow_the_original(case: Any) -> None:
    entry, model, opt = case
    first, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    losses = []
    for runner, owner in ((first, first), (opt, model)):
        sgd = torch.optim.SGD(owner.parameters(), lr=0.05)
        losses.append([])
        for seed in (1, 2, 3):
            sgd.zero_grad()
            torch.manual_seed(seed)
            loss = runner(**loops.batch(entry, seed)).loss
            loss.backward()
            sgd.step()
            losses[-1].append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    after = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert sum(not torch.equal(p, before[n]) for n, p in after.items()) > 10
    model.load_state_dict(before)  # the other tests' model
    model.zero_grad()
    for name, p in first.named_parameters():
        assert relative(after[name], p.detach()) < 1e-5, name


def test_evaluation_equals_the_original(case: Any) -> None:
    entry, model, opt = case
    if entry.name == "nllb_moe":
        pytest.skip("its router changes its capacity in evaluation")
    inputs = loops.batch(entry)
    want, got = eval_step(model, inputs), eval_step(opt, inputs)
    assert structure_faults(got, want) == []
    assert relative(got.leaves["logits"], want.leaves["logits"]) < 1e-5
    model.train()


@pytest.mark.parametrize("name", often(loops.NAMES, ("nllb_moe", "dbrx")))
def test_padded_batch_equals_the_original(name: str) -> None:
    entry = loops.get(name)
    model, inputs = loops.build(entry), loops.batch(entry, padded=True)
    opt = moefx.optimize(model, inputs, codegen="eager")
    assert all(b["raised"] for b in opt.report.blocks if b["path"] not in entry.left)
    want = train_step(model, inputs)
    assert faults(train_step(opt, inputs), want) == []
    without = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
    assert faults(train_step(model, without), want) != []  # the mask matters


@pytest.mark.parametrize("name", often(loops.NAMES, ("dbrx",)))
def test_bf16_trains(name: str) -> None:
    entry = loops.get(name)
    model, inputs = loops.build(entry, dtype=torch.bfloat16), loops.batch(entry)
    opt = moefx.optimize(model, inputs, codegen="eager")
    assert all(b["raised"] for b in opt.report.blocks if b["path"] not in entry.left)
    want, got = train_step(model, inputs), train_step(opt, inputs)
    assert abs(float(got.loss - want.loss)) < 3e-2
    assert got.grads.keys() >= want.grads.keys()
    assert relative(got.flat_grads(want), want.flat_grads()) < 0.1


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("switch", {"router_jitter_noise": 0.1}),
        nightly("nllb_moe", {"second_expert_policy": "random"}),
        nightly("nllb_moe", {"batch_prioritized_routing": True}),
        nightly("nllb_moe", {"normalize_router_prob_before_dropping": True}),
    ],
)
def test_noise_and_priorities_are_the_originals(name: str, overrides: dict[str, Any]) -> None:
    entry = loops.get(name)
    model, inputs = loops.build(entry, **overrides), loops.batch(entry)
    opt = moefx.optimize(model, inputs, codegen="eager")
    want = train_step(model, inputs)
    assert faults(train_step(opt, inputs), want) == []
    assert faults(train_step(loops.build(entry), inputs), want) != []  # the option matters


def test_a_changed_expert_is_noticed(case: Any) -> None:
    """The control for the tests above: one tensor of an expert of the optimized copy is off by one per cent."""
    entry, model, opt = case
    inputs = loops.batch(entry)
    want = train_step(model, inputs)
    other = copy.deepcopy(opt)
    block = next(iter(entry.idioms))
    inside = {n: g for n, g in want.grads.items() if n.startswith(f"{block}.") and "router" not in n and g.dim() > 1}
    name = max(inside, key=lambda n: float(inside[n].norm()))
    with torch.no_grad():
        dict(other.named_parameters())[name].mul_(1.01)
    assert any("gradient" in f for f in faults(train_step(other, inputs), want))
