"""Rows summed into tokens on a device, and the gradients of the sum, against the references and float64."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from moefx.dialect import routing
from moefx.kernels import registry
from moefx.kernels.gpu import unpermute as kernels

from .interpreter import assert_same_bits
from .test_plan import indices

Tensor = torch.Tensor
WIDE = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(0, 2, 16), (1, 1, 8), (19, 3, 40), (7, 2, 1300), (5, 0, 16), (11, 11, 33)]


def operands(T: int, k: int, H: int, dtype: torch.dtype, w_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """dout, y, token, order, slot, w; NaN in all that no token holds."""
    token, order, slot, _ = routing._plan(indices(T, k, 5), 5, 4)
    gen = torch.Generator().manual_seed(1)
    dout, y, w = (torch.randn(*shape, generator=gen) for shape in ((T, H), (len(token), H), (T, k)))
    y[token < 0], w[slot < 0] = torch.nan, torch.nan
    return dout.to(dtype), y.to(dtype), token, order, slot, w.to(w_dtype)


def summed(y: Tensor, slot: Tensor, w: Tensor | None) -> Tensor:
    """The sum over k in fp32, choice after choice. The reference leaves its order to torch, where columns differ."""
    total = torch.zeros(slot.shape[0], y.shape[1])
    for j in range(slot.shape[1] if len(y) else 0):
        row = y[slot[:, j].clamp_min(0)].float()
        total += torch.where(slot[:, j, None] < 0, 0, row if w is None else row * w[:, j, None].float())
    return total.to(y.dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(("T", "k", "H"), SIZES)
@pytest.mark.parametrize("w_dtype", [None, torch.float32, torch.bfloat16])
def test_unpermute(T: int, k: int, H: int, dtype: torch.dtype, w_dtype: torch.dtype | None) -> None:
    _, *args, w = operands(T, k, H, dtype, w_dtype or torch.float32)
    weights = None if w_dtype is None else w
    got = kernels.unpermute(*args, weights)
    assert_same_bits(got, summed(args[0], args[3], weights))
    torch.testing.assert_close(got, routing._unpermute(*args, weights))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dtype", "w_dtype"), [(d, torch.float32) for d in WIDE] + [(torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize(("T", "k", "H"), SIZES)
def test_unpermute_backward(T: int, k: int, H: int, dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    dout, y, token, order, slot, w = args = operands(T, k, H, dtype, w_dtype)
    dy, dw = kernels.unpermute_backward(*args)
    assert_same_bits(dy, routing._unpermute_bwd(*args)[0])
    # A sum of H products in fp32, in whatever order, is off by less than H rounding errors of its terms' magnitudes.
    kept = slot >= 0
    terms = dout.double()[:, None].expand(T, k, H)[kept] * y.double()[slot[kept]]
    bound = (H + 1) * 2.0**-24 * terms.abs().sum(-1) + torch.finfo(w_dtype).eps * terms.sum(-1).abs()
    assert ((dw[kept].double() - terms.sum(-1)).abs() <= bound).all()
    assert (dw[~kept] == 0).all()
    assert dw.dtype == w_dtype


@pytest.mark.usefixtures("poisoned")
@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, of infinity times zero
def test_infinite_gradients_stay_with_their_rows() -> None:
    dout, *maps, w = operands(19, 3, 40, torch.float32, torch.float32)
    dout[4], dout[9] = torch.inf, torch.nan
    got, want = kernels.unpermute_backward(dout, *maps, w), routing._unpermute_bwd(dout, *maps, w)
    assert_same_bits(got[0], want[0])
    assert_same_bits(got[1].isfinite(), want[1].isfinite())


@pytest.mark.usefixtures("poisoned")
def test_strided_operands() -> None:
    args = operands(9, 2, 24, torch.float32, torch.float32)
    strided = [a.t().contiguous().t() if a.dim() == 2 else torch.stack([a, a], 1)[:, 0] for a in args]
    assert_same_bits(kernels.unpermute(*strided[1:]), kernels.unpermute(*args[1:]))
    for got, want in zip(kernels.unpermute_backward(*strided), kernels.unpermute_backward(*args), strict=True):
        assert_same_bits(got, want)


def test_another_order_of_the_sum_is_seen() -> None:
    _, y, token, order, slot, w = operands(19, 3, 40, torch.float32, torch.float32)
    with pytest.raises(AssertionError, match="differ"):
        assert_same_bits(
            kernels.unpermute(y, token, order, slot.flip(1), w.flip(1)),
            summed(y, slot, w),
        )


def test_what_is_chosen() -> None:
    with FakeTensorMode():

        def choice(op: str, y: torch.dtype, w: torch.dtype | None) -> str:
            rows, slot = (torch.empty(8, n, dtype=t, device="cuda") for n, t in ((64, y), (2, torch.int64)))
            weights = None if w is None else torch.empty(8, 2, dtype=w, device="cuda")
            values = (rows, rows) if op == "unpermute_backward" else (rows,)
            return registry.choose(op, *values, slot.view(-1), slot.view(-1), slot, weights).name

        bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
        assert choice("unpermute", bf16, None) == choice("unpermute", bf16, fp32) == "triton"
        assert choice("unpermute_backward", fp32, bf16) == "triton"
        assert choice("unpermute", fp32, fp64) == choice("unpermute", fp64, None) == "reference"
        assert choice("unpermute_backward", fp32, fp64) == choice("unpermute_backward", fp64, fp32) == "reference"
