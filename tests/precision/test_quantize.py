"""Quantizing whole tensors, against one element at a time in fractions; inputs chosen to go wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx.errors import InputError
from moefx.precision import QuantSpec, TwoLevel, dequantize, get_format, quality, quantize

from . import oracles
from .oracles import GRIDS, same_bits, spread_rows

Tensor = torch.Tensor
ROW, COLUMN, SQUARE = "e4m3 1x128 po2/rceil", "e4m3 128x1 po2/rceil", "e4m3 128x128 po2/rceil"
MXFP4, NVFP4 = "e2m1 1x32 e8m0/rceil", "e2m1 1x16 e4m3+f32/exact"
EXACT_ROW, EXACT_COLUMN = "e4m3 1x128 f32/exact", "e4m3 128x1 f32/exact"
ALL = (ROW, COLUMN, SQUARE, MXFP4, NVFP4, EXACT_ROW, EXACT_COLUMN, "e5m2 row po2/floor", "e4m3 column f32/exact",
       "e4m3 tensor f32/exact", "e3m2 1x32 e8m0/even", "e4m3fnuz 1x128 po2/rceil")  # fmt: skip


def parts(scales: Tensor | TwoLevel) -> list[Tensor]:
    return [scales] if isinstance(scales, Tensor) else list(scales)


def back(x: Tensor, spec: str, **options: Tensor) -> Tensor:
    codes, scales = quantize(x, spec, **options)
    return dequantize(codes, scales, spec, width=x.shape[-1], **options)


def relative(y: Tensor, x: Tensor) -> float:
    return float((y.double() - x.double()).norm() / x.double().norm())


# -- the definition --------------------------------------------------------------------------------------------------

values = st.one_of(
    st.just(0.0),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-8, 8, width=32),
    st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 448.0, 2.0**-149]),
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, str, int, int, str, str]:
    M, N = draw(st.integers(0, 7)), draw(st.integers(0, 7))
    cells = draw(st.lists(values, min_size=M * N, max_size=M * N))
    br, bc = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["po2", "e8m0", "f32"]))
    rule = "exact" if kind == "f32" else draw(st.sampled_from(["rceil", "floor", "ceil", "even"]))
    elem = draw(st.sampled_from(["e4m3", "e5m2", "e2m1", "e3m2", "e2m3", "e4m3fnuz"]))
    return torch.tensor(cells, dtype=torch.float32).view(M, N), elem, br, bc + (br == bc == 1), kind, rule


@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_definition(case: tuple[Tensor, str, int, int, str, str]) -> None:
    x, elem, br, bc, kind, rule = case
    spec = f"{elem} {br}x{bc} {kind}/{rule}"
    codes, scales = quantize(x, spec)
    want_codes, want_scales = oracles.quantize(x, elem, br, bc, kind, rule)
    fmt = get_format(elem)
    y = dequantize(codes, scales, spec, width=x.shape[1])
    got_scales = get_format("e8m0").decode(scales.view(torch.uint8)) if kind == "e8m0" else scales
    assert got_scales.shape == QuantSpec.parse(spec).scale_shape(x.shape)
    want = torch.tensor(want_scales, dtype=torch.float64).view(got_scales.shape)
    assert torch.equal(got_scales.double().nan_to_num(-1), want.nan_to_num(-1))
    for got, expected, numbers in zip(fmt.load(codes, x.shape[1]).tolist(), want_codes, y.tolist(), strict=True):
        for g, w, number in zip(got, expected, numbers, strict=True):
            assert math.isnan(number) if w == -1 else g == w


@pytest.mark.parametrize("spec", ALL)
def test_dtypes_and_strides_do_not_matter(spec: str) -> None:
    x = spread_rows(67, 150, 4)
    codes, scales = quantize(x, spec)
    stepped = torch.full((135, 301), math.nan)
    stepped[1::2, 1::2] = x
    for same in (x.bfloat16(), x.double(), x.t().contiguous().t(), stepped[1::2, 1::2], x.expand(1, 67, 150)[0]):
        got, got_scales = quantize(same, spec)
        assert same_bits(got, codes)
        assert all(same_bits(a, b) for a, b in zip(parts(got_scales), parts(scales), strict=True))
    half = (x / 64).half()
    assert same_bits(quantize(half, spec)[0], quantize(half.float(), spec)[0])


@pytest.mark.parametrize("spec", ALL)
def test_each_matrix_of_a_stack_is_quantized_alone(spec: str) -> None:
    x = spread_rows(6 * 40, 70, 3).view(2, 3, 40, 70)
    codes, scales = quantize(x, spec)
    y = dequantize(codes, scales, spec, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    for i in range(2):
        for j in range(3):
            one, one_scales = quantize(x[i, j], spec)
            assert same_bits(codes[i, j], one)
            assert all(same_bits(a[i, j], b) for a, b in zip(parts(scales), parts(one_scales), strict=True))
            assert torch.equal(y[i, j], dequantize(one, one_scales, spec, dtype=torch.bfloat16))


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0), (2, 0, 64), (0, 3, 5)])
def test_nothing_is_quantized_to_nothing(spec: str, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    codes, scales = quantize(x, spec)
    assert parts(scales)[0].shape == QuantSpec.parse(spec).scale_shape(shape)
    assert dequantize(codes, scales, spec, width=shape[-1]).shape == shape


def test_stochastic_rounding() -> None:
    x = spread_rows(64, 256, 3)
    spec = "e2m1 1x32 e8m0/rceil sr"
    mean = torch.zeros(64, 256, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    first = quantize(x, spec, generator=torch.Generator().manual_seed(5))
    assert same_bits(first[0], quantize(x, spec, generator=torch.Generator().manual_seed(5))[0])
    assert not same_bits(first[0], quantize(x, spec, generator=g)[0])
    assert same_bits(first[1], quantize(x, MXFP4)[1])
    for _ in range(100):
        mean += dequantize(*quantize(x, spec, generator=g), spec).double() / 100
    nearest = back(x, MXFP4)
    assert relative(mean, x) < 0.25 * relative(nearest, x)
    assert abs(float((mean - x).sum() / x.abs().sum())) < 1e-3


def test_a_delayed_scale_is_the_callers() -> None:
    x = torch.tensor([[1.0, -2.0, 900.0, 3.0]])
    spec = "e4m3 tensor f32/exact delayed"
    codes, scales = quantize(x, spec, amax=torch.tensor(448.0))
    assert scales.tolist() == [[1.0]]
    assert dequantize(codes, scales, spec).tolist() == [[1.0, -2.0, 448.0, 3.0]]
    assert quality(x, codes, scales, spec)["saturation"] == 0.25
    with pytest.raises(InputError, match="takes the largest magnitude"):
        quantize(x, spec)
    with pytest.raises(InputError, match="measures the largest magnitude"):
        quantize(x, ROW, amax=torch.tensor(1.0))


def test_two_levels_keep_more_than_one_scale_would() -> None:
    x = spread_rows(64, 256, 6)
    codes, scales = quantize(x, NVFP4)
    assert isinstance(scales, TwoLevel)
    s = (scales.block.float() * scales.matrix).repeat_interleave(16, -1)
    grid = GRIDS["e2m1"]
    raw = get_format("e2m1").load(codes)
    for r, c in ((0, 0), (3, 17), (63, 255), (20, 100)):
        assert int(raw[r, c]) == grid.nearest(float(x[r, c] / s[r, c]))
    assert torch.equal(dequantize(codes, scales, NVFP4), get_format("e2m1").decode(raw) * s)
    assert relative(dequantize(codes, scales, NVFP4), x) < 0.11
    assert relative(back(x, "e2m1 tensor f32/exact"), x) > 0.11


# -- hard inputs -----------------------------------------------------------------------------------------------------


def hard_inputs() -> dict[str, Tensor]:
    x = spread_rows(200, 300, 0)
    cases = {f"spread {n}": spread_rows(200, 300, n, seed=n) for n in (0, 3, 6, 12, 24)}
    cases["outlier columns"] = x * torch.where(torch.arange(300) % 100 == 7, 64.0, 1.0)
    cases["zero rows"] = torch.where(torch.arange(200)[:, None] % 3 == 0, 0.0, x)
    cases["one number"] = torch.zeros(200, 300).index_put((torch.tensor(77), torch.tensor(200)), torch.tensor(-3.0))
    cases["all the largest"] = torch.full((200, 300), 448 * 2.0**-20)
    cases["denormal"] = (x * 2.0**-130).bfloat16().float()
    return cases


HARD = hard_inputs()


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("spec", [ROW, COLUMN, SQUARE, "e5m2 1x128 po2/rceil", EXACT_ROW])
def test_error_of_fp8_is_half_a_step(name: str, spec: str) -> None:
    x = HARD[name]
    s = QuantSpec.parse(spec)
    codes, scales = quantize(x, spec)
    y = dequantize(codes, scales, spec)
    step = torch.ones_like(x)
    # The scale of each element: dequantize the code of 1.
    one = torch.full(x.shape, GRIDS[s.elem].nearest(1.0), dtype=torch.uint8)
    step = dequantize(s.format.store(one), scales, spec).double()
    bound = torch.maximum(x.double().abs() * 2.0 ** -(s.format.mantissa_bits + 1), step * s.format.quantum / 2)
    assert bool(((y.double() - x.double()).abs() <= bound * (1 + 2.0**-20)).all())
    assert torch.equal(y == 0, (x == 0) | (x.abs() <= step.float() * s.format.quantum / 2))


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_in_their_block(spec: str, poison: float) -> None:
    x = spread_rows(300, 300, 3)
    clean = back(torch.where(x == 0, 1.0, x), spec)
    bad = x.clone()
    bad[140, 150] = poison
    y = back(bad, spec)
    s = QuantSpec.parse(spec)
    br, bc = s.br or 300, s.bc or 300
    inside = (torch.arange(300)[:, None] // br == 140 // br) & (torch.arange(300) // bc == 150 // bc)
    assert y[inside].isnan().all()
    if not s.two_level:
        assert torch.equal(y[~inside], clean[~inside])
    assert y[~inside].isfinite().all()


@pytest.mark.parametrize("spec", ALL)
def test_zeros_carry_the_smallest_scale(spec: str) -> None:
    s = QuantSpec.parse(spec)
    codes, scales = quantize(torch.zeros(130, 140), spec)
    assert int(codes.view(torch.uint8).max()) == 0
    least = {"e8m0": 2.0**-127, "e4m3+f32": 2.0**-9}.get(s.scale, 2.0**-126)
    first = parts(scales)[0]
    numbers = get_format("e8m0").decode(first.view(torch.uint8)) if s.scale == "e8m0" else first.float()
    assert (numbers == least).all()
    if not s.two_level:
        ones = quantize(torch.zeros(130, 140), replace(s, zero="one"))[1]
        assert (parts(ones)[0].float() == 1).all()
    if s.format.special != "fnuz":
        minus = quantize(torch.full((130, 140), -0.0), spec)[0]
        assert torch.equal(s.format.load(minus), torch.full((130, 140), 1 << (s.format.bits - 1), dtype=torch.uint8))


# -- facts about powers of two ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("binades", [0, 6, 12])
def test_rows_and_columns_give_the_same_numbers_where_both_are_normal(binades: int) -> None:
    x = spread_rows(512, 512, binades)
    (a, sa), (b, sb) = quantize(x, ROW), quantize(x, COLUMN)
    by_row, by_column = dequantize(a, sa, ROW), dequantize(b, sb, COLUMN)
    # Before rounding: what rounds up to the smallest normal number was rounded with the step of subnormal ones.
    ones = torch.ones(512, 512).to(torch.float8_e4m3fn)
    larger = torch.maximum(dequantize(ones, sa, ROW), dequantize(ones, sb, COLUMN))
    normal = x.abs() >= 2.0**-6 * larger
    assert normal.float().mean() > 0.9
    assert torch.equal(by_row[normal], by_column[normal])


@pytest.mark.parametrize("binades", [0, 6])
def test_quantizing_twice_loses_nothing_with_powers_of_two_and_a_lot_without(binades: int) -> None:
    x = spread_rows(512, 512, binades)
    once = relative(back(x, ROW), x)
    twice = relative(back(back(x, ROW).bfloat16(), COLUMN), x)
    assert twice <= once * 1.001
    exact_once = relative(back(x, EXACT_ROW), x)
    exact_twice = relative(back(back(x, EXACT_ROW).bfloat16(), EXACT_COLUMN), x)
    assert 1.3 < exact_twice / exact_once < 1.45


@pytest.mark.parametrize(("rule", "low", "high"), [("rceil", 0.04, 0.065), ("floor", 0, 0)])
def test_quantizing_what_was_quantized_changes_no_number(rule: str, low: float, high: float) -> None:
    spec = f"e4m3 1x128 po2/{rule}"
    x = spread_rows(4096, 512, 12)
    codes, scales = quantize(x, spec)
    y = dequantize(codes, scales, spec)
    again, scales_again = quantize(y.bfloat16(), spec)
    assert torch.equal(dequantize(again, scales_again, spec), y)
    assert isinstance(scales, Tensor)
    changed = float((scales != scales_again).float().mean())
    assert low <= changed <= high


def test_mxfp4_is_stable() -> None:
    for spec in (MXFP4, "e2m1 1x32 e8m0/floor"):
        y = back(spread_rows(300, 320, 8), spec)
        assert torch.equal(back(y.bfloat16(), spec), y)


# -- measurements ----------------------------------------------------------------------------------------------------


def test_quality_by_hand() -> None:
    x = torch.zeros(3, 128)
    x[0, :4] = torch.tensor([448.0, 1.0, 2.0**-11, -(2.0**-12)])  # scale 1: two numbers below half of 2^-9
    x[1, 0] = 448 * 2.0**-5
    codes, scales = quantize(x, ROW)
    got = quality(x, codes, scales, ROW)
    assert got["underflow"] == 2 / 5
    assert got["saturation"] == 0
    assert got["scale_spread"] == 5  # the third row is zero and does not count
    signal = 448.0**2 + 1 + 2.0**-22 + 2.0**-24 + 14.0**2
    assert got["sqnr_db"] == pytest.approx(10 * math.log10(signal / (2.0**-22 + 2.0**-24)))
    assert quality(torch.ones(2, 2), *quantize(torch.ones(2, 2), ROW), ROW)["sqnr_db"] == math.inf
    assert quality(torch.zeros(0, 2), *quantize(torch.zeros(0, 2), ROW), ROW)["underflow"] == 0


def test_quality_of_floor_shows_its_saturation() -> None:
    """19.3% of log-uniform blocks in E4M3 and 41.5% in E2M1 have their largest element clamped."""
    amax = torch.exp2(torch.rand(100000, generator=torch.Generator().manual_seed(0)) * 8)[:, None].expand(-1, 2)
    for spec, share in (("e4m3 row po2/floor", 0.193), ("e2m1 row e8m0/floor", 0.415)):
        assert quality(amax, *quantize(amax, spec), spec)["saturation"] == pytest.approx(share, abs=0.01)
    assert quality(amax, *quantize(amax, "e4m3 row po2/rceil"), "e4m3 row po2/rceil")["saturation"] == 0
    assert quality(amax, *quantize(amax, "e4m3 row f32/exact"), "e4m3 row f32/exact")["saturation"] == 0


def test_the_product_of_two_levels_of_scales_reads_the_same() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 100
    for spec in (NVFP4, NVFP4.replace("1x16", "16x1"), NVFP4.replace("1x16", "16x16")):
        codes, scales = quantize(x, spec)
        assert isinstance(scales, TwoLevel)
        product = scales.block.to(torch.float32) * scales.matrix
        assert torch.equal(dequantize(codes, product, spec), dequantize(codes, scales, spec))
        assert (dequantize(codes, scales, spec) - x).norm() < 0.2 * x.norm()


# -- wrong arguments -------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused() -> None:
    x = torch.ones(4, 128)
    codes, scales = quantize(x, ROW)
    for bad in (torch.ones(4, 128, dtype=torch.int32), torch.ones(128), torch.ones(4, 8).to(torch.float8_e4m3fn)):
        with pytest.raises(InputError, match="only floating-point"):
            quantize(bad, ROW)
    with pytest.raises(InputError, match="do not belong"):
        dequantize(codes, scales, COLUMN)
    with pytest.raises(InputError, match="do not belong"):
        dequantize(codes, scales, "e4m3 1x128 e8m0/rceil")
    with pytest.raises(InputError, match="stored as"):
        dequantize(codes, scales, "e5m2 1x128 po2/rceil")
    with pytest.raises(InputError, match="do not belong"):
        dequantize(torch.zeros(4, 64, dtype=torch.uint8), scales, NVFP4)
    with pytest.raises(InputError, match="one level of scales"):
        dequantize(codes, quantize(x, NVFP4)[1], ROW)
    with pytest.raises(InputError, match="offsets are int32"):
        quantize(x, ROW, offsets=torch.tensor([0.0, 4.0]))
    with pytest.raises(InputError, match="rows of a matrix"):
        quantize(x[None], ROW, offsets=torch.tensor([0, 4]))
