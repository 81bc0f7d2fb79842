"""Every kernel against the reference of its op on the same device, on memory that held NaN, run twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moefx.kernels import registry

from .cases import EXACT, OPERANDS, ROUTINGS, cases

Tensor = torch.Tensor


def flat(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def wide(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Floating-point operands in float64, where the reference takes it: an oracle that does not share fp32's errors."""
    return tuple(
        a.double() if isinstance(a, Tensor) and a.dtype in (torch.bfloat16, torch.float32) else a for a in args
    )


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("op", sorted(OPERANDS))
def test_kernel_against_reference(op: str, kind: str) -> None:
    run = getattr(torch.ops.moefx, op)
    for name, operands in cases(op, kind):
        args = operands()
        assert registry.choose(op, *args).name in ("triton", "torch_grouped"), f"{op} {name}: the reference would run"
        got, again = flat(run(*args)), flat(run(*args))
        with registry.preferring("reference"):
            want = flat(run(*args))
        for g, a, w in zip(got, again, want, strict=True):
            assert torch.equal(bits(g), bits(a)), f"{op} {name}: two runs differ"
            assert (g.shape, g.dtype) == (w.shape, w.dtype), f"{op} {name}"
            if op in EXACT:
                assert torch.equal(bits(g), bits(w)), f"{op} {name}: {int((bits(g) != bits(w)).sum())} differ"
            elif g.element_size() == 1:
                # A code may fall on the other side of a rounding boundary where exp differs in its last bit.
                steps = (bits(g).short() - bits(w).short()).abs()
                assert int((steps > 1).sum()) <= steps.numel() * 1e-5, f"{op} {name}"
                assert int((steps > 0).sum()) <= steps.numel() * 1e-2, f"{op} {name}"
            else:
                assert g.isfinite().all(), f"{op} {name}: an element was not written"
                error = (g.double() - w.double()).norm() / w.double().norm().clamp_min(1e-30)
                assert error < 5e-3, f"{op} {name}: {error}"


@pytest.mark.parametrize("op", ["grouped_mm", "grouped_wgrad", "glu", "unpermute"])
def test_kernel_against_float64(op: str) -> None:
    run = getattr(torch.ops.moefx, op)
    for name, operands in cases(op, "skewed"):
        args = operands()
        got = flat(run(*args))[0].double()
        with registry.preferring("reference"):
            want = flat(run(*wide(args)))[0]
        error = (got - want).norm() / want.norm()
        assert error < 4e-3, f"{op} {name}: {error}"  # one rounding to bf16 is 2^-9 at most, 1.1e-3 in the mean


@pytest.mark.parametrize("op", sorted(OPERANDS))
def test_kernel_waits_for_nothing(op: str) -> None:
    run = getattr(torch.ops.moefx, op)
    _, operands = next(iter(cases(op, "skewed")))
    args = operands()
    run(*args)  # compiled before
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_waiting_op_is_caught() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_unwritten_element_is_caught() -> None:
    out = torch.empty(1 << 18, device="cuda")
    assert not out.isfinite().all()
