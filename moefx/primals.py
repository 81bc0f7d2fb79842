"""Where the inputs of a compiled program are found on a module, at every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import compat
from .raising.replay import Assembly
from .routing import INSIDE

Tensor = torch.Tensor


class Inside(nn.Module):
    """The router where captures saw it."""

    def __init__(self, router: nn.Module | None) -> None:
        super().__init__()
        self.add_module(INSIDE, router)


def reference(model: nn.Module, slot: compat.Slot) -> Any:
    """Where a program input lives: a position in the flat call, or (registry, name) on the module that owns it."""
    if slot.kind == "input":
        return int(slot.key)
    if slot.kind == "state":
        return None
    path, _, leaf = str(slot.key).rpartition(".")
    owner = model.get_submodule(path)
    return (owner._parameters if leaf in owner._parameters else owner._buffers, leaf)


def assembled(model: nn.Module, path: str, assembly: Assembly) -> Callable[[], Tensor]:
    """Expert parameters as one tensor, through which autograd brings each of them its gradient.

    They are copied at every call: whether one has changed since the last cannot be known, for `p.data.mul_(...)` leaves
    no trace on its version counter. Gradients are not copied, each parameter gets its slice of the one buffer.
    """
    block = model.get_submodule(path)
    owners = {n: (block.get_submodule(n.rpartition(".")[0])._parameters, n.rpartition(".")[2]) for n in assembly.names}

    def get(name: str) -> Tensor:
        registry, leaf = owners[name]
        found = registry[leaf]
        assert found is not None
        return found

    return lambda: assembly.build(get)
