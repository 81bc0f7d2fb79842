"""Taking nodes out of a graph together with all that was computed from them, as far as sums go.

For routers that are replaced: what an auxiliary loss made of their logits leaves the loss that it was added to.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Container, Iterable
from typing import Any

import torch
from torch import fx

from moefx.errors import PassError

from .edit import inheriting, place, same_sizes, source_line, value
from .effects import is_effect, name_of

Tensor = torch.Tensor
ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")


def downstream(graph: fx.Graph, sources: Iterable[fx.Node], but: Container[fx.Node] = ()) -> set[fx.Node]:
    """The sources and all that is computed from them, other than through nodes of `but`."""
    reached = set(sources)
    for node in graph.nodes:
        if node not in but and node.op != "output" and any(i in reached for i in node.all_input_nodes):
            reached.add(node)
    return reached


def take_out(
    graph: fx.Graph, old: Collection[fx.Node], but: Container[fx.Node], instead: Callable[[fx.Node, int], fx.Node]
) -> list[str]:
    """Let no output of the graph depend on `old` nodes (other than through nodes of `but`).

    A sum keeps its other addend. An output of which nothing is left becomes `instead(node, position)`.

    Returns:
        For each sum that was changed, where it stands.

    Raises:
        PassError: an output is made of old nodes and of something trained by other operations than a sum.
    """
    tainted, notes = downstream(graph, old, but), list[str]()
    learned = [n for n in graph.find_nodes(op="placeholder") if getattr(value(n), "requires_grad", False)]
    trained = downstream(graph, learned) - tainted

    def rest(node: fx.Node) -> fx.Node | None:
        """The node without what old nodes contribute to it; None when nothing is left."""
        if node not in tainted:
            return node
        if node.target in ADDS:
            parts = [rest(a) if isinstance(a, fx.Node) else a for a in node.args[:2]]
            left = [p for p in parts if p is not None]
            if len(left) == 1 and isinstance(left[0], fx.Node) and _alike(left[0], node):
                notes.append(source_line(node))
                if is_effect(node):  # loss += aux writes into the loss
                    node.replace_all_uses_with(left[0])
                    graph.erase_node(node)
                return left[0]
            if len(left) == 2:
                with inheriting(graph, node) as call:
                    return call(torch.add, *left)
        if odd := _reads(node, tainted.difference(old), trained):
            raise PassError(
                f"an output mixes the old routers with {name_of(odd)} other than by a sum",
                where=place(node),
                todo="let the model add its auxiliary loss to its loss, or switch it off",
            )
        return None

    out = graph.output_node()
    leaves: Any = out.args[0]
    new = []
    for i, v in enumerate(leaves):
        left = rest(v) if isinstance(v, fx.Node) else v
        new.append(instead(v, i) if left is None and v is not None else left)
    if any(a is not b for a, b in zip(new, leaves, strict=True)):
        out.args = (type(leaves)(new),)
    return notes


def _reads(node: fx.Node, tainted: set[fx.Node], trained: set[fx.Node]) -> fx.Node | None:
    """What a value computed from old nodes (by `tainted` ones) reads besides them that is trained, if anything."""
    stack, seen = [node] if node in tainted else [], set[fx.Node]()
    while stack:
        n = stack.pop()
        for i in n.all_input_nodes:
            if i in trained:
                return i
            if i in tainted and i not in seen:
                seen.add(i)
                stack.append(i)
    return None


def _alike(a: fx.Node, b: fx.Node) -> bool:
    x, y = value(a), value(b)
    return isinstance(x, Tensor) and same_sizes(x.shape, y.shape) and bool(x.dtype == y.dtype)
