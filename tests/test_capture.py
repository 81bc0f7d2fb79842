"""Warm-up and capture: what they need from a model, and that they leave it as they found it."""

from __future__ import annotations

import logging
import random
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo import functional_export

import moefx
from moefx import compat
from moefx.capture import as_call, capture, distinct, warm_up
from moefx.graph.edit import module_path, source_line
from moefx.joint import trace_joint
from moefx.passes.raise_experts import raised

from . import reference as ref

Tensor = torch.Tensor


def experts_functions() -> set[str]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return set(ALL_EXPERTS_FUNCTIONS.keys())


# --- warm-up


def test_warm_up_restores_buffers_random_state_and_gradients() -> None:
    class Noisy(ref.Norm):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x + torch.rand_like(x))

    model = Noisy()
    before = ref.snapshot(model)
    warm_up(model, (ref.hidden(),), {})
    ref.assert_unchanged(model, before)
    model(ref.hidden())  # the control: a forward does change them
    with pytest.raises(AssertionError):
        ref.assert_unchanged(model, before)


def test_warm_up_restores_buffers_also_when_the_model_fails() -> None:
    class Fails(ref.Norm):
        def forward(self, x: Tensor) -> Any:
            super().forward(x)
            raise ValueError("a fault of the model's own")

    model = Fails()
    before = ref.snapshot(model)
    with pytest.raises(moefx.InputError, match="ValueError: a fault of the model's own"):
        warm_up(model, (ref.hidden(),), {})
    ref.assert_unchanged(model, before)


def test_a_buffer_that_is_bound_anew_is_refused_and_restored() -> None:
    class Rebinds(ref.Norm):
        def forward(self, x: Tensor) -> Any:
            self.mean = self.mean * 0.9 + x.detach().mean((0, 1))
            return self.moe(x - self.mean).square().mean()

    model = Rebinds()
    kept, before = model.mean, ref.snapshot(model)
    with pytest.raises(moefx.CaptureError, match="in the place of mean") as caught:
        ref.optimize(model, (ref.hidden(),))
    assert "copy_" in str(caught.value)
    assert model.mean is kept
    ref.assert_unchanged(model, before)


def test_a_buffer_bound_anew_to_what_it_held_is_no_change() -> None:
    """What transformers' rotary embeddings do with their frequencies below the length they were made for."""

    class Refreshes(ref.Norm):
        def forward(self, x: Tensor) -> Any:
            self.mean = self.mean.clone()
            return self.moe(x - self.mean).square().mean()

    opt = ref.optimize(Refreshes(), (ref.hidden(),))
    ref.assert_same(ref.step(opt, (ref.hidden(),)), ref.step(opt.original, (ref.hidden(),)))


# --- capture


def captured(model: Any, inputs: Any, **options: Any) -> Any:
    args, kwargs = as_call(inputs)
    warm_up(model, args, kwargs)
    with raised(model):
        return capture(model, args, kwargs, **options)


def test_placeholders_have_the_dotted_names_of_what_they_are() -> None:
    model = ref.tiny()
    graph = captured(model, ref.batch())
    names = set(graph.names.values())
    assert {n for n, _ in model.named_parameters()} <= names
    assert {"input_ids", "labels"} <= names
    assert set(graph.names) == {n.name for n in graph.graph.find_nodes(op="placeholder")}


def test_nodes_know_their_module_and_source_line() -> None:
    graph = captured(ref.tiny(), ref.batch()).graph
    (experts,) = [n for n in graph.nodes if n.target is torch.ops.moefx.experts or "moefx.experts" in str(n.target)]
    assert module_path(experts) == "model.layers.0.mlp.experts"
    lines = [source_line(n) for n in graph.nodes if n.op == "call_function"]
    assert sum("modeling_qwen3_moe.py:" in line for line in lines) > len(lines) / 2


def test_capture_keeps_the_mode_and_the_cache_setting_of_the_config() -> None:
    for mode in (True, False):
        model = ref.tiny(use_cache=True).train(mode)
        before = ref.snapshot(model)
        captured(model, ref.batch())
        ref.assert_unchanged(model, before)
        assert model.config.use_cache is True


