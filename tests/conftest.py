"""Shared by all tests."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch

# Kernels are interpreted or compiled, once for a process, as this says when triton is imported. Tests that compile do
# so in processes of their own; tests on a GPU set it to 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts jobs of the background with Ctrl-C ignored; tests that send themselves one mean what it does elsewhere.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def imports_are_not_collected() -> Iterator[None]:
    """Half a million objects of torch and transformers, which every full collection would go through: 8 % of a run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The models of the tests are far too small for more than one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
