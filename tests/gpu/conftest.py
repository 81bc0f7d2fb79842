"""Tests on a CUDA device: `make test-gpu`. Kernels are compiled there, so TRITON_INTERPRET must be 0."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Freed blocks hold NaN, so that an output element that nobody writes is seen."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if os.environ["TRITON_INTERPRET"] != "0":
        pytest.skip("TRITON_INTERPRET=0 compiles kernels; `make test-gpu` sets it")
    blocks = [torch.full((n,), torch.nan, device="cuda") for n in [1 << 10] * 64 + [1 << 18] * 32 + [1 << 24] * 8]
    del blocks
    yield
    torch.cuda.empty_cache()
