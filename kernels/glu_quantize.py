"""The provider of `glu_quantize` and `glu_backward_quantize` on GPUs: Triton (`gpu/glu_quantize.py`).

It covers E4M3 and E5M2 in blocks of 32 or 128 within rows and within columns, scales that are powers of two, at most
one spec per orientation and value, and values in fp32, bf16 or fp16. Blocks of h within rows must not straddle gate and
up. h comes wide or as codes in blocks within rows, the latter where gate and up are not interleaved. All else, among it
E2M1 and square blocks, is the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moefx.precision.spec import QuantSpec

from .registry import register_triton, wide

Tensor = torch.Tensor
BLOCKS = ("1x32", "1x128", "32x1", "128x1")


def _covered(spec: QuantSpec) -> bool:
    return spec.elem in ("e4m3", "e5m2") and spec.block in BLOCKS and spec.is_po2 and not spec.stochastic


def casts(specs: Sequence[str], half: int | None = None) -> bool:
    """Whether one tile gives all `specs`; `half`: the width of gate, in which blocks within rows must end."""
    parsed = [QuantSpec.parse(s) for s in specs]
    once = len({s.axis for s in parsed}) == len(parsed)
    return once and all(_covered(s) and (half is None or s.axis != -1 or half % (s.bc or 1) == 0) for s in parsed)


def _half(width: int, kind: str) -> int | None:
    return None if kind.startswith(("plain ", "interleaved ")) else width // 2


def _forward(
    h: Tensor,
    w: Tensor | None,
    offsets: Tensor | None,
    kind: str,
    specs: Sequence[str],
    h_specs: Sequence[str],
    align: int = 1,
) -> bool:
    return h.dim() == 2 and wide(h, w) and casts(specs) and casts(h_specs, _half(h.shape[1], kind))


def _backward(
    da: Tensor,
    h: Tensor,
    h_scales: Tensor | None,
    w: Tensor | None,
    offsets: Tensor | None,
    kind: str,
    h_spec: str,
    specs: Sequence[str],
    act_specs: Sequence[str],
    align: int = 1,
) -> bool:
    half = _half(h.shape[1], kind)
    if h_scales is None:
        readable = h.dtype == da.dtype
    else:
        by_rows = QuantSpec.parse(h_spec).axis == -1 and casts([h_spec], half)
        readable = by_rows and not kind.startswith("interleaved ")
    return readable and wide(da, w) and casts(specs, half) and casts(act_specs)


register_triton("glu_quantize", "glu_quantize:glu_quantize", _forward)
register_triton("glu_backward_quantize", "glu_quantize:glu_backward_quantize", _backward)