def test_the_experts_hook_is_undone_also_when_capture_fails() -> None:
    class Untraceable(ref.Block):
        def forward(self, x: Tensor) -> Any:
            return self.moe(x).square().mean() * random.SystemRandom().random()

    model, names = Untraceable(), experts_functions()
    before, flags = ref.snapshot(model), [set(vars(m)) for m in model.modules()]
    with pytest.raises(moefx.CaptureError):
        ref.optimize(model, (ref.hidden(),))
    assert experts_functions() == names
    assert model.config._experts_implementation == "grouped_mm"
    ref.assert_unchanged(model, before)
    assert [set(vars(m)) for m in model.modules()] == flags
    assert model(ref.hidden()).item() > 0  # and it still runs by itself


def test_the_experts_hook_is_active_only_inside() -> None:
    model, names = ref.tiny(), experts_functions()
    experts = model.get_submodule("model.layers.0.mlp.experts")
    with raised(model) as blocks:
        assert experts_functions() - names == {"moefx"}
        assert experts.config._experts_implementation == "moefx"
        assert model.config._experts_implementation == "grouped_mm"
        assert [b.path for b in blocks] == ["model.layers.0.mlp.experts"]
    assert experts_functions() == names
    assert experts.config is model.config


def test_state_that_a_graph_does_not_repeat_is_reported() -> None:
    class Counts(ref.Block):
        calls = 0

        def forward(self, x: Tensor) -> Any:
            self.calls += 1
            return self.moe(x).square().mean()

    with pytest.warns(UserWarning, match=r"Counts's forward changes Python state.*L\['self'\]"):
        ref.optimize(Counts(), (ref.hidden(),))


def test_a_forward_may_tell_people_something(capsys: pytest.CaptureFixture[str]) -> None:
    """Once, when it is compiled."""
    logger = logging.getLogger("tests")

    class Tells(ref.Block):
        def forward(self, x: Tensor) -> Any:
            logger.info("x is %s", tuple(x.shape))
            print("here")
            warnings.warn("careful", RuntimeWarning, stacklevel=1)
            return self.moe(x).square().mean()

    with pytest.warns(RuntimeWarning, match="careful"):
        opt = ref.optimize(Tells(), (ref.hidden(),))
    assert capsys.readouterr().out.startswith("here")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = ref.step(opt, (ref.hidden(),))
        warnings.simplefilter("ignore")
        ref.assert_same(got, ref.step(opt.original, (ref.hidden(),)))
    assert capsys.readouterr().out.count("here") == 1  # the original's


def test_a_part_whose_outputs_transformers_records_is_refused_with_the_reason() -> None:
    model = ref.tiny()
    model(**ref.batch())  # installs the recorders
    with pytest.raises(moefx.CaptureError, match="part of a model whose outputs transformers records") as caught:
        ref.optimize(model.model.layers[0].mlp, (ref.hidden(),))
    assert "optimize the whole model" in str(caught.value.todo)
    ref.optimize(model)


@pytest.mark.parametrize("model", [ref.tiny, ref.Norm])
def test_ordinary_models_are_captured_without_a_warning(model: Any) -> None:
    """Transformers' output recorder and a counter in a buffer change Python state too, harmlessly."""
    m = model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ref.optimize(m, ref.batch() if model is ref.tiny else (ref.hidden(),))
    assert not [str(w.message) for w in caught if "side effect" in str(w.message) or "Python state" in str(w.message)]


def test_other_warnings_of_a_capture_come_through(monkeypatch: pytest.MonkeyPatch) -> None:
    class Warns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Any:
            return x * self.w

    def with_warning(*args: Any) -> Any:
        warnings.warn("from the tracer", UserWarning, stacklevel=1)
        return real(*args)

    real = functional_export.dynamo_graph_capture_for_export
    monkeypatch.setattr(functional_export, "dynamo_graph_capture_for_export", with_warning)
    with pytest.warns(UserWarning, match="from the tracer"):
        compat.capture_forward(Warns(), (torch.ones(3),), {})


# --- the call


def test_packed_documents_see_each_other_in_the_model_alone_and_a_warning_says_so() -> None:
    """transformers makes the mask of packed positions only where there is no cache, as in every graph."""
    pytest.importorskip("transformers")
    model = ref.tiny(use_cache=True, output_router_logits=False).eval()
    ids = ref.batch()["input_ids"]
    packed = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]).expand(2, -1).contiguous()}
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="packed position_ids.*use_cache=False"),
    ):
        opt = ref.optimize(model, packed)
    with torch.no_grad():
        got, whole, alone = opt(**packed).logits, model(**packed).logits, model(**packed, use_cache=False).logits
    torch.testing.assert_close(got, alone)
    assert float((got - whole).abs().max()) > 1e-2


