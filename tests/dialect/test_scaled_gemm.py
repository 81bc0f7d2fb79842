"""Products of quantized operands against loops over experts in float64: what is exact, how far the rest may be off."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx.errors import InputError

from .calls import COLUMN, ROW, SQUARE
from .oracles import Tensor, check, ops, randn

FP4, FP4_COLUMN = "e2m1 1x32 e8m0/rceil", "e2m1 32x1 e8m0/rceil"
SIZES = (40, 0, 129, 1, 0, 17)
SPARE = 6  # rows behind the last offset
Pair = tuple[Tensor, Tensor]


def offsets_of(sizes: tuple[int, ...] | list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)


def grouped_mm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """y [S, N] in float64: rows of expert e times w[e] [N, K] transposed; other rows zero."""
    y = torch.zeros(x.shape[0], w.shape[1], dtype=torch.float64)
    for e, (start, end) in enumerate(pairwise(offsets.tolist())):
        y[start:end] = torch.einsum("mk,nk->mn", x[start:end].double(), w[e].double())
    return y


def grouped_wgrad(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """g [E, M, N] in float64: the sum over an expert's rows of their outer products."""
    g = torch.zeros(len(offsets) - 1, a.shape[1], b.shape[1], dtype=torch.float64)
    for e, (start, end) in enumerate(pairwise(offsets.tolist())):
        g[e] = torch.einsum("sm,sn->mn", a[start:end].double(), b[start:end].double())
    return g


def difference(x: Tensor, y: Tensor) -> float:
    """DeepGEMM's measure: 1 - 2 <x, y> / (|x|^2 + |y|^2)."""
    x, y = x.double(), y.double()
    return float(1 - 2 * (x * y).sum() / (x.square().sum() + y.square().sum()))


def quantized(x: Tensor, spec: str, offsets: Tensor | None = None) -> Pair:
    codes, scales = ops.quantize(x, offsets, [spec])
    return codes, scales


def wide(pair: Pair, spec: str, offsets: Tensor | None = None) -> Tensor:
    return ops.dequantize(*pair, offsets, spec, torch.float64)


def rows(S: int, N: int, seed: int) -> Tensor:
    """Rows of different magnitudes, as the gradients of tokens are."""
    return randn(S, N, seed=seed) * torch.exp2(randn(S, 1, seed=seed + 1))


def product(usage: str, K: int, specs: tuple[str, str]) -> tuple[Tensor, Tensor, Tensor]:
    """By the op, by the loop on dequantized operands, and by the loop on operands that were never quantized."""
    offsets, N = offsets_of(SIZES), 64
    S, E, (a_spec, b_spec) = sum(SIZES) + SPARE, len(SIZES), specs
    if usage == "wgrad":
        # A block of 4-bit codes down a column has no binades to spare for rows that differ.
        a, b = (
            randn(S, n, seed=i) if spec == FP4_COLUMN else rows(S, n, i)
            for i, (n, spec) in enumerate(zip((K, N), specs, strict=True))
        )
        qa, qb = quantized(a, a_spec, offsets), quantized(b, b_spec, offsets)
        got = ops.scaled_grouped_wgrad(*qa, *qb, offsets, a_spec, b_spec, torch.float32)
        loop, wb = grouped_wgrad, wide(qb, b_spec, offsets)
    else:
        a = rows(S, K, 0)
        b = randn(E, N, K, seed=2) if usage == "fprop" else randn(E, K, N, seed=2).mT
        qa = quantized(a, a_spec, offsets)
        if usage == "dgrad" and b_spec == SQUARE:  # the same codes as forward, read the other way
            qb = tuple(t.mT for t in quantized(b.mT, b_spec))
        else:
            qb = quantized(b, b_spec)
        got = ops.scaled_grouped_mm(*qa, *qb, offsets, a_spec, b_spec, torch.float32)
        loop, wb = grouped_mm, wide(qb, b_spec)
    return got, loop(wide(qa, a_spec, offsets), wb, offsets), loop(a, b, offsets)


@pytest.mark.parametrize("K", [96, 2048])
@pytest.mark.parametrize(
    ("usage", "specs", "gate"),
    [
        ("fprop", (ROW, SQUARE), 1e-3),
        ("dgrad", (ROW, SQUARE), 1e-3),
        ("wgrad", (COLUMN, COLUMN), 1e-3),
        ("fprop", (ROW, FP4), 0.01),
        ("dgrad", (FP4, SQUARE), 0.01),
        ("wgrad", (FP4_COLUMN, COLUMN), 0.01),
        ("fprop", (FP4, FP4), 0.02),
        ("dgrad", (FP4, FP4), 0.02),
        ("wgrad", (FP4_COLUMN, FP4_COLUMN), 0.02),
    ],
)
def test_against_float64(usage: str, specs: tuple[str, str], gate: float, K: int) -> None:
    got, dequantized, unquantized = product(usage, K, specs)
    assert got.dtype == torch.float32
    assert difference(got, dequantized) < 1e-6
    assert 1e-5 < difference(got, unquantized) < gate


