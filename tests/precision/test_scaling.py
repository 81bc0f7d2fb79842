"""Scale rules against comparisons of fractions with powers of two."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from moefx.precision import QuantSpec, get_format, scales_from_amax
from moefx.precision.scaling import two_level_scales

from .oracles import GRIDS, scale

RULES = ("rceil", "floor", "ceil", "even")
each_rule = pytest.mark.parametrize("rule", RULES)
each_elem = pytest.mark.parametrize("elem", ["e4m3", "e5m2", "e2m1", "e4m3fnuz", "e3m2", "e2m3", "e2m1small"])


def po2(elem: str, rule: str, scale: str = "po2", **options: object) -> QuantSpec:
    return QuantSpec(elem, "1x128", scale, rule, **options)  # type: ignore[arg-type]


def numbers(scales: torch.Tensor) -> torch.Tensor:
    if scales.dtype == torch.float8_e8m0fnu:
        return get_format("e8m0").decode(scales.view(torch.uint8))
    return scales


def mantissas(n: int) -> torch.Tensor:
    """1 <= m < 2: both ends, the neighbourhood of all short fractions, and random ones."""
    g = torch.Generator().manual_seed(0)
    short = torch.arange(64) << 17
    near = (short[:, None] + torch.arange(-3, 4)).flatten()
    all_of_them = torch.cat([near, torch.randint(0, 1 << 23, (n,), generator=g)]).clamp(0, (1 << 23) - 1)
    return (all_of_them + (127 << 23)).to(torch.int32).view(torch.float32)


@each_elem
@each_rule
def test_definition_for_sampled_mantissas(elem: str, rule: str) -> None:
    amax = mantissas(300)
    got = scales_from_amax(amax, po2(elem, rule)).tolist()
    assert got == [scale(a, elem, "po2", rule) for a in amax.tolist()]


@each_elem
@each_rule
@pytest.mark.parametrize("kind", ["po2", "e8m0"])
def test_definition_near_every_power_of_two_of_the_largest_number(elem: str, rule: str, kind: str) -> None:
    top = torch.tensor([float(GRIDS[elem].max)], dtype=torch.float64)
    at = torch.cat([top, torch.ones(1, dtype=torch.float64)]) * torch.exp2(torch.arange(-165, 128).double())[:, None]
    amax = at[at < 3e38].to(torch.float32)
    amax = torch.cat([amax, *(torch.nextafter(amax, torch.tensor(end)) for end in (0.0, 3e38))])
    got = numbers(scales_from_amax(amax, po2(elem, rule, kind))).tolist()
    assert got == [scale(a, elem, kind, rule) for a in amax.tolist()]


@each_elem
def test_rceil_and_ceil_never_saturate_and_rceil_wastes_no_binade(elem: str) -> None:
    top = float(GRIDS[elem].max)
    amax = mantissas(2000)
    for rule in ("rceil", "ceil"):
        assert (amax / scales_from_amax(amax, po2(elem, rule))).max() <= top
    scaled = amax / scales_from_amax(amax, po2(elem, "rceil"))
    assert scaled.min() > top / 2
    floor = amax / scales_from_amax(amax, po2(elem, "floor"))
    emax = get_format(elem).emax
    assert floor.min() >= 2**emax
    assert floor.max() < 2 ** (emax + 1)


def by_division(amax: torch.Tensor, top: float) -> torch.Tensor:
    """The form with one fp32 division: exponent of amax / max, one more with a mantissa above 1."""
    u = (amax / top).view(torch.int32)
    return torch.exp2(((u >> 23) - 127 + ((u & 0x7FFFFF) != 0)).double()).float()


def by_encode_scale(amax: torch.Tensor, top: float) -> torch.Tensor:
    """The form of Transformer Engine: the mantissa of max / amax is cut off, and the rest inverted."""
    return 1 / ((top / amax).view(torch.int32) & 0x7F800000).view(torch.float32)


@each_elem
def test_three_ways_to_write_rceil_agree(elem: str) -> None:
    top = float(GRIDS[elem].max)
    for n in (-80, -1, 0, 60):
        amax = mantissas(20000) * 2.0**n
        got = scales_from_amax(amax, po2(elem, "rceil"))
        assert torch.equal(got, by_division(amax, top))
        assert torch.equal(got, by_encode_scale(amax, top))


@pytest.mark.nightly
@each_elem
def test_three_ways_to_write_rceil_agree_for_every_mantissa(elem: str) -> None:
    top = float(GRIDS[elem].max)
    amax = torch.arange(127 << 23, 128 << 23, dtype=torch.int32).view(torch.float32)
    got = scales_from_amax(amax, po2(elem, "rceil"))
    assert torch.equal(got, by_division(amax, top))
    assert torch.equal(got, by_encode_scale(amax, top))
    if elem == "e4m3":
        reciprocal = (amax * torch.tensor(1 / 448.0)).view(torch.int32)
        with_product = torch.exp2(((reciprocal >> 23) - 127 + ((reciprocal & 0x7FFFFF) != 0)).double()).float()
        assert torch.equal(got, with_product)


@each_rule
@pytest.mark.parametrize("kind", ["po2", "e8m0"])
def test_corners_of_powers_of_two(rule: str, kind: str) -> None:
    spec = po2("e4m3", rule, kind)
    amax = torch.tensor([0.0, 2.0**-149, 2.0**-130, 2.0**-126, math.inf, math.nan])
    got = numbers(scales_from_amax(amax, spec))
    least = 2.0**-127 if kind == "e8m0" else 2.0**-126
    assert got[:4].tolist() == [least] * 4
    assert got[4:].isnan().all()
    if kind == "e8m0":
        assert scales_from_amax(amax, spec).view(torch.uint8).tolist() == [0, 0, 0, 0, 255, 255]
    one = numbers(scales_from_amax(amax, po2("e4m3", rule, kind, zero="one")))
    assert one[:2].tolist() == [1.0, least]


def test_eps_is_a_floor() -> None:
    spec = po2("e4m3", "rceil", eps=1e-10)
    amax = torch.tensor([0.0, 1e-20, 1e-10, 1.0, math.nan])
    got = scales_from_amax(amax, spec)
    assert got[:3].tolist() == [2.0**-42] * 3  # as FP8-Flow-MoE's zero blocks
    assert got[3] == scales_from_amax(amax, po2("e4m3", "rceil"))[3]
    assert got[4].isnan()


def test_exact_scales() -> None:
    spec = QuantSpec.parse("e4m3 row f32/exact")
    amax = torch.tensor([448.0, 1.0, 3.4e38, 1e-40, 0.0, math.inf, math.nan])
    got = scales_from_amax(amax, spec)
    assert got[:3].tolist() == [scale(a, "e4m3", "f32", "exact") for a in amax[:3].tolist()]
    assert got[3:5].tolist() == [2.0**-126] * 2
    assert got[5:].isnan().all()
    assert scales_from_amax(amax, QuantSpec.parse("e4m3 row f32/exact zero=one"))[4] == 1
    assert scales_from_amax(torch.zeros(1), QuantSpec.parse("e4m3 row f32/exact eps=1e-4")) == torch.tensor(1e-4) / 448


def test_a_largest_scale_that_fits() -> None:
    top = torch.tensor([torch.finfo(torch.float32).max])
    for elem in ("e4m3", "e2m1"):
        for rule in RULES:
            got = float(scales_from_amax(top, po2(elem, rule)))
            assert got == scale(float(top), elem, "po2", rule)
            assert math.isfinite(got)


def test_two_levels() -> None:
    """s_b = E4M3(amax_b / 6 / (amax_t / (448 * 6))), from the definition in fractions up to fp32's rounding."""
    g = torch.Generator().manual_seed(0)
    amax = torch.rand(40, 5, generator=g) * torch.exp2(torch.randint(-9, 3, (40, 5), generator=g).float())
    amax[3, 2], amax[5, 1], amax[6, 0] = 0.0, math.nan, math.inf
    block, matrix = two_level_scales(amax, QuantSpec.parse("e2m1 1x16 e4m3+f32/exact"))
    top = max(a for a in amax.flatten().tolist() if math.isfinite(a))
    assert matrix.shape == (1, 1)
    assert float(matrix) == pytest.approx(top / (448 * 6), rel=1e-6)
    got = block.float()
    assert got[5, 1].isnan()
    assert got[6, 0].isnan()
    assert got.isnan().sum() == 2
    assert got[3, 2] == 2.0**-9
    assert float(got.nan_to_num().max()) == 448
    grid = GRIDS["e4m3"]
    differ = 0
    for a, s in zip(amax.flatten().tolist(), got.flatten().tolist(), strict=True):
        if math.isfinite(a) and a:
            code = max(grid.nearest(Fraction(a) / 6 * 448 * 6 / Fraction(top)), 1)
            differ += grid.value(code) != s
    assert differ <= 1  # a tie may fall the other way
    assert two_level_scales(torch.zeros(2, 3), QuantSpec.parse("e2m1 1x16 e4m3+f32/exact"))[1] == 2.0**-126
