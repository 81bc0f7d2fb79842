"""On ROCm, products whose tiles do not fit a workgroup's memory are left to torch and to references."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moefx.kernels import registry

MI300X, MI355X = 64 << 10, 160 << 10
GATHERED = ("permute_grouped_mm", "permute_grouped_mm_glu", "permute_grouped_wgrad")


def chosen(monkeypatch: pytest.MonkeyPatch, shared: int) -> dict[str, str]:
    """Who computes each op on a ROCm device with that much memory for a workgroup."""
    properties = SimpleNamespace(shared_memory_per_block=shared)
    with FakeTensorMode():

        def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        x, w, rows = empty(64, 256), empty(4, 512, 256), empty(64, 512)
        offsets, index = empty(5, dtype=torch.int32), empty(64, dtype=torch.int64)
        slot = empty(32, 2, dtype=torch.int64)
        calls: dict[str, tuple[Any, ...]] = {
            "grouped_mm": (x, w, offsets),
            "grouped_wgrad": (rows, x, offsets),
            "permute_grouped_mm": (x, index, slot, w, offsets),
            "permute_grouped_mm_glu": (x, index, slot, w, offsets, None, "silu"),
            "permute_grouped_wgrad": (rows, x, index, slot, offsets),
            "gram": (w, None),
            "quadratic": (empty(4, 256, 256), 1.0, 1.0, None),
            "permute": (x, index, slot),
            "glu": (x, None, "silu"),
        }
        monkeypatch.setattr(torch.version, "hip", "7.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        return {op: registry.choose(op, *args).name for op, args in calls.items()}


def test_tiles_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = chosen(monkeypatch, MI300X)
    assert {op for op, name in found.items() if name == "triton"} == {"permute", "glu"}
    assert set(found.values()) == {"triton", "reference"}


def test_tiles_that_fit_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found = chosen(monkeypatch, MI355X)
    assert {op for op, name in found.items() if name == "reference"} == {"permute_grouped_wgrad"}
