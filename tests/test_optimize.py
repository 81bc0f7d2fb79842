"""`moefx.optimize`: its arguments, its report, and what is left of a run that failed."""

from __future__ import annotations

import copy
import importlib
from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx

import moefx
from moefx.passes import Quantize, as_pipeline
from moefx.precision.recipe import get_recipe

from . import reference as ref

Tensor = torch.Tensor
stages: Any = importlib.import_module("moefx.optimize")  # the name `moefx.optimize` is the function


@pytest.fixture(scope="module")
def opt() -> moefx.OptimizedModule:
    return ref.optimize(ref.Dropped(), (ref.hidden(),))


# --- arguments


@pytest.mark.parametrize("form", ["dict", "mapping", "tuple", "list", "tensor"])
def test_example_inputs_in_any_form(form: str) -> None:
    x = ref.hidden()
    inputs = {"dict": {"x": x}, "mapping": UserDict(x=x), "tuple": (x,), "list": [x], "tensor": x}[form]
    opt = ref.optimize(ref.Block(), inputs)
    ref.assert_same(ref.step(opt, (x,)), ref.step(opt.original, (x,)))
    assert len(ref.programs(opt)) == (
        2 if form in ("dict", "mapping") else 1
    )  # how it is passed is part of a signature


def test_the_inputs_are_left_alone() -> None:
    x = ref.hidden().requires_grad_()
    inputs = {"x": x}
    ref.optimize(ref.Block(), inputs, dynamic={"x": (0, 1)})
    assert inputs == {"x": x}
    assert x.grad is None
    assert torch.equal(x.detach(), ref.hidden())
    assert not vars(x)


def test_recipes_by_name_and_as_objects() -> None:
    recipe = moefx.Recipe("mine", "experts only", passes=("expand_experts", "lower_wires"))
    opt = ref.optimize(ref.Block(), (ref.hidden(),), recipe=recipe)
    assert opt.report.recipe == "mine"
    assert [p.name for p in opt.report.passes] == ["expand_experts", "lower_wires"]
    ref.assert_same(ref.step(opt, (ref.hidden(),)), ref.step(opt.original, (ref.hidden(),)))


def test_passes_as_pipeline_names_and_instances() -> None:
    @dataclass(frozen=True)
    class Counting(moefx.Pass):
        """Counts nodes."""

        def run(self, graph: fx.Graph, ctx: moefx.Context) -> None:
            for node in graph.find_nodes(op="placeholder"):
                ctx.matched(node)

    for passes in (
        moefx.pipeline("bf16", codegen="eager").insert(Counting(), after="expand_experts"),
        ["expand_experts", Counting()],
    ):
        opt = ref.optimize(ref.Block(), (ref.hidden(),), passes=passes)
        (row,) = [p for p in opt.report.passes if p.name == "counting"]
        assert row.matched == 4  # x, the gate and two stacks of experts
        ref.assert_same(ref.step(opt, (ref.hidden(),)), ref.step(opt.original, (ref.hidden(),)))


