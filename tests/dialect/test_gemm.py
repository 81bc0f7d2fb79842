"""Grouped products and biases: `grouped_mm`, `grouped_wgrad`, `grouped_bias`, `group_sum`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from . import oracles
from .oracles import ARMS, Routing, Tensor, check, each_arm, each_case, each_dtype, ops, randn, running

K, N = 11, 13  # multiples of nothing that a kernel would like


def grouped_mm(x: Tensor, w: Tensor, r: Routing) -> tuple[Tensor, Tensor]:
    """Row by row, the product with its expert's weight, and the sum of absolute terms."""
    out, magnitude = torch.zeros(2, x.shape[0], w.shape[1], dtype=torch.float64)
    for s, e in enumerate(r.expert):
        if e >= 0:
            terms = x[s].double() * w[e].double()
            out[s], magnitude[s] = terms.sum(1), terms.abs().sum(1)
    return out, magnitude


def grouped_wgrad(a: Tensor, b: Tensor, r: Routing) -> tuple[Tensor, Tensor]:
    out, magnitude = torch.zeros(2, r.E, a.shape[1], b.shape[1], dtype=torch.float64)
    for s, e in enumerate(r.expert):
        if e >= 0:
            term = a[s].double()[:, None] * b[s].double()
            out[e] += term
            magnitude[e] += term.abs()
    return out, magnitude


def grouped_bias(y: Tensor, bias: Tensor, r: Routing) -> Tensor:
    return torch.stack(
        [y[s].double() + (bias[e].double() if e >= 0 else 0) for s, e in enumerate(r.expert)]
        or [torch.zeros(y.shape[1], dtype=torch.float64)]
    )[: y.shape[0]]


def group_sum(y: Tensor, r: Routing) -> tuple[Tensor, Tensor]:
    out, magnitude = torch.zeros(2, r.E, y.shape[1], dtype=torch.float64)
    for s, e in enumerate(r.expert):
        if e >= 0:
            out[e] += y[s].double()
            magnitude[e] += y[s].double().abs()
    return out, magnitude


def accumulated(terms: int, dtype: torch.dtype) -> float:
    """Roundings in units of `dtype` for a sum of that many terms in fp32 (or wider) and one rounding at the end."""
    acc = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return 1.1 + 2 * terms * acc / torch.finfo(dtype).eps


@each_arm
@each_case
@each_dtype
def test_grouped_mm(r: Routing, dtype: torch.dtype, arm: str) -> None:
    x, w = randn(r.rows, K, dtype=dtype), randn(r.E, N, K, dtype=dtype, seed=1)
    want, magnitude = grouped_mm(x, w, r)
    with running(arm):
        got, flipped = ops.grouped_mm(x, w, r.offsets), ops.grouped_mm(x, w.mT.contiguous().mT, r.offsets)
    assert got.dtype == dtype
    for product in (got, flipped):  # parameters are stored either way round
        check(product, want, roundings=accumulated(K, dtype), scale=magnitude)
        assert (product[r.lists.offsets[-1] :] == 0).all()


@each_arm
@each_case
@each_dtype
def test_grouped_wgrad(r: Routing, dtype: torch.dtype, arm: str) -> None:
    a, b = randn(r.rows, N, dtype=dtype), randn(r.rows, K, dtype=dtype, seed=1)
    want, magnitude = grouped_wgrad(a, b, r)
    with running(arm):
        got = ops.grouped_wgrad(a, b, r.offsets)
    assert got.dtype == dtype
    check(got, want, roundings=accumulated(r.rows, dtype), scale=magnitude)
    empty = r.offsets.diff() == 0
    assert (got[empty] == 0).all()


@each_arm
@each_case
@each_dtype
def test_grouped_bias(r: Routing, dtype: torch.dtype, arm: str) -> None:
    y, bias = randn(r.rows, N, dtype=dtype), randn(r.E, N, dtype=dtype, seed=1)
    with running(arm):
        got = ops.grouped_bias(y, bias, r.offsets)
    assert got.dtype == dtype
    want = grouped_bias(y, bias, r)
    check(got, want, roundings=1, scale=want.abs())


@each_arm
@each_case
@each_dtype
def test_group_sum(r: Routing, dtype: torch.dtype, arm: str) -> None:
    y = randn(r.rows, N, dtype=dtype)
    with running(arm):
        got = ops.group_sum(y, r.offsets)
    assert got.dtype == dtype
    want, magnitude = group_sum(y, r)
    check(got, want, roundings=accumulated(r.rows, dtype), scale=magnitude)


@each_arm
@each_dtype
def test_many_rows_per_expert(dtype: torch.dtype, arm: str) -> None:
    # More than 128 rows per expert take another path through grouped_bias; long sums must not lose 16-bit digits.
    r = oracles.routing(torch.arange(700).remainder(5).div(2, rounding_mode="floor")[:, None], 3)
    y, bias = randn(r.rows, 3, dtype=dtype) + 1, randn(3, 3, dtype=dtype)
    with running(arm):
        biased, total = ops.grouped_bias(y, bias, r.offsets), ops.group_sum(y, r.offsets)
    want = grouped_bias(y, bias, r)
    check(biased, want, roundings=1, scale=want.abs())
    want, magnitude = group_sum(y, r)
    check(total, want, roundings=accumulated(300, dtype), scale=magnitude)


