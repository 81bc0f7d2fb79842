"""`dequantize` in the interpreter against its reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moefx.dialect.scaled import encode
from moefx.kernels import registry
from moefx.kernels.gpu import dequantize as kernel
from moefx.precision.quantize import dequantize

from .casts import COLUMN, MX_COLUMN, MXFP4, ROW, ROWS, SQUARE, check, coded, offsets, same, values

SPECS = [ROW, COLUMN, MX_COLUMN, MXFP4, SQUARE, "e5m2 1x64 f32/exact", "e2m1 16x1 po2/floor"]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_same_as_the_reference(spec: str, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = offsets() if grouped else None
    q = coded(spec, (ROWS, 144), groups)
    want = dequantize(*q, spec, dtype=torch.bfloat16, offsets=groups)
    check(monkeypatch, lambda: [kernel.dequantize(*q, groups, spec, torch.bfloat16)], [want])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(0, 32), (1, 32), (70, 77), (3, 40, 160)])
def test_dtypes_and_shapes(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in (ROW, SQUARE):
        q = coded(spec, shape)
        want = dequantize(*q, spec, dtype=dtype)
        check(monkeypatch, lambda q=q, s=spec: [kernel.dequantize(*q, None, s, dtype)], [want])


def test_two_levels_come_as_their_product() -> None:
    spec = "e2m1 1x16 e4m3+f32/exact"
    codes, scales = encode(values(40, 64), [spec], None)
    same(
        [kernel.dequantize(codes, scales, None, spec, torch.float32)],
        [torch.ops.moefx.dequantize(codes, scales, None, spec, torch.float32)],
    )


def test_every_code_and_scale() -> None:
    codes = torch.arange(256, dtype=torch.uint8).expand(256, 256).contiguous()
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16).view(torch.float8_e8m0fnu)
    for elem in ("e4m3", "e5m2", "e2m1"):
        spec = f"{elem} 1x{32 if elem == 'e2m1' else 16} e8m0/rceil"
        got = kernel.dequantize(codes, scales, None, spec, torch.float32)
        same([got], [dequantize(codes, scales, spec)], spec)


def test_scales_of_another_row_are_seen() -> None:
    codes, scales = coded(ROW, (64, 128))
    got = kernel.dequantize(codes, scales.roll(1, 0), None, ROW, torch.float32)
    with pytest.raises(AssertionError, match="differ"):
        same([got], [dequantize(codes, scales, ROW)])


def test_who_computes_it() -> None:
    with FakeTensorMode():
        codes = torch.empty(256, 256, dtype=torch.float8_e4m3fn, device="cuda")
        for spec, dtype, name in (
            (ROW, torch.bfloat16, "triton"),
            (ROW, torch.float64, "reference"),
            ("e4m3 tensor f32/exact", torch.bfloat16, "reference"),
        ):
            assert registry.choose("dequantize", codes, codes, None, spec, dtype).name == name
