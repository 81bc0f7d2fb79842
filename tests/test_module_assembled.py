"""Optimized models whose expert tensors are put together from a ModuleList's parameters at every call."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import moefx
from moefx.models.moe_lm import IDIOMS, MoELM

from .profile import often

Tensor = torch.Tensor
IDS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}
OTHER = {"input_ids": IDS.flip(0, 1), "labels": IDS.flip(0, 1)}
DOWN, UP = "layers.0.moe.experts.1.down_proj.weight", "layers.1.moe.experts.0.up_proj.weight"


def lm(idiom: str = "A2", experts: int = 4, **options: Any) -> MoELM:
    return MoELM(50, 16, 8, 2, 2, experts, 2, idiom, seed=0, **options)


def optimize(model: nn.Module) -> moefx.OptimizedModule:
    return moefx.optimize(model, BATCH, codegen="eager")


@pytest.fixture(scope="module")
def compiled() -> moefx.OptimizedModule:
    return optimize(lm())


@pytest.fixture
def opt(compiled: moefx.OptimizedModule) -> moefx.OptimizedModule:
    """A copy of its own; compiled programs are shared between copies."""
    return copy.deepcopy(compiled)


def loss(module: nn.Module, batch: dict[str, Tensor] = BATCH) -> Tensor:
    found: Tensor = module(**batch)["loss"]
    return found


def grads(module: nn.Module) -> dict[str, Tensor]:
    """Gradients by name; of experts without tokens, to which a loop gives none, zeros."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, t in want.items():
        torch.testing.assert_close(got[name], t, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# --- the model stays what it was


def test_names_parameters_and_state_stay() -> None:
    model = lm()
    before, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    storage = {n: p.data_ptr() for n, p in before.items()}
    opt = optimize(model)
    loss(opt).backward()
    for module in (model, opt):
        after = dict(module.named_parameters())
        assert list(after) == list(before)
        assert all(after[n] is p and p.data_ptr() == storage[n] for n, p in before.items())
        assert list(module.state_dict()) == list(state)
        assert all(torch.equal(module.state_dict()[n], t) for n, t in state.items())
    assert [b["raised"] for b in opt.report.to_dict()["blocks"]] == [True, True]


def test_the_roles_of_parameters_are_found_on_both(opt: moefx.OptimizedModule) -> None:
    want, got = (moefx.optim.param_groups(m, verbose=False) for m in (opt.original, opt))
    assert [(g["role"], g["names"]) for g in got] == [(g["role"], g["names"]) for g in want]
    assert all(p is q for g, h in zip(got, want, strict=True) for p, q in zip(g["params"], h["params"], strict=True))
    experts = next(g["names"] for g in got if g["role"] == "expert")
    assert {DOWN, UP} <= set(experts)


@pytest.mark.parametrize("idiom", often(["A1", "A2", "A3", "A5"], ["A2"]))
def test_the_joint_graph_does_not_grow_with_the_experts(idiom: str) -> None:
    counts = set()
    for experts in (4, 8, 16):
        nodes = list(optimize(lm(idiom, experts)).graphs["joint"].graph.nodes)
        counts.add((len(nodes), sum(n.op == "call_function" for n in nodes)))
    assert len(counts) == 1


# --- gradients


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"gated": False, "act": "relu"}])
@pytest.mark.parametrize("idiom", often(["A1", "A2", "E1"], ["A2"]))
def test_gradients_land_on_the_original_parameters(idiom: str, options: dict[str, Any]) -> None:
    assert idiom in IDIOMS
    model = lm(idiom, **options)
    loss(other := copy.deepcopy(model)).backward()
    loss(optimize(model)).backward()
    assert_close(grads(model), grads(other))
    assert all(p.grad is not None for n, p in model.named_parameters() if "experts" in n)


