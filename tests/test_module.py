"""An optimized module is the original in everything but speed: same parameters, names, state, attributes."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import moefx

from . import reference as ref

Tensor = torch.Tensor


@pytest.fixture(scope="module")
def opt() -> moefx.OptimizedModule:
    """Shared; tests that change it put it back or take a copy."""
    return ref.optimize(ref.tiny())


@pytest.fixture(scope="module")
def model(opt: moefx.OptimizedModule) -> Any:
    return opt.original


# --- registries


def test_parameters_buffers_and_submodules_are_the_same_objects_under_the_same_names(
    opt: moefx.OptimizedModule, model: Any
) -> None:
    for kind in ("named_parameters", "named_buffers", "named_children"):
        got, want = (list(getattr(m, kind)()) for m in (opt, model))
        assert [n for n, _ in got] == [n for n, _ in want]
        assert all(a is b for (_, a), (_, b) in zip(got, want, strict=True))
        assert len(got) >= 1
    mine, theirs = dict(opt.named_modules()), dict(model.named_modules())
    assert list(mine) == list(theirs)
    assert {n for n in mine if mine[n] is not theirs[n]} == {""}
    assert opt.get_submodule("model.layers.0.mlp") is model.get_submodule("model.layers.0.mlp")
    assert opt.get_parameter("lm_head.weight") is model.lm_head.weight


def test_state_dict_has_the_same_keys_in_the_same_order_and_shares_storage(
    opt: moefx.OptimizedModule, model: Any
) -> None:
    got, want = opt.state_dict(), model.state_dict()
    assert list(got) == list(want)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(got.values(), want.values(), strict=True))
    assert list(opt.state_dict(prefix="a.")) == [f"a.{n}" for n in want]


def test_state_of_a_module_that_holds_an_optimized_one(opt: moefx.OptimizedModule, model: Any) -> None:
    outer, plain = nn.ModuleDict({"m": opt}), nn.ModuleDict({"m": model})
    assert list(outer.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in outer.named_parameters()] == [n for n, _ in plain.named_parameters()]
    other = nn.ModuleDict({"m": copy.deepcopy(opt)})
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other["m"].lm_head.weight, model.lm_head.weight)


def test_load_state_dict(opt: moefx.OptimizedModule) -> None:
    target = copy.deepcopy(opt)
    state = {n: t * 0.5 for n, t in opt.state_dict().items()}
    assert target.load_state_dict(state).missing_keys == []
    ref.assert_same(ref.step(target, ref.batch()), ref.step(target.original, ref.batch()))
    assert ref.differ(ref.step(target, ref.batch()), ref.step(opt, ref.batch()))
    assert len(ref.programs(target)) == 1
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*lm_head\.weight"):
        target.load_state_dict({n: t for n, t in state.items() if n != "lm_head.weight"})


def test_a_module_around_it_loads_with_the_originals_hooks_and_extra_state() -> None:
    class Extra(ref.Block):
        got: Any = None

        def get_extra_state(self) -> Any:
            return {"steps": 7}

        def set_extra_state(self, state: Any) -> None:
            self.got = state

    def rename(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for key in [k for k in state if "old." in k]:
            state[key.replace("old.", "")] = state.pop(key)

    model, said = Extra(), []
    opt = moefx.optimize(model, (ref.hidden(),), codegen="eager")
    opt.register_load_state_dict_pre_hook(rename)
    opt.register_load_state_dict_post_hook(lambda *_: said.append("loaded"))
    state = nn.ModuleDict({"m": opt}).state_dict()
    assert state["m._extra_state"] == {"steps": 7}
    state = {k.replace("m.", "m.old.", 1) if isinstance(v, torch.Tensor) else k: v for k, v in state.items()}
    nn.ModuleDict({"m": opt}).load_state_dict(state)
    assert model.got == {"steps": 7}
    assert said == ["loaded"]
    model.load_state_dict({k.replace("m.", "", 1): v for k, v in state.items()})  # hooks are the original's, too
    assert said == ["loaded"] * 2


def test_replicas_on_other_devices_are_refused(opt: moefx.OptimizedModule) -> None:
    with pytest.raises(moefx.InputError, match="DistributedDataParallel"):
        opt._replicate_for_data_parallel()


def test_registering_on_either_side_is_seen_on_both() -> None:
    opt = ref.optimize(ref.Block(), (ref.hidden(),))
    opt.register_buffer("extra", torch.ones(2))
    opt.head = nn.Linear(2, 2)
    opt.original.scale = nn.Parameter(torch.ones(3))
    for module in (opt, opt.original):
        assert "extra" in module.state_dict()
        assert "head.weight" in module.state_dict()
        assert dict(module.named_parameters())["scale"] is opt.original.scale
    ref.assert_same(ref.step(opt, (ref.hidden(),)), ref.step(opt.original, (ref.hidden(),)))


# --- attributes


def test_attributes_fall_through(opt: moefx.OptimizedModule, model: Any) -> None:
    assert opt.config is model.config
    assert opt.dtype == torch.float32
    assert opt.device == torch.device("cpu")
    assert opt.num_parameters() == model.num_parameters()
    assert opt.get_input_embeddings() is model.get_input_embeddings()
    assert hasattr(opt, "generate")
    assert not hasattr(opt, "no_such_attribute")
    with pytest.raises(AttributeError, match=r"Qwen3MoeForCausalLM.*no_such_attribute"):
        _ = opt.no_such_attribute


def test_setting_an_attribute_of_the_original_sets_it_there(opt: moefx.OptimizedModule, model: Any) -> None:
    kept = model.loss_type
    opt.loss_type = "other"
    assert model.loss_type == "other"
    opt.loss_type = kept
    assert "loss_type" not in vars(opt)
    opt.a_note = 3  # nothing of the original's
    assert opt.a_note == 3
    assert not hasattr(model, "a_note")
    del opt.a_note


def test_replacing_a_parameter_through_the_optimized_module(opt: moefx.OptimizedModule) -> None:
    target = copy.deepcopy(opt)
    new = nn.Parameter(target.lm_head.weight.detach() * 2)
    target.lm_head.weight = new
    assert target.original.lm_head.weight is new


def test_modes(opt: moefx.OptimizedModule, model: Any) -> None:
    assert opt.training
    assert opt.eval() is opt
    assert not any(m.training for m in (opt, *model.modules()))
    assert opt.train() is opt
    assert all(m.training for m in (opt, *model.modules()))
    model.eval()
    assert opt.training is False
    opt.training = True
    assert model.training
    assert not model.lm_head.training
    model.train()


def test_to_apply_and_requires_grad_act_on_the_original(opt: moefx.OptimizedModule) -> None:
    target = copy.deepcopy(opt)
    first = target.lm_head.weight
    assert target.to(torch.bfloat16) is target
    assert target.original.dtype == torch.bfloat16
    assert target.float().lm_head.weight is first
    visited: list[nn.Module] = []
    assert target.apply(visited.append) is target
    assert visited == [*visited[:-1], target.original]
    assert {id(m) for m in visited} == {id(m) for m in target.original.modules()}
    assert target.requires_grad_(False) is target
    assert not any(p.requires_grad for p in target.original.parameters())
    target.zero_grad()
    assert target.half().original.dtype == torch.float16


def test_generate_runs_and_gives_what_the_original_gives(opt: moefx.OptimizedModule, model: Any) -> None:
    prompt = ref.batch(1, 4)["input_ids"]
    opt.eval()
    got, want = (m.generate(prompt, max_new_tokens=5, do_sample=False) for m in (opt, model))
    opt.train()
    assert got.shape == (1, 9)
    assert torch.equal(got, want)


def test_save_pretrained_and_from_pretrained(opt: moefx.OptimizedModule, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    opt.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert type(loaded) is type(opt.original)
    ref.assert_same(ref.step(loaded, ref.batch()), ref.step(opt, ref.batch()))


def test_printing(opt: moefx.OptimizedModule) -> None:
    text = str(opt)
    assert text.startswith("OptimizedModule(\n  moefx: 1 compiled signature(s) of Qwen3MoeForCausalLM\n")
    assert "(experts): Qwen3MoeExperts(" in text
    assert "lm_head" in text


def test_original_report_graphs_and_options(opt: moefx.OptimizedModule) -> None:
    assert type(opt.original).__name__ == "Qwen3MoeForCausalLM"
    assert isinstance(opt.report, moefx.Report)
    assert next(iter(opt.graphs)) == "captured"
    assert {"joint", "forward", "backward"} <= set(opt.graphs)
    assert opt.options.codegen == "eager"


# --- copies


def test_pickling_a_module_keeps_its_outputs_and_how_it_is_compiled() -> None:
    opt = ref.optimize(Picklable(), (ref.hidden(),), passes=["expand_experts", "share_plans"])
    want = ref.step(opt, (ref.hidden(),))
    for loaded in (pickle.loads(pickle.dumps(opt)), _saved_and_loaded(opt)):
        assert isinstance(loaded, moefx.OptimizedModule)
        assert ref.programs(loaded) == []
        ref.assert_same(ref.step(loaded, (ref.hidden(),)), want, value=0, grad=0)
        assert loaded.options.passes.names == ["expand_experts", "share_plans"]
        assert loaded.options.codegen == "eager"
        assert [r.name for r in loaded.report.passes] == ["expand_experts", "share_plans"]


def test_a_pickled_dynamic_module_may_first_meet_other_inputs() -> None:
    opt = ref.optimize(Picklable(), {"x": ref.hidden(), "y": ref.hidden(2)}, dynamic={"x": (0,), "y": (0,)})
    loaded = pickle.loads(pickle.dumps(opt))
    ref.assert_same(ref.step(loaded, {"x": ref.hidden()}), ref.step(opt.original, {"x": ref.hidden()}))


class Picklable(ref.Block):
    """At module level, where pickle finds it."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.moe(x if y is None else x + y).square().mean()


