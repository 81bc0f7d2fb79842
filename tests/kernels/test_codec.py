"""The scales and codes of kernels against those of `moefx.precision`, bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from moefx.kernels.casts import ELEMENTS, known
from moefx.kernels.gpu import codec
from moefx.precision.formats import get_format
from moefx.precision.scaling import scale_values, scales_from_amax
from moefx.precision.spec import QuantSpec

from .interpreter import assert_same_bits

RULES = ("po2/rceil", "po2/floor", "po2/ceil", "po2/even", "e8m0/rceil", "e8m0/floor", "e8m0/even", "f32/exact")
OPTIONS = ("", " eps=1e-10", " zero=one")
SPECS = [f"{elem} 1x32 {rule}{option}" for elem in ELEMENTS for rule in RULES for option in OPTIONS]
SIZE = 4096


@triton.jit
def _scales(
    amax,
    out,
    factor,
    EMAX: tl.constexpr,
    BOUND: tl.constexpr,
    LEAST: tl.constexpr,
    MAX: tl.constexpr,
    EPS: tl.constexpr,
    ZERO_ONE: tl.constexpr,
    PO2: tl.constexpr,
    BYTES: tl.constexpr,
    N: tl.constexpr,
):
    at = tl.arange(0, N)
    top = codec.magnitude_bits(tl.load(amax + at)).to(tl.float32, bitcast=True)
    if PO2:
        field = codec.po2_field(top, EMAX, BOUND, LEAST, EPS, ZERO_ONE)
        tl.store(factor + at, codec.inverse(field))
        if BYTES:
            tl.store(out + at, field.to(tl.uint8))
        else:
            tl.store(out + at, codec.scale_value(field))
    else:
        tl.store(out + at, codec.f32_scale(top, MAX, EPS, ZERO_ONE))


@triton.jit
def _values(field, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, codec.scale_value(tl.load(field + at).to(tl.int32)))


@triton.jit
def _encode(x, out, N: tl.constexpr, ELEM: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, codec.encode(tl.load(x + at), ELEM))


@triton.jit
def _decode(codes, out, N: tl.constexpr, ELEM: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, codec.decode(tl.load(codes + at), ELEM))


@triton.jit
def _pack(codes, packed, back, R: tl.constexpr, C: tl.constexpr):
    row, col, half = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :], tl.arange(0, C // 2)[None, :]
    b = codec.pack4(tl.load(codes + row * C + col))
    tl.store(packed + row * (C // 2) + half, b)
    tl.store(back + row * C + col, codec.unpack4(b))


def magnitudes(spec: QuantSpec) -> torch.Tensor:
    """Largest magnitudes of blocks: around every bound of the rule at many exponents, and all that is special."""
    fractions = torch.tensor([0, 1, 0x1FFFFF, 0x200000, 0x3FFFFF, 0x400000, 0x400001, 0x5FFFFF, 0x600000, 0x600001])
    fractions = torch.cat([fractions, torch.tensor([0x6FFFFF, 0x700000, 0x77FFFF, 0x780000, 0x7FFFFF])])
    near = ((torch.arange(0, 255) << 23)[:, None] + fractions).flatten()  # exponent field 0: subnormal numbers
    small = torch.tensor([1, 2, 3, 0x3FFFFF, 0x400000, 0x7FFFFF, 0, 0x7F800000, 0x7F800001, 0x7FC00000])
    top = torch.cat([small, near]).to(torch.int32).view(torch.float32)
    around = torch.tensor([spec.eps, spec.format.max, spec.format.max * 2.0**-126])
    around = torch.cat([around, around.nextafter(torch.tensor(torch.inf)), around.nextafter(torch.tensor(0.0))])
    top = torch.cat([top, around])
    return torch.cat([top, torch.zeros(SIZE - top.numel())])


@pytest.mark.parametrize("text", SPECS)
def test_scales(text: str) -> None:
    spec, sizes = QuantSpec.parse(text), codec.constants(text)
    assert known(text)
    amax = magnitudes(spec)
    want = scales_from_amax(amax, spec)
    got, factor = torch.empty_like(want), torch.empty(SIZE)
    _scales[(1,)](amax, codec.as_bytes(got), factor, N=SIZE, **{k: v for k, v in sizes.items() if k != "ELEM"})
    assert_same_bits(codec.as_bytes(got), codec.as_bytes(want), text)
    if spec.is_po2:
        assert_same_bits(factor, 1.0 / scale_values(want, spec), text)


def test_scale_values_of_all_fields() -> None:
    field, got = torch.arange(256, dtype=torch.uint8), torch.empty(256)
    _values[(1,)](field, got, N=256)
    assert_same_bits(got, get_format("e8m0").decode_by_bits(field))


def numbers(elem: str) -> torch.Tensor:
    """Every number of the format, everything halfway between two, neighbours of both, and what is out of range."""
    fmt = get_format(elem)
    every = fmt.decode_by_bits(torch.arange(1 << fmt.bits, dtype=torch.uint8))
    every = every[every.isfinite()].sort().values
    between = (every[1:] + every[:-1]) / 2
    x = torch.cat([every, between, torch.tensor([fmt.max * 1.03, fmt.max * 1.07, fmt.max * 4, 1e30, 1e-30, 1e-40])])
    x = torch.cat([x, x.nextafter(torch.tensor(torch.inf)), x.nextafter(torch.tensor(-torch.inf))])
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan])])
    spread = torch.randn(SIZE - x.numel(), generator=torch.Generator().manual_seed(0))
    return torch.cat([x, spread * torch.exp2(torch.linspace(-20, 16, spread.numel()))])


def encoded(x: torch.Tensor, elem: str) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=torch.uint8)
    _encode[(1,)](x, out, N=x.numel(), ELEM=elem)
    return out


def _alike(codes: torch.Tensor, elem: str) -> torch.Tensor:
    return codes if elem == "e2m1" else codes.view(get_format(elem).storage)  # NaN has many codes


@pytest.mark.parametrize("elem", ELEMENTS)
def test_encode(elem: str) -> None:
    x = numbers(elem)
    assert_same_bits(_alike(encoded(x, elem), elem), _alike(get_format(elem).encode_by_bits(x), elem))


@pytest.mark.parametrize("elem", ELEMENTS)
def test_decode(elem: str) -> None:
    fmt = get_format(elem)
    codes = torch.arange(1 << fmt.bits, dtype=torch.uint8)
    got = torch.empty(codes.shape)
    _decode[(1,)](codes, got, N=codes.numel(), ELEM=elem)
    assert_same_bits(got, fmt.decode_by_bits(codes))


def test_pack() -> None:
    codes = torch.randint(0, 16, (4, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed, back = torch.empty(4, 16, dtype=torch.uint8), torch.empty_like(codes)
    _pack[(1,)](codes, packed, back, R=4, C=32)
    assert_same_bits(packed, get_format("e2m1").store(codes))
    assert_same_bits(back, codes)


@pytest.mark.parametrize("elem", ELEMENTS)
def test_a_wrong_code_is_seen(elem: str) -> None:
    """Were ties rounded away from zero, or numbers a bit off before they are rounded, the comparison would fail."""
    x = numbers(elem)
    want = _alike(get_format(elem).encode_by_bits(x), elem)
    with pytest.raises(AssertionError, match="differ"):
        assert_same_bits(_alike(encoded(x * (1 + 2.0**-22), elem), elem), want)


def test_what_is_not_known() -> None:
    for text in ("e2m1 1x16 e4m3+f32/exact", "e4m3 tensor f32/exact delayed", "e4m3 1x128 po2/rceil sr"):
        assert not known(text)
    assert not known("e4m3fnuz 1x128 po2/rceil")
