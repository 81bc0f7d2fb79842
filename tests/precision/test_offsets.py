"""Rows of experts: one grouped call is one call per expert, and rows of nobody do not matter."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx.precision import QuantSpec, TwoLevel, convert, dequantize, get_format, quality, quantize, transpose_scaled

from . import oracles
from .oracles import same_bits, spread_rows

Tensor = torch.Tensor
ROW, COLUMN, SQUARE = "e4m3 1x128 po2/rceil", "e4m3 128x1 po2/rceil", "e4m3 128x128 po2/rceil"
MXFP4, NVFP4 = "e2m1 1x32 e8m0/rceil", "e2m1 1x16 e4m3+f32/exact"
SPECS = (
    ROW,
    COLUMN,
    SQUARE,
    MXFP4,
    "e4m3 128x1 f32/exact",
    "e4m3 column f32/exact",
    "e5m2 tensor po2/rceil",
    "e2m1 32x1 e8m0/floor",
    "e3m2 16x16 e8m0/rceil",
    "e4m3 1x128 po2/rceil zero=one",
    "e4m3 128x1 po2/rceil eps=1e-10",
)
SIZES = {
    "edges": [0, 1, 15, 16, 17, 127, 128, 129, 0],
    "hot": [0, 0, 500, 0],
    "one": [300],
    "none": [0, 0, 0],
    "aligned": [128, 256, 0, 128],
}
each_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def offsets_of(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)


def block_rows(sizes: list[int], br: int | None) -> list[int]:
    return [1 if br is None else -(-m // br) for m in sizes]


def rows_with_garbage(sizes: list[int], N: int, spare: int) -> Tensor:
    x = spread_rows(sum(sizes) + spare, N, 6)
    x[sum(sizes) :] = math.nan
    return x


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("spare", [0, 40])
@each_size
def test_a_grouped_call_is_one_call_per_expert(sizes: list[int], spare: int, spec: str) -> None:
    x = rows_with_garbage(sizes, 70, spare)
    offsets = offsets_of(sizes)
    s = QuantSpec.parse(spec)
    codes, scales = quantize(x, spec, offsets=offsets)
    assert isinstance(scales, Tensor)
    assert scales.shape == s.scale_shape(x.shape, len(sizes))
    y = dequantize(codes, scales, spec, offsets=offsets)
    seen = 0
    for (start, end), rows in zip(pairwise(offsets.tolist()), block_rows(sizes, s.br), strict=True):
        one, one_scales = quantize(x[start:end], spec)
        assert same_bits(codes[start:end], one)
        assert torch.equal(y[start:end], dequantize(one, one_scales, spec))
        if end > start:
            assert same_bits(scales[seen : seen + rows], one_scales)
        seen += rows
    if s.br != 1 and s.br is not None:
        assert seen <= scales.shape[0]
    behind = scales[seen:]
    least = 2.0**-127 if s.scale == "e8m0" else 2.0**-126
    numbers = get_format("e8m0").decode(behind.view(torch.uint8)) if s.scale == "e8m0" else behind
    assert (numbers == least).all()
    assert int(codes.view(torch.uint8)[sum(sizes) :].sum()) == 0
    assert bool((y[sum(sizes) :] == 0).all())
    assert math.isfinite(quality(x, codes, scales, spec, offsets)["underflow"])


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    spare=st.integers(0, 5),
    br=st.integers(1, 5),
    bc=st.integers(2, 4),
    seed=st.integers(0, 99),
)
def test_definition_with_experts(sizes: list[int], spare: int, br: int, bc: int, seed: int) -> None:
    M = sum(sizes) + spare
    x = spread_rows(M, 5, 5, seed)
    offsets = offsets_of(sizes)
    codes, scales = quantize(x, f"e4m3 {br}x{bc} po2/rceil", offsets=offsets)
    live = sum(sizes)
    want, want_scales = oracles.quantize(x[:live], "e4m3", br, bc, "po2", "rceil", offsets.tolist())
    assert codes.view(torch.uint8)[:live].tolist() == want
    assert isinstance(scales, Tensor)
    assert scales[: len(want_scales)].tolist() == want_scales
    assert (scales[len(want_scales) :] == 2.0**-126).all()
    assert scales.shape[0] == (M if br == 1 else M // br + len(sizes))


def test_rows_of_nobody_do_not_count_for_the_scale_of_the_matrix() -> None:
    x = spread_rows(40, 64, 3)
    offsets = torch.tensor([0, 10, 30], dtype=torch.int32)
    want = quantize(x[:30], NVFP4)
    x[30:] = 1e30
    codes, scales = quantize(x, NVFP4, offsets=offsets)
    assert isinstance(scales, TwoLevel)
    assert isinstance(want[1], TwoLevel)
    assert same_bits(codes[:30], want[0])
    assert same_bits(scales.block[:30], want[1].block)
    assert same_bits(scales.matrix, want[1].matrix)
    assert (scales.block[30:].float() == 2.0**-9).all()


@pytest.mark.parametrize("spec", [*SPECS, NVFP4, "e5m2 1x16 e4m3+f32/exact"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_scale_of_the_last_block_is_not_that_of_nobody(spec: str, bad: float) -> None:
    x, offsets = spread_rows(6, 32, 3), torch.tensor([1, 2, 4], dtype=torch.int32)
    x[1:4] = bad  # the last row of blocks, and the whole matrix
    codes, scales = quantize(x, spec, offsets=offsets)
    assert int(codes.view(torch.uint8)[[0, 4, 5]].sum()) == 0
    assert bool(dequantize(codes, scales, spec, offsets=offsets)[1:4].isnan().all())


@pytest.mark.parametrize("to", ["e4m3 1x32 po2/rceil", "e4m3 128x1 po2/rceil", "e2m1 32x1 e8m0/rceil"])
def test_a_converted_nan_scale_is_not_that_of_nobody(to: str) -> None:
    x, offsets, spec = spread_rows(6, 128, 3), torch.tensor([1, 2, 4], dtype=torch.int32), "e4m3 32x1 po2/rceil"
    x[1:4] = math.nan
    codes, scales = quantize(x, spec, offsets=offsets)
    new, _ = convert(codes, scales, spec, to, offsets=offsets)
    assert int(new.view(torch.uint8)[[0, 4, 5]].sum()) == 0


def test_one_by_one_and_empty_matrices_keep_their_shapes() -> None:
    sizes = ((1, 1, "column", "row"), (1, 1, "row", "column"), (1, 0, "1x2", "row"), (0, 1, "2x1", "column"))
    for M, N, spec, to in sizes:
        for offsets in (None, torch.tensor([0, M, M], dtype=torch.int32)):
            spec_, to_ = (f"e4m3 {block} po2/rceil" for block in (spec, to))
            q, want = (quantize(torch.ones(M, N), s, offsets=offsets) for s in (spec_, to_))
            new = convert(*q, spec_, to_, offsets=offsets, rule="tile_max")
            assert [t.shape for t in new] == [t.shape for t in want]  # type: ignore[union-attr]
            assert same_bits(new[0], want[0])


@each_size
@pytest.mark.parametrize("rule", ["tight", "tile_max"])
@pytest.mark.parametrize("spec", [ROW, "e5m2 1x128 e8m0/floor"])
def test_a_grouped_transpose_is_one_per_expert(sizes: list[int], spec: str, rule: str) -> None:
    x = rows_with_garbage(sizes, 140, 33)
    offsets = offsets_of(sizes)
    to = QuantSpec.parse(spec).transposed()
    codes, scales = quantize(x, spec, offsets=offsets)
    codes.view(torch.uint8)[sum(sizes) :] = 0x55  # rows of nobody may hold anything
    new, new_scales = transpose_scaled(codes, scales, spec, to, offsets=offsets, rule=rule)  # type: ignore[arg-type]
    assert isinstance(new_scales, Tensor)
    assert new_scales.shape == to.scale_shape(x.shape, len(sizes))
    seen = 0
    for (start, end), rows in zip(pairwise(offsets.tolist()), block_rows(sizes, 128), strict=True):
        one = transpose_scaled(*quantize(x[start:end], spec), spec, to, rule=rule)  # type: ignore[arg-type]
        assert same_bits(new[start:end], one[0])
        assert isinstance(one[1], Tensor)
        assert same_bits(new_scales[seen : seen + rows], one[1])
        seen += rows
    assert int(new.view(torch.uint8)[sum(sizes) :].sum()) == 0
    least = 0 if to.scale == "e8m0" else 2.0**-126
    assert bool(((new_scales[seen:].view(torch.uint8) if least == 0 else new_scales[seen:]) == least).all())
    back = transpose_scaled(new, new_scales, to, spec, offsets=offsets, rule=rule)  # type: ignore[arg-type]
    y = dequantize(new, new_scales, to, offsets=offsets)
    assert torch.equal(dequantize(*back, spec, offsets=offsets), y)


@each_size
@pytest.mark.parametrize("to", [COLUMN, ROW])
def test_grouped_fp4_to_fp8(sizes: list[int], to: str) -> None:
    x = rows_with_garbage(sizes, 160, 20)
    offsets = offsets_of(sizes)
    codes, scales = quantize(x, MXFP4, offsets=offsets)
    new, new_scales = convert(codes, scales, MXFP4, to, offsets=offsets)
    want = dequantize(codes, scales, MXFP4, offsets=offsets)
    assert torch.equal(dequantize(new, new_scales, to, offsets=offsets), want)
    for start, end in pairwise(offsets.tolist()):
        assert same_bits(new[start:end], convert(*quantize(x[start:end], MXFP4), MXFP4, to)[0])


def test_nothing_is_read_on_the_host() -> None:
    """A tensor without data has nothing to read: any look at a value would raise."""
    x = torch.empty(300, 256, device="meta", dtype=torch.bfloat16)
    offsets = torch.empty(9, device="meta", dtype=torch.int32)
    for spec in (*SPECS, NVFP4):
        codes, scales = quantize(x, spec, offsets=offsets)
        y = dequantize(codes, scales, spec, offsets=offsets, dtype=torch.bfloat16)
        assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "meta")
    codes, scales = quantize(x, ROW, offsets=offsets)
    for to in (COLUMN, MXFP4, "e4m3 1x32 e8m0/rceil", "e4m3 row po2/rceil"):
        got, got_scales = convert(codes, scales, ROW, to, offsets=offsets)
        want = quantize(x, to, offsets=offsets)
        assert got.shape == want[0].shape
        assert isinstance(got_scales, Tensor)
        assert isinstance(want[1], Tensor)
        assert (got_scales.shape, got_scales.dtype) == (want[1].shape, want[1].dtype)