def test_the_gates_can_be_missed() -> None:
    # The control: scales of the next block, experts off by one row, and one spec too narrow each break their gate.
    offsets = offsets_of(SIZES)
    x, w = rows(sum(SIZES) + SPARE, 256, 0), randn(len(SIZES), 64, 256, seed=2)
    (xc, xs), (wc, ws) = quantized(x, ROW, offsets), quantized(w, SQUARE)
    late = offsets.clone()
    late[1:-1] += 1
    want = grouped_mm(x, w, offsets)
    args = offsets, ROW, SQUARE, torch.float32
    assert difference(ops.scaled_grouped_mm(xc, xs, wc, ws, *args), want) < 1e-3
    assert difference(ops.scaled_grouped_mm(xc, xs.roll(1, 0), wc, ws, *args), want) > 0.02
    assert difference(ops.scaled_grouped_mm(xc, xs, wc, ws, late, *args[1:]), want) > 1e-3
    assert difference(product("fprop", 256, (FP4, SQUARE))[0], product("fprop", 256, (FP4, SQUARE))[2]) > 1e-3
    assert difference(product("fprop", 256, (FP4, FP4))[0], product("fprop", 256, (FP4, FP4))[2]) > 0.01


# -- exact inputs ----------------------------------------------------------------------------------------------------


def integers(*shape: int, seed: int, high: int) -> Tensor:
    return torch.randint(-high, high + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize(("spec", "high"), [(ROW, 16), (FP4, 4)], ids=["fp8", "fp4"])
def test_one_hot_rows_pick_columns_of_the_weight(spec: str, high: int) -> None:
    offsets, K = offsets_of(SIZES), 256
    S = sum(SIZES) + SPARE
    picked = torch.arange(S) * 7 % K
    x, w = torch.nn.functional.one_hot(picked, K).float(), integers(len(SIZES), 32, K, seed=1, high=high)
    y = ops.scaled_grouped_mm(*quantized(x, spec, offsets), *quantized(w, spec), offsets, spec, spec, torch.float32)
    for e, (start, end) in enumerate(pairwise(offsets.tolist())):
        assert torch.equal(y[start:end], w[e][:, picked[start:end]].t())
    assert not y[offsets[-1] :].any()


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    spare=st.integers(0, 4),
    K=st.integers(1, 9).map(lambda n: 4 * n),
    N=st.integers(1, 5).map(lambda n: 2 * n),
    four=st.booleans(),
    seed=st.integers(0, 99),
)
def test_small_integers_are_exact(sizes: list[int], spare: int, K: int, N: int, four: bool, seed: int) -> None:
    offsets, S = offsets_of(sizes), sum(sizes) + spare
    x, w = (integers(S, K, seed=seed, high=4), integers(len(sizes), N, K, seed=seed + 1, high=4))
    row, col = (FP4, FP4_COLUMN) if four else (ROW, COLUMN)
    y = ops.scaled_grouped_mm(*quantized(x, row, offsets), *quantized(w, row), offsets, row, row, torch.float32)
    assert torch.equal(y.double(), grouped_mm(x, w, offsets))
    dy = integers(S, N, seed=seed + 2, high=4)
    g = ops.scaled_grouped_wgrad(
        *quantized(dy, col, offsets), *quantized(x, col, offsets), offsets, col, col, torch.float32
    )
    assert torch.equal(g.double(), grouped_wgrad(dy, x, offsets))


@pytest.mark.parametrize("alternating", [False, True])
def test_the_largest_numbers_add_up(alternating: bool) -> None:
    # Accumulators of less than fp32 would lose the later terms, or leave a rest where they cancel.
    K, offsets = 2048, offsets_of([3, 0, 2])
    x, w = torch.full((5, K), 448.0), torch.full((3, 8, K), 448.0)
    if alternating:
        x[:, 1::2] = -448.0
    y = ops.scaled_grouped_mm(*quantized(x, ROW, offsets), *quantized(w, SQUARE), offsets, ROW, SQUARE, torch.float32)
    assert bool((y == (0.0 if alternating else 448.0**2 * K)).all())


# -- rows, dtypes, shapes --------------------------------------------------------------------------------------------


