"""The router's kernels against the definition of `route` in float64, and their rule for equal experts."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    for which in ("w", "s", "ws", ""):
        gradient(x, 4, score, norm, which)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("T", "E", "k"), SIZES)
def test_gradients_of_sizes(T: int, E: int, k: int) -> None:
    gradient(logits_of(T, E), k, "softmax", "sum", "ws", dtype=BF16)
    gradient(logits_of(0, E), k, "softmax", "sum", "ws")


def test_clamped_sums_on_both_sides() -> None:
    x = torch.tensor([[-4.0, -5.0, -6.0], [1.0, 2.0, 0.5]])  # sums of two sigmoids below and above the bound of 0.3
    for which in ("w", "ws"):
        gradient(x, 2, "sigmoid", "clamp", which)


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


# -- groups of experts -----------------------------------------------------------------------------------------------

V3, V2 = (8, 4, "top2sum", -torch.inf, False), (8, 3, "max", 0.0, True)
# T, E, k, groups, kept: DeepSeek-V3 and -V2, sizes of groups that are no powers of two, groups of one expert, k beyond
# the experts of those kept.
GROUPED = [
    (5, 256, 8, 8, 4), (9, 160, 6, 8, 3), (7, 72, 6, 4, 2), (5, 20, 5, 10, 1), (3, 12, 4, 12, 5), (4, 8, 6, 4, 2),
    (3, 60, 16, 12, 2), (2, 510, 8, 3, 1), (1, 512, 10, 32, 16), (1, 4, 2, 2, 1),
]  # fmt: skip


def check_groups(x: Tensor, bias: Tensor | None, k: int, score: str, norm: str, *groups: Any) -> Tensor:
    """Against the reference on the kernel's own scores, whose choice has the same numbers to compare. Returns idx."""
    args = norm, NORMS[norm], 2.5, None, *groups
    scores, idx, w = kernels.topk_route(x, bias, k, score, "scores", *args)
    torch.testing.assert_close(scores, _topk_route(x, None, 1, score)[0], rtol=3e-6, atol=1e-7, equal_nan=True)
    want = _topk_route(scores, bias, k, "identity", "scores", *args)
    assert_same_bits(idx, want[1], f"idx {groups}")
    torch.testing.assert_close(w, want[2], rtol=3e-6, atol=1e-7, equal_nan=True, msg=lambda m: f"w {groups}: {m}")
    return idx


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("T", "E", "k", "count", "kept"), GROUPED)
def test_groups(T: int, E: int, k: int, count: int, kept: int) -> None:
    x, bias = logits_of(T, E, F32), torch.linspace(1, -1, E).roll(E // 3)
    for reducer, fill in product(("max", "top2sum") if E // count > 1 else ("max",), (0.0, -torch.inf)):
        groups = count, kept, reducer, fill
        check_groups(x, bias, k, "sigmoid", "sum", *groups, False)
        if (reducer == "max") == (fill == 0):  # the interpreter takes seconds for a sum of two
            check_groups(x, None, k, "identity" if fill else "softmax", "none", *groups, True)
            given = x.to(BF16 if reducer == "max" else F32), None, k, "sqrtsoftplus", "logits", "clamp", 0.3, 1.5, None
            got, want = kernels.topk_route(*given, *groups, False), _topk_route(*given, *groups, False)
            assert_same_bits(got[1], want[1], f"idx of logits {groups}")
            close(got[2], want[2])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_groups_of_few_values(data: st.DataObject) -> None:
    """Logits of which most are equal, with NaN and infinities among them, in any number of groups."""
    count, size = data.draw(st.integers(2, 7)), data.draw(st.integers(1, 6))
    E, k = count * size, data.draw(st.integers(1, min(count * size, 16)))
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    values = torch.tensor([-2.0, -1.0, -0.0, 0.0, 1.0, 1.0, 2.0, torch.inf, -torch.inf, torch.nan])
    score, finite = (
        data.draw(st.sampled_from(("softmax", "sigmoid", "sqrtsoftplus", "identity"))),
        data.draw(st.booleans()),
    )
    x = values[torch.randint(0, 7 if finite else 10, (5, E), generator=gen)]
    bias = torch.randint(-1, 2, (E,), generator=gen) / 2 if data.draw(st.booleans()) else None
    reducer = data.draw(st.sampled_from(("max", "top2sum") if size > 1 else ("max",)))
    fill, masked = data.draw(st.sampled_from((0.0, -torch.inf))), bias is None and data.draw(st.booleans())
    limit = count, data.draw(st.integers(1, count - 1)), reducer, fill
    norm = data.draw(st.sampled_from(list(NORMS)))
    idx = check_groups(x, bias, k, score, norm, *limit, masked)
    if masked and finite and (score != "identity" or fill):
        # The backward kernel finds the kept groups without choosing them again.
        given = (
            torch.randint(-4, 5, idx.shape, generator=gen).float(),
            None,
            x,
            idx,
            score,
            norm,
            NORMS[norm],
            2.5,
            *limit,
        )
        args = kernels.topk_route_backward(*given), _topk_route_backward(*given)
        torch.testing.assert_close(*args, rtol=1e-5, atol=3e-6, equal_nan=True)


def chosen(rows: list[list[float]], k: int, *groups: Any, bias: Tensor | None = None) -> list[list[int]]:
    x = torch.tensor(rows)
    args = x, bias, k, "identity", "scores", "none", 0.0, 1.0, None, *groups
    assert_same_bits(kernels.topk_route(*args)[1], _topk_route(*args)[1])
    got: list[list[int]] = kernels.topk_route(*args)[1].tolist()
    return got


def test_the_first_of_equal_groups_and_its_lowest_index_come_first() -> None:
    inf, nan = torch.inf, torch.nan
    rows = [[0.0] * 8, [1, 0, 2, 2, 2, 0, 2, 2], [0, 0, 0, 1, 1, 0, 1, 1], [-inf] * 8, [-0.0, 0, 0, 0, -0.0, 0, 0, 0]]
    by_max = [[0, 1, 2, 3], [2, 3, 4, 5], [3, 4, 2, 5], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert chosen(rows, 4, 4, 2, "max", -inf, False) == by_max
    # Two equal experts count twice: 2 + 2 is more than 2 + 0.
    by_two = [[0, 1, 2, 3], [2, 3, 6, 7], [3, 6, 7, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert chosen(rows, 4, 4, 2, "top2sum", -inf, False) == by_two
    assert chosen([[5, 0, 3, 3], [3, 3, 5, 0]], 2, 2, 1, "top2sum", -inf, False) == [[2, 3], [0, 1]]
    assert chosen([[1, 2, 0, nan, 9, 9]], 2, 3, 1, "top2sum", -inf, False) == [[3, 2]]
    assert chosen([[1, 2, inf, -inf, 9, 9]], 2, 3, 1, "top2sum", -inf, False) == [[2, 0]]  # NaN


def test_fills_are_chosen_like_other_values() -> None:
    inf, x = torch.inf, [[-1.0, -2.0, 3.0, 1.0, -3.0, -4.0]]
    assert chosen(x, 5, 3, 1, "max", 0.0, False) == [[2, 3, 0, 1, 4]]
    assert chosen(x, 5, 3, 1, "max", -inf, False) == [[2, 3, 0, 1, 4]]
    below = [[-1.0, -2.0, -3.0, -4.0]]  # 0 is above all that take part
    assert chosen(below, 3, 2, 1, "max", 0.0, False) == [[2, 3, 0]]
    assert chosen(below, 3, 2, 1, "max", -inf, False) == [[0, 1, 2]]
    for fill, masked, want in ((0.0, True, [-1, -2, 0]), (-inf, True, [-1, -2, -inf]), (-inf, False, [-1, -2, -3])):
        given = torch.tensor(below), None, 3, "identity", "scores", "none", 0.0, 1.0, None, 2, 1, "max", fill, masked
        if fill:
            assert kernels.topk_route(*given)[2].tolist() == [want]
        else:
            assert kernels.topk_route(*given)[2].tolist() == [[0, 0, -1]]


def test_a_filled_choice_has_a_constant_weight() -> None:
    x, gen = logits_of(9, 24, F32), torch.Generator().manual_seed(2)
    args = "softmax", "sum", 1e-3, 2.5
    limit = 8, 2, "max", 0.0
    idx = _topk_route(x, None, 8, "softmax", "scores", *args[1:], None, *limit, True)[1]  # 6 take part
    dw, dscores = torch.randn(9, 8, generator=gen), torch.randn(9, 24, generator=gen)
    for seen in (None, dscores):
        got, want = (f(dw, seen, x, idx, *args, *limit) for f in (kernels.topk_route_backward, _topk_route_backward))
        close(got, want, "masked")
        with pytest.raises(AssertionError):
            close(kernels.topk_route_backward(dw, seen, x, idx, *args), want)
        with pytest.raises(AssertionError):  # one group more
            close(kernels.topk_route_backward(dw, seen, x, idx, *args, 8, 3, "max", 0.0), want)


def test_groups_chosen_on_cuda() -> None:
    with compat.FakeTensorMode():

        def name(dtype: torch.dtype, score: str, order: str, *groups: Any, bias: torch.dtype | None = None) -> str:
            x = torch.empty(4, 256, dtype=dtype, device="cuda")
            shift = None if bias is None else torch.empty(256, dtype=bias, device="cuda")
            return registry.choose(
                "topk_route", x, shift, 8, score, order, "none", 0.0, 1.0, None, *groups
            ).name  # fmt: skip

        assert name(BF16, "sigmoid", "scores", *V3, bias=F32) == name(BF16, "softmax", "scores", *V2) == "triton"
        by_max, by_two = (8, 4, "max", 0.0, False), (8, 4, "top2sum", 0.0, False)
        assert name(BF16, "softmax", "logits", *by_max) == name(F32, "softmax", "logits", *by_two) == "triton"
        assert name(BF16, "softmax", "logits", *by_two) == "reference"
        assert name(F32, "sigmoid", "scores", 64, 17, "max", 0.0, False) == "reference"
        assert name(F32, "identity", "scores", *V2) == "reference"
        assert name(F32, "identity", "scores", 8, 3, "max", -torch.inf, True) == "triton"
        x, dw = torch.empty(4, 8, device="cuda"), torch.empty(4, 2, device="cuda")
        idx = torch.empty(4, 2, dtype=torch.int64, device="cuda")
        back = [
            registry.choose("topk_route_backward", dw, None, x, idx, score, "none", 0.0, 1.0, 4, 2, "max", fill).name
            for score, fill in (("softmax", 0.0), ("identity", -torch.inf), ("identity", 0.0))
        ]
        assert back == ["triton", "triton", "reference"]