def test_passes_and_recipe_are_one_thing_or_an_error() -> None:
    """None of the ways to name passes drops the casts of a recipe in silence."""
    flow = moefx.pipeline("fp8_flow", codegen="eager")
    for passes, recipe in (
        (flow, "bf16"),  # what a pipeline was made for counts where nothing else is asked for
        (flow, "fp8_flow"),
        (flow.names, "fp8_flow"),
        (["raise_idioms", *flow.names], "fp8_flow"),
        (moefx.pipeline("bf16", codegen="eager").insert(Quantize(), before="lower_wires"), "fp8_flow"),
    ):
        chain, chosen = as_pipeline(passes, recipe, "eager")
        assert chosen == get_recipe("fp8_flow")
        assert {p.recipe.name for p in chain.passes if isinstance(p, Quantize)} == {"fp8_flow"}
    opt = ref.optimize(ref.tiny(hidden_size=128, moe_intermediate_size=128), passes=flow)
    assert opt.report.recipe == "fp8_flow"
    assert opt.report.casts["before"] == 12

    bf16 = moefx.pipeline("bf16", codegen="eager")
    for passes, recipe, said in (
        (bf16.remove("fold_combine"), "fp8_flow", r"'fp8_flow' asks for casts, and no pass .*start from"),
        (["expand_experts"], "fp8_flow", "it holds expand_experts"),
        ([], "mxfp8", "it is empty"),
        (flow, "mxfp4_hopper", r"was made for recipe 'fp8_flow', and recipe is 'mxfp4_hopper'.*start from"),
        ([*flow.passes, *moefx.pipeline("mxfp8").passes], "bf16", "was made for recipe 'mxfp8'"),
        (None, moefx.Recipe("mine", specs=flow_specs(), passes=("expand_experts",)), "'mine' asks for casts"),
    ):
        with pytest.raises(moefx.RecipeError, match=f"(?s){said}"):
            as_pipeline(passes, recipe, "eager")
    # Casts that only a rule asks for are casts.
    ruled = moefx.Recipe("ruled", rules=(moefx.Rule("*", flow_specs()),))
    assert "quantize" in ruled.passes


def flow_specs() -> dict[str, str]:
    return dict(get_recipe("fp8_flow").specs)


def test_verify_measures_every_pass_that_changed_something() -> None:
    opt = ref.optimize(ref.tiny(), verify=True)
    errors = {p.name: p.error for p in opt.report.passes if p.matched}
    assert errors
    assert all(e is not None and 0 <= e < 1e-4 for e in errors.values())
    plain = {p.name: p.error for p in ref.optimize(ref.Block(), (ref.hidden(),)).report.passes}
    assert set(plain.values()) == {None}
    ref.assert_same(ref.step(opt, ref.batch()), ref.step(opt.original, ref.batch()))


