"""The softmax and top-k that an auxiliary loss computes again are the router's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.nn import functional as F

from moefx.graph.edit import find, mutated, outputs, replace, same_value, value
from moefx.manager import Context, Pass


@dataclass(frozen=True)
class MergeRouters(Pass):
    """Merge softmax and top-k nodes that compute the same thing from the same logits.

    transformers builds its load-balancing loss from the recorded logits, with a softmax and a top-k of its own per
    layer. Casts and moves that change nothing are looked through. Where the second softmax is computed in another dtype
    (bf16 models whose router works in fp32) the two differ in value and are left alone. Merging changes the order in
    which gradients are added.
    """

    requires: ClassVar[set[str]] = {"captured"}
    provides: ClassVar[set[str]] = {"routers_merged"}
    numerics: ClassVar[str] = "rounding"

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        written = {n for node in graph.nodes for n in mutated(node)}
        softmaxes: dict[tuple[Any, ...], fx.Node] = {}
        near: dict[fx.Node, fx.Node] = {}
        for node in ctx.at(_softmaxes(graph)):
            logits, dim = _source(_arg(node, 0, "input")), _dim(node)
            if not isinstance(logits, fx.Node):
                continue
            kept = softmaxes.setdefault((logits, dim, value(node).dtype), node)
            if kept is not node:
                if {node, kept, logits} & written:
                    ctx.rejected(node, "one of the two is written in place")
                    continue
                replace(graph, node, kept)
                ctx.matched(kept)
            elif (other := near.setdefault(logits, node)) is not node and _topk_users(node) and _topk_users(other):
                ctx.rejected(
                    node, f"computed in {value(node).dtype}, the router's in {value(other).dtype}: the values differ"
                )
        topks: dict[tuple[Any, ...], fx.Node] = {}
        for node in ctx.at(find(graph, torch.topk)):
            key = (
                _arg(node, 0, "input"),
                _arg(node, 1, "k"),
                tuple(node.args[2:]),
                tuple(sorted(node.kwargs.items(), key=str)),
            )
            kept = topks.setdefault(key, node)
            if kept is node:
                continue
            taken = outputs(node)
            if set(taken) - {1} and (written & {taken[0], outputs(kept).get(0)}):
                ctx.rejected(node, "its values are written in place")
                continue
            kept_outputs = outputs(kept)
            for i, user in taken.items():
                if i in kept_outputs and kept_outputs[i] < user:
                    replace(graph, user, kept_outputs[i])
                else:
                    user.args = (kept, i)
            graph.erase_node(node)
            ctx.matched(kept)


def _softmaxes(graph: fx.Graph) -> list[fx.Node]:
    methods = [n for n in graph.nodes if n.op == "call_method" and n.target == "softmax"]
    return sorted(find(graph, F.softmax, torch.softmax) + methods, key=list(graph.nodes).index)


def _arg(node: fx.Node, index: int, name: str) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def _dim(node: fx.Node) -> Any:
    dim = _arg(node, 1, "dim")
    return dim - value(node).dim() if isinstance(dim, int) and dim >= 0 else dim


def _source(node: Any) -> Any:
    """Look through casts and moves that change nothing."""
    while isinstance(node, fx.Node) and node.op == "call_method" and node.target in ("to", "float", "contiguous"):
        inner = node.args[0]
        if not isinstance(inner, fx.Node) or not same_value(value(inner), value(node)):
            break
        node = inner
    return node


def _topk_users(node: fx.Node) -> list[fx.Node]:
    return [u for u in node.users if u.target is torch.topk]
