"""Conversions between specs: every code at every shift in fractions, tensors against dequantizing, refusals."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx.errors import InputError, RecipeError
from moefx.precision import QuantSpec, convert, dequantize, exactness, get_format, quantize, transpose_scaled

from .oracles import GRIDS, Grid, power, same_bits, spread_rows
from .test_spec import REFUSED

Tensor = torch.Tensor
ROW, COLUMN, SQUARE = "e4m3 1x128 po2/rceil", "e4m3 128x1 po2/rceil", "e4m3 128x128 po2/rceil"
MXFP8, MXFP4 = "e4m3 1x32 e8m0/rceil", "e2m1 1x32 e8m0/rceil"
RULES = ("tight", "tile_max")
each_rule = pytest.mark.parametrize("rule", RULES)


def one_level(pair: tuple[Tensor, object]) -> tuple[Tensor, Tensor]:
    assert isinstance(pair[1], Tensor)
    return pair[0], pair[1]


def e8m0(exponents: list[list[int]]) -> Tensor:
    return torch.tensor([[t + 127 for t in row] for row in exponents], dtype=torch.uint8).view(torch.float8_e8m0fnu)


def shifted(code: int, k: int, grid: Grid) -> int:
    """Code of the number / 2^k, to nearest even; special codes stay."""
    number = grid.number(code)
    if isinstance(number, str):
        return code
    magnitude = grid.nearest(number / power(k))
    return magnitude | (code & grid.sign) if magnitude or grid.special != "fnuz" else 0


# -- one element -----------------------------------------------------------------------------------------------------


@each_rule
@pytest.mark.parametrize("elem", ["e4m3", "e5m2", "e4m3fnuz", "e3m2", "e2m3"])
def test_every_code_at_every_shift(elem: str, rule: str) -> None:
    grid, fmt = GRIDS[elem], get_format(elem)
    n = 2 * grid.sign
    spec = QuantSpec.parse(f"{elem} 1x{n} e8m0/rceil")
    for k in (*range(21), 32, 254):
        start = -127 if k == 254 else -5
        codes = torch.stack([torch.arange(n), torch.full((n,), fmt.max_code)]).to(torch.uint8)
        scales = e8m0([[start], [start + k]])
        new, new_scales = one_level(
            transpose_scaled(fmt.store(codes), scales, spec, spec.transposed(), rule=rule)  # type: ignore[arg-type]
        )
        assert new_scales.view(torch.uint8).eq(start + k + 127).all()
        assert fmt.load(new)[0].tolist() == [shifted(c, k, grid) for c in range(n)]
        assert fmt.load(new)[1].tolist() == [fmt.max_code] * n


def test_share_of_codes_that_a_shift_leaves_exact() -> None:
    grid = GRIDS["e4m3"]
    finite = [c for c in range(256) if isinstance(grid.number(c), Fraction)]
    shares = []
    for k in range(5):
        same = [grid.value(shifted(c, k, grid)) * 2.0**k == grid.value(c) for c in finite]
        shares.append(round(100 * sum(same) / len(finite)))
    assert shares == [100, 94, 87, 81, 75]


# -- row to column ---------------------------------------------------------------------------------------------------


@each_rule
@pytest.mark.parametrize("binades", [0, 3, 6, 12, 24])
@pytest.mark.parametrize("back", [False, True])
def test_transposed_tensor(binades: int, rule: str, back: bool) -> None:
    spec, to = (COLUMN, ROW) if back else (ROW, COLUMN)
    x = spread_rows(300, 260, binades)
    x = x.t().contiguous() if back else x
    codes, scales = one_level(quantize(x, spec))
    want = dequantize(codes, scales, spec)
    new, new_scales = one_level(transpose_scaled(codes, scales, spec, to, rule=rule))  # type: ignore[arg-type]
    got = dequantize(new, new_scales, to)
    S = dequantize(torch.ones_like(want).to(torch.float8_e4m3fn), new_scales, to)
    large = want.abs() >= 2.0**-6 * S
    assert torch.equal(got[large], want[large])
    assert bool(((got - want).abs() <= 2.0**-10 * S).all())
    assert torch.equal(got.sign() * want.sign(), got.sign().abs())
    if rule == "tile_max":
        T = scales.t() if back else scales
        for b in range(3):
            top = T[128 * b : 128 * (b + 1)].amax(0).repeat_interleave(128)[: x.shape[0 if back else 1]]
            assert torch.equal((new_scales.t() if back else new_scales)[b], top)
    else:
        loose = dequantize(*transpose_scaled(codes, scales, spec, to, rule="tile_max"), to)
        assert bool(((got - want).abs() <= (loose - want).abs()).all())
    again = transpose_scaled(*transpose_scaled(new, new_scales, to, spec), spec, to)
    assert torch.equal(dequantize(*again, to), got)


@pytest.mark.parametrize(
    ("to", "saturates"), [("floor", True), ("even", True), ("rceil", False), ("ceil", False)]
)  # 240 and 60 are 1.875 * 2^n, and the largest number of E4M3 is 1.75 * 2^8
def test_the_top_of_a_column_saturates_where_the_rule_of_its_scale_lets_it(to: str, saturates: bool) -> None:
    x = torch.tensor([[-240.0, 1.0], [3.0, 60.0]])
    a, b = "e4m3 1x2 po2/rceil", f"e4m3 2x1 po2/{to}"
    pair = quantize(x, a)
    assert torch.equal(dequantize(*pair, a), x)
    got = dequantize(*transpose_scaled(*pair, a, b), b)
    assert got.tolist() == ([[-224.0, 1.0], [3.0, 56.0]] if saturates else x.tolist())
    assert torch.equal(got, dequantize(*quantize(x, b), b))
    assert ("saturate" in exactness(a, b).reason) == saturates
    assert torch.equal(dequantize(*transpose_scaled(*pair, a, b, rule="tile_max"), b), x)


@pytest.mark.parametrize(("binades", "tile_max", "tight"), [(0, 1e-4, 1e-4), (6, 2e-3, 1e-3), (12, 4e-2, 2.2e-2)])
def test_share_of_elements_changed(binades: int, tile_max: float, tight: float) -> None:
    """About 0.01, 0.1 and 3% with the largest scale of the tile; 1.8% for 12 binades with the tight one."""
    x = spread_rows(1024, 1024, binades)
    codes, scales = quantize(x, ROW)
    y = dequantize(codes, scales, ROW)
    changed = []
    for rule in ("tile_max", "tight"):
        got = dequantize(*transpose_scaled(codes, scales, ROW, COLUMN, rule=rule), COLUMN)  # type: ignore[arg-type]
        changed.append(float((got != y).float().mean()))
    assert changed[1] <= changed[0]
    assert changed[0] <= tile_max
    assert changed[1] <= tight
    if binades == 12:
        assert changed[0] > 1e-2


@each_rule
@pytest.mark.parametrize("zero", ["", " zero=one", " eps=1e-10"])
def test_a_row_of_zeros_does_not_flush_its_tile(zero: str, rule: str) -> None:
    spec, to = ROW + zero, COLUMN + zero
    x = spread_rows(128, 128, 0) * 2.0**-12
    x[5] = 0
    codes, scales = one_level(quantize(x, spec))
    y = dequantize(codes, scales, spec)
    got = dequantize(*transpose_scaled(codes, scales, spec, to, rule=rule), to)  # type: ignore[arg-type]
    assert float((got != y).float().mean()) < 1e-3


def test_a_row_of_zeros_with_scale_one_would_flush_its_tile() -> None:
    """The hazard itself, in the naive way that takes the largest of all scales: the test above has power."""
    x = spread_rows(128, 128, 0) * 2.0**-12
    x[5] = 0
    lost = {}
    for zero in ("min", "one"):
        codes, scales = one_level(quantize(x, f"{ROW} zero={zero}"))
        top = scales.max()
        naive = (codes.float() * (scales / top)).to(torch.float8_e4m3fn).float() * top
        y = dequantize(codes, scales, ROW)
        lost[zero] = float(((naive == 0) & (y != 0)).float().mean())
    assert lost["min"] < 1e-3
    assert lost["one"] > 0.6


def test_a_tile_of_zeros_carries_the_smallest_scale() -> None:
    for zero, want in (("", 2.0**-126), (" zero=one", 1.0), (" eps=1e-10", 2.0**-42)):
        spec, to = ROW + zero, COLUMN + zero
        pair = quantize(torch.zeros(130, 200), spec)
        for rule in RULES:
            codes, scales = one_level(transpose_scaled(*pair, spec, to, rule=rule))  # type: ignore[arg-type]
            assert int(codes.view(torch.uint8).max()) == 0
            assert (scales == want).all()


@each_rule
def test_nan_moves_with_its_elements(rule: str) -> None:
    x = spread_rows(256, 256, 3)
    x[7, 9] = math.nan
    codes, scales = one_level(quantize(x, ROW))
    assert scales[7, 0].isnan()
    y = dequantize(codes, scales, ROW)
    new, new_scales = one_level(transpose_scaled(codes, scales, ROW, COLUMN, rule=rule))  # type: ignore[arg-type]
    got = dequantize(new, new_scales, COLUMN)
    assert torch.equal(got.isnan(), y.isnan())
    assert new_scales.isfinite().all()
    assert float((got != y)[~y.isnan()].float().mean()) < 0.01
    # A scale that is NaN over codes that are numbers is not laundered either.
    scales[100, 1] = math.nan
    got = dequantize(*transpose_scaled(codes, scales, ROW, COLUMN, rule=rule), COLUMN)  # type: ignore[arg-type]
    assert got[100, 128:].isnan().all()
    # Where codes cannot say NaN, the block does.
    new, new_scales = one_level(convert(codes, scales, ROW, MXFP4))
    y4 = dequantize(new, new_scales, MXFP4)
    assert torch.equal(y4.isnan(), dequantize(codes, scales, ROW).isnan())
    assert int(get_format("e2m1").load(new)[7, :128].max()) == 0
    assert dequantize(*convert(new, new_scales, MXFP4, COLUMN), COLUMN).isnan().sum() == 256


def test_one_nan_code_is_a_nan_block_where_codes_cannot_say_it() -> None:
    codes, scales = one_level(quantize(spread_rows(4, 128, 3), ROW))
    codes.view(torch.uint8)[2, 40] = 0xFF
    four, four_scales = one_level(convert(codes, scales, ROW, MXFP4))
    want = quantize(dequantize(codes, scales, ROW), MXFP4)
    assert same_bits(four, want[0])
    assert same_bits(*(one_level(p)[1] for p in ((four, four_scales), want)))
    assert dequantize(four, four_scales, MXFP4).isnan().nonzero().tolist() == [[2, c] for c in range(32, 64)]


@each_rule
def test_infinity_of_e5m2_stays(rule: str) -> None:
    spec, to = "e5m2 1x4 po2/rceil", "e5m2 4x1 po2/rceil"
    codes = torch.tensor([[0x7C, 0x3C, 0xFC, 0x7E]] + [[0x7B] * 4] * 3, dtype=torch.uint8).view(torch.float8_e5m2)
    scales = torch.tensor([[1.0], [8.0], [8.0], [8.0]])
    new, _ = transpose_scaled(codes, scales, spec, to, rule=rule)  # type: ignore[arg-type]
    assert new.view(torch.uint8)[0].tolist() == [0x7C, 0x30, 0xFC, 0x7E]


def test_square_blocks_serve_both_orientations() -> None:
    x = spread_rows(300, 200, 6)
    codes, scales = one_level(quantize(x, SQUARE))
    same = transpose_scaled(codes, scales, SQUARE, SQUARE)
    assert same_bits(same[0], codes)
    turned, turned_scales = one_level(quantize(x.t(), SQUARE))
    assert same_bits(turned, codes.t().contiguous())
    assert same_bits(turned_scales, scales.t().contiguous())


# -- same bits as dequantizing and quantizing again ------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_requantized(data: st.DataObject) -> None:
    M, N = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    b = data.draw(st.integers(2, 4))
    elem, to_elem = data.draw(st.sampled_from([("e4m3", "e4m3"), ("e5m2", "e5m2"), ("e4m3", "e2m1"), ("e3m2", "e2m1")]))
    rule, to_rule = (data.draw(st.sampled_from(["rceil", "floor", "ceil", "even"])) for _ in range(2))
    eps = data.draw(st.sampled_from(["", " eps=1e-10", " eps=4"]))
    blocks = [f"1x{b}"] if to_elem == "e2m1" else [f"{b}x1", f"1x{2 * b}", "row"]
    if to_elem == "e2m1":
        spec, to = f"{elem} 1x{2 * b} po2/{rule}", f"{to_elem} {blocks[0]} e8m0/{to_rule}{eps}"
    else:
        spec, to = f"{elem} 1x{b} po2/{rule}", f"{elem} {data.draw(st.sampled_from(blocks))} po2/{to_rule}{eps}"
    x = spread_rows(M, N, data.draw(st.sampled_from([0, 6, 24])), data.draw(st.integers(0, 1000)))
    x = torch.where(torch.rand(M, N, generator=torch.Generator().manual_seed(M * N)) < 0.2, 0.0, x)
    x = x * 2.0 ** data.draw(st.sampled_from([-100, 0, 90]))
    codes, scales = quantize(x, spec)
    wide = dequantize(codes, scales, spec)
    found = exactness(spec, to)
    assert found.requantized
    got, got_scales = one_level(convert(codes, scales, spec, to))
    want, want_scales = one_level(quantize(wide, to))
    assert same_bits(got, want)
    assert same_bits(got_scales, want_scales)


# -- block sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(70, 300), (3, 128), (2, 5, 200), (0, 128)])
def test_fp8_blocks_to_mxfp8_and_back(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, scales = one_level(quantize(x, ROW))
    new, new_scales = one_level(convert(codes, scales, ROW, MXFP8))
    assert same_bits(new, codes)
    want = ((scales.view(torch.int32) >> 23).repeat_interleave(4, -1)[..., : -(-shape[-1] // 32)]).to(torch.uint8)
    assert torch.equal(new_scales.view(torch.uint8), want)
    assert torch.equal(dequantize(new, new_scales, MXFP8), dequantize(codes, scales, ROW))
    back, back_scales = one_level(convert(new, new_scales, MXFP8, ROW, rule="tile_max"))
    assert same_bits(back, codes)
    assert same_bits(back_scales, scales)


@pytest.mark.parametrize("to", ["e4m3 1x32 e8m0/rceil eps=0.0001", "e4m3 1x64 po2/floor eps=0.0001"])
def test_smaller_blocks_keep_numbers_below_eps(to: str) -> None:
    """Scales that were raised to the floor of the new spec, over the same codes, would mean other numbers."""
    x = spread_rows(40, 300, 6) * 2.0**-24
    x[3] = 0
    codes, scales = one_level(quantize(x, ROW))
    assert exactness(ROW, to).kind == "value"
    got = dequantize(*convert(codes, scales, ROW, to), to)
    assert torch.equal(got, dequantize(codes, scales, ROW))
    assert got.abs().max() > 0
    assert not torch.equal(dequantize(*quantize(got, to), to), got)  # the control: the floor would have shown


def test_scales_at_the_ends_of_their_range() -> None:
    codes = torch.full((4, 128), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.tensor([[2.0**-126], [2.0**-127], [2.0**127], [math.nan]])  # the second is subnormal in fp32
    new, new_scales = one_level(convert(codes, scales, ROW, MXFP8))
    assert same_bits(new, codes)
    assert new_scales.view(torch.uint8).tolist() == [[1] * 4, [0] * 4, [254] * 4, [255] * 4]
    # E8M0's 2^-127 has no normal number in fp32: the codes take the factor.
    for rule in RULES:
        back, back_scales = one_level(convert(new, new_scales, MXFP8, ROW, rule=rule))  # type: ignore[arg-type]
        y = dequantize(back, back_scales, ROW)
        assert y[0].eq(2.0**-126).all()
        assert y[1].eq(2.0**-127).all()
        assert y[2].eq(2.0**127).all()
        assert y[3].isnan().all()
        assert (back_scales[:3] >= 2.0**-126).all()


@each_rule
def test_mxfp8_to_larger_blocks_is_exact_within_the_normal_numbers(rule: str) -> None:
    x = spread_rows(400, 64, 9).view(100, 256)
    codes, scales = quantize(x, MXFP8)
    want = dequantize(codes, scales, MXFP8)
    new, new_scales = one_level(convert(codes, scales, MXFP8, ROW, rule=rule))  # type: ignore[arg-type]
    got = dequantize(new, new_scales, ROW)
    S = new_scales.repeat_interleave(128, -1)
    large = want.abs() >= 2.0**-6 * S
    assert large.float().mean() > 0.8
    assert torch.equal(got[large], want[large])
    assert bool(((got - want).abs() <= 2.0**-10 * S).all())


# -- 4 and 8 bits ----------------------------------------------------------------------------------------------------


def all_pairs(T: int) -> tuple[Tensor, Tensor]:
    """Blocks of 32 with every largest magnitude of E4M3, and every magnitude below it, with both signs."""
    rows = []
    for top in range(127):
        row = []
        for part in range(5):
            below = [min(31 * part + i, top) | (128 * ((part + i) % 2)) for i in range(31)]
            row += [top, *below]
        rows.append(row)
    codes = torch.tensor(rows, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return codes, torch.full((127, 1), 2.0**T)


@pytest.mark.parametrize("rule", ["rceil", "floor"])
def test_fp8_to_fp4_is_the_same_as_through_bf16(rule: str) -> None:
    spec, to = "e4m3 1x160 po2/rceil", f"e2m1 1x32 e8m0/{rule}"
    for T in (*range(-10, 11), -110, 100):
        codes, scales = all_pairs(T)
        got, got_scales = one_level(convert(codes, scales, spec, to))
        want, want_scales = one_level(quantize(dequantize(codes, scales, spec).bfloat16(), to))
        assert same_bits(got, want)
        assert same_bits(got_scales, want_scales)


@pytest.mark.parametrize("rule", ["rceil", "floor"])
def test_fp8_to_fp4_by_integers(rule: str) -> None:
    """The rule of normalized significands, in integers: X = T + f - 2 (+1 above 1.5), codes round(sig / 2^(2 - d))."""
    T = 3
    codes, scales = all_pairs(T)
    got, got_scales = one_level(convert(codes, scales, "e4m3 1x160 po2/rceil", f"e2m1 1x32 e8m0/{rule}"))
    raw, fours = codes.view(torch.uint8).tolist(), get_format("e2m1").load(got).tolist()
    exponents = got_scales.view(torch.uint8).tolist()

    def normalized(code: int) -> tuple[int, int]:
        e, m = divmod(code & 127, 8)
        if e:
            return 8 + m, e - 7
        return m << (3 - (m.bit_length() - 1)), m.bit_length() - 1 - 9

    for row in range(127):
        for block in range(5):
            cells = raw[row][32 * block : 32 * block + 32]
            top = max(c & 127 for c in cells)
            X = -127
            if top:
                sig, f = normalized(top)
                X = T + f - 2 + (rule == "rceil" and sig > 12)
            assert exponents[row][block] == X + 127
            for code, four in zip(cells, fours[row][32 * block : 32 * block + 32], strict=True):
                mag = 0
                if code & 127:
                    sig, f = normalized(code)
                    d = T + f - X
                    mag = min(7, 2 * max(d, 0) + round(Fraction(sig, 1 << (2 + max(-d, 0)))))
                assert four == (8 if code & 128 else 0) | mag


@pytest.mark.parametrize("to", ["e4m3 1x64 po2/rceil", "e4m3 64x1 po2/rceil"])
def test_fp4_to_fp8_over_every_spread(to: str) -> None:
    """Every code next to a block k binades larger: exact up to 14, then rounded to the subnormal numbers of E4M3."""
    grid = GRIDS["e4m3"]
    four = torch.cat([torch.arange(16), torch.arange(16)]).to(torch.uint8)
    row = QuantSpec.parse(to).axis == -1
    for k in range(24):
        if row:
            codes, scales = torch.cat([four, four])[None], e8m0([[k - 10, -10]])
        else:
            codes, scales = torch.stack([four, four]), e8m0([[k - 10], [-10]])
        new, new_scales = one_level(convert(get_format("e2m1").store(codes), scales, MXFP4, to))
        assert (new_scales == 2.0 ** (k - 10 - 6)).all()
        small = (new[0, 32:] if row else new[1]).view(torch.uint8).tolist()
        large = (new[0, :32] if row else new[0]).view(torch.uint8).tolist()
        for c in range(16):
            value = GRIDS["e2m1"].positive[c % 8]
            sign = 128 * (c // 8)
            assert large[c] == sign | grid.nearest(value * 64)
            assert small[c] == sign | grid.nearest(value * 64 / power(k))
            if k <= 14:
                assert grid.number(small[c]) == value * 64 / power(k)
    top = [0x00, 0x60, 0x68, 0x6C, 0x70, 0x74, 0x78, 0x7C]
    assert large[:8] == top


def test_fp4_serves_rows_and_columns_with_the_same_numbers() -> None:
    x = spread_rows(300, 320, 8)
    codes, scales = quantize(x, MXFP4)
    want = dequantize(codes, scales, MXFP4)
    for to in (ROW, COLUMN, "e5m2 1x128 po2/rceil", "e4m3fnuz 128x1 po2/rceil"):
        assert torch.equal(dequantize(*convert(codes, scales, MXFP4, to), to), want)
    wide = spread_rows(300, 320, 24)
    codes, scales = quantize(wide, MXFP4)
    got = dequantize(*convert(codes, scales, MXFP4, COLUMN), COLUMN)
    assert not torch.equal(got, dequantize(codes, scales, MXFP4))


@pytest.mark.parametrize("N", [1, 31, 33, 129])
def test_an_odd_width_is_given(N: int) -> None:
    x = spread_rows(10, N, 3)
    codes, scales = one_level(quantize(x, ROW))
    four, four_scales = one_level(convert(codes, scales, ROW, MXFP4))
    assert four.shape == (10, (N + 1) // 2)
    want = dequantize(four, four_scales, MXFP4, width=N)
    for to in (ROW, COLUMN):
        eight = convert(four, four_scales, MXFP4, to, width=N)
        assert eight[0].shape == (10, N)
        assert torch.equal(dequantize(*eight, to), want)
    with pytest.raises(InputError, match="logical width"):
        convert(four, four_scales, MXFP4, ROW, width=N + 3)


def test_quantizing_to_fp4_from_fp8_instead_of_the_source() -> None:
    """Rounded twice: 7 to 10% of the elements differ, the error grows from .115 to .123."""
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    direct = dequantize(*quantize(x, MXFP4), MXFP4)
    codes, scales = quantize(x, ROW)
    via = dequantize(*convert(codes, scales, ROW, MXFP4), MXFP4)
    differ = float((direct != via).float().mean())
    assert 0.05 < differ < 0.12
    errors = [float((y - x).norm() / x.norm()) for y in (direct, via)]
    assert errors[0] == pytest.approx(0.115, abs=0.002)
    assert errors[1] == pytest.approx(0.123, abs=0.002)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b", "why"), REFUSED)
def test_refused_conversions(a: str, b: str, why: str) -> None:
    codes, scales = quantize(torch.ones(64, 128), a)
    with pytest.raises(RecipeError, match="no conversion from") as error:
        convert(codes, scales, a, b)
    assert why in str(error.value)


def test_refused_arguments() -> None:
    codes, scales = quantize(torch.ones(4, 128), ROW)
    with pytest.raises(RecipeError, match="use convert"):
        transpose_scaled(codes, scales, ROW, MXFP8)
    with pytest.raises(InputError, match="did you mean 'tight'"):
        convert(codes, scales, ROW, COLUMN, rule="tigth")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="do not belong"):
        convert(codes, torch.ones(4, 2), ROW, COLUMN)
