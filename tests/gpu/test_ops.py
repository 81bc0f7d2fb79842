"""Every kernel on memory that held NaN: against the reference of its op on the same device, run twice, and float64.

Each provider that a GPU has for an op is called by name: torch's grouped products come before Triton's kernels, which
would otherwise never run.
"""

from __future__ import annotations

import pytest
import torch

from .cases import OPERANDS, ROUTINGS, cases, op_of
from .checks import EXPECTED, compare, compare_float64, providers, run

CALLS = [(name, provider) for name in sorted(OPERANDS) for provider in providers(name)]


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize(("name", "provider"), CALLS)
def test_kernel_against_reference(name: str, provider: str, kind: str) -> None:
    for size, operands in cases(name, kind):
        compare(name, operands(), provider, size)


@pytest.mark.parametrize(("name", "provider"), [(n, p) for n, p in CALLS if op_of(n) in EXPECTED])
def test_kernel_against_float64(name: str, provider: str) -> None:
    for size, operands in cases(name, "skewed"):
        args = operands()
        compare_float64(name, args, run(name, args, provider), f"{size} by {provider}")


@pytest.mark.parametrize(("name", "provider"), CALLS)
def test_kernel_waits_for_nothing(name: str, provider: str) -> None:
    _, operands = next(iter(cases(name, "skewed")))
    args = operands()
    run(name, args, provider)  # compiled before
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(name, args, provider)
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
