"""The random states of the process, as plain data that `torch.load(weights_only=True)` accepts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def get_rng_state() -> dict[str, Any]:
    """States of torch (CPU, and every CUDA device once CUDA is in use), `random` and numpy's global generator."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": [str(kind), torch.tensor(np.asarray(keys, dtype=np.int64)), *rest],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `get_rng_state` returned. CUDA devices beyond those of this machine are left out."""
    torch.set_rng_state(state["torch"])
    for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, device)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


@contextmanager
def undisturbed_rng() -> Iterator[None]:
    """Whatever is drawn inside leaves no trace: evaluating at other steps must not change a training run."""
    state = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
