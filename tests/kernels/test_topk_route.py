"""The router's kernels against the definition of `route` in float64, and their rule for equal experts."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from moefx import compat
from moefx.dialect.topk_route import _topk_route, _topk_route_backward
from moefx.kernels import registry
from moefx.kernels.gpu import topk_route as kernels

from .interpreter import assert_same_bits

Tensor = torch.Tensor
BF16, F32 = torch.bfloat16, torch.float32
SIZES = [(19, 128, 8), (3, 512, 10), (70, 60, 6), (5, 72, 16), (1, 8, 2), (2, 3, 3), (4, 5, 1)]
NORMS = {"none": 0.0, "sum": 1e-3, "clamp": 0.3, "softmax": 0.0}


def logits_of(T: int, E: int, dtype: torch.dtype = BF16) -> Tensor:
    """Logits without equal experts in a row, and none so near that scores in fp32 are."""
    gen = torch.Generator().manual_seed(T + E)
    steps = torch.stack([torch.randperm(E, generator=gen) for _ in range(T)]) if T else torch.empty(0, E)
    return ((steps - E // 2) / 64).to(dtype)


def close(got: Tensor, want: Tensor, what: str = "") -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=3e-6, atol=1e-7, msg=lambda m: f"{what}: {m}")


def check(x: Tensor, bias: Tensor | None, k: int, score: str, order: str, norm: str, **kw: Any) -> None:
    args = score, order, norm, NORMS[norm], 2.5
    scores, idx, w = kernels.topk_route(x, bias, k, *args, **kw)
    want = _topk_route(x.double(), bias, k, *args)
    assert (scores.dtype, idx.dtype, w.dtype) == (F32, torch.int64, kw.get("out") or F32)
    assert_same_bits(idx, want[1], "idx")
    close(scores, want[0], "scores")
    if "out" in kw:
        want = *want[:2], want[2].float().to(kw["out"])
        torch.testing.assert_close(w, want[2])
    else:
        close(w, want[2], "w")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("T", "E", "k"), SIZES)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32], ids=str)
def test_sizes(T: int, E: int, k: int, dtype: torch.dtype) -> None:
    check(logits_of(T, E, dtype), None, k, "softmax", "scores", "sum")


@pytest.mark.parametrize(
    ("score", "order"), list(product(("softmax", "sigmoid", "sqrtsoftplus", "identity"), ("scores", "logits")))
)
@pytest.mark.parametrize("norm", list(NORMS))
def test_every_form(score: str, order: str, norm: str) -> None:
    if (score, order) == ("identity", "logits"):
        order = "scores"
    x = logits_of(9, 24, F32)
    check(x, None, 4, score, order, norm)
    check(x, torch.linspace(1, -1, 24).roll(5), 4, score, order, norm)


def test_no_rows_leading_dimensions_strides_and_a_cast() -> None:
    x = logits_of(12, 40)
    check(x[:0], None, 4, "softmax", "scores", "sum")
    check(x.view(2, 3, 2, 40), None, 4, "sigmoid", "scores", "sum")
    check(x.t().contiguous().t(), None, 4, "sigmoid", "logits", "softmax", out=BF16)
    check(x.repeat_interleave(2, 1)[:, ::2], None, 4, "sigmoid", "scores", "none", out=torch.float16)


def test_the_lowest_index_of_equal_experts_comes_first() -> None:
    x = torch.zeros(4, 20)
    x[1, [3, 7, 11]] = 2.0
    x[2, 4] = -torch.inf
    x[3] = -torch.inf
    x[3, 9] = 1.0
    x[0, ::2] = -0.0
    _, idx, _ = kernels.topk_route(x, None, 5, "sigmoid", "logits")
    assert idx.tolist() == [[0, 1, 2, 3, 4], [3, 7, 11, 0, 1], [0, 1, 2, 3, 5], [9, 0, 1, 2, 3]]
    gen = torch.Generator().manual_seed(0)
    many = torch.randint(-3, 3, (64, 72), generator=gen).bfloat16()
    for order in ("scores", "logits"):
        got, want = (f(many, None, 8, "sigmoid", order)[1] for f in (kernels.topk_route, _topk_route))
        assert_same_bits(got, want)


def test_nan_is_chosen_first_and_stays_in_its_row() -> None:
    x = logits_of(3, 20, F32)
    x[1, 6] = torch.nan
    for score in ("softmax", "sigmoid", "sqrtsoftplus"):
        scores, idx, w = kernels.topk_route(x, None, 3, score, "logits", "sum")
        assert idx[1, 0] == 6
        assert w.isnan().any(1).tolist() == scores.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus", "identity"])
@pytest.mark.parametrize("norm", list(NORMS))
def test_infinite_logits_and_nan_as_the_definition_has_them(score: str, norm: str) -> None:
    inf, nan, gen = torch.inf, torch.nan, torch.Generator().manual_seed(0)
    x = torch.tensor([[1.0, 2.0, -inf, 0.5], [1, inf, 0, 0.5], [inf, inf, -inf, 1], [-inf] * 4, [1, nan, -inf, inf]])
    args = score, norm, NORMS[norm], 2.5
    for bias in (None, torch.tensor([0.5, 0, -inf, 0])):
        got, want = (f(x, bias, 2, score, "scores", *args[1:]) for f in (kernels.topk_route, _topk_route))
        assert_same_bits(got[1], want[1], "idx")
        for a, b in ((got[0], want[0]), (got[2], want[2])):
            torch.testing.assert_close(a, b, equal_nan=True)
        dw, dscores = torch.randn(5, 2, generator=gen), torch.randn(5, 4, generator=gen)
        back, right = (f(dw, dscores, x, want[1], *args) for f in (kernels.topk_route_backward, _topk_route_backward))
        torch.testing.assert_close(back, right, equal_nan=True)
        assert right[4, 1].isnan() or score == "identity"  # the gradient of a score that is NaN shows


def gradient(x: Tensor, k: int, score: str, norm: str, given: str, order: str = "scores", dtype: Any = F32) -> None:
    eps, gen = NORMS[norm], torch.Generator().manual_seed(1)
    idx = _topk_route(x, None, k, score)[1]
    dw = torch.randn(*x.shape[:-1], k, generator=gen).to(dtype) if "w" in given else None
    dscores = torch.randn(x.shape, generator=gen) if "s" in given else None
    got = kernels.topk_route_backward(dw, dscores, x, idx, score, norm, eps, 2.5)
    wide = [None if t is None else t.double() for t in (dw, dscores)]
    want = _topk_route_backward(*wide, x.double(), idx, score, norm, eps, 2.5)
    assert got.dtype == x.dtype
    eps_out = torch.finfo(x.dtype).eps if x.dtype != F32 else 0.0
    torch.testing.assert_close(got.double(), want, rtol=1e-5 + eps_out, atol=3e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus", "identity"])
@pytest.mark.parametrize("norm", list(NORMS))
def test_gradients(score: str, norm: str) -> None:
    x = logits_of(9, 24, F32).abs() if score == "identity" else logits_of(9, 24, F32)
    for given in ("w", "s", "ws", ""):
        gradient(x, 4, score, norm, given)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("T", "E", "k"), SIZES)
def test_gradients_of_sizes(T: int, E: int, k: int) -> None:
    gradient(logits_of(T, E), k, "softmax", "sum", "ws", dtype=BF16)
    gradient(logits_of(0, E), k, "softmax", "sum", "ws")


def test_clamped_sums_on_both_sides() -> None:
    x = torch.tensor([[-4.0, -5.0, -6.0], [1.0, 2.0, 0.5]])  # sums of two sigmoids below and above the bound of 0.3
    for given in ("w", "ws"):
        gradient(x, 2, "sigmoid", "clamp", given)


def test_the_comparison_sees_another_tie_and_another_norm() -> None:
    x = logits_of(9, 24, F32)
    with pytest.raises(AssertionError):
        assert_same_bits(kernels.topk_route(x.flip(-1), None, 4)[1], _topk_route(x, None, 4)[1])
    args = torch.ones(9, 4), None, x, _topk_route(x, None, 4)[1], "softmax"
    with pytest.raises(AssertionError):
        close(kernels.topk_route_backward(*args, "none"), _topk_route_backward(*args, "sum"))


def test_chosen_on_cuda() -> None:
    with compat.FakeTensorMode():

        def name(E: int, k: int, dtype: torch.dtype, bias: torch.dtype | None = None, order: str = "scores") -> str:
            x = torch.empty(4, E, dtype=dtype, device="cuda")
            shift = None if bias is None else torch.empty(E, dtype=bias, device="cuda")
            return registry.choose("topk_route", x, shift, k, "sigmoid", order).name

        assert name(128, 8, BF16) == name(512, 16, F32, F32) == name(60, 6, BF16, BF16) == "triton"
        assert name(60, 6, BF16, BF16, "logits") == name(513, 8, BF16) == name(128, 17, BF16) == "reference"
        assert name(128, 8, torch.float64) == "reference"
        x, dw = torch.empty(4, 8, device="cuda"), torch.empty(4, 2, device="cuda")
        idx = torch.empty(4, 2, dtype=torch.int64, device="cuda")
        assert registry.choose("topk_route_backward", dw, None, x, idx).name == "triton"
        assert registry.choose("topk_route", torch.empty(4, 8), None, 2).name == "reference"
