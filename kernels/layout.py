"""How codes lie in memory: those that a product sums over rows have the elements of a column next to each other.

FP8 tensor cores of NVIDIA read both operands with the axis that is summed over contiguous. Codes in blocks along
columns are made for such a sum (wgrad, and dgrad of a weight in blocks that serve only it), so on a GPU casts write
them [S, N] with strides (1, S), S rounded up to 16 so that columns begin at multiples of 16 bytes. On a CPU nothing
gains, and codes are contiguous. Shapes and ops know nothing of it: strides say it, of real and of fake tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moefx.precision.spec import QuantSpec

Tensor = torch.Tensor
ALIGN = 16
"""Rows by which columns, and rows of an expert within them, begin at 16 bytes."""
DEVICES = ("cuda",)
"""Types of devices where codes lie by columns."""


def by_columns(spec: QuantSpec | str) -> bool:
    """Whether codes of a spec are summed over rows alone; codes that share a byte share it within a row."""
    s = QuantSpec.parse(spec)
    return s.axis == -2 and s.format.per_byte == 1


def strides_by_columns(shape: Sequence[int]) -> list[int]:
    """Strides of codes [..., M, N] that lie by columns: (..., 1, M), M rounded up."""
    *front, M, N = shape
    height = -(-M // ALIGN) * ALIGN
    stride, step = [1, height], height * N
    for size in reversed(front):
        stride.insert(0, step)
        step *= size
    return stride


def empty_by_columns(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for codes [..., M, N] by columns. All columns, the last one too, may be written to a multiple of 16 rows."""
    *front, M, N = shape
    stride = strides_by_columns(shape)
    return like.new_empty((*front, N, stride[-1]), dtype=dtype).as_strided(shape, stride)


def codes_fake(like: Tensor, spec: QuantSpec | str, shape: Sequence[int]) -> Tensor:
    """A fake of codes of a tensor of `shape` as they lie on the device of `like`."""
    s = QuantSpec.parse(spec)
    if by_columns(s) and like.device.type in DEVICES:
        return like.new_empty_strided(shape, strides_by_columns(shape), dtype=s.format.storage)
    return like.new_empty(s.format.stored_shape(shape), dtype=s.format.storage)


def laid_out(codes: Tensor, spec: QuantSpec | str) -> Tensor:
    """Codes as they lie on their device, which is a copy where they do not lie so yet."""
    if by_columns(spec) and codes.device.type in DEVICES:
        return empty_by_columns(codes, codes.shape, codes.dtype).copy_(codes)
    return codes
