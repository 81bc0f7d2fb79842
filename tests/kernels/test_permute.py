"""Rows moved to experts on a device, against the references bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses import FakeTensorMode

from moefx.dialect import routing, scaled
from moefx.kernels import registry
from moefx.kernels.gpu import permute as kernels

from .interpreter import assert_same_bits
from .test_plan import indices

Tensor = torch.Tensor
WIDE = [torch.float32, torch.bfloat16, torch.float16]
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def maps(T: int, k: int = 3, E: int = 5, align: int = 4) -> tuple[Tensor, Tensor]:
    token, _, slot, _ = routing._plan(indices(T, k, E), E, align)
    return token, slot


def random_bytes(*shape: int) -> Tensor:
    """Rows of every bit pattern, NaN and infinity among them."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def same_bytes(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert_same_bits(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(("T", "H"), [(0, 16), (1, 64), (37, 24), (29, 7), (5, 2100)])
def test_permute(T: int, H: int, dtype: torch.dtype) -> None:
    x = random_bytes(T, H * dtype.itemsize).view(dtype)
    same_bytes(kernels.permute(x, *maps(T)), routing._permute(x, *maps(T)))


@pytest.mark.usefixtures("poisoned")
def test_tokens_share_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FEW", 2)
    monkeypatch.setattr(kernels, "TILE", 512)
    x = random_bytes(37, 48).view(torch.float16)
    same_bytes(kernels.permute(x, *maps(37)), routing._permute(x, *maps(37)))


@pytest.mark.usefixtures("poisoned")
def test_rows_at_any_address_and_stride() -> None:
    flat = random_bytes(2 * (1 + 20 * 32)).view(torch.bfloat16)
    odd = flat[1:].view(20, 32)  # two bytes off, which words of four bytes cannot be
    for x in (odd, odd.t().contiguous().t(), odd[:, 3:9]):
        same_bytes(kernels.permute(x, *maps(20)), routing._permute(x, *maps(20)))


@pytest.mark.usefixtures("poisoned")
def test_expert_choice_has_a_slot_for_each_expert() -> None:
    token_EC = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(e))[:5] for e in range(9)])
    token, _, slot, _ = routing._choice_plan(token_EC, 12, 4)
    x = torch.randn(12, 40)
    same_bytes(kernels.permute(x, token, slot), routing._permute(x, token, slot))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("codes", "scales", "H", "C"),
    [
        (E4M3, torch.float32, 256, 2),
        (torch.float8_e5m2, E8M0, 64, 2),
        (torch.uint8, torch.uint8, 144, 9),
        (torch.uint8, torch.float32, 33, 300),  # codes narrower than their scales, in more than one block
    ],
)
@pytest.mark.parametrize("T", [0, 1, 23])
def test_permute_scaled(T: int, codes: torch.dtype, scales: torch.dtype, H: int, C: int) -> None:
    c, s = random_bytes(T, H).view(codes), random_bytes(T, C * scales.itemsize).view(scales)
    for got, want in zip(kernels.permute_scaled(c, s, *maps(T)), scaled._permute_scaled(c, s, *maps(T)), strict=True):
        same_bytes(got, want)


@pytest.mark.usefixtures("poisoned")
def test_plan_permute() -> None:
    x, idx = torch.randn(19, 16), indices(19, 2, 5)
    rows, *plan = kernels.plan_permute(x, idx, 5, 8)
    want = routing._plan(idx, 5, 8)
    for got, w in zip((rows, *plan), (routing._permute(x, want[0], want[2]), *want), strict=True):
        assert_same_bits(got, w)


@triton.jit
def _one_word(y, row, block, value, W, BLOCK):
    tl.store(y + row * W, value)


@pytest.mark.usefixtures("poisoned")
def test_rows_left_as_they_were_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_fill", _one_word)
    x = torch.randn(9, 16)
    with pytest.raises(AssertionError, match="differ"):
        same_bytes(kernels.permute(x, *maps(9)), routing._permute(x, *maps(9)))


def test_what_is_chosen() -> None:
    with FakeTensorMode():

        def rows(H: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(8, H, dtype=dtype, device="cuda")

        slot = rows(2, torch.int64)
        plan, codes = (slot.view(-1), slot), rows(64, E4M3)
        assert registry.choose("permute", rows(64, torch.float16), *plan).name == "triton"
        assert registry.choose("permute", rows(64, torch.float64), *plan).name == "reference"
        assert registry.choose("permute_scaled", codes, rows(2, torch.float32), *plan).name == "triton"
        assert registry.choose("permute_scaled", codes, rows(2, E8M0), *plan).name == "triton"
        assert registry.choose("permute_scaled", codes, rows(2, torch.float16), *plan).name == "reference"
        assert registry.choose("plan_permute", rows(64, torch.float32), slot, 8, 16).name == "triton"
        assert registry.choose("plan_permute", rows(64, torch.float32), slot, 4096, 16).name == "reference"
