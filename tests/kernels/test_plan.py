"""The plan on a device, and the weights that move along it, against their references bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses import FakeTensorMode

from moefx.dialect import routing
from moefx.kernels import registry
from moefx.kernels.gpu import plan as kernels

from .interpreter import assert_same_bits

Tensor = torch.Tensor


def indices(T: int, k: int, E: int, seed: int = 0) -> Tensor:
    """Indices as a router that prefers low experts would give them, some out of range on either side."""
    gen = torch.Generator().manual_seed(seed)
    skewed = torch.rand(T, k, generator=gen).square() * (E + 2)
    return skewed.long() - 1


def check(idx: Tensor, E: int, align: int) -> None:
    got, want = kernels.plan(idx, E, align), routing._plan(idx, E, align)
    for name, a, b in zip(("token", "order", "slot", "offsets"), got, want, strict=True):
        assert_same_bits(a, b, name)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 pairs and four programs: sorting is slow in the interpreter."""
    monkeypatch.setattr(kernels, "CHUNK", 64)
    monkeypatch.setattr(kernels, "TABLE", 128)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("T", "k", "E", "align"),
    [
        (0, 2, 4, 4),  # no tokens: all rows are padding
        (5, 0, 4, 1),  # no choices
        (1, 1, 1, 1),
        (1, 8, 128, 16),
        (90, 6, 37, 1),  # several chunks for each program, and a tail after dropped pairs
        (64, 4, 8, 128),
        (43, 3, 200, 3),  # most experts are empty
    ],
)
def test_plan(T: int, k: int, E: int, align: int) -> None:
    check(indices(T, k, E), E, align)


@pytest.mark.usefixtures("poisoned")
def test_plan_of_int32_strided_and_extreme_indices() -> None:
    check(indices(40, 3, 9).int(), 9, 4)
    check(indices(3, 40, 9).t(), 9, 4)
    far = indices(40, 3, 9)
    far[3], far[7, 1], far[9] = 1 << 32, -(1 << 40), 8 + (1 << 32)  # narrowed to 32 bits, these were experts
    check(far, 9, 1)


@pytest.mark.usefixtures("poisoned")
def test_plan_of_one_expert_and_of_none() -> None:
    check(torch.full((50, 2), 3), 5, 8)
    check(torch.full((50, 2), 5), 5, 8)


@pytest.mark.usefixtures("poisoned")
def test_plan_at_full_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK", 512)
    check(indices(60, 4, 300), 300, 2)


@triton.jit
def _unchecked(idx, at, pairs, E):
    value = tl.load(idx + at, mask=at < pairs, other=-1)
    return tl.where(value >= 0, value, 0).to(tl.int32), value >= 0


def test_experts_of_other_ranks_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_buckets", _unchecked)
    with pytest.raises(AssertionError, match="differ"):
        check(indices(20, 4, 9), 9, 1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_move_along_a_plan(dtype: torch.dtype) -> None:
    idx = indices(700, 3, 9)
    _, order, slot, _ = routing._plan(idx, 9, 4)
    w = torch.randn(700, 3).to(dtype)
    w[slot < 0] = torch.nan
    w_S = kernels.gather_weights(w, order)
    assert_same_bits(w_S, routing._gather_weights(w, order))
    w_S[order < 0] = torch.nan
    assert_same_bits(kernels.scatter_weights(w_S, order, 700, 3), routing._scatter_weights(w_S, order, 700, 3))
    none = order[:0]
    assert kernels.gather_weights(w, none).shape == (0,)
    assert_same_bits(kernels.scatter_weights(w_S[:0], none, 0, 3), w[:0])


def test_what_is_chosen() -> None:
    with FakeTensorMode():
        idx = torch.empty(8, 2, dtype=torch.int64, device="cuda")
        w, order = torch.empty(8, 2, device="cuda"), idx.view(-1)
        assert registry.choose("plan", idx, 2048, 128).name == "triton"
        assert registry.choose("plan", idx, 2049, 1).name == "reference"
        assert registry.choose("plan", idx.short(), 8, 1).name == "reference"
        assert registry.choose("gather_weights", w, order).name == "triton"
        assert registry.choose("scatter_weights", w.view(-1), order, 8, 2).name == "triton"
