"""Aliases, views and pairs of transposes that change nothing go from the training graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from moefx.graph.edit import is_backward, replace, same_sizes, value
from moefx.manager import Context, Pass

aten = torch.ops.aten
_ALIASES = {aten.detach.default, aten.alias.default}
_VIEWS = {aten.view.default, aten.expand.default, aten._unsafe_view.default, aten.reshape.default}
_FLIPS = {aten.t.default, aten.transpose.int}


@dataclass(frozen=True)
class DropNoops(Pass):
    """Remove detach and alias, views to the shape a tensor has already, and pairs of transposes that undo each other.

    Under autograd these mattered; in a traced graph they are work for an interpreter and noise for a reader. A forward
    value that only the backward reads through a detach is then read directly, so the partitioner sees one tensor, not
    two.
    """

    level: ClassVar[str] = "training"
    provides: ClassVar[set[str]] = {"noops_dropped"}

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        for node in ctx.at(list(graph.nodes)):
            source = _same_as(node)
            # Outputs stay nodes of their own: an output that is an input, or two outputs in one, would change calling
            # semantics.
            if (
                source is None
                or any(u.op == "output" for u in node.users)
                or (is_backward(source) != is_backward(node) and not node.users)
            ):
                continue
            replace(graph, node, source)
            ctx.row.matched += 1


def _same_as(node: fx.Node) -> fx.Node | None:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source: fx.Node = node.args[0]
    if node.target in _ALIASES:
        return source
    a, b = value(source), value(node)
    if node.target in _VIEWS:
        same = isinstance(a, torch.Tensor) and same_sizes(a.shape, b.shape) and same_sizes(a.stride(), b.stride())
        return source if same else None
    if node.target in _FLIPS and source.target in _FLIPS and isinstance(source.args[0], fx.Node):
        return source.args[0] if _axes(node) == _axes(source) else None
    return None


def _axes(node: fx.Node) -> Any:
    dims = value(node).dim()
    if node.target is aten.t.default:
        return frozenset({0, 1})
    return frozenset(int(d) % dims for d in node.args[1:3])  # type: ignore[arg-type]
