"""`topk_route` against `route` with autograd in float64, of any spec; what is no router is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx.dialect.route import Groups, RouteSpec
from moefx.dialect.topk_route import attributes, covers
from moefx.errors import InputError

from .oracles import Tensor, ops, randn
from .test_route import specs

E, F64 = 12, torch.float64
V3 = RouteSpec("sigmoid", 4, "f64", bias=True, groups=Groups(4, 2, "top2sum"), norm="sum", eps=1e-20, factor=2.5)
V2 = RouteSpec("softmax", 4, "f64", groups=Groups(4, 2, "max", 0.0), masked=True, factor=16.0)


def results(op: Any, spec: RouteSpec, seed: int) -> list[Tensor]:
    """scores, idx, w, and the gradient of the logits from scores and w."""
    logits = randn(9, E, dtype=F64, seed=seed).requires_grad_()
    bias = randn(E, dtype=F64, seed=seed + 1).abs() if spec.bias else None
    scores, idx, w = op(logits, bias, spec)
    # Chosen at the fill, weights may be infinite: what is differentiated is finite.
    seen = torch.where(w.isfinite(), w, 0) * randn(*w.shape, dtype=F64, seed=seed + 2)
    total = seen.sum() + (scores * randn(9, E, dtype=F64, seed=seed + 3)).sum()
    return [scores, idx, w, *torch.autograd.grad(total, logits)]


def one_op(logits: Tensor, bias: Tensor | None, spec: RouteSpec) -> Any:
    assert covers(spec, logits.dtype)
    return ops.topk_route(logits, bias, *attributes(spec))


def written(logits: Tensor, bias: Tensor | None, spec: RouteSpec) -> Any:
    return ops.route(logits, bias, None, str(spec))


def same(spec: RouteSpec, seed: int) -> None:
    got, want = results(one_op, spec, seed), results(written, spec, seed)
    assert torch.equal(got[0], want[0])
    g, certain = spec.groups, True
    if g is not None:  # fills are equal, and torch.topk takes any of them
        least = g.fill < 0 or (spec.score != "identity" and spec.order == "scores")
        certain = least and spec.k <= g.kept * E // g.count
    if certain:
        assert torch.equal(got[1], want[1])
    if certain or spec.masked:
        torch.testing.assert_close(got[2], want[2], rtol=1e-13, atol=1e-15, equal_nan=True)
        if got[2].isfinite().all():
            torch.testing.assert_close(got[3], want[3], rtol=1e-9, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(spec=specs(experts=E), seed=st.integers(0, 99), more=st.booleans())
def test_as_route_of_any_spec(spec: RouteSpec, seed: int, more: bool) -> None:
    eps, factor = (0.25 if spec.eps else 0.0), (2.5 if spec.factor != 1 else 1.0)
    k = min(spec.k + 3, E) if more else spec.k
    same(replace(spec, k=k, dtype="f64", eps=eps, factor=factor, per_expert=False, sorted=True, out=None), seed)


@pytest.mark.parametrize("spec", [V3, V2, replace(V2, k=8), replace(V2, k=8, norm="softmax")], ids=str)
def test_as_route_of_deepseek(spec: RouteSpec) -> None:
    for seed in range(5):
        same(spec, seed)


def test_the_comparison_sees_other_groups_and_the_gradient_of_a_fill() -> None:
    with pytest.raises(AssertionError):
        torch.testing.assert_close(results(one_op, V3, 0), results(written, replace(V3, groups=Groups(4, 1)), 0))
    got, want = (results(one_op, s, 0) for s in (replace(V2, k=8, masked=False), replace(V2, k=8)))
    assert torch.equal(got[1], want[1])
    assert not torch.allclose(got[3], want[3])


def test_equal_groups_are_kept_from_the_first_on() -> None:
    x = torch.zeros(2, E)
    x[1, 6] = 1.0
    spec = RouteSpec("identity", 4, groups=Groups(4, 2))
    assert one_op(x, None, spec)[1].tolist() == [[0, 1, 2, 3], [6, 0, 1, 2]]


@pytest.mark.parametrize("spec", [V3, V2, replace(V2, k=8)], ids=str)
def test_gradcheck(spec: RouteSpec) -> None:
    bias = torch.linspace(0, 1, E, dtype=F64) if spec.bias else None
    logits = randn(3, E, dtype=F64).requires_grad_()

    def f(logits: Tensor) -> tuple[Tensor, Tensor]:
        scores, _, w = one_op(logits, bias, spec)
        return scores, w

    assert torch.autograd.gradcheck(f, (logits,))
    assert torch.autograd.gradgradcheck(f, (logits,))


@pytest.mark.parametrize(
    ("groups", "named"),
    [
        ((5, 2, "max", 0.0), "12 experts in"),
        ((12, 2, "top2sum", 0.0), "12 experts in"),
        ((4, 4, "max", 0.0), "groups"),
        ((4, 2, "mean", 0.0), "groups"),
        ((4, 2, "max", 1.0), "groups"),
    ],
)
def test_groups_that_are_none_are_refused(groups: tuple[Any, ...], named: str) -> None:
    args = torch.zeros(3, E), None, 2, "softmax", "scores", "none", 0.0, 1.0, None
    assert ops.topk_route(*args, 4, 2, "max", 0.0)[1].tolist() == [[0, 1]] * 3
    for device in ("cpu", "meta"):
        with pytest.raises(InputError, match=named):
            ops.topk_route(args[0].to(device), *args[1:], *groups)
    with pytest.raises(InputError, match="masked"):
        ops.topk_route(args[0], torch.zeros(E), *args[2:], 4, 2, "max", 0.0, True)
    with pytest.raises(InputError, match="masked"):
        ops.topk_route(*args, 0, 0, "max", 0.0, True)
