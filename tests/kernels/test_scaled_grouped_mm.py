"""Grouped products of codes in the interpreter: against float64, and exactly where sums are exact.

The bound is that of fp32 sums of dequantized operands, K rounding errors of the sum of magnitudes. Codes that are small
integers under powers of two make every sum exact, so that nothing hides in a bound.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moefx.dialect.scaled_gemm import _mm, _mm_quantize
from moefx.kernels.gpu import scaled_grouped_mm as kernels
from moefx.precision.builtin import BUILT_IN
from moefx.precision.quantize import dequantize, fp32_scales
from moefx.precision.recipe import lookup
from moefx.precision.spec import QuantSpec

from .interpreter import assert_same_bits
from .products import (
    COLUMN,
    ROW,
    TILE,
    Tensor,
    assert_close,
    chosen,
    encoded,
    integers,
    numbers,
    offsets_of,
    powers,
)


def operands(
    S: int, K: int, N: int, offsets: Tensor, x_spec: str, w_spec: str, flipped: bool = False
) -> tuple[Any, ...]:
    E = offsets.shape[0] - 1
    x = encoded(x_spec, numbers(S, K), offsets)
    if flipped:
        codes, scales = encoded(str(QuantSpec.parse(w_spec).transposed()), numbers(E, K, N, seed=1))
        w = codes.mT, scales.mT
    else:
        w = encoded(w_spec, numbers(E, N, K, seed=1))
    return *x, *w, offsets, x_spec, w_spec


def exact(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The product in float64, and the sum of magnitudes that its rounding errors are relative to."""
    x, xs, w, ws, offsets, x_spec, w_spec = args
    a = dequantize(x, xs, x_spec, offsets=offsets).double()
    b = dequantize(w, ws, w_spec).double()
    y = a.new_zeros(2, a.shape[0], b.shape[1])
    for e in range(b.shape[0]):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        y[0, rows], y[1, rows] = a[rows] @ b[e].T, a[rows].abs() @ b[e].T.abs()
    return y[0], y[1]


MM = [
    (ROW, TILE, False),
    (ROW, TILE, True),  # the dgrad of a weight stored [E, N, K]: its transposed view
    ("e5m2 1x128 f32/exact", "e4m3 128x128 f32/exact", False),
    ("e4m3 1x32 e8m0/rceil", "e4m3 1x32 e8m0/rceil", False),
    ("e4m3 1x32 e8m0/rceil", "e4m3 1x32 e8m0/rceil", True),
    ("e4m3 1x32 e8m0/rceil", "e4m3 32x32 e8m0/rceil", False),
    ("e4m3 1x64 po2/rceil", TILE, False),
    ("e4m3 row f32/exact", "e4m3 row f32/exact", True),
    ("e5m2 tensor f32/exact", "e4m3 tensor f32/exact", True),
    ("e4m3 tensor f32/exact delayed", "e4m3 row f32/exact", False),
    (ROW, "e4m3 row f32/exact", False),
    ("e4m3 row f32/exact", "e4m3 1x128 po2/rceil", False),
]


