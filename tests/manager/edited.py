"""A small graph and passes made of functions, for the tests of the pass manager."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from moefx import Pass
from moefx.graph.effects import name_of
from moefx.manager import Context
from tests.passes.subject import H, rand

Tensor = torch.Tensor


class Block(torch.nn.Module):
    """A product, a dropout, a buffer that counts, a softmax; `y` has two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(H, H, bias=False)
        with torch.no_grad():
            self.inner.weight.copy_(rand(H, H))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        """Two outputs."""
        self.seen.add_(1.0)  # type: ignore[operator]
        y = F.dropout(self.inner(x), 0.5, True)
        return torch.softmax(y, -1), y * 2


def first(graph: fx.Graph, name: str) -> fx.Node:
    """The first node of this name."""
    return next(n for n in graph.nodes if n.op.startswith("call") and name_of(n) == name)


@dataclass(frozen=True)
class Edit(Pass):
    """A pass made of a function."""

    edit: Callable[[fx.Graph, Context], Any]
    klass: str = "exact"

    @property
    def numerics(self) -> str:  # type: ignore[override]
        """As given."""
        return self.klass

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        """Apply the function."""
        self.edit(graph, ctx)


def after(graph: fx.Graph, node: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Put `target(node, *args)` behind a node for all its readers."""
    readers = list(node.users)
    with graph.inserting_after(node):
        new = graph.call_function(target, (node, *args))
    for reader in readers:
        reader.replace_input_with(node, new)
    return new


@dataclass(frozen=True)
class Nothing(Pass):
    """Does nothing."""

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        """Leave it."""
