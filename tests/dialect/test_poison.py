"""Every row is defined, and what was dropped stays out.

Uninitialised memory is filled with NaN, so a row that no kernel wrote shows. Rows that must not be read are NaN or Inf.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moefx.kernels import registry

from ..profile import often
from . import oracles
from .calls import calls, each_call
from .oracles import DTYPES, Routing, Tensor, each_arm, each_dtype, ops, randn, running, tensors

CASES = ("balanced", "dropped", "all_dropped", "padded", "padded_and_dropped", "padded_all_dropped", "no_tokens")
H, I = 6, 5


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fresh memory is NaN, or the largest integer."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_the_poison_works() -> None:
    for dtype in (*DTYPES, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu):
        assert torch.empty(3, 2, dtype=dtype).float().isnan().all()
        assert torch.zeros(3, dtype=dtype).new_empty(2, 2).float().isnan().all()
        assert not all_finite(torch.empty(1, dtype=dtype))
    assert not all_finite(torch.empty(1, dtype=torch.uint8))
    assert (torch.empty(4, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_a_kernel_that_leaves_rows_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    # The negative control: like torch.grouped_mm, it leaves the rows behind the last offset as they are.
    def leaky(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
        y, ends = x.new_empty(x.shape[0], w.shape[1]), offsets.tolist()
        for e in range(w.shape[0]):
            y[ends[e] : ends[e + 1]] = x[ends[e] : ends[e + 1]] @ w[e].t()
        return y

    call = calls(oracles.CASES["dropped"])["grouped_mm"]
    entry = registry._TABLE["grouped_mm"]
    assert all_finite(call())
    monkeypatch.setattr(entry, "providers", [registry.Provider("leaky", leaky, lambda *_: True)])
    assert not all_finite(call())


def all_finite(outputs: object) -> bool:
    """Neither NaN nor, for integers, the poison value."""
    return all(
        bool((t.float() if t.element_size() == 1 else t).isfinite().all())
        if t.is_floating_point()
        else bool((t != torch.iinfo(t.dtype).max).all())
        for t in tensors(outputs)
    )


@each_arm
@pytest.mark.parametrize("dtype", often(DTYPES, DTYPES[:2]), ids=str)
@each_call
@pytest.mark.parametrize("case", CASES)
def test_every_output_and_gradient_is_written(case: str, name: str, dtype: torch.dtype, arm: str) -> None:
    call = calls(oracles.CASES[case], dtype)[name]
    args = call.differentiable()
    with running(arm):
        outputs = tensors(call(*args))
        moving = [t for t in outputs if t.requires_grad]
        wrt = [t for t in tensors(args) if t.requires_grad]
        grads = torch.autograd.grad(moving, wrt, [torch.ones_like(t) for t in moving]) if moving else ()
    assert all_finite(outputs)
    assert all_finite(grads)


def holds(r: Routing) -> Tensor:
    """Which rows hold a token."""
    return torch.tensor(r.lists.token) >= 0


@each_arm
@each_dtype
@pytest.mark.parametrize("case", CASES)
def test_rows_that_hold_nothing_are_zero(case: str, dtype: torch.dtype, arm: str) -> None:
    r = oracles.CASES[case]
    T, k = r.idx.shape
    x, w = randn(T, H, dtype=dtype), randn(T, k, dtype=dtype)
    y, weight, dout = randn(r.rows, H, dtype=dtype), randn(r.E, I, H, dtype=dtype), randn(T, H, dtype=dtype)
    vacant, end = ~holds(r), r.lists.offsets[-1]
    with running(arm):
        assert (ops.permute(x, r.token, r.slot)[vacant] == 0).all()
        assert (ops.plan_permute(x, r.idx, r.E, r.align)[0][vacant] == 0).all()
        assert (ops.gather_weights(w, r.order)[vacant] == 0).all()
        assert (ops.unpermute_backward(dout, y, r.token, r.order, r.slot, w)[0][vacant] == 0).all()
        assert (ops.grouped_mm(y, weight, r.offsets)[end:] == 0).all()
        # Padding rows are zero going into the product, so they are zero coming out.
        padded = ops.grouped_mm(ops.permute(x, r.token, r.slot), weight, r.offsets)
        assert (padded[vacant] == 0).all()
        assert (ops.unpermute(y, r.token, r.order, r.slot, w)[(r.slot < 0).all(1)] == 0).all()
        assert (ops.unpermute_backward(dout, y, r.token, r.order, r.slot, w)[1][r.slot < 0] == 0).all()
        assert (ops.scatter_weights(y[:, 0], r.order, T, k)[r.slot < 0] == 0).all()


BAD = (float("nan"), float("inf"), float("-inf"))


@each_arm
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("case", ["dropped", "all_dropped", "padded", "padded_and_dropped"])
def test_rows_that_hold_nothing_are_not_read(case: str, bad: float, arm: str) -> None:
    r = oracles.CASES[case]
    T, k = r.idx.shape
    vacant, dropped, end = ~holds(r), r.slot < 0, r.lists.offsets[-1]
    y, dout, w = randn(r.rows, H), randn(T, H), randn(T, k)
    rows, weight, bias = randn(r.rows), randn(r.E, I, H), randn(r.E, H)
    maps = r.token, r.order, r.slot
    bad_y, bad_w, bad_rows = y.clone(), w.clone(), rows.clone()
    bad_y[vacant], bad_w[dropped], bad_rows[vacant] = bad, bad, bad
    behind = y.clone()
    behind[end:] = bad
    assert vacant.any()
    with running(arm):
        for weights in (w, bad_w):
            same = (
                ops.unpermute(y, *maps, w),
                *ops.unpermute_backward(dout, y, *maps, w),
                ops.gather_weights(w, r.order),
            )
            got = (
                ops.unpermute(bad_y, *maps, weights),
                *ops.unpermute_backward(dout, bad_y, *maps, weights),
                ops.gather_weights(weights, r.order),
            )
            assert all(map(torch.equal, got, same))
        assert torch.equal(ops.unpermute(bad_y, *maps, None), ops.unpermute(y, *maps, None))
        assert torch.equal(ops.scatter_weights(bad_rows, r.order, T, k), ops.scatter_weights(rows, r.order, T, k))
        # Behind the last offset no product or sum looks.
        dy = ops.grouped_mm(y, weight, r.offsets)
        assert torch.equal(ops.grouped_mm(behind, weight, r.offsets), dy)
        assert torch.equal(ops.grouped_wgrad(dy, behind, r.offsets), ops.grouped_wgrad(dy, y, r.offsets))
        assert torch.equal(ops.grouped_wgrad(behind, dy, r.offsets), ops.grouped_wgrad(y, dy, r.offsets))
        assert torch.equal(ops.group_sum(behind, r.offsets), ops.group_sum(y, r.offsets))
        assert torch.equal(ops.grouped_bias(behind, bias, r.offsets)[:end], ops.grouped_bias(y, bias, r.offsets)[:end])


@each_arm
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("spec", ["silu | nk", "interleaved clamp(7,1.702) | kn bias"])
def test_a_dropped_token_spoils_no_other(spec: str, bad: float, arm: str) -> None:
    idx = torch.tensor([[-1, 4], [0, 1], [4, -7], [1, 4], [9, 0]])
    gone, kept = torch.tensor([0, 2]), torch.tensor([1, 3, 4])
    name = "experts_gptoss" if "bias" in spec else "experts"
    results = []
    for value in (0.0, bad):
        x, _, w, weights, _ = calls(oracles.routing(idx, 4))[name].differentiable()
        with torch.no_grad():
            x[gone] = value
            w[(idx < 0) | (idx > 3)] = value
        with running(arm):
            y = ops.experts(x, idx, w, weights, spec)
            (y * randn(5, H)).sum().backward()
        assert (y[gone] == 0).all()
        assert x.grad is not None
        assert w.grad is not None
        assert (x.grad[gone] == 0).all()
        assert (w.grad[(idx < 0) | (idx > 3)] == 0).all()
        results.append([y[kept], x.grad, w.grad, *(t.grad for t in weights)])
    assert all_finite(results)
    assert all(map(torch.equal, *results))


@each_arm
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_gradient_of_a_dropped_token_spoils_nothing(bad: float, arm: str) -> None:
    idx = torch.tensor([[-1, 4], [0, 1], [4, 9], [1, 4]])
    gone = torch.tensor([0, 2])
    x, _, w, weights, spec = calls(oracles.routing(idx, 4))["experts_gptoss"].differentiable()
    seed = randn(4, H)
    seed[gone] = bad
    with running(arm):
        y = ops.experts(x, idx, w, weights, spec)
        grads = torch.autograd.grad(y, [x, w, *weights], seed)
    assert all_finite(grads)
    assert (grads[0][gone] == 0).all()


@each_arm
def test_a_nan_that_was_routed_is_seen(arm: str) -> None:
    # The other direction: what is kept is not cleaned up.
    idx = torch.tensor([[0, 1], [1, 4]])
    x, _, w, weights, spec = calls(oracles.routing(idx, 4))["experts"].args
    x[1] = float("nan")
    with running(arm):
        y = ops.experts(x, idx, w, weights, spec)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
