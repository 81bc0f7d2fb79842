"""A tensor [E, ...] that is indexed once per expert is unbound once instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from moefx import compat
from moefx.graph.edit import inheriting, origin, value
from moefx.graph.effects import modes, name_of, writers
from moefx.manager import Context, Pass


@dataclass(frozen=True)
class UnbindExperts(Pass):
    """Replace `w[0]`, `w[1]`, ... by the outputs of one `torch.unbind(w)`.

    The backward of one index is a tensor of zeros as large as all experts with one gradient in it, and E of them are
    added up. The backward of unbind stacks the E gradients. Only tensors of which every index is taken are unbound, and
    only at the first place where one is.
    """

    requires: ClassVar[set[str]] = {"captured"}
    provides: ClassVar[set[str]] = {"experts_unbound"}

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            source = _indexed(node)
            if source is not None:
                found.setdefault(source, []).append(node)
        if not found:
            return
        written, mode = writers(graph), modes(graph)
        for source, nodes in found.items():
            ctx.node, whole = nodes[0], value(source)
            taken = {_index(n) % whole.shape[0] for n in nodes}
            if len(nodes) < 2 or whole.dim() < 2 or not whole.requires_grad:
                continue
            if len(taken) < whole.shape[0]:
                ctx.rejected(
                    nodes[0], f"{len(taken)} of {whole.shape[0]} are taken, so the others have zeros as gradients"
                )
            elif written(source):
                ctx.rejected(nodes[0], "the tensor, or a part of it, is written in place")
            elif len({mode[n] for n in nodes}) > 1:
                ctx.rejected(nodes[0], "gradients or autocast are switched between its uses")
            else:
                self._unbind(graph, source, nodes, whole.shape[0])
                ctx.matched(source)
        ctx.node = None

    def _unbind(self, graph: fx.Graph, source: fx.Node, nodes: list[fx.Node], count: int) -> None:
        with inheriting(graph, nodes[0]) as call:
            parts = call(torch.unbind, source, 0)
        for node in nodes:
            with graph.inserting_before(node):
                part = graph.call_function(compat.getitem, (parts, _index(node) % count))
            part.meta = origin(node)
            node.replace_all_uses_with(part)
            graph.erase_node(node)


def _indexed(node: fx.Node) -> fx.Node | None:
    """The tensor of which a node takes one entry along the first axis."""
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    held = value(node.args[0])
    if not isinstance(held, torch.Tensor) or held.dim() < 2 or type(held.shape[0]) is not int:
        return None
    if node.target is compat.getitem and type(_index(node)) is int:
        return node.args[0]
    if name_of(node) == "select" and _arg(node, 1) == 0 and type(_arg(node, 2)) is int:
        return node.args[0]
    return None


def _arg(node: fx.Node, i: int) -> Any:
    return node.args[i] if len(node.args) > i else node.kwargs.get(("input", "dim", "index")[i])


def _index(node: fx.Node) -> Any:
    if node.target is compat.getitem:
        index = node.args[1]
        return index[0] if isinstance(index, tuple) and len(index) == 1 else index
    return _arg(node, 2)
