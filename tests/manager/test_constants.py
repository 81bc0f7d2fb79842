"""Constants, modules and output nodes that passes put into graphs, and what the model sees of them: nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx, nn

from moefx import Pass, PassError, PassManager
from moefx.manager import Context
from moefx.passes import pipeline
from moefx.report import Report
from tests import reference as ref
from tests.passes.subject import H, T, captured_graph, rand, trained

from .edited import Block, Edit, first

Tensor = torch.Tensor
X = (ref.hidden(),)
TENSOR = torch.tensor(3.0)


def as_buffer(gm: fx.GraphModule) -> str:
    gm.register_buffer("three", TENSOR)
    return "three"


def as_attribute(gm: fx.GraphModule) -> str:
    gm.three = TENSOR
    return "three"


def within(gm: fx.GraphModule) -> str:
    gm.get_submodule("moe.gate").register_buffer("three", TENSOR)
    return "moe.gate.three"


def in_its_own(gm: fx.GraphModule) -> str:
    held = nn.Module()
    held.register_buffer("three", TENSOR)
    gm.add_submodule("moe.constants", held)
    return "moe.constants.three"


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies the loss by a constant that it brings, or by a parameter of the model."""

    register: Callable[[Any], str]
    level: str = "model"  # type: ignore[misc]
    numerics = "changes"

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        """Once."""
        out: Any = graph.output_node()
        loss = out.args[0][0]
        if loss.meta.get("moefx_passes", ())[-1:] == (self.name,):
            return
        with graph.inserting_before(out):
            factor = graph.get_attr(self.register(graph.owning_module))
            scaled = graph.call_function(torch.ops.aten.mul.Tensor, (loss, factor))
        out.args = ((scaled, *out.args[0][1:]),)


def scaled(model: nn.Module, register: Callable[[Any], str], level: str = "model", **options: Any) -> Any:
    passes = pipeline(codegen="eager").insert(Scale(register, level))
    return ref.optimize(model, X, passes=passes, **options)


@pytest.mark.parametrize("register", [as_buffer, as_attribute, within, in_its_own])
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_a_constant_of_a_pass_is_none_of_the_models(register: Callable[[Any], str]) -> None:
    model = ref.Block()
    before, modules = ref.snapshot(model), dict(model.named_modules())
    opt = scaled(model, register, verify=register is as_buffer)
    for module in (opt, copy.deepcopy(opt)):
        ref.step(module, X)
        assert module(*X).item() == pytest.approx(3 * model(*X).item(), rel=1e-5)
    ref.assert_unchanged(model, before)
    assert dict(model.named_modules()) == modules
    assert not any("three" in vars(m) for m in model.modules())
    assert list(opt.state_dict()) == list(before["state"])
    assert ref.count(opt) == 1  # the second call did not find another model
    (read,) = opt.graphs["scale"].graph.find_nodes(op="get_attr")
    assert opt.graphs["scale"].get_buffer(read.target) is TENSOR


def test_a_parameter_of_the_model_that_a_pass_reads_is_trained() -> None:
    class Shifted(ref.Block):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Any:
            return super().forward(x + self.shift)

    model = Shifted()
    opt = scaled(model, lambda gm: "shift")
    ref.assert_same(ref.step(opt, X), ref.step(model, X, lambda loss: loss * model.shift))


def new_parameter(gm: fx.GraphModule) -> str:
    gm.register_parameter("three", nn.Parameter(TENSOR.clone()))
    return "three"


def that_needs_a_gradient(gm: fx.GraphModule) -> str:
    gm.register_buffer("three", TENSOR.clone().requires_grad_())
    return "three"


@pytest.mark.parametrize("level", ["model", "training"])
@pytest.mark.parametrize("register", [new_parameter, that_needs_a_gradient])
def test_a_constant_that_would_have_to_be_trained_is_refused(register: Callable[[Any], str], level: str) -> None:
    model = ref.Block()
    before = ref.snapshot(model)
    with pytest.raises(PassError, match="scale: it adds three, which requires a gradient") as e:
        scaled(model, register, level)
    assert "never be trained" in str(e.value.why)
    ref.assert_unchanged(model, before)


def test_modules_are_not_called() -> None:
    def edit(graph: fx.Graph, ctx: Context) -> None:
        if graph.find_nodes(op="call_module"):
            return
        node = first(graph, "linear")
        graph.owning_module.add_submodule("same", nn.Identity())  # type: ignore[union-attr]
        with graph.inserting_after(node):
            called = graph.call_module("same", (node,))
        first(graph, "dropout").replace_input_with(node, called)

    captured = captured_graph(Block(), rand(T, H))
    with pytest.raises(PassError, match="it calls the module same") as e:
        PassManager((Edit(edit),)).run("model", captured.gm, Report(), captured.gm.meta["fake_mode"])
    assert "call_function" in str(e.value.todo)


@dataclass(frozen=True)
class OutputAnew(Pass):
    """Erases the output node and makes another."""

    level: str = "model"  # type: ignore[misc]

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        """Once."""
        out = graph.output_node()
        if "anew" not in out.meta:
            returned = out.args[0]
            graph.erase_node(out)
            graph.output(returned).meta["anew"] = True


@pytest.mark.parametrize("level", ["model", "training"])
def test_an_output_node_made_anew_means_what_the_old_one_meant(level: str) -> None:
    losses = {"losses": ["sp", "metrics"]}
    plain = ref.optimize(ref.Block(), X, **losses)
    want = ref.step(plain, X)
    opt = ref.optimize(ref.Block(), X, passes=pipeline(codegen="eager").insert(OutputAnew(level)), **losses)
    ref.assert_same(ref.step(opt, X), want, 0.0, 0.0)
    assert opt.losses.keys() == plain.losses.keys() != set()
    assert opt.routing.keys() == plain.routing.keys() != set()
    assert opt.report.losses == plain.report.losses != []


def test_constants_survive_a_second_tracing() -> None:
    """A returned view is traced again, as a copy."""

    class Viewed(ref.Block):
        def forward(self, x: Tensor) -> Any:
            y = self.moe(x)
            return y.square().mean(), y.view(-1)

    model = Viewed()
    opt = scaled(model, as_buffer)
    assert opt(*X)[0].item() == pytest.approx(3 * model(*X)[0].item(), rel=1e-5)


def test_captured_modules_hold_the_models_own_tensors() -> None:
    """Which passes may read; registries are their own, and the model's again while the joint graph is traced."""
    model = Block()
    captured = captured_graph(model, rand(T, H))
    gm = captured.gm
    assert gm.get_parameter("inner.weight") is model.inner.weight
    assert gm.get_buffer("seen") is model.seen
    assert gm.get_submodule("inner") is not model.inner
    with captured.holder.as_model():
        assert gm.get_submodule("inner") is model.inner
    assert gm.get_submodule("inner") is not model.inner
    assert trained(model, captured).level == "training"