def test_rows_of_nobody_are_not_read_and_come_out_zero() -> None:
    offsets, end = offsets_of(SIZES), sum(SIZES)
    for x_spec in (ROW, COLUMN):
        (xc, xs), (wc, ws) = (
            quantized(rows(end + SPARE, 160, 0), x_spec, offsets),
            quantized(randn(len(SIZES), 24, 160, seed=2), SQUARE),
        )
        bad = xc.clone()
        bad.view(torch.uint8)[end:] = 0x7F  # NaN
        bad_scales = xs.clone()
        if x_spec == ROW:
            bad_scales[end:] = float("nan")
        y, z = (
            ops.scaled_grouped_mm(c, s, wc, ws, offsets, x_spec, SQUARE, torch.float32)
            for c, s in ((xc, xs), (bad, bad_scales))
        )
        assert torch.equal(y, z)
        assert not y[end:].any()
        assert bool(y[:end].any(1).all())
        g, h = (
            ops.scaled_grouped_wgrad(c, s, xc, xs, offsets, x_spec, x_spec, torch.float32)
            for c, s in ((xc, xs), (bad, bad_scales))
        )
        assert torch.equal(g, h)
        for e, m in enumerate(SIZES):
            assert bool(g[e].any()) == (m > 0)


@pytest.mark.parametrize("T", [0, 1])
def test_hardly_any_rows(T: int) -> None:
    offsets = offsets_of([0, T, 0])
    x, w = rows(T, 128, 0), randn(3, 8, 128, seed=2)
    q, turned = quantized(x, ROW, offsets), quantized(x, COLUMN, offsets)
    y = ops.scaled_grouped_mm(*q, *quantized(w, SQUARE), offsets, ROW, SQUARE, torch.float32)
    assert y.shape == (T, 8)
    g = ops.scaled_grouped_wgrad(*turned, *turned, offsets, COLUMN, COLUMN, torch.float32)
    want = wide(turned, COLUMN, offsets)
    check(g, grouped_wgrad(want, want, offsets), roundings=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_result_is_rounded_once(dtype: torch.dtype) -> None:
    offsets = offsets_of(SIZES)
    q = quantized(rows(sum(SIZES), 160, 0), ROW, offsets), quantized(randn(len(SIZES), 24, 160, seed=2), SQUARE)
    y, z = (ops.scaled_grouped_mm(*q[0], *q[1], offsets, ROW, SQUARE, d) for d in (dtype, torch.float32))
    assert y.dtype == dtype
    assert torch.equal(y, z.to(dtype))
    turned = quantized(rows(sum(SIZES), 32, 0), COLUMN, offsets)
    g, h = (ops.scaled_grouped_wgrad(*turned, *turned, offsets, COLUMN, COLUMN, d) for d in (dtype, torch.float32))
    assert g.dtype == dtype
    assert torch.equal(g, h.to(dtype))


def test_wrong_shapes_are_refused() -> None:
    offsets = offsets_of([3, 2])
    (xc, xs), (wc, ws) = quantized(randn(5, 256), ROW, offsets), quantized(randn(2, 8, 256), SQUARE)
    more: tuple[object, ...] = offsets, ROW, SQUARE, torch.float32

    def refused(error: type[Exception], text: str, f: Callable[..., Tensor], *args: object, fake: bool = True) -> None:
        with pytest.raises(error, match=text):
            f(*args)
        if fake:
            with pytest.raises(error, match=text):
                f(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))

    mm, wgrad = ops.scaled_grouped_mm, ops.scaled_grouped_wgrad
    refused(RuntimeError, "has 128 columns of .* has 256", mm, xc[:, :128], xs[:, :1], wc, ws, *more)
    refused(RuntimeError, "has 256 columns of .* has 512", mm, xc, xs, wc.view(torch.uint8), ws, offsets, ROW, FP4, 6)
    refused(RuntimeError, r"offsets are \(2,\)", mm, xc, xs, wc, ws, offsets[:2], *more[1:])
    refused(RuntimeError, r"w \(8, 256\)", mm, xc, xs, wc[0], ws[0], *more)
    refused(RuntimeError, r"a \[S, M\] is \(4, 256\)", wgrad, xc[:4], xs[:4], xc, xs, offsets, ROW, ROW, torch.float32)
    refused(RuntimeError, "b .* is", wgrad, xc, xs, wc, ws, offsets, ROW, ROW, torch.float32)
    # Scales and dtypes that do not belong to the codes are found when there are values.
    refused(InputError, "scales do not belong", mm, xc, xs[:, :1], wc, ws, *more, fake=False)
    refused(InputError, "scales do not belong", mm, xc, xs, wc, ws[:, :, :1], *more, fake=False)
    refused(InputError, "codes are stored as", mm, xc, xs, wc.float(), ws, *more, fake=False)
