"""The turn that subtracts exponents four codes at a time, against rounding in fractions and the reference."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from moefx.kernels import registry
from moefx.kernels.transpose_scaled import shift_codes, shift_words
from moefx.precision.quantize import quantize

from .oracles import ops, randn

ROW, COLUMN = "e4m3 1x128 po2/rceil", "e4m3 128x1 po2/rceil"
SHIFTS = [*range(21), 254]


def exact(code: int, k: int) -> int:
    """The nearest E4M3 code of a number in a scale that is 2^k times as large, ties to the even code."""
    sign, magnitude = code & 0x80, code & 0x7F
    if k == 0 or magnitude == 0x7F:
        return code
    value = number(magnitude) / 2**k
    near = min(range(0x7F), key=lambda c: (abs(number(c) - value), c & 1))
    return sign | near


def number(magnitude: int) -> Fraction:
    e, m = magnitude >> 3, magnitude & 7
    return Fraction(8 + m, 8) * Fraction(2) ** (e - 7) if e else Fraction(m, 8) * Fraction(2) ** -6


@pytest.mark.parametrize("k", SHIFTS)
def test_every_code_is_rounded_to_the_nearest(k: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    got = shift_codes(codes, torch.full((256,), k, dtype=torch.int32))
    assert got.tolist() == [exact(c, k) for c in range(256)]


@pytest.mark.parametrize("k", range(15))
def test_words_are_exact_where_they_say_so(k: int) -> None:
    """All pairs of codes, in both lanes of a half word, beside codes that are always normal."""
    a, b = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    safe = torch.full_like(a, 0x7E)
    for lanes in ((a, b, safe, safe), (safe, safe, a, b)):
        codes = torch.stack(lanes, -1).to(torch.uint8).reshape(-1, 4)
        words, ok = shift_words(codes.view(torch.int32)[:, 0], torch.full((256 * 256,), k, dtype=torch.int32))
        want = shift_codes(codes, torch.full((256 * 256, 1), k, dtype=torch.int32))
        same = (words[:, None].view(torch.uint8) == want).all(-1)
        assert bool(same[ok].all())
        assert bool(ok.any())
        if k:
            assert not bool(same[~ok].all())  # the control: where a code would leave the normal ones, words are wrong


@pytest.mark.parametrize("spread", [0, 6, 24])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_provider_is_the_reference(spread: int, grouped: bool) -> None:
    gen = torch.Generator().manual_seed(spread)
    x = randn(300, 256) * torch.exp2(torch.randint(-spread, 1, (300, 1), generator=gen).float())
    x[7], x[130:200] = 0, x[130:200] * 1e-9
    x[11, 5] = float("nan")
    offsets = torch.tensor([0, 1, 1, 129, 290], dtype=torch.int32) if grouped else None
    codes, scales = quantize(x, ROW)
    assert isinstance(scales, torch.Tensor)
    codes.view(torch.uint8)[12, 3] = 0xFF  # a NaN of its own, and its sign
    args = (codes, scales, offsets, ROW, COLUMN, "tile_max")
    before = dict(registry.used().get("transpose_scaled", {}))
    got = ops.transpose_scaled(*args)
    assert registry.used()["transpose_scaled"] != before
    assert any(key.startswith("torch_words") for key in registry.used()["transpose_scaled"])
    with registry.preferring("reference"):
        want = ops.transpose_scaled(*args)
    assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8))
    assert torch.equal(got[1], want[1])
    assert not torch.equal(ops.transpose_scaled(*args[:-1], "tight")[1], want[1])  # the other rule is another one
