"""Autocast: grouped products run in its dtype, as other matrix products do; parameters keep their gradients' dtype."""

from __future__ import annotations

import pytest
import torch

from . import oracles
from .calls import calls, each_training
from .oracles import check, each_arm, ops, randn, running
from .test_gemm import accumulated, grouped_mm

R = oracles.CASES["dropped"]


@each_arm
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_grouped_mm_runs_in_the_autocast_dtype(low: torch.dtype, arm: str) -> None:
    x, w, offsets = calls(R)["grouped_mm"].args
    with running(arm), torch.autocast("cpu", low):
        y = ops.grouped_mm(x, w, offsets)
        assert torch.mm(x, w[0].t()).dtype == low  # what PyTorch does
    assert y.dtype == low
    want, magnitude = grouped_mm(x.to(low), w.to(low), R)
    check(y, want, roundings=accumulated(x.shape[1], low), scale=magnitude)


@each_arm
def test_mixed_operands_are_cast_to_one_dtype(arm: str) -> None:
    x, w, offsets = calls(R)["grouped_mm"].args
    with running(arm), torch.autocast("cpu", torch.bfloat16):
        y = ops.grouped_mm(x.bfloat16(), w, offsets)
    assert torch.equal(y, ops.grouped_mm(x.bfloat16(), w.bfloat16(), offsets))


@each_arm
def test_float64_is_left_alone(arm: str) -> None:
    x, w, offsets = calls(R, torch.float64)["grouped_mm"].args
    with running(arm), torch.autocast("cpu", torch.bfloat16):
        y = ops.grouped_mm(x, w, offsets)
        assert torch.mm(x, w[0].t()).dtype == torch.float64  # what PyTorch does
    assert y.dtype == torch.float64


@each_arm
def test_a_disabled_region_inside_runs_wide(arm: str) -> None:
    x, w, offsets = calls(R)["grouped_mm"].args
    with running(arm), torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        y = ops.grouped_mm(x, w, offsets)
    assert y.dtype == torch.float32
    assert torch.equal(y, ops.grouped_mm(x, w, offsets))


@each_arm
@pytest.mark.parametrize("inside", [False, True], ids=["backward_outside", "backward_inside"])
@pytest.mark.parametrize("name", ["grouped_mm", "experts", "experts_gptoss"])
def test_gradients_come_back_in_the_parameters_dtype(name: str, inside: bool, arm: str) -> None:
    call = calls(R)[name]
    args = call.differentiable()
    wide = call.differentiable()
    with running(arm):
        with torch.autocast("cpu", torch.bfloat16):
            y = call(*args)
            if inside:
                y.float().square().mean().backward()
        if not inside:
            y.float().square().mean().backward()
        call(*wide).square().mean().backward()
    assert y.dtype == torch.bfloat16
    for mine, exact in zip(oracles.tensors(args), oracles.tensors(wide), strict=True):
        if mine.requires_grad:
            assert mine.grad is not None
            assert exact.grad is not None
            assert mine.grad.dtype == mine.dtype == torch.float32
            error = (mine.grad - exact.grad).norm() / exact.grad.norm()
            assert error < 0.05


def test_autocast_is_the_cast_written_out() -> None:
    # bf16 in, bf16 through all ops: the same numbers as a model converted by hand.
    x, idx, w, (up, down), spec = calls(R)["experts"].args
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.experts(x, idx, w, [up, down], spec)
    token, order, slot, offsets = ops.plan(idx, R.E, 1)
    h = ops.grouped_mm(ops.permute(x, token, slot).bfloat16(), up.bfloat16(), offsets)
    rows = ops.grouped_mm(ops.glu(h, None, "silu"), down.bfloat16(), offsets)
    assert torch.equal(y, ops.unpermute(rows, token, order, slot, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_training
def test_ops_of_training_graphs_are_left_alone(name: str, dtype: torch.dtype) -> None:
    # Their operands were rounded on purpose: a product of theirs in 16 bits would round once more.
    call = calls(R, dtype)[name]
    want = oracles.tensors(call())
    with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float32 else torch.float16):
        got = oracles.tensors(call())
    assert all(map(oracles.equal, got, want))


def test_ops_that_move_rows_keep_their_dtype() -> None:
    found = calls(R)
    with torch.autocast("cpu", torch.bfloat16):
        for name in ("permute", "unpermute_weighted", "glu", "glu_weighted", "grouped_bias", "group_sum"):
            assert found[name]().dtype == torch.float32, name
    assert torch.equal(found["glu"](), ops.glu(randn(R.rows, 10, seed=7), None, "silu"))
