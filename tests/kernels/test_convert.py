"""`convert` in the interpreter against its reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moefx.kernels import registry
from moefx.kernels.gpu import convert as kernel
from moefx.precision.convert import convert

from .casts import COLUMN, MX, MX_COLUMN, MXFP4, ROW, ROWS, check, coded, offsets, same

PAIRS = [
    (ROW, MXFP4),
    (MX, f"{MXFP4} zero=one"),
    ("e5m2 1x128 po2/rceil", "e2m1 1x32 po2/floor eps=0.01"),
    (MXFP4, ROW),
    (MXFP4, COLUMN),
    (MXFP4, f"{MX_COLUMN} eps=0.01"),
    (MX, ROW),
    ("e5m2 32x1 po2/rceil", "e5m2 128x1 e8m0/even"),
    ("e5m2 1x64 e8m0/rceil", "e5m2 64x1 po2/rceil"),
]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("spec", "to_spec"), PAIRS)
def test_same_as_the_reference(spec: str, to_spec: str, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = offsets() if grouped else None
    q = coded(spec, (ROWS, 144), groups, spread=30.0)
    want = convert(*q, spec, to_spec, offsets=groups)
    check(monkeypatch, lambda: kernel.convert(*q, groups, spec, to_spec), want)


@pytest.mark.parametrize("shape", [(0, 128), (1, 128), (3, 40, 160)])
@pytest.mark.parametrize(("spec", "to_spec"), [(ROW, MXFP4), (MXFP4, COLUMN)])
def test_shapes(shape: tuple[int, ...], spec: str, to_spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q = coded(spec, shape)
    check(monkeypatch, lambda: kernel.convert(*q, None, spec, to_spec), convert(*q, spec, to_spec))


@pytest.mark.parametrize(("spec", "to_spec"), [(ROW, MXFP4), (MXFP4, COLUMN), (MXFP4, ROW)])
def test_scales_at_the_ends_of_their_range(spec: str, to_spec: str) -> None:
    codes, scales = coded(spec, (64, 128))
    ends = torch.tensor([0, 1, 2, 3, 126, 253, 254, 255], dtype=torch.uint8).repeat(8)[:, None].expand(scales.shape)
    scales = ends.contiguous().view(torch.float8_e8m0fnu) if spec == MXFP4 else (ends.int() << 23).view(torch.float32)
    same(kernel.convert(codes, scales, None, spec, to_spec), convert(codes, scales, spec, to_spec))


def test_the_other_rule_is_seen() -> None:
    q = coded(MX, (128, 128))
    with pytest.raises(AssertionError, match="differ"):
        same(kernel.shift(*q, None, MX, ROW, align=1, tight=False), convert(*q, MX, ROW))


def test_who_computes_it() -> None:
    with FakeTensorMode():
        codes = torch.empty(256, 256, dtype=torch.float8_e4m3fn, device="cuda")
        for spec, to_spec, name in (
            (ROW, MXFP4, "triton"),
            (MXFP4, COLUMN, "triton"),
            (ROW, ROW, "reference"),
            (ROW, MX, "reference"),
        ):
            assert registry.choose("convert", codes, codes, None, spec, to_spec).name == name
        odd = torch.empty(256, 77, dtype=torch.float8_e4m3fn, device="cuda")
        assert registry.choose("convert", odd, odd, None, ROW, MXFP4).name == "reference"
