"""The same bits on a GPU as on the CPU."""

from __future__ import annotations

import math

import pytest
import torch

from moefx.precision import convert, dequantize, get_format, quantize

from .oracles import GRIDS, same_bits, spread_rows
from .test_quantize import ALL, parts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", GRIDS)
def test_codes(name: str) -> None:
    fmt = get_format(name)
    high = torch.arange(-(1 << 15), 1 << 15)[:, None] << 16
    x = (high + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).to(torch.int32).view(torch.float32)
    x = x[~x.isnan()]  # the sign of NaN may differ
    codes = fmt.encode(x)
    assert torch.equal(fmt.encode(x.cuda()).cpu(), codes)
    assert torch.equal(fmt.encode_by_bits(x.cuda()).cpu(), codes)
    assert same_bits(fmt.decode(codes.cuda()).cpu(), fmt.decode(codes))


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("grouped", [False, True])
def test_tensors(spec: str, grouped: bool) -> None:
    x = spread_rows(300, 260, 12)
    x[7, 9] = math.inf
    x[100:130] = 0
    offsets = torch.tensor([0, 17, 17, 250], dtype=torch.int32) if grouped else None
    there = None if offsets is None else offsets.cuda()
    codes, scales = quantize(x, spec, offsets=offsets)
    got, got_scales = quantize(x.cuda(), spec, offsets=there)
    assert all(same_bits(a.cpu(), b) for a, b in zip(parts(got_scales), parts(scales), strict=True))
    want = dequantize(codes, scales, spec, offsets=offsets)
    assert torch.equal(dequantize(got, got_scales, spec, offsets=there).cpu().nan_to_num(-1), want.nan_to_num(-1))


@pytest.mark.parametrize("to", ["e4m3 128x1 po2/rceil", "e2m1 1x32 e8m0/rceil", "e4m3 1x32 e8m0/rceil"])
def test_conversions(to: str) -> None:
    row = "e4m3 1x128 po2/rceil"
    codes, scales = quantize(spread_rows(300, 260, 12), row)
    assert isinstance(scales, torch.Tensor)
    want = convert(codes, scales, row, to)
    got = convert(codes.cuda(), scales.cuda(), row, to)
    assert same_bits(got[0].cpu(), want[0])
    assert all(same_bits(a.cpu(), b) for a, b in zip(parts(got[1]), parts(want[1]), strict=True))
