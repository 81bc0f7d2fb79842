"""Launching: on the device, in the interpreter, or, for kernels of machines that are not here, compiling alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

Tensor = torch.Tensor
_WHERE_UNKNOWN = 132  # multiprocessors of an H100 or H200: what programs are counted by where there is no device


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled by `recording`: its name, and what Triton made of it."""

    name: str
    kernel: Any


_recorded: list[Compiled] | None = None


def launch(kernel: Any, grid: Sequence[int], *args: Any, **kw: Any) -> None:
    """Run `kernel[grid](*args, **kw)` on the device of its first tensor; a grid with a zero runs nothing.

    `kw` are constexprs by name, and Triton's options `num_warps`, `num_stages` and `maxnreg`, which ROCm's lacks.
    """
    if 0 in grid:
        return
    recorded_hip = _recorded is not None and driver.active.get_current_target().backend == "hip"
    if recorded_hip or torch.version.hip is not None:
        kw.pop("maxnreg", None)
    if _recorded is not None:
        _recorded.append(Compiled(kernel.__name__, kernel.warmup(*args, grid=tuple(grid), **kw)))
        return
    first = next(a for a in args if isinstance(a, Tensor))
    with torch.cuda.device_of(first) if first.is_cuda else nullcontext():
        kernel[tuple(grid)](*args, **kw)


@contextmanager
def recording() -> Iterator[list[Compiled]]:
    """Within, launches compile and do not run. Call launchers with tensors on the device "meta"."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def processors(device: torch.device) -> int:
    """Multiprocessors of a device: persistent kernels start a few programs on each."""
    if device.type == "cuda":
        count: int = torch.cuda.get_device_properties(device).multi_processor_count
        return count
    return 4 if knobs.runtime.interpret else _WHERE_UNKNOWN  # few, so that an interpreted program meets several tiles


def is_hopper(device: torch.device) -> bool:
    """Whether a kernel for tensors on a device is compiled for sm_90, as interpreted ones are taken to be."""
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
    return bool(knobs.runtime.interpret) or driver.active.get_current_target().arch == 90


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
