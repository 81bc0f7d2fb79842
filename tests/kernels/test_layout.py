"""Codes by columns: what the kernels write, bit for bit, where fakes say that it lies, at odd sizes and on poison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moefx.dialect  # noqa: F401  registers the ops
from moefx.errors import InputError
from moefx.kernels.gpu import convert, glu_quantize, quantize, transpose_scaled
from moefx.kernels.layout import by_columns, lies_by_columns, strides_by_columns
from tests.profile import often

from .casts import COLUMN, MX, MX_COLUMN, MXFP4, ROW, check, coded, offsets, values
from .interpreter import assert_same_bits

Tensor = torch.Tensor
ops = torch.ops.moefx
# Rows before the first expert and behind the last, an empty one, one of a whole tile, one of several, S no multiple.
GROUPS, S = (16, 16, 32, 160, 432), 443
Case = tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]


def _glu(specs: list[str], h_specs: list[str], kind: str = "silu") -> Case:
    h, w = values(S, 2 * 160, spread=4.0), values(S, 1, spread=1.0)[:, 0].contiguous().nan_to_num()
    return glu_quantize.glu_quantize, ops.glu_quantize, (h, w, offsets(*GROUPS), kind, specs, h_specs)


def _glu_backward(specs: list[str], act: list[str], kind: str = "silu") -> Case:
    da, h = values(S, 128, spread=4.0, seed=1), values(S, 256, spread=4.0)
    args = (da, h, None, None, offsets(*GROUPS), kind, "", specs, act)
    return glu_quantize.glu_backward_quantize, ops.glu_backward_quantize, args


def _turn(spec: str, to_spec: str, rule: str, N: int = 128) -> Case:
    groups = offsets(*GROUPS)
    args = (*coded(spec, (S, N), groups, spread=6.0), groups, spec, to_spec, rule)
    return transpose_scaled.transpose_scaled, ops.transpose_scaled, args


def _convert(spec: str, to_spec: str) -> Case:
    groups = offsets(*GROUPS)
    return convert.convert, ops.convert, (*coded(spec, (S, 160), groups, spread=3.0), groups, spec, to_spec)


CASES: dict[str, Callable[[], Case]] = {
    "quantize": lambda: (quantize.quantize, ops.quantize, (values(S, 144), offsets(*GROUPS), [ROW, COLUMN])),
    "quantize mx": lambda: (quantize.quantize, ops.quantize, (values(S, 77), offsets(*GROUPS), [MX, MX_COLUMN])),
    "quantize weights": lambda: (quantize.quantize, ops.quantize, (values(3, 130, 160), None, [MX_COLUMN])),
    "quantize no rows": lambda: (quantize.quantize, ops.quantize, (values(0, 32), offsets(0, 0), [COLUMN])),
    "tight": lambda: _turn(ROW, COLUMN, "tight"),
    "tile_max": lambda: _turn(ROW, COLUMN, "tile_max"),
    "tile_max, odd width": lambda: _turn(ROW, COLUMN, "tile_max", 144),
    "tight mx": lambda: _turn(MX, MX_COLUMN, "tight"),
    "convert": lambda: _convert(MXFP4, COLUMN),
    "glu_quantize": lambda: _glu([ROW, COLUMN], [MX]),
    "glu_quantize interleaved": lambda: _glu([COLUMN], [MX_COLUMN], "interleaved clamp(7,1.702)"),
    "glu_backward_quantize": lambda: _glu_backward([ROW, COLUMN], [COLUMN]),
    "glu_backward_quantize interleaved": lambda: _glu_backward([COLUMN, ROW], [COLUMN], "interleaved clamp(7,1.702)"),
}  # fmt: skip
EACH_RUN = (
    "quantize",
    "quantize mx",
    "tight",
    "tile_max, odd width",
    "convert",
    "glu_quantize",
    "glu_backward_quantize",
)


def fake(t: Any, mode: FakeTensorMode) -> Any:
    return mode.from_tensor(t) if isinstance(t, Tensor) else t


def codes(outputs: Any) -> list[Tensor]:
    """Those of blocks along columns, by their strides."""
    return [t for t in outputs if t.dim() >= 2 and t.element_size() == 1 and t.stride(-2) == 1 and t.shape[-1] > 1]


@pytest.mark.parametrize("name", often(CASES, EACH_RUN))
def test_written_by_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, op, args = CASES[name]()
    want = op(*args)
    if "glu" in name:  # another exponential than the definition's: the bits are those of codes by rows
        check(monkeypatch, lambda: launcher(*args, align=16), launcher(*args), name)
    else:
        check(monkeypatch, lambda: launcher(*args, align=16), want, name)
    got, reference = launcher(*args, align=16), op(*args, align=16)
    with FakeTensorMode() as mode:
        promised = op(*(fake(a, mode) for a in args), align=16)
    assert [t.stride() for t in got] == [t.stride() for t in reference] == [t.stride() for t in promised]
    for a, b in zip(reference, want, strict=True):
        assert_same_bits(*(t.view(torch.uint8) if t.element_size() == 1 else t for t in (a, b)), name)
    assert codes(got) or args[0].shape[0] == 0
    assert not codes(want)


def test_which_codes_lie_by_columns() -> None:
    for spec, columns in ((COLUMN, True), (MX_COLUMN, True), ("e4m3 column f32/exact", True), (ROW, False),
                          ("e4m3 128x128 po2/rceil", False), ("e2m1 16x1 e8m0/rceil", False)):  # fmt: skip
        assert by_columns(spec, 16) == by_columns(spec, 32) == columns
        assert not by_columns(spec, 1)
        assert not by_columns(spec, 8)
    assert strides_by_columns((2, 33, 5)) == [240, 1, 48]
    assert lies_by_columns(torch.empty(48, 5).mT.contiguous().mT)
    assert not lies_by_columns(torch.empty(33, 5).mT.contiguous().mT)


def test_a_broken_promise_is_an_error_where_offsets_can_be_seen() -> None:
    with pytest.raises(InputError, match=r"moefx.quantize was promised .* multiples of 16, but offsets are \[0, 17\]"):
        ops.quantize(values(17, 32), offsets(0, 17), [COLUMN], 16)