@pytest.mark.parametrize(("x_spec", "w_spec", "flipped"), MM)
def test_products_are_those_of_the_dequantized_operands(x_spec: str, w_spec: str, flipped: bool) -> None:
    offsets = offsets_of(5, 0, 67)
    args = operands(75, 256, 144, offsets, x_spec, w_spec, flipped)  # 3 rows of nobody, 16 columns in the last tile
    y = kernels.scaled_grouped_mm(*args, torch.float32)
    assert_close(y, *exact(args), depth=256)
    assert not y[72:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K", [16, 208])
def test_a_depth_that_fits_no_block_and_narrow_results(dtype: torch.dtype, K: int) -> None:
    args = operands(9, K, 16, offsets_of(3, 6), ROW, TILE)
    y = kernels.scaled_grouped_mm(*args, dtype)
    assert y.dtype == dtype
    assert_close(y, *exact(args), depth=K)


def test_many_rows_take_the_large_tile_and_programs_several_tiles() -> None:
    offsets = offsets_of(300)
    args = operands(300, 128, 272, offsets, ROW, TILE)
    assert_close(kernels.scaled_grouped_mm(*args, torch.float32), *exact(args), depth=128)


def in_halves(counts: tuple[int, ...], S: int, K: int = 256, N: int = 256) -> tuple[Any, ...]:
    """Exact operands of sizes that are multiplied in two halves of 64 rows; what rows of nobody hold is NaN."""
    offsets = offsets_of(*counts)
    E, held = len(counts), sum(counts)
    x, xs = integers(S, K, seed=0), powers(S, K // 128, seed=1)
    x.view(torch.uint8)[held:], xs[held:] = 0x7F, torch.nan
    w, ws = integers(E, N, K, seed=2), powers(E, N // 128, K // 128, seed=3)
    return x, xs, w, ws, offsets, ROW, TILE


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each launch, whether its tiles were computed in two halves."""
    seen: list[bool] = []
    launch = kernels.launch

    def spy(*args: Any, **kw: Any) -> None:
        seen.append(kw["TWICE"])
        launch(*args, **kw)

    monkeypatch.setattr(kernels, "launch", spy)
    return seen


@pytest.mark.usefixtures("poisoned_bytes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("counts", "S"), [((300,), 300), ((60, 310), 386), ((129,), 200), ((0, 384), 384)])
def test_halves_of_a_tile_are_the_references_bits(
    counts: tuple[int, ...], S: int, dtype: torch.dtype, halves: list[bool]
) -> None:
    """The last tile begins less than 128 rows before the end, and is moved up."""
    args = in_halves(counts, S)
    want = _mm(*args, dtype)
    assert_same_bits(kernels.scaled_grouped_mm(*args, dtype), want)
    y, codes, scales = kernels.scaled_grouped_mm_quantize(*args, dtype, [ROW])
    assert_same_bits(y, want)
    for got, known in zip((codes, scales), _mm_quantize(*args, dtype, [ROW])[1:], strict=True):
        assert_same_bits(got, known)
    assert halves == [True, True]


def test_rows_of_a_tile_that_is_moved_up_are_compared() -> None:
    args = in_halves((300,), 300)
    got = kernels.scaled_grouped_mm(*args, torch.float32)
    for row in (255, 256, 299):
        args[1][row] *= 2
        with pytest.raises(AssertionError, match=rf"first at \({row}"):
            assert_same_bits(got, _mm(*args, torch.float32))
        args[1][row] /= 2
    assert_same_bits(got, _mm(*args, torch.float32))


@pytest.mark.parametrize(
    ("x_spec", "w_spec"),
    [
        ("e5m2 row f32/exact", "e4m3 row f32/exact"),
        ("e4m3 tensor f32/exact", "e4m3 tensor f32/exact"),
        (ROW, "e4m3 1x128 po2/rceil"),
        ("e4m3 1x256 po2/rceil", "e4m3 row f32/exact"),
        ("e4m3 1x32 e8m0/rceil", "e4m3 1x32 e8m0/rceil"),
        ("e4m3 1x32 e8m0/rceil", "e4m3 32x32 e8m0/rceil"),
    ],
)
def test_halves_under_other_scales(x_spec: str, w_spec: str, halves: list[bool]) -> None:
    args = operands(280, 256, 128, offsets_of(270), x_spec, w_spec)
    assert_close(kernels.scaled_grouped_mm(*args, torch.float32), *exact(args), depth=256)
    assert halves == [True]


def test_nan_among_scales_of_columns() -> None:
    """Scales that four warps decode and exchange keep NaN, and the smallest power."""
    spec = "e4m3 1x32 e8m0/rceil"
    args = operands(280, 64, 128, offsets_of(280), spec, spec)
    scales = args[3].view(torch.uint8)
    scales[0, 5, 1], scales[0, 77] = 255, 0
    y = kernels.scaled_grouped_mm(*args, torch.float32)
    assert y[:, 5].isnan().all()
    args[2].view(torch.uint8)[0, 5] = scales[0, 5] = 0  # the rest is compared
    y[:, 5] = 0
    assert_close(y, *exact(args), depth=64)


@pytest.mark.parametrize("flipped", [False, True])
def test_exact_sums_are_the_references_bits(flipped: bool) -> None:
    w, ws = integers(2, 144, 256, seed=2), powers(2, 2, 2, seed=3)
    if flipped:
        w, ws = w.mT.contiguous().mT, ws.mT.contiguous().mT
    args = (integers(40, 256, seed=0), powers(40, 2, seed=1), w, ws, offsets_of(7, 30), ROW, TILE)
    for dtype in (torch.float32, torch.bfloat16):
        assert_same_bits(kernels.scaled_grouped_mm(*args, dtype), _mm(*args, dtype))


def by_hand(args: tuple[Any, ...], forget: int = -1) -> Tensor:
    """Block for block in the kernel's order; the scales of block `forget` are left out."""
    x, xs, w, ws, offsets, *_ = args
    y = torch.zeros(x.shape[0], w.shape[1])
    for e in range(w.shape[0]):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        for k in range(xs.shape[1]):
            part = slice(128 * k, 128 * k + 128)
            p = (x[rows, part].double() @ w[e][:, part].double().T).float()  # one rounding of an exact sum
            s = fp32_scales(xs, QuantSpec.parse(ROW))[rows, k, None] * ws[e, :, k].repeat_interleave(128)[: w.shape[1]]
            y[rows] += p if k == forget else p * s
    return y


def test_blocks_are_promoted_one_after_another() -> None:
    """Any scales: with products of integers, only the order of the sums over blocks rounds."""
    gen = torch.Generator().manual_seed(5)
    xs, ws = torch.rand(20, 3, generator=gen) + 0.5, torch.rand(2, 1, 3, generator=gen) + 0.5
    args = (integers(20, 384, seed=0), xs, integers(2, 48, 384, seed=2), ws, offsets_of(7, 13), ROW, TILE)
    y = kernels.scaled_grouped_mm(*args, torch.float32)
    assert_same_bits(y, by_hand(args))
    for forgotten in range(3):
        with pytest.raises(AssertionError):
            assert_same_bits(y, by_hand(args, forgotten))


def test_a_forgotten_scale_is_outside_the_bound() -> None:
    args = operands(20, 256, 48, offsets_of(7, 13), ROW, TILE)
    want, size = exact(args)
    assert_close(kernels.scaled_grouped_mm(*args, torch.float32), want, size, depth=256)
    with pytest.raises(AssertionError):
        assert_close(by_hand(args, forget=1), want, size, depth=256)


def test_nan_stays_in_its_rows_and_rows_of_nobody_are_zero() -> None:
    x, xs, w, ws, offsets, *specs = operands(12, 128, 32, offsets_of(4, 5), ROW, TILE)
    xs[2], xs[9:] = torch.nan, torch.nan
    x.view(torch.uint8)[9:] = 0x7F
    for dtype in (torch.float32, torch.bfloat16):
        y = kernels.scaled_grouped_mm(x, xs, w, ws, offsets, *specs, dtype)
        assert y[2].isnan().all()
        assert not y.isnan()[[0, 1, *range(3, 12)]].any()
        assert not y[9:].any()


@pytest.mark.usefixtures("poisoned_bytes")
@pytest.mark.parametrize(("S", "counts"), [(0, (0, 0)), (1, (0, 1)), (3, (0, 0)), (5, (5,))])
def test_every_element_is_written(S: int, counts: tuple[int, ...]) -> None:
    offsets = offsets_of(*counts)
    y = kernels.scaled_grouped_mm(*operands(S, 128, 16, offsets, ROW, TILE), torch.bfloat16)
    assert y.shape == (S, 16)
    assert not y.isnan().any()


@pytest.mark.usefixtures("poisoned_bytes")
@pytest.mark.parametrize(
    "spec", [ROW, "e4m3 1x128 e8m0/floor", "e5m2 1x128 f32/exact", "e4m3 1x128 f32/exact zero=one"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_of_the_result_are_those_of_quantize(spec: str, dtype: torch.dtype) -> None:
    args = (
        integers(12, 256, seed=0), powers(12, 2, seed=1), integers(2, 144, 256, seed=2), powers(2, 2, 2, seed=3),
        offsets_of(4, 5), ROW, TILE, dtype, [spec],
    )  # fmt: skip
    args[0].view(torch.uint8)[1] = 0  # a block of zeros
    args[1][3] = torch.nan
    for got, want in zip(kernels.scaled_grouped_mm_quantize(*args), _mm_quantize(*args), strict=True):
        assert_same_bits(got, want, spec)


@pytest.mark.parametrize(("x_spec", "w_spec", "flipped"), MM)
def test_triton_multiplies_what_it_can(x_spec: str, w_spec: str, flipped: bool) -> None:
    assert chosen("scaled_grouped_mm", (x_spec, w_spec), flipped=flipped) == "triton"


@pytest.mark.parametrize("name", sorted(set(BUILT_IN) - {"bf16", "nvfp4"}))
def test_triton_multiplies_for_the_built_in_recipes(name: str) -> None:
    specs = BUILT_IN[name].specs
    for gemm in ("up", "down"):
        of = {key: lookup(specs, gemm, key) for key in ("input.fprop", "weight.fprop", "grad.dgrad", "weight.dgrad")}
        for kind, x in (("fprop", "input"), ("dgrad", "grad")):
            pair = (of[f"{x}.{kind}"], of[f"weight.{kind}"])
            assert chosen("scaled_grouped_mm", pair, flipped=kind == "dgrad") == "triton"
        pair = (lookup(specs, gemm, "grad.wgrad"), lookup(specs, gemm, "input.wgrad"))
        assert chosen("scaled_grouped_wgrad", pair) == "triton"


def test_the_reference_takes_the_rest() -> None:
    assert chosen("scaled_grouped_mm_quantize", (ROW, TILE), ([ROW],)) == "triton"
    assert chosen("scaled_grouped_mm_quantize", (ROW, TILE), ([ROW, COLUMN],)) == "reference"
    assert chosen("scaled_grouped_mm_quantize", (ROW, TILE), ([f"{ROW} sr"],)) == "reference"
    assert chosen("scaled_grouped_mm", (ROW, TILE), K=264) == "reference"
    assert chosen("scaled_grouped_mm", ("e2m1 1x32 e8m0/rceil", TILE)) == "reference"
    assert chosen("scaled_grouped_mm", (COLUMN, TILE)) == "reference"
