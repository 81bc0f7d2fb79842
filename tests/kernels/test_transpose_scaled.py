"""`transpose_scaled` in the interpreter against its reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from moefx.kernels import registry
from moefx.kernels.gpu import transpose_scaled as kernel
from moefx.precision.convert import transpose_scaled
from moefx.precision.quantize import quantize

from .casts import COLUMN, MX, MX_COLUMN, ROW, ROWS, check, coded, offsets, same, values

PAIRS = [(ROW, COLUMN), (COLUMN, ROW), (f"{ROW} eps=1e-10", f"{COLUMN} eps=1e-10"), (MX, MX_COLUMN)]


@triton.jit
def _leave(
    codes, scales, offsets, new_codes, new_scales, batch, tile, row0, rows, exists, live, first, segment, last, col0,
    M, N, W, E, R,
    A: tl.constexpr, B: tl.constexpr, TIGHT: tl.constexpr,
    GROUPED: tl.constexpr, LIVE: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    pass  # instead of `_turn_slowly`


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("rule", ["tight", "tile_max"])
@pytest.mark.parametrize(("spec", "to_spec"), PAIRS)
def test_same_as_the_reference(
    spec: str, to_spec: str, rule: str, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = offsets() if grouped else None
    q = coded(spec, (ROWS, 128), groups, spread=30.0)
    want = transpose_scaled(*q, spec, to_spec, offsets=groups, rule=rule)
    check(monkeypatch, lambda: kernel.transpose_scaled(*q, groups, spec, to_spec, rule), want)


@pytest.mark.parametrize("rule", ["tight", "tile_max"])
@pytest.mark.parametrize("shape", [(0, 128), (1, 256), (150, 144), (2, 140, 128)])
def test_shapes(shape: tuple[int, ...], rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q = coded(ROW, shape, spread=3.0)
    want = transpose_scaled(*q, ROW, COLUMN, rule=rule)
    check(monkeypatch, lambda: kernel.transpose_scaled(*q, None, ROW, COLUMN, rule), want)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_codes_that_begin_anywhere_in_memory(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales = coded(ROW, (150, 256), spread=30.0)
    memory = torch.zeros(offset + codes.numel(), dtype=torch.uint8)
    shifted = memory[offset:].view(codes.dtype).view(codes.shape).copy_(codes)
    assert shifted.is_contiguous()
    assert shifted.storage_offset() == offset
    want = transpose_scaled(codes, scales, ROW, COLUMN, rule="tile_max")
    check(monkeypatch, lambda: kernel.transpose_scaled(shifted, scales, None, ROW, COLUMN, "tile_max"), want)


@pytest.mark.parametrize("to_spec", [COLUMN, f"{COLUMN} zero=one", f"{COLUMN} eps=0.5"])
def test_scales_at_the_ends_of_their_range(to_spec: str) -> None:
    codes = coded(ROW, (128, 256))[0]
    codes.view(torch.uint8)[:, 128:] &= 0x80  # only zeros
    field = torch.tensor([0, 1, 2, 120, 126, 253, 254, 255]).repeat(16)[:, None].expand(128, 2)
    scales = (field.to(torch.int32) << 23).view(torch.float32)
    got = kernel.transpose_scaled(codes, scales, None, ROW, to_spec, "tile_max")
    same(got, transpose_scaled(codes, scales, ROW, to_spec, rule="tile_max"))


@pytest.mark.parametrize(("spec", "to_spec"), [(ROW, COLUMN), (MX, MX_COLUMN)])
def test_largest_scale_under_the_rule_that_exceeds_it(spec: str, to_spec: str) -> None:
    spec, to_spec = spec.replace("rceil", "ceil"), to_spec.replace("rceil", "ceil")
    codes, scales = coded(spec, (128, 128))
    codes.view(torch.uint8)[5, 7] = 0x7E  # 448, whose scale would be 2^128
    scales = torch.exp2(torch.full(scales.shape, 127.0)).to(scales.dtype)
    got = kernel.transpose_scaled(codes, scales, None, spec, to_spec)
    same(got, transpose_scaled(codes, scales, spec, to_spec, rule="tight"))


def every_code(step: int, nan: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A row of all codes for each of 128 / step shifts, and more of the largest scale."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(128, 1)
    if not nan:
        codes[(codes & 0x7F) == 0x7F] = 0
    down = torch.arange(128) // step
    return codes.view(torch.float8_e4m3fn), torch.exp2(20.0 - down)[:, None].expand(128, 2)


@pytest.mark.parametrize("align", [1, 16])
@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("step", [1, 6])
@pytest.mark.parametrize("rule", ["tight", "tile_max"])
def test_every_code_by_every_shift(
    rule: str, step: int, nan: bool, align: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = every_code(step, nan)
    for columns in (slice(0, 128), slice(128, 256), slice(None)):
        codes, scales = q[0][:, columns].contiguous(), q[1][:, : 2 if columns.start is None else 1]
        want = transpose_scaled(codes, scales, ROW, COLUMN, rule=rule)
        check(
            monkeypatch, lambda c=codes, s=scales: kernel.transpose_scaled(c, s, None, ROW, COLUMN, rule, align), want
        )


@pytest.mark.parametrize("spread", range(18, 25))
def test_rows_at_the_ends_of_what_fp16_holds(spread: int) -> None:
    """Columns in which only the smallest codes of rows far below the largest scale are left, or nothing is."""
    codes = torch.zeros(128, 256, dtype=torch.uint8)
    codes[0], codes[5, ::2], codes[6, ::3], codes[7, ::5] = 0x7E, 1, 0x81, 8
    codes[0, 3:] = 0
    scales = torch.ones(128, 2)
    scales[5], scales[6], scales[7] = 2.0**-spread, 2.0 ** (1 - spread), 2.0 ** (-spread - 3)
    q = codes.view(torch.float8_e4m3fn), scales
    for rule in ("tight", "tile_max"):
        same(kernel.transpose_scaled(*q, None, ROW, COLUMN, rule), transpose_scaled(*q, ROW, COLUMN, rule=rule))


@pytest.mark.parametrize("rule", ["tight", "tile_max"])
def test_common_tiles_take_the_fast_way(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = values(150, 256, dtype=torch.bfloat16, spread=8.0)
    x[x.isfinite().logical_not()] = 1.0
    q, groups = quantize(x, ROW, offsets=offsets(0, 70, 150)), offsets(0, 70, 150)
    want = transpose_scaled(*q, ROW, COLUMN, offsets=groups, rule=rule)
    monkeypatch.setattr(kernel, "_turn_slowly", _leave)
    check(monkeypatch, lambda: kernel.transpose_scaled(*q, groups, ROW, COLUMN, rule), want)
    q[1][100, 1] = torch.nan
    with pytest.raises(AssertionError, match="differ"):
        check(
            monkeypatch,
            lambda: kernel.transpose_scaled(*q, groups, ROW, COLUMN, rule),
            transpose_scaled(*q, ROW, COLUMN, offsets=groups, rule=rule),
        )


def test_who_computes_it() -> None:
    with FakeTensorMode():
        codes = torch.empty(256, 256, dtype=torch.float8_e4m3fn, device="cuda")
        for rule in ("tight", "tile_max"):
            assert registry.choose("transpose_scaled", codes, codes, None, ROW, COLUMN, rule).name == "triton"
        whole = ("e4m3 row po2/rceil", "e4m3 column po2/rceil")
        assert registry.choose("transpose_scaled", codes, codes, None, *whole).name == "reference"
