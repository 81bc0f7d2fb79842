"""The Triton interpreter with the rounding of a GPU, and what compares its results bit for bit.

Triton's interpreter (3.6 to 3.9) truncates fp32 to bf16, loses the carry when it rounds to fp8, truncates fp8 subnormal
numbers and multiplies bf16 operands of a dot as integers. `repaired` converts through torch's casts instead: nearest,
ties to even, saturating in fp8 as the instructions on sm_90 are. test_interpreter.py holds what is replaced to account.
Bounds of loops are arrays of one element in Triton 3.6, which NumPy 2.4 no longer takes for numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

DTYPES = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2, "fp64": torch.float64,
}  # fmt: skip
CONTAINERS = {1: np.uint8, 2: np.uint16, 4: np.float32, 8: np.float64}
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def _as_torch(data: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(data).view(np.uint8).copy()).view(dtype).reshape(np.shape(data))


def convert(data: Any, source: Any, target: Any) -> Any:
    """Numbers of one Triton dtype as those of another, in the container NumPy has for it."""
    a, b = DTYPES[source.scalar.name], DTYPES[target.scalar.name]
    x = _as_torch(np.atleast_1d(data), a)
    if b in LARGEST:
        wide = x.to(torch.float32)
        x = torch.where(wide.isnan(), wide, wide.clamp(-LARGEST[b], LARGEST[b]))
    out = x.to(b).contiguous().view(torch.uint8).numpy()
    return out.view(np.float16 if b is torch.float16 else CONTAINERS[b.itemsize]).reshape(np.shape(data))


def _floats(*dtypes: Any) -> bool:
    return all(t.scalar.name in DTYPES for t in dtypes)


@contextmanager
def repaired() -> Iterator[None]:
    """Within, interpreted kernels round as a GPU does."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    patch = interpreter._patch_lang_tensor

    def lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    before = {name: getattr(builder, name) for name in ("create_fp_to_fp", "create_dot", "cast_impl")}

    def fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        return handle(convert(src.data, src.dtype, dst_type), dst_type.scalar)

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        if _floats(src.dtype, dst_type):
            return handle(convert(src.data, src.dtype, dst_type), dst_type.scalar)
        return before["cast_impl"](self, src, dst_type)

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        wide = [convert(t.data, t.dtype, tl.float32) for t in (a, b)]
        return handle(np.matmul(*wide, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    try:
        builder.create_fp_to_fp, builder.create_dot, builder.cast_impl = fp_to_fp, dot, cast
        interpreter._patch_lang_tensor = lang_tensor
        yield
    finally:
        interpreter._patch_lang_tensor = patch
        for name, old in before.items():
            setattr(builder, name, old)


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor as integers, all NaN alike."""
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    out = t.contiguous().view(ints[t.element_size()])
    return torch.where(t.float().isnan(), -1 if t.element_size() > 1 else 255, out) if t.is_floating_point() else out


def assert_same_bits(got: torch.Tensor, want: torch.Tensor, what: str = "") -> None:
    """Equal shape, dtype and bits; -0 and 0 differ."""
    assert got.shape == want.shape, what
    assert got.dtype == want.dtype, what
    wrong = bits(got) != bits(want)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what} {int(wrong.sum())} of {wrong.numel()} differ, first at {at}: {got[at]} for {want[at]}"
        )
