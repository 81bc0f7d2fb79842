"""What `interpreter.repaired` replaces exists, is wrong without it and right with it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

from .interpreter import assert_same_bits, repaired

TORCH = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@triton.jit
def _convert(x, y, n, N: tl.constexpr, TO: tl.constexpr):
    at = tl.arange(0, N)
    v = tl.load(x + at, mask=at < n, other=0.0)
    if TO == "bf16":
        tl.store(y + at, v.to(tl.bfloat16), mask=at < n)
    elif TO == "e4m3":
        tl.store(y + at, v.to(tl.float8e4nv), mask=at < n)
    else:
        tl.store(y + at, v.to(tl.float8e5), mask=at < n)


@triton.jit
def _square(x, y, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    v = tl.load(x + at)
    tl.store(y + at, tl.dot(v, tl.trans(v)))


def _numbers() -> torch.Tensor:
    gen = torch.Generator().manual_seed(0)
    wide = torch.randn(1 << 14, generator=gen) * torch.exp2(torch.randint(-20, 12, (1 << 14,), generator=gen).float())
    ties = torch.arange(-2048, 2048) / 16.0
    return torch.cat(
        [wide, ties, torch.tensor([0.0, -0.0, 7.98, 0.124, 448.0, 500.0, torch.inf, -torch.inf, torch.nan])]
    )


def _converted(x: torch.Tensor, to: str) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=TORCH[to])
    _convert[(1,)](x, y, x.numel(), N=triton.next_power_of_2(x.numel()), TO=to)
    return y


def _expected(x: torch.Tensor, to: str) -> torch.Tensor:
    limit = {"e4m3": 448.0, "e5m2": 57344.0}.get(to)
    return (x if limit is None else x.clamp(-limit, limit)).to(TORCH[to])


@pytest.mark.parametrize("to", sorted(TORCH))
def test_repaired_conversions_round_to_nearest_even(to: str) -> None:
    x = _numbers()
    assert_same_bits(_converted(x, to), _expected(x, to))


def test_repaired_dots_multiply_bf16() -> None:
    x, y = torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    _square[(1,)](x, y, N=16)
    torch.testing.assert_close(y, x.float() @ x.float().t())


# Were this to fail, the interpreter has been mended (or renamed its parts), and `repaired` can go (or must follow).
@pytest.mark.parametrize("to", sorted(TORCH))
def test_the_interpreter_alone_is_wrong(to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = triton_interpreter.InterpreterBuilder
    for name in ("create_fp_to_fp", "create_dot", "cast_impl"):
        assert hasattr(builder, name), f"InterpreterBuilder.{name} is gone"
    x = _numbers()
    right = _converted(x, to)
    monkeypatch.setattr(builder, "create_fp_to_fp", ORIGINAL["create_fp_to_fp"])
    monkeypatch.setattr(builder, "cast_impl", ORIGINAL["cast_impl"])
    wrong = _converted(x, to)
    assert (wrong.view(torch.uint8) != right.view(torch.uint8)).any()


ORIGINAL = {name: getattr(triton_interpreter.InterpreterBuilder, name) for name in ("create_fp_to_fp", "cast_impl")}


def test_repairs_end() -> None:
    with repaired():
        pass
    assert triton_interpreter.InterpreterBuilder.cast_impl is not ORIGINAL["cast_impl"]  # the fixture's still hold
