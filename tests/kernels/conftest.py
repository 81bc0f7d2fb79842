"""Kernels run in the Triton interpreter, on CPU tensors; see `interpreter`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from .interpreter import repaired


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    """Run launchers on CPU tensors, with the rounding of a GPU."""
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("these tests interpret kernels; TRITON_INTERPRET says to compile them")
    with repaired():
        yield


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill new memory with NaN, and integers with their largest, so that what a kernel does not write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1).new_empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def poisoned_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds the byte that is NaN in every float format, codes included."""
    real = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *args: Any, **kw: Any) -> torch.Tensor:
        made = real(self, *args, **kw)
        if made.numel():
            made.view(torch.uint8).fill_(0xFF)
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
