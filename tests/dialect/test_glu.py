"""`glu` and `glu_backward` in all kinds, with and without row weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from . import oracles
from .oracles import ARMS, KINDS, Tensor, check, each_arm, each_dtype, each_kind, ops, randn, running

S, I = 9, 7
each_weighting = pytest.mark.parametrize("weighted", [False, True], ids=["plain_rows", "weighted_rows"])

# Kinds with a CPU kernel of their own; without row weights it rounds twice, as PyTorch models do.
ROUNDS_TWICE = ("silu", "gelu", "gelu_tanh")


def width(kind: str) -> int:
    return I if kind.startswith("plain") else 2 * I


def inputs(kind: str, dtype: torch.dtype, weighted: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """da, h with values on both sides of every kink but none near one, w."""
    h = randn(S, width(kind), dtype=torch.float64, seed=seed) * 2
    for kink in (0.0, 1.25, -1.25):
        h = torch.where((h - kink).abs() < 0.02, kink + 0.05, h)
    h = h.to(dtype)
    w = randn(S, dtype=dtype, seed=seed + 1) if weighted else None
    return randn(S, I, dtype=dtype, seed=seed + 2), h, w


@each_arm
@each_weighting
@each_dtype
@each_kind
def test_forward(kind: str, dtype: torch.dtype, weighted: bool, arm: str) -> None:
    _, h, w = inputs(kind, dtype, weighted)
    with running(arm):
        got = ops.glu(h, w, kind)
    want = oracles.glu(h, w, kind)
    assert got.dtype == dtype
    # Where what dispatch picks rounds to 16 bits between activation and product.
    twice = arm == "dispatch" and kind in ROUNDS_TWICE and not weighted and dtype != torch.float32
    roundings = 2.2 if twice else 4 if dtype == torch.float32 else 1.1
    check(got, want, roundings=roundings, scale=want.abs(), slack=oracles.glu_slack(h, w, kind))


def oracle_backward(da: Tensor, h: Tensor, w: Tensor | None, kind: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dh by central differences, dw and its scale by definition."""
    d, x = da.double(), h.double()
    weights = None if w is None else w.double()
    dh = oracles.central(lambda t: oracles.glu(t, weights, kind), x, d)
    if w is None:
        return dh, None, None
    terms = d * oracles.glu(x, None, kind)
    return dh, terms.sum(1), terms.abs().sum(1)


@each_arm
@each_weighting
@each_dtype
@each_kind
def test_backward(kind: str, dtype: torch.dtype, weighted: bool, arm: str) -> None:
    da, h, w = inputs(kind, dtype, weighted)
    with running(arm):
        dh, dw = ops.glu_backward(da, h, w, kind)
    want, want_dw, magnitude = oracle_backward(da, h, w, kind)
    assert dh.dtype == dtype
    # One rounding (16-bit operands are widened), 1e-7 for the differences, a few roundings in fp32 arithmetic.
    exact = 16 * torch.finfo(torch.float32).eps + 1e-7
    check(dh, want, roundings=1.1 + 2 * exact / torch.finfo(dtype).eps, scale=want.abs() + 0.25)
    if want_dw is None or magnitude is None:
        assert dw.shape == (0,)
    else:
        assert dw.dtype == dtype
        check(dw, want_dw, roundings=1.1 + 2 * I * exact / torch.finfo(dtype).eps, scale=magnitude + 0.25)


@each_arm
@each_kind
def test_weights_in_another_dtype(kind: str, arm: str) -> None:
    for dtype, w_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16,) * 2):
        da, h, _ = inputs(kind, dtype, False)
        w = randn(S, dtype=w_dtype)
        with running(arm):
            a = ops.glu(h, w, kind)
            dh, dw = ops.glu_backward(da, h, w, kind)
        want = oracles.glu(h, w, kind)
        want_dh, want_dw, magnitude = oracle_backward(da, h, w, kind)
        assert (a.dtype, dh.dtype, dw.dtype) == (dtype, dtype, w_dtype)
        assert want_dw is not None
        slack = oracles.glu_slack(h, w, kind)
        check(a, want, roundings=4 if dtype == torch.float32 else 1.1, scale=want.abs(), slack=slack)
        check(dh, want_dh, roundings=4 if dtype == torch.float32 else 1.1, scale=want_dh.abs(), slack=1e-5)
        # Not rounded to the rows' 16 bits when the weights are fp32.
        slack = (oracles.glu_slack(h, None, kind) * da.double().abs()).sum(1)
        check(dw, want_dw, roundings=2 * I if w_dtype == torch.float32 else 1.1, scale=magnitude, slack=slack)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(0, 9),
    columns=st.integers(0, 20),
    weighted=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_shape(kind: str, rows: int, columns: int, weighted: bool, seed: int) -> None:
    h = randn(rows, columns * (1 if kind.startswith("plain") else 2), seed=seed)
    w, da = randn(rows, seed=seed + 1) if weighted else None, randn(rows, columns, seed=seed + 2)
    want = oracles.glu(h, w, kind)
    grads = []
    for arm in ARMS:
        with running(arm):
            check(ops.glu(h, w, kind), want, roundings=4, scale=want.abs(), slack=oracles.glu_slack(h, w, kind))
            grads.append(ops.glu_backward(da, h, w, kind))
    for got, reference in zip(*grads, strict=True):
        torch.testing.assert_close(got, reference, rtol=2e-5, atol=2e-5)