def _saved_and_loaded(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def test_pickling_the_state(opt: moefx.OptimizedModule) -> None:
    state = pickle.loads(pickle.dumps(opt.state_dict()))
    fresh = ref.tiny(initializer_range=0.1)
    fresh.load_state_dict(state)
    ref.assert_same(ref.step(fresh, ref.batch()), ref.step(opt, ref.batch()))


def test_a_shallow_copy_shares_the_original(opt: moefx.OptimizedModule) -> None:
    shallow = copy.copy(opt)
    assert shallow is not opt
    assert shallow.original is opt.original


def test_copies_have_reports_of_their_own() -> None:
    opt = ref.optimize(ref.Block(), (ref.hidden(),))
    text, copied = str(opt.report), copy.deepcopy(opt)
    assert str(copied.report) == text
    assert list(copied.graphs) == list(opt.graphs)
    copied.eval()(ref.hidden())
    assert len(copied.report.signatures) == 2
    assert str(opt.report) == text


def test_deepcopy_of_a_module_that_holds_an_optimized_one(opt: moefx.OptimizedModule) -> None:
    outer = nn.ModuleDict({"opt": opt, "head": opt.lm_head})
    copied = copy.deepcopy(outer)
    assert copied["head"] is copied["opt"].lm_head
    assert copied["head"] is not opt.lm_head


# --- the model after optimizing


def test_optimizing_changes_nothing_of_the_model() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model = ref.tiny(use_cache=True, attention_dropout=0.1)
    names = set(ALL_EXPERTS_FUNCTIONS.keys())
    before, flags = ref.snapshot(model), [set(vars(m)) for m in model.modules()]
    opt = ref.optimize(model)
    ref.assert_unchanged(model, before)
    opt(**ref.batch()).loss.backward()
    opt.zero_grad()
    assert set(ALL_EXPERTS_FUNCTIONS.keys()) == names
    assert model.config._experts_implementation == "grouped_mm"
    assert all(p.grad is None for p in model.parameters())
    new = set().union(*(set(vars(m)) - f for m, f in zip(model.modules(), flags, strict=True)))
    assert not {n for n in new if "moefx" in n}


def test_the_original_runs_its_own_code(opt: moefx.OptimizedModule, model: Any) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Ops(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names = set[str]()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.add(func.namespace)
            return func(*args, **(kwargs or {}))

    found = {}
    for module in (opt, model):
        with Ops() as ops, torch.no_grad():
            module(**ref.batch())
        found[module] = ops.names
    assert "moefx" in found[opt]
    assert "moefx" not in found[model]