@each_arm
def test_a_bias_in_another_dtype_takes_the_rows_dtype(arm: str) -> None:
    r = oracles.CASES["dropped"]
    y, bias = randn(r.rows, N, dtype=torch.bfloat16), randn(r.E, N)
    with running(arm):
        got = ops.grouped_bias(y, bias, r.offsets)
    assert got.dtype == torch.bfloat16
    want = grouped_bias(y, bias.bfloat16(), r)
    check(got, want, roundings=1, scale=want.abs())


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=7),
    tail=st.integers(0, 5),
    k=st.integers(0, 17),
    n=st.integers(1, 17),
    seed=st.integers(0, 2**16),
)
def test_any_groups(counts: list[int], tail: int, k: int, n: int, seed: int) -> None:
    ends = [sum(counts[:e]) for e in range(len(counts) + 1)]
    S = ends[-1] + tail
    r = Routing(torch.empty(0), len(counts), 1, oracles.Plan([0] * S, [], [], ends))
    x, w, dy = randn(S, k, seed=seed), randn(r.E, n, k, seed=seed + 1), randn(S, n, seed=seed + 2)
    product, product_scale = grouped_mm(x, w, r)
    wgrad, wgrad_scale = grouped_wgrad(dy, x, r)
    sums, sums_scale = group_sum(dy, r)
    for arm in ARMS:
        with running(arm):
            check(ops.grouped_mm(x, w, r.offsets), product, roundings=2 * k + 2, scale=product_scale)
            check(ops.grouped_wgrad(dy, x, r.offsets), wgrad, roundings=2 * S + 2, scale=wgrad_scale)
            check(ops.group_sum(dy, r.offsets), sums, roundings=2 * S + 2, scale=sums_scale)
            biased = grouped_bias(dy, w[:, :, 0] if k else sums.float(), r)
            bias = w[:, :, 0] if k else sums.float()
            check(ops.grouped_bias(dy, bias, r.offsets), biased, roundings=1, scale=biased.abs())


@each_arm
def test_any_strides(arm: str) -> None:
    r = oracles.CASES["dropped"]
    x, w, dy, bias = randn(r.rows, K), randn(r.E, N, K), randn(r.rows, N), randn(r.E, N)
    with running(arm):
        product, wgrad = ops.grouped_mm(x, w, r.offsets), ops.grouped_wgrad(dy, x, r.offsets)
        biased, total = ops.grouped_bias(dy, bias, r.offsets), ops.group_sum(dy, r.offsets)
        for v in oracles.layouts(x).values():
            torch.testing.assert_close(ops.grouped_mm(v, w, r.offsets), product)
            torch.testing.assert_close(ops.grouped_wgrad(dy, v, r.offsets), wgrad)
        for v in oracles.layouts(w).values():
            torch.testing.assert_close(ops.grouped_mm(x, v, r.offsets), product)
        for v in oracles.layouts(dy).values():
            torch.testing.assert_close(ops.grouped_wgrad(v, x, r.offsets), wgrad)
            assert torch.equal(ops.grouped_bias(v, bias, r.offsets), biased)
            torch.testing.assert_close(ops.group_sum(v, r.offsets), total)
        for v in oracles.layouts(bias).values():
            assert torch.equal(ops.grouped_bias(dy, v, r.offsets), biased)
        for v in oracles.layouts(r.offsets).values():
            assert torch.equal(ops.grouped_mm(x, w, v), product)
            assert torch.equal(ops.grouped_wgrad(dy, x, v), wgrad)
            assert torch.equal(ops.grouped_bias(dy, bias, v), biased)
            assert torch.equal(ops.group_sum(dy, v), total)


@each_arm
def test_expanded_operands(arm: str) -> None:
    r = oracles.CASES["balanced"]
    one = torch.tensor(1.5)
    x, w, dy = randn(1, K).expand(r.rows, K), randn(1, N, K).expand(r.E, N, K), one.expand(r.rows, N)
    with running(arm):
        torch.testing.assert_close(ops.grouped_mm(x, w, r.offsets), ops.grouped_mm(x.clone(), w.clone(), r.offsets))
        torch.testing.assert_close(
            ops.grouped_wgrad(dy, x, r.offsets), ops.grouped_wgrad(dy.clone(), x.clone(), r.offsets)
        )
        torch.testing.assert_close(ops.group_sum(dy, r.offsets), ops.group_sum(dy.clone(), r.offsets))
        assert torch.equal(
            ops.grouped_bias(dy, one.expand(r.E, N), r.offsets), (dy + one).masked_fill(r.token[:, None] < 0, 1.5)
        )


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: ops.grouped_mm(randn(4, 3), randn(2, 5, 4), torch.tensor([0, 2, 4])), "x .* is \\(4, 3\\)"),
        (lambda: ops.grouped_mm(randn(4, 3), randn(2, 5, 3), torch.tensor([0, 4])), "offsets"),
        (lambda: ops.grouped_mm(randn(4, 3), randn(5, 3), torch.tensor([0, 4])), "w .* is \\(5, 3\\)"),
        (lambda: ops.grouped_mm(randn(4, 3), randn(2, 5, 3).bfloat16(), torch.tensor([0, 2, 4])), "bfloat16"),
        (lambda: ops.grouped_wgrad(randn(4, 3), randn(5, 3), torch.tensor([0, 4])), "b .* is \\(5, 3\\)"),
        (lambda: ops.grouped_bias(randn(4, 3), randn(2, 3), torch.tensor([0, 4])), "offsets"),
        (lambda: ops.grouped_bias(randn(4, 3), randn(1, 2), torch.tensor([0, 4])), "bias .* is \\(1, 2\\)"),
    ],
)
def test_operands_that_do_not_fit_are_named(call: object, complaint: str) -> None:
    assert callable(call)
    with pytest.raises(RuntimeError, match=complaint):
        call()
