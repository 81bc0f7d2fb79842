"""One optimized module, many signatures: each call runs a graph that is valid for it, and never a wrong one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import moefx

from . import reference as ref

Tensor = torch.Tensor


@pytest.fixture(scope="module")
def compiled() -> moefx.OptimizedModule:
    """Compiled for `batch()` in training mode. Not used itself: tests take copies, which share the compiled graph."""
    return ref.optimize(ref.tiny())


@pytest.fixture
def opt(compiled: moefx.OptimizedModule) -> moefx.OptimizedModule:
    return copy.deepcopy(compiled)


# --- modes


def test_train_and_eval_have_graphs_of_their_own() -> None:
    opt = ref.optimize(ref.Dropped(), (ref.hidden(),))
    train = ref.check(opt, (ref.hidden(),))
    assert opt.eval().training is False
    evaluated = ref.check(opt, (ref.hidden(),))
    assert ref.differ(train, evaluated)
    assert ref.count(opt) == 2
    opt.train()
    assert torch.equal(ref.check(opt, (ref.hidden(),)).value, train.value)
    assert ref.count(opt) == 2


def test_one_submodule_in_eval_mode() -> None:
    class Sub(ref.Block):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Any:
            return self.drop(self.moe(x)).square().mean()

    opt = ref.optimize(Sub(), (ref.hidden(),))
    both = ref.check(opt, (ref.hidden(),))
    opt.drop.eval()
    assert ref.differ(ref.check(opt, (ref.hidden(),)), both)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_a_graph_runs_that_saves_nothing(opt: moefx.OptimizedModule, mode: Any) -> None:
    with mode():
        out = opt(**ref.batch())
        want = opt.original(**ref.batch())
        assert ref.error(out.logits, want.logits) <= 1e-5
    assert not out.logits.requires_grad
    assert not out.loss.requires_grad
    assert out.logits.is_inference() == (mode is torch.inference_mode)
    training, inference = ref.programs(opt)
    assert training.bw_graph is not None
    assert inference.bw_graph is None
    assert inference.saved == []
    assert opt(**ref.batch()).loss.requires_grad  # and training goes on as before
    assert ref.count(opt) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_optimizing_for_inference_first(mode: Any) -> None:
    model = ref.tiny()
    with mode():
        opt = ref.optimize(model)
        assert ref.error(opt(**ref.batch()).loss, model(**ref.batch()).loss) <= 1e-5
    assert [p.bw_graph for p in ref.programs(opt)] == [None]
    assert opt.report.signatures[0]["grad"] is False
    ref.check(opt, ref.batch())
    with torch.no_grad():
        assert ref.error(opt(**ref.batch()).loss, model(**ref.batch()).loss) <= 1e-5
    assert ref.count(opt) == 2


# --- the model changes after compiling


def test_requires_grad_toggled(opt: moefx.OptimizedModule) -> None:
    everything = ref.check(opt, ref.batch())
    opt.lm_head.weight.requires_grad_(False)
    assert ref.check(opt, ref.batch()).grads["lm_head.weight"] is None
    assert ref.count(opt) == 2
    opt.lm_head.weight.requires_grad_(True)
    assert torch.equal(ref.check(opt, ref.batch()).value, everything.value)
    assert ref.count(opt) == 2


def test_dtype_changed(opt: moefx.OptimizedModule) -> None:
    single = ref.check(opt, ref.batch())
    assert opt.to(torch.bfloat16) is opt
    got, want = ref.step(opt, ref.batch()), ref.step(opt.original, ref.batch())
    ref.assert_same(got, want, value=1e-2, grad=5e-2)
    assert {g.dtype for g in got.grads.values() if g is not None} == {torch.bfloat16}
    assert not torch.equal(got.value, single.value)
    assert ref.count(opt) == 2


def test_submodule_replaced_by_one_of_the_same_shape(opt: moefx.OptimizedModule) -> None:
    before = ref.check(opt, ref.batch())
    opt.model.layers[0].mlp.experts.act_fn = nn.GELU()
    assert ref.differ(ref.check(opt, ref.batch()), before)


def test_submodule_replaced_by_one_without_parameters(opt: moefx.OptimizedModule) -> None:
    before = ref.check(opt, ref.batch())
    opt.original.model.layers[0].input_layernorm = nn.Identity()
    got = ref.check(opt, ref.batch())
    assert ref.differ(got, before)
    assert "model.layers.0.input_layernorm.weight" not in got.grads


def test_parameter_replaced(opt: moefx.OptimizedModule) -> None:
    before = ref.check(opt, ref.batch())
    opt.lm_head.weight = nn.Parameter(opt.lm_head.weight.detach() * -1)
    assert ref.differ(ref.check(opt, ref.batch()), before)
    assert ref.count(opt) == 1


def test_embeddings_resized(opt: moefx.OptimizedModule) -> None:
    opt.resize_token_embeddings(ref.VOCAB + 16)
    assert opt(**ref.batch()).logits.shape[-1] == ref.VOCAB + 16
    ref.check(opt, ref.batch())
    opt(**ref.batch()).loss.backward()
    opt.resize_token_embeddings(ref.VOCAB)
    with pytest.raises(moefx.InputError, match=r"the gradient of .* is \[80, [\s\S]*zero_grad"):
        opt(**ref.batch())
    opt.zero_grad()
    ref.check(opt, ref.batch())


def test_config_changed(opt: moefx.OptimizedModule) -> None:
    assert opt(**ref.batch()).router_logits is not None
    opt.config.output_router_logits = False
    assert list(opt(**ref.batch())) == list(opt.original(**ref.batch())) == ["loss", "logits"]
    got = ref.check(opt, ref.batch())
    opt.config.output_router_logits = True
    assert not torch.equal(ref.check(opt, ref.batch()).value, got.value)  # with the auxiliary loss
    assert ref.count(opt) == 2


def test_saving_the_model_changes_its_config_but_needs_no_new_graph(opt: moefx.OptimizedModule, tmp_path: Any) -> None:
    before = dict(vars(opt.config))
    opt.save_pretrained(tmp_path)
    assert dict(vars(opt.config)) != before
    opt(**ref.batch())
    assert ref.count(opt) == 1


def test_moving_a_model_that_compiled_graphs_hold_no_tensor_of(opt: moefx.OptimizedModule) -> None:
    """New storage under the same parameters, as after a move to another device and back."""
    for p in opt.parameters():
        p.data = p.data.clone() * 1.1
    ref.check(opt, ref.batch())
    assert ref.count(opt) == 1


# --- hooks


def test_forward_hooks_of_submodules_are_traced(opt: moefx.OptimizedModule) -> None:
    before = ref.check(opt, ref.batch())
    handle = opt.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out * 2)
    assert ref.differ(ref.check(opt, ref.batch()), before)
    handle.remove()
    assert torch.equal(ref.check(opt, ref.batch()).value, before.value)
    assert ref.count(opt) == 2


def test_forward_pre_hooks_of_submodules_are_traced(opt: moefx.OptimizedModule) -> None:
    before = ref.check(opt, ref.batch())
    opt.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    assert ref.differ(ref.check(opt, ref.batch()), before)


def test_a_hook_with_a_side_effect_is_reported(opt: moefx.OptimizedModule) -> None:
    seen: list[Tensor] = []
    opt.model.layers[0].mlp.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    with pytest.warns(UserWarning, match="Python state, which compiled graphs do not repeat"):
        opt(**ref.batch())


def test_backward_hooks_of_submodules_are_refused(opt: moefx.OptimizedModule) -> None:
    opt.model.layers[0].mlp.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 2,))
    with pytest.raises(moefx.CaptureError, match=r"where: model\.layers\.0\.mlp\n.*backward hook of a submodule"):
        opt(**ref.batch())


@pytest.mark.parametrize("on", ["optimized", "original"])
def test_hooks_of_the_model_itself_run_at_every_call(opt: moefx.OptimizedModule, on: str) -> None:
    module = opt if on == "optimized" else opt.original
    before, calls = ref.check(opt, ref.batch()), list[str]()

    def pre(module: nn.Module, args: Any, kwargs: Any) -> Any:
        calls.append("pre")
        return args, {**kwargs, "labels": kwargs["labels"].flip(0)}

    def post(module: nn.Module, args: Any, out: Any) -> Any:
        calls.append("post")
        out["loss"] = out.loss * 3
        return out

    handles = [module.register_forward_pre_hook(pre, with_kwargs=True), module.register_forward_hook(post)]
    got = ref.step(opt, ref.batch())
    assert calls == ["pre", "post"]
    ref.step(opt, ref.batch())
    assert calls == ["pre", "post"] * 2
    assert ref.differ(got, before)
    ref.assert_same(got, ref.step(opt.original, ref.batch()))
    for handle in handles:
        handle.remove()
    assert torch.equal(ref.check(opt, ref.batch()).value, before.value)
    assert ref.count(opt) == 1


def test_full_backward_hooks_of_the_model_itself() -> None:
    opt = ref.optimize(ref.Block(), (ref.hidden().requires_grad_(),))
    calls = []
    opt.register_full_backward_hook(lambda module, grad_in, grad_out: calls.append((grad_in[0].shape, grad_out[0])))
    opt(ref.hidden().requires_grad_()).backward()
    assert calls == [(ref.hidden().shape, torch.ones(()))]


def test_hooks_of_parameters(opt: moefx.OptimizedModule) -> None:
    opt.lm_head.weight.register_hook(lambda g: g * 2)
    accumulated = []
    opt.lm_head.weight.register_post_accumulate_grad_hook(lambda p: accumulated.append(p.grad.norm().item()))
    ref.check(opt, ref.batch())
    assert len(accumulated) == 2
    assert accumulated[0] == pytest.approx(accumulated[1], rel=1e-4)


# --- inputs


def test_a_new_shape_compiles_a_new_variant(opt: moefx.OptimizedModule) -> None:
    ref.check(opt, ref.batch(3, 5))
    ref.check(opt, ref.batch())
    assert ref.count(opt) == 2
    block = ref.optimize(ref.Block(), (ref.hidden(),))
    for i, (B, S) in enumerate([(2, 8), (3, 8), (2, 11), (1, 8), (2, 8)]):
        ref.check(block, (torch.randn(B, S, ref.HIDDEN, generator=torch.Generator().manual_seed(S)),))
        assert ref.count(block) == min(i + 1, 4)
    shapes = [s["inputs"][0].removeprefix("float32") for s in block.report.signatures]
    assert shapes == ["[2, 8, 32]", "[3, 8, 32]", "[2, 11, 32]", "[1, 8, 32]"]


def test_labels_absent_and_present(opt: moefx.OptimizedModule) -> None:
    ids = {"input_ids": ref.batch()["input_ids"]}
    out = opt(**ids)
    assert out.loss is None
    ref.check(opt, ids, lambda out: out.logits.square().mean())
    ref.check(opt, ref.batch())
    ref.check(opt, {**ids, "labels": None}, lambda out: out.logits.square().mean())


def test_the_same_tensor_twice_at_first_and_two_tensors_later() -> None:
    """`labels=input_ids` when optimizing must not make the graph read one in the place of the other."""
    model = ref.tiny()
    ids = ref.batch()["input_ids"]
    opt = ref.optimize(model, {"input_ids": ids, "labels": ids})
    same = ref.check(opt, {"input_ids": ids, "labels": ids})
    assert ref.differ(ref.check(opt, ref.batch()), same)
    assert ref.differ(ref.check(opt, {"input_ids": ids, "labels": ids.flip(1)}), same)
    assert ref.count(opt) == 1


def test_the_same_differentiable_tensor_twice() -> None:
    class Both(ref.Block):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            return (self.moe(x) * y).mean()

    x = ref.hidden().requires_grad_()
    opt = ref.optimize(Both(), (x, x))
    grads = []
    for module in (opt, opt.original):
        a, b = ref.hidden(1).requires_grad_(), ref.hidden(2).requires_grad_()
        module(a, b).backward()
        module(a, a).backward()
        grads.append((a.grad, b.grad))
    for got, want in zip(*grads, strict=True):
        assert ref.error(got, want) <= 1e-4


def test_a_parameter_as_an_input() -> None:
    class Scaled(ref.Block):
        def forward(self, x: Tensor, w: Tensor) -> Any:
            return (self.moe(x) @ w.mT).square().mean()

    model = Scaled()
    opt = ref.optimize(model, (ref.hidden(), model.moe.gate.weight))
    ref.check(opt, (ref.hidden(), model.moe.gate.weight))
    ref.check(opt, (ref.hidden(), nn.Parameter(model.moe.gate.weight.detach() * 3)))


def test_keywords_in_any_order(opt: moefx.OptimizedModule) -> None:
    b = ref.batch()
    ref.check(opt, {"labels": b["labels"], "input_ids": b["input_ids"]})
    assert ref.count(opt) == 1


def test_positional_and_keyword_arguments(opt: moefx.OptimizedModule) -> None:
    b = ref.batch()
    assert ref.error(opt(b["input_ids"], labels=b["labels"]).loss.detach(), opt(**b).loss.detach()) <= 1e-6


def test_inputs_of_any_layout(opt: moefx.OptimizedModule) -> None:
    strided = {k: v.mT.contiguous().mT for k, v in ref.batch().items()}
    assert not strided["input_ids"].is_contiguous()
    ref.check(opt, strided)

    class Copies(ref.Block):
        def forward(self, x: Tensor) -> Any:
            return self.moe(x.contiguous()).square().mean() + x.mT.sum()

    block, x = ref.optimize(Copies(), (ref.hidden(),)), ref.hidden()
    layouts = [
        x.mT.contiguous().mT,
        torch.stack([x, x * 0], -1)[..., 0],
        torch.cat([x * 0, x])[2:],
        x[:1].expand(2, -1, -1),
    ]
    for layout in layouts:
        ref.check(block, (layout,))
        ref.check(block, (layout.detach().requires_grad_(),))


@pytest.mark.parametrize(
    "constants",
    [
        {"attention_mask": None, "logits_to_keep": 0, "output_router_logits": True, "use_cache": False},
        {"attention_mask": torch.tensor([[1] * 8, [0] * 3 + [1] * 5])},
        {"position_ids": torch.arange(8)[None] % 5, "past_key_values": None},
    ],
)
def test_numbers_truth_values_none_and_masks_as_arguments(opt: moefx.OptimizedModule, constants: Any) -> None:
    ref.check(opt, {**ref.batch(), **constants})


def test_constants_are_part_of_the_signature() -> None:
    class Powered(ref.Block):
        def forward(self, x: Tensor, power: Any = 2, flip: bool = False, name: str = "mean", scale: Any = None) -> Any:
            y = self.moe(x if scale is None else x * scale["by"]) ** power
            return getattr(-y if flip else y, name)()

    model = Powered()
    opt = ref.optimize(model, {"x": ref.hidden()})
    calls: list[dict[str, Any]] = [
        {}, {"power": 3}, {"power": 2.0}, {"power": True}, {"power": 1}, {"flip": True}, {"name": "sum"},
        {"scale": {"by": 0.5}}, {"scale": {"by": torch.tensor(0.5)}},
    ]  # fmt: skip
    values = [ref.check(opt, {"x": ref.hidden(), **c}).value for c in calls * 2]
    assert ref.count(opt) == len(calls)
    assert torch.equal(torch.stack(values[: len(calls)]), torch.stack(values[len(calls) :]))


def test_nested_inputs_and_outputs() -> None:
    class Nested(ref.Block):
        def forward(self, x: Any) -> Any:
            y = self.moe(x["a"]) + x["list"][1]
            return {"y": (y, [y.sum(), 3, None, "text"]), "x": x["a"]}

    opt = ref.optimize(Nested(), {"x": {"a": ref.hidden(), "list": [ref.hidden(2), ref.hidden(3)]}})
    x = {"a": ref.hidden(4), "list": [ref.hidden(5), ref.hidden(6)]}
    got, want = opt(x=x), opt.original(x=x)
    assert ref.error(got["y"][0], want["y"][0]) <= 1e-5
    assert got["y"][1][1:] == [3, None, "text"]
    assert got["x"] is x["a"]
    ref.check(opt, {"x": x}, lambda out: out["y"][1][0])


def test_a_graph_returns_no_cache_and_computes_what_the_original_computes_without_one() -> None:
    opt = ref.optimize(ref.tiny(use_cache=True))
    assert opt.config.use_cache is True
    want = opt.original(**ref.batch())
    assert list(opt(**ref.batch())) == [k for k in want if k != "past_key_values"]
    ref.check(opt, ref.batch())
    # Positions that restart mean packed sequences to transformers, but only where there is no cache.
    packed = {**ref.batch(), "position_ids": torch.arange(8)[None] % 4}
    got = ref.step(opt, packed)
    ref.assert_same(got, ref.step(opt.original, {**packed, "use_cache": False}))
    assert ref.differ(got, ref.step(opt, ref.batch()))


def test_outputs_have_the_type_of_the_original(opt: moefx.OptimizedModule) -> None:
    got, want = opt(**ref.batch()), opt.original(**ref.batch())
    assert type(got) is type(want)
    assert list(got) == list(want)
    assert isinstance(got.router_logits, tuple)


def test_outputs_that_are_views_of_one_another() -> None:
    class Views(ref.Block):
        def forward(self, x: Tensor) -> Any:
            y = self.moe(x)
            return y, y.transpose(0, 1), y[0]

    opt = ref.optimize(Views(), (ref.hidden(),))
    for module in (opt, opt.original):
        assert [o.shape for o in module(ref.hidden())] == [(2, 8, 32), (8, 2, 32), (8, 32)]
    ref.check(opt, (ref.hidden(),), lambda out: out[0].square().sum() + out[1].sum() + out[2].exp().sum())


def test_a_model_that_writes_into_its_input() -> None:
    class Writes(ref.Block):
        def forward(self, x: Tensor, seen: Tensor) -> Any:
            seen.add_(1)
            return self.moe(x).square().mean()

    opt = ref.optimize(Writes(), (ref.hidden(), torch.zeros(3)))
    seen = torch.zeros(3)
    ref.check(opt, (ref.hidden(), seen))
    assert seen.tolist() == [2, 2, 2]  # once by each of the two models
