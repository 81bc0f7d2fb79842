"""Training an optimized model: everything that a loop does to a model has the effect that it has on the original."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import moefx

from . import reference as ref
from .profile import nightly

Tensor = torch.Tensor


@pytest.fixture(scope="module")
def pair() -> tuple[Any, moefx.OptimizedModule]:
    """A model and its optimized form; tests leave both as they found them."""
    model = ref.tiny()
    return model, ref.optimize(model)


def train(module: nn.Module, optim: torch.optim.Optimizer, steps: range) -> list[float]:
    """Losses of some steps, on two batches in turn."""
    losses = []
    for i in steps:
        optim.zero_grad()
        loss = module(**ref.batch(seed=i % 2)).loss
        loss.backward()
        optim.step()
        losses.append(loss.item())
    return losses


def assert_same_state(a: nn.Module, b: nn.Module, tolerance: float = 1e-5) -> None:
    x, y = a.state_dict(), b.state_dict()
    assert list(x) == list(y)
    for name, t in x.items():
        assert ref.error(t, y[name]) <= tolerance, name


# --- steps


def test_several_steps_leave_the_weights_that_the_original_would_have(
    pair: tuple[Any, moefx.OptimizedModule],
) -> None:
    other, opt = copy.deepcopy(pair[0]), copy.deepcopy(pair[1])
    start = copy.deepcopy(opt.state_dict())
    got = train(opt, torch.optim.AdamW(opt.parameters(), lr=1e-2), range(6))
    want = train(other, torch.optim.AdamW(other.parameters(), lr=1e-2), range(6))
    assert got == pytest.approx(want, abs=1e-4)
    assert want[-1] < want[0]
    assert_same_state(opt, other, 1e-3)
    assert ref.error(opt.state_dict()["lm_head.weight"], start["lm_head.weight"]) > 1e-2
    assert len(ref.programs(opt)) == 1


def test_gradients_accumulate_over_microbatches(pair: tuple[Any, moefx.OptimizedModule]) -> None:
    grads = []
    for module in pair:
        module.zero_grad()
        for i in range(3):
            (module(**ref.batch(seed=i)).loss / 3).backward()
        grads.append({n: p.grad for n, p in module.named_parameters()})
        module.zero_grad()
    single = ref.step(pair[0], ref.batch(seed=2)).grads
    for name, want in grads[0].items():
        assert ref.error(grads[1][name], want) <= 1e-4, name
        assert ref.error(single[name] / 3, want) > 1e-2, name  # type: ignore[operator]


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(pair: tuple[Any, moefx.OptimizedModule], to_none: bool) -> None:
    model, opt = pair
    want = ref.step(model, ref.batch())
    opt(**ref.batch(seed=7)).loss.backward()
    held = [p.grad for p in model.parameters()]
    opt.zero_grad(set_to_none=to_none)
    assert all((p.grad is None) == to_none for p in model.parameters())
    opt(**ref.batch()).loss.backward()
    for (name, p), before in zip(model.named_parameters(), held, strict=True):
        assert (p.grad is before) == (not to_none)
        assert ref.error(p.grad, want.grads[name]) <= 1e-4, name
    opt.zero_grad()


def test_retained_graphs_and_a_second_backward(pair: tuple[Any, moefx.OptimizedModule]) -> None:
    model, opt = pair
    once = ref.step(opt, ref.batch()).grads
    loss = opt(**ref.batch()).loss
    loss.backward(retain_graph=True)
    loss.backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, 2 * once[name]), name  # type: ignore[operator, arg-type]
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    opt.zero_grad()


@pytest.mark.parametrize("keep", [False, True])
def test_second_derivatives_are_refused_and_first_ones_are_right(
    pair: tuple[Any, moefx.OptimizedModule], keep: bool
) -> None:
    model, opt = pair
    want = ref.step(model, ref.batch()).grads
    parameters = list(model.parameters())
    loss = opt(**ref.batch()).loss
    grads = torch.autograd.grad(loss, parameters, create_graph=True, retain_graph=keep)
    for g, w in zip(grads, want.values(), strict=True):
        assert ref.error(g, w) <= 1e-4
    total = loss + sum(g.square().sum() for g in grads)
    ways: list[Callable[[], Any]] = [
        lambda: total.backward(inputs=parameters, retain_graph=True),
        lambda: torch.autograd.grad(total, parameters, retain_graph=True),
        lambda: torch.autograd.grad(grads[0].sum(), parameters[0], retain_graph=True),
        lambda: total.backward(),
    ]
    for way in ways:
        with pytest.raises(moefx.InputError, match="differentiated again") as caught:
            way()
        assert "opt.original" in str(caught.value)
    opt.zero_grad()


def test_second_derivatives_by_an_activation_are_refused() -> None:
    opt = ref.optimize(ref.Block(), {"x": ref.hidden()})
    x = ref.hidden().requires_grad_()
    inside = x * 2
    (grad,) = torch.autograd.grad(opt(inside).sum(), x, create_graph=True)
    with pytest.raises(moefx.InputError, match="differentiated again"):
        torch.autograd.grad(grad.square().sum(), x)


def test_a_weight_changed_in_place_before_the_backward_is_an_error_as_in_eager(
    pair: tuple[Any, moefx.OptimizedModule],
) -> None:
    model, opt = pair
    for module in (model, opt):
        loss = module(**ref.batch()).loss
        with torch.no_grad():
            model.lm_head.weight.mul_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    opt.zero_grad()


def test_two_forwards_before_their_backwards_do_not_mix(pair: tuple[Any, moefx.OptimizedModule]) -> None:
    model, opt = pair
    want = {seed: ref.step(model, ref.batch(seed=seed)) for seed in (3, 4)}
    first, second = opt(**ref.batch(seed=3)).loss, opt(**ref.batch(seed=4)).loss
    for seed, loss in ((4, second), (3, first)):
        loss.backward()
        for name, p in model.named_parameters():
            assert ref.error(p.grad, want[seed].grads[name]) <= 1e-4
        opt.zero_grad()


# --- what the model is made of


@pytest.fixture(scope="module")
def tied() -> tuple[Any, moefx.OptimizedModule]:
    model = ref.tiny(tie_word_embeddings=True)
    return model, ref.optimize(model)


def test_tied_weights(tied: tuple[Any, moefx.OptimizedModule]) -> None:
    model, opt = tied
    assert opt.lm_head.weight is opt.model.embed_tokens.weight
    got, want = ref.step(opt, ref.batch()), ref.step(model, ref.batch())
    ref.assert_same(got, want)
    assert "lm_head.weight" not in got.grads  # one parameter under its first name
    assert list(opt.state_dict()) == list(model.state_dict())
    frozen: Any = copy.deepcopy(model)  # the control: what the gradient would be without the output side
    frozen.lm_head.weight = nn.Parameter(frozen.lm_head.weight.detach().clone())
    name = "model.embed_tokens.weight"
    assert ref.error(ref.step(frozen, ref.batch()).grads[name], want.grads[name]) > 1e-2


def test_untying_weights_after_compiling(tied: tuple[Any, moefx.OptimizedModule]) -> None:
    opt = copy.deepcopy(tied[1])
    model: Any = opt.original
    before = ref.step(opt, ref.batch())
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    got = ref.step(opt, ref.batch())
    ref.assert_same(got, ref.step(model, ref.batch()))
    assert got.grads["lm_head.weight"] is not None
    assert ref.error(got.value, before.value) > 1e-2


DROPOUT = {
    "attention": (lambda: ref.tiny(attention_dropout=0.3), ref.batch(), "eager"),
    "eager": (ref.Dropped, (ref.hidden(),), "eager"),
    "inductor": (ref.Dropped, (ref.hidden(),), "inductor"),
}


@pytest.mark.parametrize("case", DROPOUT)
def test_dropout(case: str) -> None:
    make, inputs, codegen = DROPOUT[case]
    model = make()
    opt = ref.optimize(model, inputs, codegen=codegen)
    for seed in (0, 1):
        ref.assert_same(ref.step(opt, inputs, seed=seed), ref.step(model, inputs, seed=seed))
    assert ref.differ(ref.step(opt, inputs, seed=0), ref.step(opt, inputs, seed=1))

    draws, ends = [], []
    for module in (model, opt):
        torch.manual_seed(5)
        outs = [module(**inputs) if isinstance(inputs, dict) else module(*inputs) for _ in range(3)]
        draws.append([ref.loss(out).item() for out in outs])
        ends.append(torch.get_rng_state())
    assert draws[1] == pytest.approx(draws[0], rel=1e-5)
    assert len(set(draws[1])) == 3  # another mask at every step
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("cls", "codegen"), [(ref.Norm, "eager"), (ref.ReadFirst, "eager"), nightly(ref.ReadFirst, "inductor")]
)
def test_buffers_are_updated_once_per_call_and_not_by_optimizing(cls: type[ref.Norm], codegen: str) -> None:
    model = cls()
    other, before = copy.deepcopy(model), ref.snapshot(model)
    opt = ref.optimize(model, (ref.hidden(),), codegen=codegen)
    ref.assert_unchanged(model, before)
    for i in range(3):
        ref.assert_same(ref.step(opt, (ref.hidden(i),)), ref.step(other, (ref.hidden(i),)), grad=1e-5)
        assert int(model.steps) == i + 1
        assert_same_state(opt, other, 1e-6)
    assert bool(model.mean.any())
    with torch.no_grad():
        for module in (opt, other):
            module(ref.hidden(9))
    assert int(model.steps) == 4
    assert_same_state(opt, other, 1e-6)


def test_a_buffer_that_was_replaced_between_calls_is_the_one_that_is_used() -> None:
    model = ref.Norm()
    opt = ref.optimize(model, (ref.hidden(),))
    model.mean = torch.full((ref.HIDDEN,), 3.0)
    other = copy.deepcopy(model)
    ref.assert_same(ref.step(opt, (ref.hidden(),)), ref.step(other, (ref.hidden(),)))
    assert_same_state(opt, other, 1e-6)
    assert len(ref.programs(opt)) == 1


@pytest.mark.parametrize("trained", ["gate", "experts", "layernorm", "embed_tokens"])
def test_frozen_parameters(trained: str) -> None:
    model = ref.tiny()
    for name, p in model.named_parameters():
        p.requires_grad_(trained in name)
    opt = ref.optimize(model)
    got = ref.step(opt, ref.batch())
    ref.assert_same(got, ref.step(model, ref.batch()))
    assert {n for n, g in got.grads.items() if g is not None} == {n for n in got.grads if trained in n}


def test_frozen_parameters_cost_no_gradients() -> None:
    model = ref.tiny()
    everything = ref.programs(ref.optimize(model))[0]
    for name, p in model.named_parameters():
        p.requires_grad_("gate.weight" in name)
    some = ref.programs(ref.optimize(model))[0]
    assert len(some.bw_graph.graph.nodes) < len(everything.bw_graph.graph.nodes) / 2
    assert some.saved_bytes < everything.saved_bytes


def test_a_fully_frozen_model_has_an_inference_graph_and_may_still_pass_gradients_to_its_inputs() -> None:
    model = ref.tiny().requires_grad_(False)
    opt = ref.optimize(model)
    out = opt(**ref.batch())
    assert not out.loss.requires_grad
    assert ref.programs(opt)[0].bw_graph is None
    assert ref.error(out.loss, model(**ref.batch()).loss) <= 1e-6
    grads = []
    for module in (opt, model):
        x = model.model.embed_tokens(ref.batch()["input_ids"]).detach().requires_grad_()
        module(inputs_embeds=x, labels=ref.batch()["labels"]).loss.backward()
        grads.append(x.grad)
    assert ref.error(*grads) <= 1e-4


def test_gradients_reach_an_input_and_whatever_made_it() -> None:
    model = ref.Block()
    opt = ref.optimize(model, (ref.hidden().requires_grad_(),))
    grads = []
    for module in (opt, model):
        before = nn.Linear(ref.HIDDEN, ref.HIDDEN)
        torch.nn.init.constant_(before.weight, 0.02)
        torch.nn.init.constant_(before.bias, 0.3)
        x = ref.hidden().requires_grad_()
        module(before(x)).backward()
        grads.append((x.grad, before.weight.grad))
    for got, want in zip(*grads, strict=True):
        assert ref.error(got, want) <= 1e-4


def test_autocast_has_a_variant_of_its_own_with_float32_gradients(
    pair: tuple[Any, moefx.OptimizedModule],
) -> None:
    opt = copy.deepcopy(pair[1])
    model = opt.original
    plain = ref.step(opt, ref.batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = ref.step(opt, ref.batch()), ref.step(model, ref.batch())
        outs = [m(**ref.batch()) for m in (opt, model)]
        assert [o.logits.dtype for o in outs] == [torch.bfloat16] * 2
        assert outs[0].loss.dtype == outs[1].loss.dtype
    # Rounding of bfloat16; the experts of the original run in float32 here, those of the graph in bfloat16.
    ref.assert_same(got, want, value=1e-2, grad=5e-2)
    assert {g.dtype for g in got.grads.values() if g is not None} == {torch.float32}
    assert max(ref.error(got.grads[n], g) for n, g in plain.grads.items() if g is not None) > 1e-4
    assert len(ref.programs(opt)) == 2
    assert torch.equal(ref.step(opt, ref.batch()).value, plain.value)


def test_a_backward_under_autocast_is_not_cast_again(pair: tuple[Any, moefx.OptimizedModule]) -> None:
    opt = pair[1]
    want = ref.step(opt, ref.batch())
    loss = opt(**ref.batch()).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss.backward()
    assert all(torch.equal(p.grad, want.grads[n]) for n, p in opt.named_parameters())
    opt.zero_grad()


# --- several modules over one model, several models


def test_two_optimized_forms_of_one_model_share_everything(pair: tuple[Any, moefx.OptimizedModule]) -> None:
    model, first = pair
    second = ref.optimize(model, passes=["expand_experts"])
    assert [id(p) for p in first.parameters()] == [id(p) for p in second.parameters()]
    (first(**ref.batch()).loss + second(**ref.batch()).loss).backward()
    want = ref.step(copy.deepcopy(model), ref.batch()).grads
    for name, p in model.named_parameters():
        assert ref.error(p.grad / 2, want[name]) <= 1e-4
    model.zero_grad()


def test_optimizing_an_optimized_module_optimizes_the_original(
    pair: tuple[Any, moefx.OptimizedModule],
) -> None:
    model, opt = pair
    again = ref.optimize(opt)
    assert again.original is model
    ref.assert_same(ref.step(again, ref.batch()), ref.step(model, ref.batch()))


def test_a_deepcopy_trains_by_itself_with_the_same_compiled_graphs(
    pair: tuple[Any, moefx.OptimizedModule],
) -> None:
    opt = pair[1]
    copied = copy.deepcopy(opt)
    assert not {id(p) for p in opt.parameters()} & {id(p) for p in copied.parameters()}
    assert isinstance(copied, moefx.OptimizedModule)
    before = ref.step(opt, ref.batch())
    train(copied, torch.optim.SGD(copied.parameters(), lr=0.1), range(2))
    assert ref.programs(copied) == ref.programs(opt)
    after = ref.step(opt, ref.batch())
    assert torch.equal(before.value, after.value)
    assert ref.differ(ref.step(copied, ref.batch()), after)
    ref.assert_same(ref.step(copied, ref.batch()), ref.step(copied.original, ref.batch()))


def test_a_deepcopy_of_a_model_whose_structure_changed_compiles_anew(
    pair: tuple[Any, moefx.OptimizedModule],
) -> None:
    changed = copy.deepcopy(pair[1])
    changed.model.layers[0].mlp.experts.act_fn = nn.GELU()
    copied = copy.deepcopy(changed)
    got = ref.step(copied, ref.batch())
    ref.assert_same(got, ref.step(copied.original, ref.batch()))
    assert ref.differ(got, ref.step(pair[1], ref.batch()))


def test_training_continues_from_saved_state(pair: tuple[Any, moefx.OptimizedModule]) -> None:
    def fresh() -> tuple[moefx.OptimizedModule, torch.optim.Optimizer]:
        opt = copy.deepcopy(pair[1])
        return opt, torch.optim.AdamW(opt.parameters(), lr=1e-2)

    opt, optim = fresh()
    train(opt, optim, range(2))
    file = io.BytesIO()
    torch.save({"model": opt.state_dict(), "optim": optim.state_dict()}, file)
    want = train(opt, optim, range(2, 5))
    other, other_optim = fresh()
    control = train(*fresh(), range(2, 5))
    state: dict[str, Any] = torch.load(io.BytesIO(file.getvalue()))
    other.load_state_dict(state["model"])
    other_optim.load_state_dict(state["optim"])
    assert train(other, other_optim, range(2, 5)) == want
    assert control != want
    assert all(torch.equal(a, b) for a, b in zip(opt.parameters(), other.parameters(), strict=True))


# --- other ways to call it


def test_threads_may_compile_at_the_same_time() -> None:
    opts = [ref.optimize(ref.tiny()) for _ in range(2)]
    wants = [ref.step(ref.tiny(), ref.batch(2, 5 + i)).value for i in range(2)]
    start, found = threading.Barrier(3), dict[int, Any]()

    def call(i: int, opt: moefx.OptimizedModule) -> None:
        start.wait()
        try:
            found[i] = opt(**ref.batch(2, 5 + i % 2)).loss
        except Exception as e:
            found[i] = e

    threads = [threading.Thread(target=call, args=(i, opts[i % 2])) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(3):
        assert isinstance(found[i], Tensor), found[i]
        assert ref.error(found[i], wants[i % 2]) <= 1e-5
    assert [len(ref.programs(opt)) for opt in opts] == [2, 2]  # the third thread found what the first had made


def test_transforms_of_torch_func_are_refused(pair: tuple[Any, moefx.OptimizedModule]) -> None:
    model, opt = pair
    values = {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(opt, parameters, (), ref.batch()).loss  # type: ignore[no-any-return]

    assert ref.error(loss(values), model(**ref.batch()).loss) <= 1e-5  # without a transform it works
    with pytest.raises(moefx.InputError, match=r"torch\.func[\s\S]*loss\.backward"):
        torch.func.grad(loss)(values)


@pytest.mark.parametrize("how", ["pickle", "save"])
def test_a_model_with_recorders_of_router_logits_can_be_pickled(
    pair: tuple[Any, moefx.OptimizedModule], how: str
) -> None:
    model, opt = pair
    hooks = [dict(m._forward_hooks) for m in model.modules()]
    assert any(hooks)  # transformers has installed them
    want = ref.step(opt, ref.batch())
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(opt))
    else:
        file = io.BytesIO()
        torch.save(opt, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    assert [dict(m._forward_hooks) for m in model.modules()] == hooks
    assert_same_state(loaded, model, 0.0)
    ref.assert_same(ref.step(loaded, ref.batch()), want, 1e-6, 1e-6)
    assert ref.error(loaded(**ref.batch()).router_logits[0], model(**ref.batch()).router_logits[0]) <= 1e-5
