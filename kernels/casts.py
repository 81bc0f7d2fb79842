"""Which casts the Triton kernels in `gpu` compute: quantize, dequantize and convert, by spec and shape.

E4M3, E5M2 and E2M1 codes in blocks of 1, 16, 32, 64 or 128 rows and columns, of up to 1022 experts. All else (whole
rows, columns or matrices as blocks, two levels of scales where they are made, stochastic rounding) is the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moefx.precision.convert import exactness
from moefx.precision.spec import QuantSpec

from .registry import WIDE, register_triton

Tensor = torch.Tensor
ELEMENTS = ("e4m3", "e5m2", "e2m1")
BLOCKS = (1, 16, 32, 64, 128)
EXPERTS = 1022  # a program counts through two segments more


def in_tiles(text: str, offsets: Tensor | None) -> bool:
    """Whether the kernels can read codes of a spec: known elements, blocks that lie in a tile, not too many experts."""
    spec = QuantSpec.parse(text)
    few = offsets is None or offsets.shape[0] - 1 <= EXPERTS
    return few and spec.elem in ELEMENTS and spec.br in BLOCKS and spec.bc in BLOCKS


def known(text: str) -> bool:
    """Whether `gpu.codec` makes codes of a spec: not of two levels, delayed or stochastic, nor of other elements."""
    s = QuantSpec.parse(text)
    return s.elem in ELEMENTS and not (s.two_level or s.delayed or s.stochastic)


def shifts(codes: Tensor, offsets: Tensor | None, spec: str, to_spec: str) -> bool:
    """Whether the kernels convert between two specs; with rules that leave codes alone they have nothing to do."""
    aligned = codes.shape[-1] * QuantSpec.parse(spec).format.per_byte % 16 == 0
    known = aligned and in_tiles(spec, offsets) and in_tiles(to_spec, offsets)
    return known and exactness(spec, to_spec).rule in ("R11/R12", "R15", "R16", "R17")


def _quantizes(x: Tensor, offsets: Tensor | None, specs: Sequence[str], align: int = 1) -> bool:
    return x.dtype in WIDE and len(specs) > 0 and all(known(s) and in_tiles(s, offsets) for s in specs)


def _dequantizes(codes: Tensor, scales: Any, offsets: Tensor | None, spec: str, dtype: torch.dtype) -> bool:
    return dtype in WIDE and in_tiles(spec, offsets)


register_triton("quantize", "quantize:quantize", _quantizes)
register_triton("dequantize", "dequantize:dequantize", _dequantizes)
register_triton("convert", "convert:convert", lambda codes, scales, *rest: shifts(codes, *rest[:3]))
