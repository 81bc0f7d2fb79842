"""What holds for every op: registered correctly, functional, contiguous, deterministic."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import oracles
from .calls import CONSTANT, DIFFERENTIABLE, NAMES, TRAINING, Call, calls, each_call, each_training
from .oracles import DTYPES, Tensor, bits, each_arm, equal, running, tensors

# Dropped pairs and padding rows: the hardest plan. Its rows are not a multiple of anything.
HARD = oracles.CASES["padded_and_dropped"]
OFTEN_EMPTY = ("unpermute_weighted", "grouped_mm", "grouped_bias", "glu_weighted", "experts")
SHAPES = ("balanced", "padded_and_dropped", "no_tokens", "all_dropped")


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def checks(call: Call) -> tuple[str, ...]:
    """All four, but PyTorch's check of the schema compares operands before and after in arithmetic that 8-bit
    floating-point numbers lack; `test_functional` below compares their bytes, for aliases and writes alike."""
    eight = any(t.is_floating_point() and t.element_size() == 1 for t in tensors(call.args))
    return CHECKS[1:] if eight else CHECKS


@each_call
def test_opcheck(name: str) -> None:
    """Schema, autograd registration, fake against real, and AOT with symbolic shapes against eager.

    All four apply to all ops. In `plan` nothing requires grad, so there is nothing for two of them to differentiate;
    the composite `experts` has no autograd kernel of its own, and is checked through the ops it is made of.
    """
    call = calls(HARD, torch.float32)[name]
    if call.op not in TRAINING:
        assert checks(call) == CHECKS
    done = torch.library.opcheck(call.default, call.differentiable(), test_utils=checks(call))
    assert done == dict.fromkeys(checks(call), "SUCCESS")


@pytest.mark.parametrize(
    "name", [*OFTEN_EMPTY, "scaled_grouped_mm", "scaled_grouped_wgrad", "permute_scaled", "glu_quantize"]
)
@pytest.mark.parametrize("case", ["no_tokens", "k1"])
def test_opcheck_where_a_size_is_zero_or_one(name: str, case: str) -> None:
    call = calls(oracles.CASES[case])[name]
    done = torch.library.opcheck(call.default, call.differentiable(), test_utils=checks(call))
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
    assert all(map(equal, tensors(call.args), before))
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
            assert [t.dtype for t in got] == [t.dtype for t in want]
            torch.testing.assert_close([*map(bits, got)], [*map(bits, want)], rtol=1e-5, atol=1e-5)


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
    assert all(map(equal, *runs))


@each_call
def test_threads_do_not_change_the_result_beyond_rounding(name: str) -> None:
    # Each row, bag or expert is one thread's: rows of a GEMM may be split otherwise, nothing else.
    call = calls(oracles.CASES["dropped"])[name]
    one = [*map(bits, tensors(call()))]
    torch.set_num_threads(2)
    torch.testing.assert_close([*map(bits, tensors(call()))], one, rtol=1e-6, atol=1e-6)


@each_arm
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "plan"])
def test_outputs_take_the_operands_dtype(name: str, dtype: torch.dtype, arm: str) -> None:
    call = calls(HARD, dtype)[name]
    with running(arm):
        floating = [t for t in tensors(call()) if t.is_floating_point()]
    wide = torch.promote_types(dtype, torch.float32) if call.op in ("overlap", "topk_route") else dtype
    assert all(t.dtype == wide for t in floating)
    assert bool(floating) == (name != "plan")


E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
CODES_AND_SCALES = {"e4m3": [E4M3, torch.float32], "e2m1": [torch.uint8, E8M0]}


@each_arm
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@each_training
def test_outputs_take_the_dtypes_of_their_specs(name: str, dtype: torch.dtype, arm: str) -> None:
    call = calls(HARD, dtype)[name]
    e4m3, e2m1 = CODES_AND_SCALES["e4m3"], CODES_AND_SCALES["e2m1"]
    want = {
        "quantize": [*e4m3, *e4m3, *e4m3],
        "quantize_fp4": e2m1,
        "permute_scaled_fp4": e2m1,
        "glu_quantize": [*e4m3, *e4m3, *e4m3],
        "glu_quantize_plain": e2m1,
        "glu_backward_quantize": [dtype, *e4m3, *e4m3, *e4m3],
        "glu_backward_quantize_codes": [dtype, *e4m3],
        "scaled_grouped_mm_quantize": [dtype, *e4m3],
        "quantize_delayed": [*e4m3, torch.float32],
        "gather_amax": [torch.float32],
    }
    told = dtype in call.args
    with running(arm):
        assert [t.dtype for t in tensors(call())] == want.get(name, [dtype] if told else e4m3)


def test_every_call_is_known() -> None:
    assert len(NAMES) == len(set(NAMES)) >= 38
    found = calls(HARD)
    # Every op has a gradient except those that say that they have none.
    without = (*TRAINING, *CONSTANT)
    assert {n for n in NAMES if not found[n].grads} == {n for n in NAMES if found[n].op in without}