@pytest.mark.parametrize("idiom", ["A2", "D3"])
def test_a_layer_that_is_the_model_itself_trains(idiom: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer, x = IDIOMS[idiom](16, 8, 4, 2), torch.randn(2, 6, 16)
    other = copy.deepcopy(layer)
    opt = moefx.optimize(layer, (x,), codegen="eager")
    for module in (opt, other):
        module(x).square().sum().backward()
    assert_close(grads(layer), grads(other))
    assert all(p.grad is not None for p in layer.parameters())
    assert [(b["path"], b["raised"]) for b in opt.report.to_dict()["blocks"]] == [("", True)]
    with torch.no_grad():
        for module in (layer, other):
            for p in module.parameters():
                p.mul_(-2)
    torch.testing.assert_close(opt(x), other(x), rtol=1e-4, atol=1e-5)


def test_gradients_add_up_over_microbatches(opt: moefx.OptimizedModule) -> None:
    other = copy.deepcopy(opt.original)
    for module in (opt, other):
        for batch in (BATCH, OTHER, BATCH):
            loss(module, batch).backward()
    assert_close(grads(opt), grads(other))


def test_two_forwards_before_one_backward(opt: moefx.OptimizedModule) -> None:
    other = copy.deepcopy(opt.original)
    for module in (opt, other):
        (loss(module, BATCH) + 2 * loss(module, OTHER)).backward()
    assert_close(grads(opt), grads(other))


def test_gradients_of_the_experts_are_apart(opt: moefx.OptimizedModule) -> None:
    """They may share memory as slices of one tensor, but not elements."""
    loss(opt).backward()
    kept = grads(opt)
    changed = opt.get_parameter(DOWN).grad
    assert changed is not None
    changed.fill_(7.0)
    assert all(torch.equal(t, kept[n]) for n, t in grads(opt).items() if n != DOWN)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_between_steps(opt: moefx.OptimizedModule, to_none: bool) -> None:
    other = copy.deepcopy(opt.original)
    for module in (opt, other):
        for batch in (BATCH, OTHER):
            module.zero_grad(set_to_none=to_none)
            loss(module, batch).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.1)
    assert_close(grads(opt), grads(other))


def test_hooks_on_single_experts(opt: moefx.OptimizedModule) -> None:
    loss(opt).backward()
    plain = grads(opt)
    opt.zero_grad()
    seen: list[str] = []
    p, q = opt.get_parameter(DOWN), opt.get_parameter(UP)
    p.register_hook(lambda g: 2 * g)
    q.register_post_accumulate_grad_hook(lambda _: seen.append(UP))
    loss(opt).backward()
    assert_close(grads(opt), {n: 2 * t if n == DOWN else t for n, t in plain.items()})
    assert seen == [UP]


def test_a_frozen_expert_gets_no_gradient() -> None:
    model = lm()
    model.get_parameter(DOWN).requires_grad_(False)
    loss(other := copy.deepcopy(model)).backward()
    opt = optimize(model)
    loss(opt).backward()
    assert model.get_parameter(DOWN).grad is None
    assert_close(grads(model), grads(other))
    model.get_parameter(DOWN).requires_grad_(True)
    opt.zero_grad()
    loss(opt).backward()
    assert model.get_parameter(DOWN).grad is not None


# --- parameters that change


