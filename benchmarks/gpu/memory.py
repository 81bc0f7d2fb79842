"""What a layer's forward keeps for its backward, for `layers`: activations, its input, and copies of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

Tensor = torch.Tensor
MIB = 2**20


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def saved(
    machine: Any, forward: Callable[[], Tensor], x: Tensor, parameters: Iterable[Tensor], experts: int
) -> dict[str, int]:
    """Bytes that stay alive between forward and backward, each piece of memory counted once.

    Whoever saves its input keeps it from being freed, so that it counts; parameters and the output, which live anyway,
    do not. A tensor of three axes whose first is that of the experts is a copy of weights, as their codes are: it does
    not grow with the tokens. What a layer keeps without telling autograd shows in the device's memory, and counts as
    activations.

    Returns:
        bytes by "activations", "input" and "weights".
    """
    known = {_memory(p) for p in parameters}
    kept: dict[int, Tensor] = {}

    def note(t: Tensor) -> Tensor:
        if t.numel() and _memory(t) not in known:
            kept.setdefault(_memory(t), t.detach())  # held, or its memory might come back as another one's
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = forward()
    kept.pop(_memory(y), None)
    found = {"activations": 0, "input": 0, "weights": 0}
    for memory, t in kept.items():
        copy = t.dim() == 3 and t.shape[0] == experts
        kind = "input" if memory == _memory(x) else "weights" if copy else "activations"
        found[kind] += t.untyped_storage().nbytes()
    kept.clear()
    del y
    before = machine.allocated()
    y = forward()
    there = machine.allocated() - before - y.untyped_storage().nbytes()
    found["activations"] = max(found["activations"], there - found["weights"])
    return found


def columns(found: dict[str, int], parameters: Iterable[Tensor]) -> dict[str, str]:
    """The columns of the CSV, in MiB."""
    weights = sum(p.numel() * p.element_size() for p in parameters)
    mib = {
        "saved_mib": found["activations"], "saved_input_mib": found["input"], "saved_weights_mib": found["weights"],
        "weights_mib": weights,
    }  # fmt: skip
    return {name: f"{n / MIB:.4g}" if n < 100 * MIB else f"{n / MIB:.0f}" for name, n in mib.items()}
