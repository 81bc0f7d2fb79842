"""Codes and rounding of every format against a list of fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx.errors import InputError, RecipeError
from moefx.precision import Format, get_format, register_format

from .oracles import GRIDS, Grid

each_format = pytest.mark.parametrize("name", GRIDS)
WAYS = ("encode", "encode_by_bits")
CODES = torch.arange(256, dtype=torch.uint8)


def encode(name: str, x: float, **options: object) -> int:
    return int(get_format(name).encode(torch.tensor([x], dtype=torch.float32), **options))  # type: ignore[arg-type]


def probes(grid: Grid) -> list[float]:
    """All numbers, all midpoints, both neighbours of each in fp32, and numbers beyond the largest one."""
    numbers = [*grid.positive, grid.max * 2]
    exact = [float(v) for v in numbers] + [float((a + b) / 2) for a, b in pairwise(numbers)]
    t = torch.tensor(exact)
    near = torch.cat([t, torch.nextafter(t, torch.tensor(0.0)), torch.nextafter(t, torch.tensor(math.inf))])
    return torch.cat([near, -near]).tolist()


@each_format
def test_every_code_means_the_number_of_its_definition(name: str) -> None:
    fmt, grid = get_format(name), GRIDS[name]
    codes = CODES[: 2 * grid.sign]
    for way in (fmt.decode, fmt.decode_by_bits):
        for code, got in enumerate(way(codes).tolist()):
            want = grid.value(code)
            assert got == want or (math.isnan(got) and math.isnan(want)), (code, got, want)
            assert math.isnan(want) or math.copysign(1, got) == math.copysign(1, want)
    assert [code for code in range(2 * grid.sign) if not isinstance(grid.number(code), Fraction)] == (
        codes[fmt.is_special(codes)].tolist()
    )


def test_parameters_are_those_of_the_standards() -> None:
    rows = {
        "e4m3": (8, 448, 2**-6, 2**-9, 8),
        "e5m2": (8, 57344, 2**-14, 2**-16, 15),
        "e4m3fnuz": (8, 240, 2**-7, 2**-10, 7),
        "e2m1": (4, 6, 1, 0.5, 2),
        "e3m2": (6, 28, 0.25, 0.0625, 4),
        "e2m3": (6, 7.5, 1, 0.125, 2),
    }
    for name, row in rows.items():
        f = get_format(name)
        assert (f.bits, f.max, f.min_normal, f.quantum, f.emax) == row
    e8m0 = get_format("e8m0")
    assert (e8m0.bits, e8m0.max, e8m0.quantum, e8m0.emax) == (8, 2.0**127, 2.0**-127, 127)
    assert get_format("e2m1").decode(CODES[:16]).tolist()[:8] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@each_format
@pytest.mark.parametrize("way", WAYS)
def test_rounds_to_the_nearest_number_ties_to_the_even_code(name: str, way: str) -> None:
    fmt, grid = get_format(name), GRIDS[name]
    xs = probes(grid)
    got = getattr(fmt, way)(torch.tensor(xs, dtype=torch.float32)).tolist()
    assert got == [grid.nearest(x) for x in xs]


@each_format
@settings(max_examples=60, deadline=None)
@given(x=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_rounds_any_fp32_number(name: str, x: list[float]) -> None:
    fmt, grid = get_format(name), GRIDS[name]
    want = [grid.nearest(v) for v in x]
    assert fmt.encode(torch.tensor(x, dtype=torch.float32)).tolist() == want
    assert fmt.encode_by_bits(torch.tensor(x, dtype=torch.float32)).tolist() == want


@pytest.mark.parametrize("name", ["e4m3", "e4m3fnuz", "e5m2"])
def test_the_cast_of_torch_gives_the_bits_of_the_definition(name: str) -> None:
    fmt = get_format(name)
    g = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31 - 1, (1 << 20,), generator=g, dtype=torch.int32).view(torch.float32)
    usual = torch.randn(1 << 20, generator=g) * torch.exp2(torch.randint(-20, 18, (1 << 20,), generator=g).float())
    for x in (patterns, usual):
        assert torch.equal(fmt.encode(x), fmt.encode_by_bits(x))


@each_format
def test_the_fast_way_for_every_upper_half_of_fp32(name: str) -> None:
    """The cast of torch, and tables for formats that torch lacks. Rounding to 8 bits sees the lower half of a number
    only as zero, below, at or above a half of its last place."""
    fmt = get_format(name)
    high = torch.arange(-(1 << 15), 1 << 15)[:, None] << 16
    x = (high + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).to(torch.int32).view(torch.float32)
    for saturate in (True, False) if fmt.has_nan else (True,):
        assert torch.equal(fmt.encode(x, saturate=saturate), fmt.encode_by_bits(x, saturate=saturate))


def test_saturation_infinity_and_nan() -> None:
    for x in (448.0, 449.0, 464.0, 465.0, 479.0, 480.0, 1e30, math.inf):
        assert (encode("e4m3", x), encode("e4m3", -x)) == (0x7E, 0xFE)
    assert [encode("e4m3", x, saturate=False) for x in (463.0, 464.0, 464.1, 480.0, math.inf)] == [
        0x7E,
        0x7E,
        0x7F,
        0x7F,
        0x7F,
    ]
    assert [encode("e5m2", x) for x in (57344.0, 61440.0, 1e30, math.inf, -math.inf)] == [0x7B, 0x7B, 0x7B, 0x7B, 0xFB]
    assert [encode("e5m2", x, saturate=False) for x in (61439.0, 61440.0, -math.inf)] == [0x7B, 0x7C, 0xFC]
    assert [encode("e4m3fnuz", x, saturate=False) for x in (240.0, 247.0, 248.0, math.inf)] == [0x7F, 0x7F, 0x80, 0x80]
    assert [encode("e4m3", math.nan), encode("e4m3fnuz", math.nan), encode("e5m2", math.nan)] == [0x7F, 0x80, 0x7F]
    assert [encode(n, math.nan) for n in ("e2m1", "e3m2", "e2m3")] == [0, 0, 0]
    assert [encode("e2m1", x) for x in (5.0, 5.1, 6.0, 6.9, 7.0, math.inf, -math.inf)] == [6, 7, 7, 7, 7, 7, 15]
    assert [encode("e2m1", x) for x in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5)] == [0, 2, 2, 4, 4, 6]
    assert encode("e4m3", -0.0) == 0x80
    assert encode("e4m3fnuz", -0.0) == encode("e4m3fnuz", -1e-9) == 0


@pytest.mark.parametrize("name", ["e4m3", "e4m3fnuz", "e5m2", "e3m3ieee", "e2m2fn"])
def test_without_saturation_what_rounds_beyond_the_largest_number_is_special(name: str) -> None:
    fmt, grid = get_format(name), GRIDS[name]
    step = grid.max - grid.positive[-2]
    half = float(grid.max + step / 2)
    below, above = math.nextafter(half, 0), math.nextafter(half, math.inf)
    x = torch.tensor([float(grid.max), half * (1 - 2**-20), half * (1 + 2**-20), 1e38], dtype=torch.float32)
    assert below < half < above
    got = fmt.encode(x, saturate=False)
    assert fmt.is_special(got).tolist() == [False, False, True, True]
    assert got[:2].tolist() == [fmt.max_code] * 2


def test_exponent_format() -> None:
    e8m0 = get_format("e8m0")
    values = e8m0.decode(CODES)
    assert values[:-1].tolist() == [2.0 ** (c - 127) for c in range(255)]
    assert values[255].isnan()
    assert torch.equal(e8m0.encode(values), CODES)
    x = torch.tensor([1.5, 3.0, 1.4, 1.6, 0.0, -1.0, math.inf, math.nan, 2.0**-127 * 1.5, 2.0**-140])
    assert e8m0.encode(x).tolist() == [128, 128, 127, 128, 0, 255, 254, 255, 0, 0]
    assert e8m0.encode(torch.tensor([1.75 * 2.0**127, math.inf]), saturate=False).tolist() == [255, 255]
    assert torch.equal(CODES.view(torch.float8_e8m0fnu).float()[:-1], values[:-1])


@each_format
def test_stochastic_rounding_is_unbiased_and_stays_between_neighbours(name: str) -> None:
    fmt, grid = get_format(name), GRIDS[name]
    low, high = grid.positive[2], grid.positive[3]
    for part in (0.0, 0.125, 0.5, 0.875):
        x = float(low) + part * float(high - low)
        g = torch.Generator().manual_seed(1)
        codes = fmt.encode(torch.full((20000,), x), round="sr", generator=g)
        assert set(codes.tolist()) <= {2, 3}
        share = float((codes == 3).float().mean())
        assert abs(share - part) <= 4 * math.sqrt(part * (1 - part) / 20000)
        again = fmt.encode(torch.full((20000,), x), round="sr", generator=torch.Generator().manual_seed(1))
        assert torch.equal(codes, again)
    every = fmt.decode(torch.arange(fmt.max_code + 1, dtype=torch.uint8))
    assert fmt.encode(every, round="sr").tolist() == list(range(fmt.max_code + 1))
    beyond = torch.tensor([1e30, -1e30])
    assert fmt.encode(beyond, round="sr").tolist() == [fmt.max_code, fmt.max_code | grid.sign]


# -- storage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0, 1, 2, 7, 8])
def test_nibbles_even_column_low(width: int) -> None:
    fmt = get_format("e2m1")
    codes = (torch.arange(3 * width).view(3, width) % 16).to(torch.uint8)
    stored = fmt.store(codes)
    assert stored.dtype == torch.uint8
    assert tuple(stored.shape) == fmt.stored_shape((3, width)) == (3, (width + 1) // 2)
    assert stored.numel() == fmt.nbytes((3, width))
    assert torch.equal(fmt.load(stored, width), codes)
    for i in range(width):
        assert torch.equal(stored[:, i // 2] >> 4 * (i % 2) & 15, codes[:, i])
    if width % 2:
        assert (stored[:, -1] >> 4).eq(0).all()
        assert fmt.load(stored).shape == (3, width + 1)
    with pytest.raises(InputError, match="logical width"):
        fmt.load(stored, width + 2 + width % 2)


def test_other_formats_take_a_byte_per_code() -> None:
    codes = CODES[:60].view(3, 20)
    assert get_format("e4m3").store(codes).dtype == torch.float8_e4m3fn
    assert get_format("e5m2").store(codes).dtype == torch.float8_e5m2
    six = get_format("e3m2")
    assert six.store(codes).dtype == torch.uint8
    assert six.nbytes((3, 20)) == 60
    for name in ("e4m3", "e3m2"):
        assert torch.equal(get_format(name).load(get_format(name).store(codes)), codes)
    with pytest.raises(InputError, match="stored as"):
        get_format("e4m3").load(codes.view(torch.float8_e5m2))


# -- the registry ----------------------------------------------------------------------------------------------------


def test_registering_a_format() -> None:
    new = Format("e3m1", 3, 1, 3)
    assert register_format(new) is new
    assert register_format(Format("e3m1", 3, 1, 3)) == get_format("e3m1")
    with pytest.raises(RecipeError, match="other parameters"):
        register_format(Format("e3m1", 3, 1, 4))
    with pytest.raises(RecipeError, match="other parameters"):
        register_format(Format("e4m3", 4, 3, 7, "ieee"))
    with pytest.raises(RecipeError, match="other numbers"):
        register_format(Format("e4m3odd", 4, 3, 6, "fn", torch.float8_e4m3fn))
    with pytest.raises(RecipeError, match="did you mean 'e4m3'"):
        get_format("e4m33")


@pytest.mark.parametrize(
    "parameters",
    [
        ("E4M3", 4, 3, 7, "fn"),
        ("e", 5, 3, 7, "fn"),
        ("e", 0, 3, 1, "none"),
        ("e", 4, 3, 7, "fnz"),
        ("e", 7, 0, 140, "none"),
        ("e", 7, 0, -10, "none"),
        ("e", 4, 0, 7, "ieee"),
        ("e", 2, 1, 1, "none", torch.float8_e4m3fn),
    ],
)
def test_parameters_that_make_no_format_are_refused(parameters: tuple[object, ...]) -> None:
    with pytest.raises(RecipeError, match="not a usable number format"):
        Format(*parameters)  # type: ignore[arg-type]


def test_what_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(InputError, match="made from fp32"):
        get_format("e4m3").encode(torch.zeros(1, dtype=torch.float64))
    with pytest.raises(InputError, match="only saturate"):
        get_format("e2m1").encode(torch.zeros(1), saturate=False)
