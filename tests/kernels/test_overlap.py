"""The kernels of `overlap` against its reference in float64, within what fp32 sums and bf16 outputs allow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moefx.dialect  # noqa: F401  registers the providers
from moefx import compat
from moefx.dialect.overlap import _overlap, _overlap_backward
from moefx.kernels import registry
from moefx.kernels.gpu import overlap as kernels

from .interpreter import assert_same_bits

Tensor = torch.Tensor
EPS = 1e-12
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rows(
    T: int, k: int, I: int, dtype: torch.dtype = torch.bfloat16, dropped: float = 0.2, spare: int = 5
) -> tuple[Tensor, Tensor]:
    """z with rows of one token that are alike, NaN in rows of nobody, and slots of which some are dropped."""
    gen = torch.Generator().manual_seed(T + k + I)
    S = T * k + spare
    slot = torch.randperm(S, generator=gen)[: T * k].view(T, k)
    slot = torch.where(torch.rand(T, k, generator=gen) < dropped, -1, slot)
    z = torch.full((S, I), torch.nan)
    common = torch.randn(T, 1, I, generator=gen)
    z_TkI = (torch.randn(T, k, I, generator=gen) + common) * torch.exp2(2 * torch.randn(T, k, 1, generator=gen))
    held = slot.flatten() >= 0
    z[slot.flatten()[held]] = z_TkI.flatten(0, 1)[held]
    return z.to(dtype), slot


def assert_overlap(got: Tensor, z: Tensor, slot: Tensor, eps: float = EPS) -> None:
    want = _overlap(z.double(), slot, eps)
    k, I = slot.shape[1], z.shape[1]
    assert got.dtype == torch.float32
    # A cosine is wrong by at most I + 32 roundings, and there are k (k - 1) squares of cosines up to one.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2 * k * (k - 1) * (I + 32) * 2**-24)


def assert_gradient(got: Tensor, dout: Tensor, z: Tensor, slot: Tensor, eps: float = EPS) -> None:
    want = _overlap_backward(dout.double(), z.double(), slot, eps)
    assert got.dtype == z.dtype
    # Each of its k terms is at most 4 |dout| / |z_e| times a unit vector; m has 16 bits, fp32 sums as above.
    k, I = slot.shape[1], z.shape[1]
    held = slot >= 0
    length = torch.ones(z.shape[0], dtype=torch.float64)
    length[slot[held]] = z[slot[held]].double().norm(dim=-1).clamp_min(eps)
    weight = torch.zeros_like(length)
    weight[slot[held]] = dout.double().abs()[:, None].expand(slot.shape)[held]
    bound = 4 * weight / length * k * (2**-15 + (I + 32) * 2**-23)
    info = torch.finfo(z.dtype)  # below its smallest normal number, what a dtype loses does not shrink any more
    wrong = ~((got.double() - want).abs() <= bound[:, None] + info.eps * (want.abs() + info.smallest_normal))
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}, first at {wrong.nonzero()[0].tolist()}"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "k", "I"), [(9, 8, 96), (19, 6, 133), (7, 10, 40), (3, 32, 130), (33, 2, 8), (1, 1, 5)])
def test_value_and_gradient(T: int, k: int, I: int, dtype: torch.dtype) -> None:
    z, slot = rows(T, k, I, dtype)
    dout = torch.randn(T, generator=torch.Generator().manual_seed(T))
    assert_overlap(kernels.overlap(z, slot), z, slot)
    assert_gradient(kernels.overlap_backward(dout, z, slot), dout, z, slot)


@pytest.mark.usefixtures("poisoned")
def test_no_token_no_row_and_nothing_but_dropped_choices() -> None:
    z, slot = rows(4, 3, 20, dropped=1.0)
    for some_z, some_slot in ((z, slot), (z[:0], slot), (z, slot[:0])):
        T = some_slot.shape[0]
        assert_same_bits(kernels.overlap(some_z, some_slot), torch.zeros(T))
        dz = kernels.overlap_backward(torch.randn(T), some_z, some_slot)
        assert_same_bits(dz, torch.zeros(some_z.shape, dtype=z.dtype))


def test_rows_that_are_zero_short_or_alike() -> None:
    z, slot = rows(4, 4, 64, torch.float32, dropped=0.0)
    z[slot[0, 0]] = 0
    z[slot[1]] *= 1e-15  # shorter than eps: divided by eps
    z[slot[2]] = z[slot[2, 0]].clone()  # cosines of one, and no gradient
    dout = torch.ones(4)
    assert_overlap(kernels.overlap(z, slot), z, slot)
    assert_gradient(kernels.overlap_backward(dout, z, slot), dout, z, slot)
    assert kernels.overlap(z, slot)[2] == pytest.approx(12, rel=1e-5)


def test_nan_stays_in_its_token() -> None:
    z, slot = rows(6, 4, 32, dropped=0.0)
    z[slot[2, 1], 3] = torch.nan
    out, dz = kernels.overlap(z, slot), kernels.overlap_backward(torch.ones(6), z, slot)
    assert out.isnan().tolist() == [False, False, True, False, False, False]
    # Rows of other tokens share a product with the NaN; only those of its own token may show it.
    others = torch.cat([slot[:2].flatten(), slot[3:].flatten()])
    assert out[[0, 1, 3, 4, 5]].isfinite().all()
    assert dz[slot[2]].isnan().all()
    assert dz[others].isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_is_no_pair_with_itself_whatever_it_holds(bad: float) -> None:
    z, slot = torch.ones(4, 8), torch.tensor([[0], [1]])
    z[1, 3] = bad
    for find in (kernels.overlap, _overlap):
        assert_same_bits(find(z, slot), torch.zeros(2))


def test_strides_and_an_expanded_gradient() -> None:
    z, slot = rows(5, 4, 48)
    strided, by_column = z.repeat_interleave(2, 1)[:, ::2], slot.t().contiguous().t()
    one = torch.tensor(0.25).expand(5)
    assert_same_bits(kernels.overlap(strided, by_column), kernels.overlap(z, slot))
    want = kernels.overlap_backward(torch.full((5,), 0.25), z, slot)
    assert_same_bits(kernels.overlap_backward(one, strided, by_column), want)


@pytest.mark.usefixtures("poisoned")
def test_the_comparison_sees_dropped_choices_and_rows_left_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    z, slot = rows(9, 4, 64)
    held = slot.clamp_min(int(slot.max()))
    with pytest.raises(AssertionError):
        assert_overlap(kernels.overlap(z, held), z, slot)
    real = kernels.launch

    def launch(kernel: Any, *args: Any, **kw: Any) -> None:
        if kernel is not kernels._zero_unheld:
            real(kernel, *args, **kw)

    monkeypatch.setattr(kernels, "launch", launch)
    with pytest.raises(AssertionError):
        assert_gradient(kernels.overlap_backward(torch.ones(9), z, slot), torch.ones(9), z, slot)


def test_chosen_on_cuda() -> None:
    with compat.FakeTensorMode():
        z, slot = torch.empty(64, 32, dtype=torch.bfloat16, device="cuda"), torch.empty(8, 8, dtype=torch.int64)
        assert registry.choose("overlap", z, slot, EPS).name == "triton"
        dout = torch.empty(8, device="cuda")
        assert registry.choose("overlap_backward", dout, z, slot, EPS).name == "triton"
        wide, many = torch.empty(64, 32, dtype=torch.float64, device="cuda"), torch.empty(8, 33, dtype=torch.int64)
        assert registry.choose("overlap", wide, slot, EPS).name == "reference"
        assert registry.choose("overlap", z, many, EPS).name == "reference"
        assert registry.choose("overlap", torch.empty(64, 32), slot, EPS).name == "reference"