@each_weighting
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_blocks_of_rows_join_without_a_seam(
    dtype: torch.dtype, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moefx.kernels import glu as kernel

    for kind in ("silu", "gelu", "gelu_tanh"):
        da, h, w = inputs(kind, dtype, weighted)
        whole = ops.glu(h, w, kind), *ops.glu_backward(da, h, w, kind)
        monkeypatch.setattr(kernel, "_BLOCK", 2 * I)  # two rows a block, and one row left over
        assert kernel._rows_per_block(da) == 2
        blocked = ops.glu(h, w, kind), *ops.glu_backward(da, h, w, kind)
        monkeypatch.undo()
        # Not bitwise: where a block ends decides which elements a vector instruction takes.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(blocked, whole, rtol=4 * eps, atol=4 * eps)


@each_arm
@each_kind
def test_any_strides(kind: str, arm: str) -> None:
    da, h, w = inputs(kind, torch.float32, True)
    assert w is not None
    with running(arm):
        want = ops.glu(h, w, kind), *ops.glu_backward(da, h, w, kind)
        for name, v in oracles.layouts(h).items():
            got = ops.glu(v, w, kind), *ops.glu_backward(da, v, w, kind)
            assert all(t.is_contiguous() for t in got), name
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        for v in (*oracles.layouts(w).values(), w[:1].expand(S)):
            same = w.clone() if torch.equal(v, w) else v.clone()
            got = ops.glu(h, v, kind), *ops.glu_backward(da, h, v, kind)
            reference = ops.glu(h, same, kind), *ops.glu_backward(da, h, same, kind)
            torch.testing.assert_close(got, reference, rtol=1e-6, atol=1e-6)
        for v in (*oracles.layouts(da).values(), da[:1, :1].expand(S, I)):
            got = ops.glu_backward(v, h, w, kind)
            torch.testing.assert_close(got, ops.glu_backward(v.clone(), h, w, kind), rtol=1e-6, atol=1e-6)


@each_arm
@each_kind
def test_one_column_may_lie_by_columns(kind: str, arm: str) -> None:
    da, h, w = (t if t is None or t.dim() == 1 else t[:, : t.shape[1] // I] for t in inputs(kind, torch.float32, True))
    assert da.shape == (S, 1)
    with running(arm):
        want = ops.glu(h, w, kind), *ops.glu_backward(da, h, w, kind)
        by_columns = h.t().contiguous().t()
        torch.testing.assert_close((ops.glu(by_columns, w, kind), *ops.glu_backward(da, by_columns, w, kind)), want)


@each_arm
@each_kind
@each_weighting
def test_activation_again_with_its_gradients(kind: str, weighted: bool, arm: str) -> None:
    da, h, w = inputs(kind, torch.bfloat16, weighted)
    with running(arm):
        *gradients, again = ops.glu_backward_again(da, h, w, kind)
        want = *ops.glu_backward(da, h, w, kind), ops.glu(h, w, kind)
    for got, one in zip((*gradients, again), want, strict=True):
        assert got.dtype == one.dtype
        assert torch.equal(got, one)


@each_arm
@each_kind
def test_leading_axes(kind: str, arm: str) -> None:
    da, h, _ = inputs(kind, torch.float32, False)
    with running(arm):
        got, (dh, _) = (
            ops.glu(h.view(3, 3, -1), None, kind),
            ops.glu_backward(da.view(3, 3, -1), h.view(3, 3, -1), None, kind),
        )
        torch.testing.assert_close(got.view(S, -1), ops.glu(h, None, kind), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(dh.view(S, -1), ops.glu_backward(da, h, None, kind)[0], rtol=1e-6, atol=1e-6)


@each_arm
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamp(7,1.702)"])
def test_large_arguments_saturate(kind: str, arm: str) -> None:
    gate = torch.tensor([[-1e4, -50.0, 50.0, 1e4]])
    h = torch.cat([gate, torch.ones_like(gate)], 1)
    with running(arm):
        a, (dh, _) = ops.glu(h, None, kind), ops.glu_backward(torch.ones(1, 4), h, None, kind)
    assert torch.equal(a[0, :2].abs() < 1e-12, torch.tensor([True, True]))
    assert (dh[0, :2].abs() < 1e-12).all()
    limit = {
        "relu2": gate[0, 2:] ** 2,
        "clamp(7,1.702)": torch.full((2,), 2 * 7 / (1 + 2.718281828459045 ** (-7 * 1.702))),
    }
    torch.testing.assert_close(a[0, 2:], limit.get(kind, gate[0, 2:]))


@pytest.mark.parametrize(
    ("h", "w", "complaint"),
    [
        (torch.zeros(3, 5), None, "gate and up columns"),
        (torch.zeros(3, 4), torch.zeros(4), "w is \\(4,\\)"),
        (torch.zeros(3, 4), torch.zeros(3, 1), "w is \\(3, 1\\)"),
        (torch.zeros(3, 2, 4), torch.zeros(3), "row weights need"),
    ],
)
def test_operands_that_do_not_fit_are_named(h: Tensor, w: Tensor | None, complaint: str) -> None:
    with pytest.raises(RuntimeError, match=complaint):
        ops.glu(h, w, "silu")
    for op in (ops.glu_backward, ops.glu_backward_again):
        with pytest.raises(RuntimeError, match=complaint):
            op(torch.zeros(3, 2), h, w, "silu")
