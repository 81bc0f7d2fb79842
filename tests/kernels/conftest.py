"""Kernels run in the Triton interpreter, on CPU tensors; see `interpreter`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

pytest.importorskip("triton")

from .interpreter import repaired


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    """Run launchers on CPU tensors, with the rounding of a GPU."""
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("these tests interpret kernels; TRITON_INTERPRET says to compile them")
    with repaired():
        yield
