"""Twenty transformers families through `moefx.optimize`: the same loss, outputs and gradients as the original model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import moefx

from ..profile import often
from . import zoo
from .compare import (
    BF16_BATCHES,
    Step,
    eval_step,
    relative,
    rng_faults,
    rounding,
    rounding_faults,
    structure_faults,
    train_step,
    typical,
    value_faults,
)

pytest.importorskip("transformers")

IDIOMS = {
    "gpt_oss": "interleaved clamp(1,1.702) | kn bias",
    "nemotron_h": "plain relu2 | nk",
    "llama4": "every expert on every token: silu | nk",
}
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


@dataclass
class Case:
    """A family in fp32 with its optimized twin, which shares its parameters."""

    entry: zoo.Entry
    model: nn.Module
    opt: moefx.OptimizedModule
    inputs: dict[str, torch.Tensor]


# Each run: one of every kind of router and of experts. The others differ from one of these in little but names.
EACH_RUN = ("mixtral", "deepseek_v3", "gpt_oss", "phimoe", "jamba", "llama4")


@pytest.fixture(scope="module", params=often(zoo.NAMES, EACH_RUN))
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(zoo.get(request.param))


def make_case(entry: zoo.Entry, *, padded: bool = False, **overrides: Any) -> Case:
    model, inputs = zoo.build(entry, **overrides), zoo.batch(entry, padded=padded)
    return Case(entry, model, moefx.optimize(model, inputs, codegen="eager"), inputs)


def experts_of(model: nn.Module, entry: zoo.Entry) -> Iterator[nn.Module]:
    return (m for m in model.modules() if type(m).__name__ == entry.experts)


def change_first_experts(
    opt: moefx.OptimizedModule, entry: zoo.Entry, reference: Step, change: Callable[..., None]
) -> Any:
    """A copy of an optimized model, with `change(weights, busiest, second)` applied to its first bank of experts."""
    other = copy.deepcopy(opt)
    path, bank = next((n, m) for n, m in other.named_modules() if type(m).__name__ == entry.experts)
    use = reference.grads[f"{path}.down_proj"].float().flatten(1).norm(dim=1)
    busiest, second = use.topk(2).indices.tolist()
    with torch.no_grad():
        change([p for p in bank.parameters() if p.shape[0] == len(use)], busiest, second)
    return other


# -- fp32 ------------------------------------------------------------------------------------------------------------


def test_every_block_is_raised_or_the_report_says_why(case: Case) -> None:
    blocks = case.opt.report.blocks
    # Experts behind the library's interface are raised by themselves, others with the block around them.
    cls = case.entry.experts if case.entry.switchable else case.entry.block
    assert [b["path"] for b in blocks] == [n for n, m in case.model.named_modules() if type(m).__name__ == cls]
    assert len(blocks) == case.entry.moe_layers
    for block in blocks:
        assert block["raised"]
        assert block["idiom"] == IDIOMS.get(case.entry.name, "silu | nk")
        assert block["error"] < 1e-6
        assert block["reason"] is None
        assert (block["certificate"] is None) == case.entry.switchable
    targets = [str(n.target) for n in case.opt.graphs["captured"].graph.nodes]
    assert sum(t.startswith("moefx.experts") for t in targets) == case.entry.moe_layers


def test_training_step_equals_the_original(case: Case) -> None:
    want, got = train_step(case.model, case.inputs), train_step(case.opt, case.inputs)
    assert structure_faults(got, want) == []
    assert value_faults(got, want) == []
    assert rng_faults(got, want) == []
    assert want.leaves.keys() >= {"loss", "logits"}
    if case.entry.router_logits:
        assert want.leaves.keys() >= {"aux_loss", "router_logits.0"}


def test_evaluation_equals_the_original(case: Case) -> None:
    want, got = eval_step(case.model, case.inputs), eval_step(case.opt, case.inputs)
    assert structure_faults(got, want) == []
    assert value_faults(got, want) == []
    assert got.tracked == set()
    assert [s["mode"] for s in case.opt.report.signatures] == ["train", "eval"]


def test_a_changed_expert_is_noticed(case: Case) -> None:
    """The control for the two tests above: one expert of the optimized copy is off by one per cent."""

    def scale(weights: list[torch.Tensor], busiest: int, second: int) -> None:
        weights[0][busiest] *= 1.01

    want = train_step(case.model, case.inputs)
    got = train_step(change_first_experts(case.opt, case.entry, want, scale), case.inputs)
    faults = value_faults(got, want)
    assert any("logits" in f for f in faults)
    assert any("gradient" in f for f in faults)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_padded_batch_equals_the_original(name: str) -> None:
    case = make_case(zoo.get(name), padded=True)
    want, got = train_step(case.model, case.inputs), train_step(case.opt, case.inputs)
    assert structure_faults(got, want) == []
    assert value_faults(got, want) == []
    # Control: the mask has an effect, so a graph that ignored it would have been caught.
    without = {k: v for k, v in case.inputs.items() if k != "attention_mask"}
    assert value_faults(train_step(case.model, without), want) != []


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("mixtral", {"router_jitter_noise": 0.1, "attention_dropout": 0.1}),
        ("phimoe", {"input_jitter_noise": 0.1, "router_jitter_noise": 0.3}),
    ],
)
def test_noise_is_drawn_from_the_same_stream(name: str, overrides: dict[str, Any]) -> None:
    case = make_case(zoo.get(name), **overrides)
    for seed in (0, 1):
        want, got = train_step(case.model, case.inputs, seed), train_step(case.opt, case.inputs, seed)
        assert structure_faults(got, want) == []
        assert value_faults(got, want) == []
        assert rng_faults(got, want) == []
    # Control: the seed matters, by far more than the tolerance.
    assert relative(train_step(case.opt, case.inputs, 2).leaves["logits"], want.leaves["logits"]) > 1e-2


def test_graphs_return_no_cache() -> None:
    """`use_cache` of the config is off in the graphs and stays on in the config."""
    entry = zoo.get("mixtral")
    model, inputs = zoo.build(entry, use_cache=True).eval(), zoo.batch(entry)
    with torch.no_grad():
        opt = moefx.optimize(model, inputs, codegen="eager")
    want, got = eval_step(model, inputs), eval_step(opt, inputs)
    assert set(want.output) - set(got.output) == {"past_key_values"}
    assert set(got.output) < set(want.output)
    assert relative(got.leaves["logits"], want.leaves["logits"]) < 1e-5
    assert model.config.use_cache is True


# -- bf16 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", often(zoo.NAMES, ("deepseek_v3", "gpt_oss", "llama4")))
def test_bf16_rounds_no_worse_than_the_original(name: str) -> None:
    entry = zoo.get(name)
    model, exact = zoo.build(entry, dtype=torch.bfloat16), zoo.build(entry)
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    opt = moefx.optimize(model, zoo.batch(entry), codegen="eager")

    measured = []
    for inputs in (zoo.batch(entry, seed) for seed in BF16_BATCHES):
        want, got, own = train_step(exact, inputs), train_step(opt, inputs), train_step(model, inputs)
        assert structure_faults(got, own) == []
        measured.append(rounding(own, got, want))
    assert rounding_faults(typical(measured)) == []

    # Control: two experts of the optimized copy are exchanged.
    def exchange(weights: list[torch.Tensor], busiest: int, second: int) -> None:
        for w in weights:
            w[[busiest, second]] = w[[second, busiest]].clone()

    wrong = train_step(change_first_experts(opt, entry, own, exchange), inputs)
    assert "gradient error of" in " ".join(rounding_faults(rounding(own, wrong, want)))


def test_autocast_runs_the_products_in_its_dtype() -> None:
    """fp32 weights under autocast: as the loop of the class, whose linear layers are cast; same yardstick as above."""
    entry = zoo.get("mixtral")
    model, inputs = zoo.build(entry, experts_implementation="eager"), zoo.batch(entry)
    with torch.autocast("cpu", torch.bfloat16):
        opt = moefx.optimize(model, inputs, codegen="eager")
    products = [n for n in opt.graphs["joint"].graph.nodes if "moefx.grouped_mm" in str(n.target)]
    assert products
    assert {n.meta["val"].dtype for n in products} == {torch.bfloat16}

    measured = []
    for inputs in (zoo.batch(entry, seed) for seed in BF16_BATCHES):
        want = train_step(model, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            own, got = train_step(model, inputs), train_step(opt, inputs)
        assert structure_faults(got, own) == []
        measured.append(rounding(own, got, want))
    assert rounding_faults(typical(measured)) == []
