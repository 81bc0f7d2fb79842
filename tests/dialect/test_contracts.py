"""What holds for every op: registered correctly, functional, contiguous, deterministic."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import oracles
from .calls import NAMES, calls, each_call
from .oracles import DTYPES, Tensor, each_arm, running, tensors

# Dropped pairs and padding rows: the hardest plan. Its rows are not a multiple of anything.
HARD = oracles.CASES["padded_and_dropped"]
SHAPES = ("balanced", "padded_and_dropped", "no_tokens", "all_dropped")


@each_call
def test_opcheck(name: str) -> None:
    """Schema, autograd registration, fake against real, and AOT with symbolic shapes against eager.

    All four apply to all ops. In `plan` nothing requires grad, so there is nothing for two of them to differentiate;
    the composite `experts` has no autograd kernel of its own, and is checked through the ops it is made of.
    """
    call = calls(HARD, torch.float32)[name]
    done = torch.library.opcheck(call.default, call.differentiable())
    assert done == dict.fromkeys(
        ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"), "SUCCESS"
    )


@pytest.mark.parametrize("name", ["unpermute_weighted", "grouped_mm", "grouped_bias", "glu_weighted", "experts"])
@pytest.mark.parametrize("case", ["no_tokens", "k1"])
def test_opcheck_where_a_size_is_zero_or_one(name: str, case: str) -> None:
    call = calls(oracles.CASES[case])[name]
    done = torch.library.opcheck(call.default, call.differentiable())
    assert set(done.values()) == {"SUCCESS"}


def storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


@each_arm
@each_call
@pytest.mark.parametrize("case", SHAPES)
def test_functional(case: str, name: str, arm: str) -> None:
    call = calls(oracles.CASES[case])[name]
    before = [t.clone() for t in tensors(call.args)]
    versions = [t._version for t in tensors(call.args)]
    with running(arm):
        outputs = tensors(call())
    assert all(map(torch.equal, tensors(call.args), before))
    assert [t._version for t in tensors(call.args)] == versions
    held = {storage(t) for t in tensors(call.args) if t.numel()}
    written = [storage(t) for t in outputs if t.numel()]
    assert not held & set(written), "an output is a view of an argument"
    assert len(set(written)) == len(written), "two outputs share memory"


@each_arm
@each_call
def test_outputs_are_contiguous_whatever_comes_in(name: str, arm: str) -> None:
    call = calls(HARD)[name]

    def lay_out(a: Any, how: str) -> Any:
        if isinstance(a, list):
            return [lay_out(t, how) for t in a]
        return oracles.layouts(a).get(how, a) if isinstance(a, Tensor) else a

    with running(arm):
        want = tensors(call())
        for how in ("transposed", "stepped", "sliced"):
            got = tensors(call(*(lay_out(a, how) for a in call.args)))
            assert all(t.is_contiguous() for t in got), how
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@each_arm
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_call
def test_two_runs_are_bitwise_equal(name: str, dtype: torch.dtype, arm: str) -> None:
    call = calls(oracles.CASES["dropped"], dtype)[name]
    runs = []
    with running(arm):
        for _ in range(2):
            args = call.differentiable()
            outputs = tensors(call(*args))
            moving = [t for t in outputs if t.requires_grad]
            wrt = [t for t in tensors(args) if t.requires_grad]
            grads = torch.autograd.grad(moving, wrt, [torch.ones_like(t) for t in moving]) if moving else ()
            runs.append([*outputs, *grads])
    assert len(runs[0]) >= len(wrt)
    assert all(map(torch.equal, *runs))


@each_call
def test_threads_do_not_change_the_result_beyond_rounding(name: str) -> None:
    # Each row, bag or expert is one thread's: rows of a GEMM may be split otherwise, nothing else.
    call = calls(oracles.CASES["dropped"])[name]
    one = tensors(call())
    torch.set_num_threads(2)
    torch.testing.assert_close(tensors(call()), one, rtol=1e-6, atol=1e-6)


@each_arm
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@each_call
def test_outputs_take_the_operands_dtype(name: str, dtype: torch.dtype, arm: str) -> None:
    call = calls(HARD, dtype)[name]
    with running(arm):
        floating = [t for t in tensors(call()) if t.is_floating_point()]
    assert all(t.dtype == dtype for t in floating)
    assert bool(floating) == (name != "plan")


def test_every_call_is_known() -> None:
    assert len(NAMES) == len(set(NAMES)) >= 19