class Positions(ref.Block):
    """A block that is called as transformers' models are."""

    def forward(self, x: Tensor, position_ids: Any = None, attention_mask: Any = None, use_cache: Any = None) -> Any:
        return self.moe(x + position_ids.unsqueeze(-1)).square().mean()


@pytest.mark.parametrize(
    ("other", "in_config", "warned"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"attention_mask": torch.ones(2, 8)}, True, False),
        ({"use_cache": False}, True, False),
        ({"use_cache": True}, False, True),
        ({"position_ids": torch.arange(8).expand(2, -1)}, True, False),
    ],
)
def test_packed_positions_are_warned_about_where_the_model_would_make_a_cache(
    other: dict[str, Any], in_config: bool, warned: bool
) -> None:
    model = Positions(use_cache=in_config)
    packed = {"x": ref.hidden(), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 2)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        captured(model, {**packed, **other})
    assert any("packed position_ids" in str(w.message) for w in caught) == warned


def test_as_call() -> None:
    x = ref.hidden()
    assert as_call({"x": x}) == ((), {"x": x})
    assert as_call((x, 3)) == ((x, 3), {})
    assert as_call([x]) == ((x,), {})
    assert as_call(x) == ((x,), {})


def test_distinct_separates_tensors_that_are_the_same_object() -> None:
    model = ref.Block()
    x, y = ref.hidden(), ref.hidden(2).requires_grad_()
    w = model.moe.gate.weight
    (a, b), kwargs = distinct(model, (x, y), {"x": x, "nest": [y, 3], "w": w})
    assert a is x
    assert b is y
    assert kwargs["x"] is not x
    assert kwargs["w"] is not w
    assert kwargs["w"].requires_grad
    assert kwargs["nest"][0].requires_grad
    assert kwargs["nest"][1] == 3
    assert torch.equal(kwargs["nest"][0], y)
    assert len({id(t) for t in (a, b, kwargs["x"], kwargs["nest"][0], w)}) == 5


def test_dynamic_axes_are_symbols_in_both_graphs_and_leave_no_mark_on_the_inputs() -> None:
    class Both(ref.Block):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            return self.moe(x).square().mean() + y.sum()

    inputs = {"x": ref.hidden(), "y": torch.ones(3, 4)}
    graph = captured(Both(), inputs, dynamic={"x": (0, 1), "y": (1,)})
    shapes = {
        graph.names[n.name]: [isinstance(s, torch.SymInt) for s in n.meta["example_value"].shape]
        for n in graph.graph.find_nodes(op="placeholder")
        if graph.names[n.name] in inputs
    }
    assert shapes == {"x": [True, True, False], "y": [False, True]}
    joint = trace_joint(graph, grad=True, codegen="eager")
    symbols = {
        str(s)
        for n, slot in zip(joint.graph.find_nodes(op="placeholder"), joint.inputs, strict=True)
        if slot.kind == "input"
        for s in n.meta["val"].shape
        if isinstance(s, torch.SymInt)
    }
    values = [n.meta["example_value"] for n in graph.graph.find_nodes(op="placeholder")]
    known = {str(s) for v in values if isinstance(v, Tensor) for s in v.shape}  # torch 2.11 passes sizes, too
    assert symbols
    assert symbols <= known  # the same symbols, so that one guard covers both graphs
    assert not any(a.startswith("_dynamo") for t in inputs.values() for a in vars(t))


def test_arguments_that_are_no_tensors_are_no_inputs_of_the_training_graph() -> None:
    class Optional(ref.Block):
        def forward(self, a: Any = None, x: Any = None, b: Any = None, y: Any = 0) -> Any:
            return self.moe(x).square().mean() + y

    inputs = {"a": None, "x": ref.hidden(), "b": 3, "y": torch.ones(())}
    joint = trace_joint(captured(Optional(), inputs), grad=True, codegen="eager")
    plain = trace_joint(captured(Optional(), {"x": ref.hidden(), "y": torch.ones(())}), grad=True, codegen="eager")
    assert [s.key for s in joint.inputs if s.kind == "input"] == [
        1,
        3,
    ]  # positions in the call, as the runtime needs them
    assert [s.kind for s in joint.inputs] == [s.kind for s in plain.inputs]
    assert len(joint.outputs) == len(plain.outputs) == len(joint.graph.output_node().args[0])
    assert joint.fwd_outputs == plain.fwd_outputs
