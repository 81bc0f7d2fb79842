"""How codes lie in memory: by rows, or, for a product that sums over rows on fp8 tensor cores, by columns.

Those cores read both operands with the axis that is summed over contiguous (NVIDIA calls it K-major). Codes in blocks
along columns are made for sums over rows: wgrad, and dgrad of a weight that is cast for it alone. By columns, [S, N]
has strides (1, S), S rounded up to 16, so that columns begin at multiples of 16 bytes. Shapes know nothing of it.

What an op writes so it is told by `align`, a promise that the rows of each expert begin and end at multiples of it (1:
nothing is known). Only with a multiple of 16 can 16 bytes of an expert be moved at once, and only then, codes in blocks
along columns lie by columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moefx.errors import InputError
from moefx.precision.spec import QuantSpec

Tensor = torch.Tensor
ALIGN = 16


def by_columns(spec: QuantSpec | str, align: int) -> bool:
    """Whether codes of a spec lie by columns under a promise."""
    return align % ALIGN == 0 and QuantSpec.parse(spec).sums_rows


def strides_by_columns(shape: Sequence[int]) -> list[int]:
    """Strides of codes [..., M, N] by columns: (..., 1, M), M rounded up."""
    *front, M, N = shape
    height = -(-M // ALIGN) * ALIGN
    stride, step = [1, height], height * N
    for size in reversed(front):
        stride.insert(0, step)
        step *= size
    return stride


def empty_codes(like: Tensor, spec: QuantSpec | str, shape: Sequence[int], align: int) -> Tensor:
    """Memory for codes of values of `shape`. All columns, the last one too, have room for a multiple of 16 rows."""
    s = QuantSpec.parse(spec)
    if not by_columns(s, align):
        return like.new_empty(s.format.stored_shape(shape), dtype=s.format.storage)
    *front, _, N = shape
    stride = strides_by_columns(shape)
    return like.new_empty((*front, N, stride[-1]), dtype=s.format.storage).as_strided(shape, stride)


def codes_fake(like: Tensor, spec: QuantSpec | str, shape: Sequence[int], align: int) -> Tensor:
    """A fake of `empty_codes`, whose sizes may be symbols."""
    s = QuantSpec.parse(spec)
    if by_columns(s, align):
        return like.new_empty_strided(shape, strides_by_columns(shape), dtype=s.format.storage)
    return like.new_empty(s.format.stored_shape(shape), dtype=s.format.storage)


def laid_out(codes: Tensor, spec: QuantSpec | str, align: int) -> Tensor:
    """Codes as `empty_codes` lays them out, which is a copy where they do not lie so yet."""
    if by_columns(spec, align):
        return empty_codes(codes, spec, codes.shape, align).copy_(codes)
    return codes.contiguous() if codes.numel() else codes.new_empty(codes.shape)


def lies_by_columns(codes: Tensor) -> bool:
    """Whether codes [S, N] have the strides of `strides_by_columns`."""
    return codes.stride(0) == 1 and codes.stride(1) % ALIGN == 0 and codes.storage_offset() % ALIGN == 0


def check_promise(op: str, offsets: Tensor | None, align: int) -> None:
    """Raise `InputError` where offsets that the host sees (on a CPU) break the promise `align`."""
    if align == 1 or offsets is None or offsets.device.type != "cpu":
        return
    if type(offsets) is Tensor and bool((offsets % align).any()):
        raise InputError(
            f"moefx.{op} was promised rows of experts at multiples of {align}, but offsets are {offsets.tolist()}",
            todo="make the plan with that `align`, or leave it at 1",
        )
