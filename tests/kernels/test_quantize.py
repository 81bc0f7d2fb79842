"""`quantize` in the interpreter against its reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moefx.dialect.scaled import encode
from moefx.kernels import registry
from moefx.kernels.gpu import quantize as kernel

from .casts import COLUMN, MX, MX_COLUMN, MXFP4, ROW, ROWS, SQUARE, check, offsets, same, values

BOTH = [
    [ROW],
    [ROW, COLUMN],
    [f"{COLUMN} zero=one", f"{ROW} eps=1e-10"],
    [MX, MX_COLUMN],
    [MXFP4],
    ["e5m2 1x128 f32/exact zero=one", "e4m3 128x1 f32/exact eps=0.001"],
    [SQUARE],
    ["e2m1 16x1 po2/even", "e5m2 1x64 e8m0/floor", "e4m3 64x64 po2/ceil"],
]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("specs", BOTH, ids="+".join)
def test_same_as_the_reference(specs: list[str], grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, groups = values(ROWS, 144, dtype=torch.bfloat16), offsets() if grouped else None
    check(monkeypatch, lambda: kernel.quantize(x, groups, specs), encode(x, specs, groups))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtypes_and_odd_widths(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, specs = values(70, 77, dtype=dtype, spread=6), [ROW, MXFP4, MX_COLUMN]
    check(monkeypatch, lambda: kernel.quantize(x, offsets(0, 40, 70), specs), encode(x, specs, offsets(0, 40, 70)))


@pytest.mark.parametrize("specs", [[SQUARE, ROW], [MXFP4]], ids="+".join)
def test_weights(specs: list[str]) -> None:
    w = values(3, 130, 160, dtype=torch.bfloat16).transpose(-2, -1)
    same(kernel.quantize(w, None, specs), encode(w, specs, None))


@pytest.mark.parametrize("shape", [(0, 128), (1, 128), (1, 16), (5, 0)])
@pytest.mark.parametrize("specs", [[ROW, COLUMN], [MXFP4]], ids="+".join)
def test_few_rows(shape: tuple[int, int], specs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    x = values(*shape)
    for groups in (None, offsets(0, 0, shape[0], shape[0])):
        check(monkeypatch, lambda g=groups: kernel.quantize(x, g, specs), encode(x, specs, groups))


def test_rows_of_nobody_may_hold_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    x, groups = values(ROWS, 64), offsets()
    x[:3], x[290:] = torch.nan, torch.inf
    check(monkeypatch, lambda: kernel.quantize(x, groups, [ROW, COLUMN]), encode(x, [ROW, COLUMN], groups))


def test_a_nan_scale_of_the_last_block_is_not_that_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    x, groups, specs = values(6, 32), offsets(1, 2, 4), [COLUMN, SQUARE]
    x[3, 5] = torch.nan
    check(monkeypatch, lambda: kernel.quantize(x, groups, specs), encode(x, specs, groups))


def test_every_expert_may_be_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    x, groups = values(140, 64), offsets(7, 7, 7)
    check(monkeypatch, lambda: kernel.quantize(x, groups, [COLUMN, ROW]), encode(x, [COLUMN, ROW], groups))


def test_blocks_that_cross_experts_are_seen() -> None:
    x = values(ROWS, 64)
    with pytest.raises(AssertionError, match="differ"):
        same(kernel.quantize(x, offsets(0, 138, ROWS), [COLUMN]), encode(x, [COLUMN], offsets(0, 137, ROWS)))


@pytest.mark.parametrize(
    ("specs", "dtype", "name"),
    [
        ([ROW, COLUMN], torch.bfloat16, "triton"),
        ([MXFP4], torch.float16, "triton"),
        (["e4m3 row po2/rceil"], torch.bfloat16, "reference"),
        ([f"{ROW} sr"], torch.bfloat16, "reference"),
        (["e2m1 1x16 e4m3+f32/exact"], torch.bfloat16, "reference"),
        ([ROW], torch.float64, "reference"),
    ],
)
def test_who_computes_it(specs: list[str], dtype: torch.dtype, name: str) -> None:
    with FakeTensorMode():
        x = torch.empty(256, 256, dtype=dtype, device="cuda")
        assert registry.choose("quantize", x, None, specs).name == name
    assert registry.choose("quantize", torch.empty(2, 2), None, specs).name == "reference"