def test_a_bank_of_experts_that_is_not_raised_is_named_in_the_report() -> None:
    class Loop(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(ref.HIDDEN, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Any:
            return sum(e(x).square().sum() for e in self.experts)

    opt = ref.optimize(Loop(), (ref.hidden(),))
    (row,) = opt.report.to_dict()["blocks"]
    assert row["raised"] is False
    assert "an expert is a single matrix" in row["reason"]
    assert "0 raised, 1 left alone" in str(opt.report)
    ref.assert_same(ref.step(opt, (ref.hidden(),)), ref.step(opt.original, (ref.hidden(),)))


@pytest.mark.nightly
def test_inductor_with_symbolic_sizes_of_a_transformers_model() -> None:
    """Saved tensors are batch * sequence long: the backward is told both."""
    pytest.importorskip("transformers")
    model = ref.tiny()
    opt = ref.optimize(model, codegen="inductor", dynamic=ref.DYNAMIC)
    for B, S in [(2, 8), (3, 5)]:
        ref.assert_same(ref.step(opt, ref.batch(B, S)), ref.step(model, ref.batch(B, S)))
    assert len(ref.programs(opt)) == 1


def test_inductor_codegen_of_a_transformers_model() -> None:
    model = ref.tiny(attention_dropout=0.2)
    opt = ref.optimize(model, codegen="inductor")
    ref.assert_same(ref.step(opt, ref.batch()), ref.step(model, ref.batch()))
    got, want = (ref.step(m, ref.batch(), lambda out: out.router_logits[0].square().sum()) for m in (opt, model))
    ref.assert_same(got, want)
    (program,) = ref.programs(opt)
    assert len(program.backward_variants) == 2
    assert not any(
        "moefx.glu" in str(n.target) for n in program.fw_graph.graph.nodes
    )  # inlined, so that Inductor fuses it


# --- the report


def test_signatures_are_listed_in_the_order_of_compilation(opt: moefx.OptimizedModule) -> None:
    opt(ref.hidden()[:1])
    opt.eval()
    with torch.no_grad():
        opt(ref.hidden())
    opt.train()
    rows = [{k: v for k, v in s.items() if k != "seconds"} for s in opt.report.signatures]
    assert rows == [
        {"mode": "train", "grad": True, "inputs": ["float32[2, 8, 32]"]},
        {"mode": "train", "grad": True, "inputs": ["float32[1, 8, 32]"]},
        {"mode": "eval", "grad": False, "inputs": ["float32[2, 8, 32]"]},
    ]
    assert all(s["seconds"] > 0 for s in opt.report.signatures)


def test_stages_are_timed_and_counted(opt: moefx.OptimizedModule) -> None:
    opt(ref.hidden()).backward()
    opt.zero_grad()
    rows = opt.report.stages
    assert list(rows) == [
        "warm-up", "raise", "capture", "model passes", "joint", "training passes", "partition", "codegen",
        "codegen backward",
    ]  # fmt: skip
    assert all(r["seconds"] >= 0 for r in rows.values())
    assert rows["joint"]["nodes"] > rows["capture"]["nodes"] > 20
    assert opt.report.memory["saved_bytes"] > 0


def test_graphs_of_every_stage_can_be_looked_at(opt: moefx.OptimizedModule) -> None:
    assert {"captured", "expand_experts", "joint", "forward", "backward"} <= set(opt.graphs)
    experts = {name: "moefx.experts" in str(g.graph) for name, g in opt.graphs.items()}
    assert experts["captured"]
    assert not experts["forward"]
    assert all(isinstance(g, fx.GraphModule) for g in opt.graphs.values())


def test_the_report_of_the_first_signature_is_not_touched_by_later_ones(opt: moefx.OptimizedModule) -> None:
    before = (list(opt.graphs), len(opt.report.passes), opt.report.stages["capture"]["seconds"])
    opt(ref.hidden()[:, :6])
    assert (list(opt.graphs), len(opt.report.passes), opt.report.stages["capture"]["seconds"]) == before


def test_a_slow_compilation_says_what_it_is_doing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ref.optimize(ref.Block(), (ref.hidden(),))
    monkeypatch.setattr(stages.Stages, "total", property(lambda self: 3.0))
    ref.optimize(ref.Block(), (ref.hidden(),))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2].split(" ")[0] for line in lines if line.startswith("moefx: Block: ")][-1] == "codegen"
    assert "(3.0 s so far)" in lines[-1]


# --- failures


@dataclass(frozen=True)
class Broken(moefx.Pass):
    """Fails at either level."""

    level: str = "model"  # type: ignore[misc]

    def run(self, graph: fx.Graph, ctx: moefx.Context) -> None:
        raise ZeroDivisionError("a fault of the pass's own")


def fail(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("no such luck")


FAILURES: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "a model pass": ({"passes": [Broken()]}, None, "a fault of the pass's own"),
    "a training pass": ({"passes": ["expand_experts", Broken("training")]}, None, "a fault of the pass's own"),
    "capture": ({}, "capture", "no such luck"),
    "joint": ({}, "trace_joint", "no such luck"),
    "partition": ({}, "split", "no such luck"),
    "codegen": ({}, "compiler", "no such luck"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_after_a_failure_the_model_is_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    class Noisy(ref.Norm):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x + torch.rand_like(x))

    options, replaced, text = FAILURES[name]
    model = Noisy().eval()
    other = copy.deepcopy(model)
    registry = set(ALL_EXPERTS_FUNCTIONS.keys())
    before, flags = ref.snapshot(model), [set(vars(m)) for m in model.modules()]
    with monkeypatch.context() as patch:
        if replaced:
            patch.setattr(stages, replaced, fail)
        with pytest.raises((moefx.PassError, RuntimeError), match=text):
            ref.optimize(model, (ref.hidden(),), **options)
    ref.assert_unchanged(model, before)
    assert [set(vars(m)) for m in model.modules()] == flags
    assert set(ALL_EXPERTS_FUNCTIONS.keys()) == registry
    opt = ref.optimize(model, (ref.hidden(),))
    ref.assert_same(ref.step(opt, (ref.hidden(),)), ref.step(other, (ref.hidden(),)))