@pytest.mark.parametrize("foreach", [True, False])
def test_several_steps_leave_the_weights_that_the_original_would_have(
    opt: moefx.OptimizedModule, foreach: bool
) -> None:
    other = copy.deepcopy(opt.original)
    losses = []
    for module in (opt, other):
        optim = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, foreach=foreach)
        losses.append([])
        for i in range(5):
            optim.zero_grad()
            (found := loss(module, (BATCH, OTHER)[i % 2])).backward()
            optim.step()
            losses[-1].append(found.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    assert_close(opt.state_dict(), other.state_dict())


def _in_place(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.mul_(-3)


def _behind_the_version_counter(p: nn.Parameter) -> None:
    p.data.mul_(-3)


def _replaced(p: nn.Parameter) -> None:
    p.data = p.data * -3


CHANGES = [_in_place, _behind_the_version_counter, _replaced]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("grad", [True, False])
def test_a_changed_parameter_is_seen_at_the_next_call(opt: moefx.OptimizedModule, change: Any, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        before = loss(opt)
        for name in (DOWN, UP):
            change(opt.get_parameter(name))
        after, want = loss(opt), loss(opt.original)
    assert after.item() == pytest.approx(want.item(), rel=1e-5)
    assert after.item() != pytest.approx(before.item(), rel=1e-6)


def test_a_new_parameter_object_is_seen_at_the_next_call(opt: moefx.OptimizedModule) -> None:
    loss(opt)
    linear = opt.get_submodule(DOWN.removesuffix(".weight"))
    linear.weight = nn.Parameter(linear.weight.detach() * -3)  # type: ignore[operator]
    loss(opt).backward()
    assert loss(opt).item() == pytest.approx(loss(opt.original).item(), rel=1e-5)
    assert opt.get_parameter(DOWN).grad is not None


def test_a_loaded_state_is_seen_at_the_next_call(opt: moefx.OptimizedModule) -> None:
    loss(opt)
    state = {n: t + 0.1 for n, t in opt.state_dict().items()}
    opt.load_state_dict(state)
    assert loss(opt).item() == pytest.approx(loss(opt.original).item(), rel=1e-5)


# --- copies, and no gradients


def test_a_deep_copy_has_parameters_of_its_own(opt: moefx.OptimizedModule) -> None:
    other = copy.deepcopy(opt)
    _in_place(other.get_parameter(DOWN))
    loss(other).backward()
    assert all(p.grad is None for p in opt.parameters())
    assert loss(other).item() == pytest.approx(loss(other.original).item(), rel=1e-5)
    assert loss(other).item() != pytest.approx(loss(opt).item(), rel=1e-6)


def test_pickle(opt: moefx.OptimizedModule) -> None:
    other = pickle.loads(pickle.dumps(opt))
    assert list(other.state_dict()) == list(opt.state_dict())
    assert loss(other).item() == pytest.approx(loss(opt).item(), rel=1e-5)
    loss(other).backward()
    assert other.get_parameter(DOWN).grad is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference(opt: moefx.OptimizedModule, mode: Any) -> None:
    opt.eval()
    with mode():
        got, want = opt(IDS)["logits"], opt.original(IDS)["logits"]
    assert not got.requires_grad
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "K", "N"), [(torch.float32, 4, 6), (torch.float32, 8, 12), (torch.float64, 8, 12)])
def test_grouped_products_with_rows_and_experts_missing(dtype: torch.dtype, K: int, N: int) -> None:
    """By the library (8 x 12 in float32) and by our own loop."""
    from moefx.kernels.grouped_mm import grouped_mm_cpu, grouped_wgrad_cpu

    offsets = torch.tensor([0, 0, 3, 3, 5], dtype=torch.int32)
    x, w, dy = torch.randn(7, K, dtype=dtype), torch.randn(4, N, K, dtype=dtype), torch.randn(7, N, dtype=dtype)
    y, g = grouped_mm_cpu(x, w, offsets), grouped_wgrad_cpu(x, dy, offsets)
    torch.testing.assert_close(y, torch.cat([x[:3] @ w[1].t(), x[3:5] @ w[3].t(), x.new_zeros(2, N)]))
    none = x.new_zeros(K, N)
    torch.testing.assert_close(g, torch.stack([none, x[:3].t() @ dy[:3], none, x[3:5].t() @ dy[3:5]]))
    assert grouped_mm_cpu(x[:0], w, torch.zeros(5, dtype=torch.int32)).shape == (0, N)
    turned = w.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(grouped_mm_cpu(x, turned, offsets), y)
    assert y.is_contiguous()
    assert g.is_contiguous()
