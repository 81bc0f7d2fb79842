"""Row movement: `permute`, `unpermute`, `unpermute_backward`, `plan_permute`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from . import oracles
from .oracles import ARMS, Routing, Tensor, check, each_arm, each_case, each_dtype, ops, randn, running

H = 7

# Routing weights as models keep them: in the dtype of the rows, in fp32 beside 16-bit rows, or narrower than the rows.
each_pair_of_dtypes = pytest.mark.parametrize(
    ("dtype", "w_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float16),
    ],
    ids=str,
)


def permute(x: Tensor, r: Routing) -> Tensor:
    rows = [[0.0] * x.shape[1] if t < 0 else x[t].tolist() for t in r.lists.token]
    return torch.tensor(rows, dtype=torch.float64).view(r.rows, x.shape[1])


def unpermute(y: Tensor, r: Routing, w: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sums, and the sums of absolute values."""
    out, magnitude = torch.zeros(2, r.idx.shape[0], y.shape[1], dtype=torch.float64)
    for t, row in enumerate(r.lists.slot):
        for j, s in enumerate(row):
            if s >= 0:
                term = y[s].double() * (1 if w is None else w[t, j].item())
                out[t] += term
                magnitude[t] += term.abs()
    return out, magnitude


def unpermute_backward(dout: Tensor, y: Tensor, r: Routing, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows and of the weights, and the scale of the latter."""
    dy = torch.zeros(r.rows, y.shape[1], dtype=torch.float64)
    dw, magnitude = torch.zeros(2, *r.idx.shape, dtype=torch.float64)
    for t, row in enumerate(r.lists.slot):
        for j, s in enumerate(row):
            if s >= 0:
                dy[s] = dout[t].double() * w[t, j].item()
                terms = dout[t].double() * y[s].double()
                dw[t, j], magnitude[t, j] = terms.sum(), terms.abs().sum()
    return dy, dw, magnitude


@each_arm
@each_case
@each_dtype
def test_permute_moves_rows_exactly(r: Routing, dtype: torch.dtype, arm: str) -> None:
    x = randn(r.idx.shape[0], H, dtype=dtype)
    with running(arm):
        got = ops.permute(x, r.token, r.slot)
    assert got.dtype == dtype
    assert torch.equal(got.double(), permute(x, r))


@each_arm
@each_case
@each_dtype
def test_plan_permute_is_plan_and_permute(r: Routing, dtype: torch.dtype, arm: str) -> None:
    x = randn(r.idx.shape[0], H, dtype=dtype)
    with running(arm):
        rows, *maps = ops.plan_permute(x, r.idx, r.E, r.align)
    assert torch.equal(rows.double(), permute(x, r))
    assert rows.dtype == dtype
    assert all(map(torch.equal, maps, (r.token, r.order, r.slot, r.offsets)))


@each_arm
@each_case
@each_pair_of_dtypes
def test_weighted_unpermute(r: Routing, dtype: torch.dtype, w_dtype: torch.dtype, arm: str) -> None:
    y, w = randn(r.rows, H, dtype=dtype), randn(*r.idx.shape, dtype=w_dtype, seed=1)
    with running(arm):
        got = ops.unpermute(y, r.token, r.order, r.slot, w)
    want, magnitude = unpermute(y, r, w)
    assert got.dtype == dtype
    # 16-bit rows are summed in fp32 and rounded once; fp32 rounds each product and sum.
    check(got, want, roundings=8 if dtype == torch.float32 else 1.1, scale=magnitude)


@each_arm
@each_case
@each_dtype
def test_plain_unpermute(r: Routing, dtype: torch.dtype, arm: str) -> None:
    y = randn(r.rows, H, dtype=dtype)
    with running(arm):
        got = ops.unpermute(y, r.token, r.order, r.slot, None)
    want, magnitude = unpermute(y, r, None)
    assert got.dtype == dtype
    check(got, want, roundings=4 if dtype == torch.float32 else 1.1, scale=magnitude)


@each_arm
@each_case
@each_pair_of_dtypes
def test_unpermute_backward(r: Routing, dtype: torch.dtype, w_dtype: torch.dtype, arm: str) -> None:
    T = r.idx.shape[0]
    dout, y = randn(T, H, dtype=dtype), randn(r.rows, H, dtype=dtype, seed=1)
    w = randn(*r.idx.shape, dtype=w_dtype, seed=2)
    with running(arm):
        dy, dw = ops.unpermute_backward(dout, y, r.token, r.order, r.slot, w)
    want_dy, want_dw, magnitude = unpermute_backward(dout, y, r, w)
    assert (dy.dtype, dw.dtype) == (dtype, w_dtype)
    check(dy, want_dy, roundings=1.1, scale=want_dy.abs())
    # A weight wider than 16 bits gets a gradient that was not rounded to 16 bits on its way.
    wide = torch.promote_types(torch.promote_types(dtype, w_dtype), torch.float32)
    accumulated = 2 * H * torch.finfo(wide).eps / torch.finfo(w_dtype).eps
    check(dw, want_dw, roundings=1.1 + accumulated, scale=magnitude)


@each_arm
def test_large_16_bit_products_do_not_overflow(arm: str) -> None:
    # 300 * 300 is beyond fp16: products have to be formed in fp32, in both directions.
    r = oracles.CASES["k1"]
    T = r.idx.shape[0]
    y = torch.full((r.rows, H), 300.0, dtype=torch.float16)
    y[:, 1::2] = -300.0
    w = torch.full(r.idx.shape, 0.5, dtype=torch.float16)
    dout = torch.full((T, H), 300.0, dtype=torch.float16)
    with running(arm):
        _, dw = ops.unpermute_backward(dout, y, r.token, r.order, r.slot, w)
    # H is odd, so one product of each row is left; as fp16 it is infinite, as fp32 it was 90000.
    assert torch.isinf(dw).all()
    y[:, 0] = 0
    with running(arm):
        _, dw = ops.unpermute_backward(dout, y, r.token, r.order, r.slot, w)
    assert torch.equal(dw, torch.zeros_like(dw))


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(0, 12),
    k=st.integers(1, 4),
    E=st.integers(1, 9),
    width=st.integers(1, 33),
    align=st.sampled_from([1, 4, 8]),
    drops=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape(T: int, k: int, E: int, width: int, align: int, drops: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    idx = torch.randint(-1 if drops else 0, E + 1 if drops else E, (T, k), generator=g)
    r = oracles.routing(idx, E, align)
    x, y, w = randn(T, width, seed=seed), randn(r.rows, width, seed=seed + 1), randn(T, k, seed=seed + 2)
    want, magnitude = unpermute(y, r, w)
    want_dy, want_dw, dw_magnitude = unpermute_backward(x, y, r, w)
    for arm in ARMS:
        with running(arm):
            assert torch.equal(ops.permute(x, r.token, r.slot).double(), permute(x, r))
            check(ops.unpermute(y, r.token, r.order, r.slot, w), want, roundings=10, scale=magnitude)
            dy, dw = ops.unpermute_backward(x, y, r.token, r.order, r.slot, w)
            check(dy, want_dy)
            check(dw, want_dw, roundings=2 * width + 2, scale=dw_magnitude)


@each_arm
@pytest.mark.parametrize("case", ["balanced", "padded_and_dropped"])
def test_any_strides(case: str, arm: str) -> None:
    r = oracles.CASES[case]
    T = r.idx.shape[0]
    x, y, w = randn(T, H), randn(r.rows, H, seed=1), randn(*r.idx.shape, seed=2)
    maps = r.token, r.order, r.slot
    with running(arm):
        rows, sums, grads = (
            ops.permute(x, r.token, r.slot),
            ops.unpermute(y, *maps, w),
            ops.unpermute_backward(x, y, *maps, w),
        )
        for name, v in oracles.layouts(x).items():
            assert torch.equal(ops.permute(v, r.token, r.slot), rows), name
            assert torch.equal(ops.plan_permute(v, r.idx, r.E, r.align)[0], rows), name
            assert all(map(torch.equal, ops.unpermute_backward(v, y, *maps, w), grads)), name
        for name, v in oracles.layouts(y).items():
            assert torch.equal(ops.unpermute(v, *maps, w), sums), name
            assert all(map(torch.equal, ops.unpermute_backward(x, v, *maps, w), grads)), name
        for name, v in oracles.layouts(w).items():
            assert torch.equal(ops.unpermute(y, *maps, v), sums), name
            assert all(map(torch.equal, ops.unpermute_backward(x, y, *maps, v), grads)), name
        for name, v in oracles.layouts(r.slot).items():
            assert torch.equal(ops.unpermute(y, r.token, r.order, v, w), sums), name
            assert all(map(torch.equal, ops.unpermute_backward(x, y, r.token, r.order, v, w), grads)), name
        for name, v in oracles.layouts(r.token).items():
            assert torch.equal(ops.permute(x, v, r.slot), rows), name
            assert all(map(torch.equal, ops.unpermute_backward(x, y, v, r.order, r.slot, w), grads)), name


@each_arm
def test_expanded_operands(arm: str) -> None:
    # What `out.sum().backward()` hands over: one number seen as a matrix.
    r = oracles.CASES["padded_and_dropped"]
    T = r.idx.shape[0]
    one, w = torch.tensor(1.5), randn(*r.idx.shape)[:, :1].expand(*r.idx.shape)
    dout, y = one.expand(T, H), randn(1, H).expand(r.rows, H)
    maps = r.token, r.order, r.slot
    with running(arm):
        assert torch.equal(ops.permute(dout, r.token, r.slot), ops.permute(dout.clone(), r.token, r.slot))
        assert torch.equal(ops.unpermute(y, *maps, w), ops.unpermute(y.clone(), *maps, w.clone()))
        got = ops.unpermute_backward(dout, y, *maps, w)
        want = ops.unpermute_backward(dout.clone(), y.clone(), *maps, w.clone())
    assert all(map(torch.equal, got, want))


@each_arm
def test_a_slot_may_be_dropped_while_its_row_is_there(arm: str) -> None:
    # Expert parallelism masks slots of a full plan; nothing marks the rows.
    r = oracles.CASES["balanced"]
    lists = [[-1 if (t + j) % 3 == 0 else s for j, s in enumerate(row)] for t, row in enumerate(r.lists.slot)]
    masked = oracles.Routing(r.idx, r.E, 1, oracles.Plan(r.lists.token, r.lists.order, lists, r.lists.offsets))
    y, w, dout = randn(r.rows, H), randn(*r.idx.shape), randn(r.idx.shape[0], H)
    with running(arm):
        for weights in (w, None):
            got = ops.unpermute(y, r.token, r.order, masked.slot, weights)
            check(got, unpermute(y, masked, weights)[0], roundings=8)
        _, dw = ops.unpermute_backward(dout, y, r.token, r.order, masked.slot, w)
    check(dw, unpermute_backward(dout, y, masked, w)[1], roundings=2 * H)
