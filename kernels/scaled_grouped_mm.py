"""Providers of the products of quantized operands: Triton kernels on GPUs with fp8 tensor cores.

They read E4M3 and E5M2 codes: x in blocks of a row (1x32, 1x64, 1x128 and multiples), or with a scale per row or per
expert; w the same or in square blocks; wgrad operands in blocks of a column (32x1 and so on) or square ones, or with a
scale per column or per expert. Widths are multiples of 16, as 16-byte loads want them. Everything else, as four-bit
codes and two levels of scales, is the reference's; so are codes of a result under more than one spec.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from moefx.precision.spec import QuantSpec

from .layout import lies_by_columns
from .registry import WIDE, register_triton

Tensor = torch.Tensor
_ELEMS = ("e4m3", "e5m2")


@cache
def _has_fp8(index: int | None) -> bool:
    """Whether a device multiplies OCP fp8 codes and holds the kernels' tiles: sm_90 and sm_100, or none being here."""
    if torch.version.hip is not None:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(index)[0] in (9, 10)


def _codes(codes: Tensor, spec: QuantSpec) -> bool:
    """Whether codes and spec are of a kind that the kernels read; steps of the memory are checked apart."""
    one_level = spec.scale in ("po2", "f32", "e8m0")
    return spec.elem in _ELEMS and one_level and codes.dtype == spec.format.storage


def _divides(block: int | None) -> bool:
    """Whether a block along the depth is made of whole steps, or steps of whole blocks. None: all of the depth."""
    return block is None or block in (32, 64) or block % 128 == 0


def _aligned(t: Tensor, dense: int) -> bool:
    steps = [s for axis, s in enumerate(t.stride()) if axis != dense % t.dim()]
    whole = t.shape[dense] % 16 == 0 and t.storage_offset() % 16 == 0
    return t.stride(dense) == 1 and whole and all(s % 16 == 0 for s in steps)


def _mm(
    x: Tensor, xs: Tensor, w: Tensor, ws: Tensor, offsets: Tensor, x_spec: str, w_spec: str, dtype: torch.dtype
) -> bool:
    a, b = QuantSpec.parse(x_spec), QuantSpec.parse(w_spec)
    return (
        _has_fp8(x.device.index)
        and _codes(x, a) and _codes(w, b) and dtype in WIDE
        and a.block != "column" and a.br in (1, None) and _divides(a.bc)
        and b.block != "column" and (b.br in (1, None) or b.br == b.bc) and _divides(b.bc)
        and x.shape[1] % 16 == 0 and w.shape[1] % 16 == 0
        and _aligned(x, -1) and (_aligned(w, -1) or _aligned(w, -2))
    )  # fmt: skip


def _mm_quantize(
    x: Tensor, xs: Tensor, w: Tensor, ws: Tensor, offsets: Tensor, x_spec: str, w_spec: str, dtype: torch.dtype,
    specs: Sequence[str],
) -> bool:  # fmt: skip
    if len(specs) != 1 or not _mm(x, xs, w, ws, offsets, x_spec, w_spec, dtype):
        return False
    s = QuantSpec.parse(specs[0])
    return s.block == "1x128" and _codes(x.new_empty(0, dtype=s.format.storage), s) and not s.stochastic


def _wgrad(
    a: Tensor,
    as_: Tensor,
    b: Tensor,
    bs: Tensor,
    offsets: Tensor,
    a_spec: str,
    b_spec: str,
    dtype: torch.dtype,
    align: int = 1,
) -> bool:
    specs = [QuantSpec.parse(s) for s in (a_spec, b_spec)]
    return _has_fp8(a.device.index) and dtype in WIDE and all(
        _codes(t, s) and s.br != 1 and _divides(s.br) and (s.bc in (1, None) or s.bc == s.br)
        and t.shape[1] % 16 == 0 and (_aligned(t, -1) or lies_by_columns(t))
        for t, s in zip((a, b), specs, strict=True)
    )  # fmt: skip


register_triton("scaled_grouped_mm", "scaled_grouped_mm:scaled_grouped_mm", _mm)
register_triton("scaled_grouped_mm_quantize", "scaled_grouped_mm:scaled_grouped_mm_quantize", _mm_quantize)
register_triton("scaled_grouped_wgrad", "scaled_grouped_wgrad:scaled_grouped_wgrad", _wgrad)
