"""First and second derivatives in float64, through every op and through the composite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import oracles
from .calls import calls, each_call, each_differentiable
from .oracles import Tensor, each_arm, each_kind, ops, randn, running


def as_function(call: Any) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """The op as a function of the tensors that it is differentiable in, weight lists flattened."""
    args = call.differentiable()
    places = [(i, j) for i in call.grads for j in (range(len(args[i])) if isinstance(args[i], list) else [None])]
    inputs = tuple(args[i] if j is None else args[i][j] for i, j in places)

    def f(*given: Tensor) -> Any:
        full = [list(a) if isinstance(a, list) else a for a in args]
        for (i, j), t in zip(places, given, strict=True):
            if j is None:
                full[i] = t
            else:
                full[i][j] = t
        return tuple(t for t in oracles.tensors(call(*full)) if t.is_floating_point() and t.numel())

    return f, inputs


@each_arm
@each_differentiable
def test_gradcheck(name: str, arm: str) -> None:
    f, inputs = as_function(calls(oracles.CASES["padded_and_dropped"], torch.float64)[name])
    with running(arm):
        assert torch.autograd.gradcheck(f, inputs, fast_mode=True)


@each_differentiable
def test_gradgradcheck(name: str) -> None:
    f, inputs = as_function(calls(oracles.CASES["dropped"], torch.float64)[name])
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@each_differentiable
def test_gradcheck_by_every_element(name: str) -> None:
    small = oracles.routing(torch.tensor([[0, 2], [2, -1], [3, 0]]), E=3, align=2)
    f, inputs = as_function(calls(small, torch.float64)[name])
    assert torch.autograd.gradcheck(f, inputs, fast_mode=False)


@pytest.mark.parametrize("case", ["balanced", "k1", "one_hot_expert", "empty_experts", "all_dropped", "padded"])
@pytest.mark.parametrize("name", ["unpermute_weighted", "plan_permute", "experts", "experts_gptoss"])
def test_gradcheck_of_every_case(name: str, case: str) -> None:
    f, inputs = as_function(calls(oracles.CASES[case], torch.float64)[name])
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)


@each_kind
@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck_of_every_kind(kind: str, weighted: bool) -> None:
    h = randn(4, 3 if kind.startswith("plain") else 6, dtype=torch.float64) * 2
    for kink in (0.0, 1.25, -1.25):
        h = torch.where((h - kink).abs() < 0.02, kink + 0.05, h)
    inputs = [h.requires_grad_()] + ([randn(4, dtype=torch.float64, seed=1).requires_grad_()] if weighted else [])
    assert torch.autograd.gradcheck(lambda h, w=None: ops.glu(h, w, kind), inputs)
    assert torch.autograd.gradgradcheck(lambda h, w=None: ops.glu(h, w, kind), inputs)


def test_only_what_requires_a_gradient_gets_one() -> None:
    r = oracles.CASES["balanced"]
    found = calls(r)
    for name, frozen in (("grouped_mm", 1), ("grouped_bias", 1), ("unpermute_weighted", 4), ("grouped_mm", 0)):
        args = found[name].differentiable()
        args[frozen].requires_grad_(False)
        found[name](*args).sum().backward()
        moving = [i for i in found[name].grads if i != frozen]
        assert args[frozen].grad is None
        assert all(args[i].grad is not None for i in moving)


def test_frozen_weights_skip_their_wgrad() -> None:
    from moefx.kernels import registry

    x, w, offsets = calls(oracles.CASES["balanced"])["grouped_mm"].differentiable()
    before = dict(registry.used().get("grouped_wgrad", {}))
    ops.grouped_mm(x, w.detach(), offsets).sum().backward()
    assert registry.used().get("grouped_wgrad", {}) == before
    ops.grouped_mm(x, w, offsets).sum().backward()
    assert sum(registry.used()["grouped_wgrad"].values()) == sum(before.values()) + 1


@each_call
def test_integer_outputs_have_no_gradient(name: str) -> None:
    call = calls(oracles.CASES["balanced"])[name]
    for t in oracles.tensors(call(*call.differentiable())):
        assert t.requires_grad == (t.is_floating_point() and bool(call.grads))


def test_the_plain_unpermute_keeps_no_rows_alive() -> None:
    # The folded combine counts on it: its backward moves rows and needs none of their values.
    r = oracles.CASES["balanced"]
    y = randn(r.rows, 64).requires_grad_()
    saved = list[Tensor]()

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ops.unpermute(y, r.token, r.order, r.slot, None)
    assert saved
    assert not any(t.is_floating_point() for t in saved)
