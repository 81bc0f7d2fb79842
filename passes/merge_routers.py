"""The softmax and top-k that an auxiliary loss computes again are the router's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.nn import functional as F

from moefx.graph.edit import find, outputs, replace, same_value, value
from moefx.graph.effects import modes, writers
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
        written, mode = writers(graph), modes(graph)
        softmaxes: dict[tuple[Any, ...], fx.Node] = {}
        topks: dict[tuple[Any, ...], fx.Node] = {}
        near: dict[fx.Node, fx.Node] = {}
        # In the order of the graph, for one of each kind may read what the other gives.
        for node in ctx.at(_calls(graph, ("softmax", "topk"), F.softmax, torch.softmax, torch.topk)):
            if node.target in ("topk", torch.topk):
                self._topk(graph, ctx, node, topks, written, mode)
                continue
            logits, dim = _source(_arg(node, 0, "input")), _dim(node)
            if not isinstance(logits, fx.Node):
                continue
            kept = softmaxes.setdefault((logits, dim, value(node).dtype, mode[node]), node)
            if kept is not node:
                if written(node) or written(kept) or any(kept < w < node for w in written(logits)):
                    ctx.rejected(node, "one of the two, or what they read, is written in place")
                    continue
                replace(graph, node, kept)
                ctx.matched(kept)
            elif (other := near.setdefault(logits, node)) is not node and _topk_users(node) and _topk_users(other):
                mine, theirs = value(node).dtype, value(other).dtype
                if mine != theirs:
                    ctx.rejected(node, f"computed in {mine}, the router's in {theirs}: the values differ")

    @staticmethod
    def _topk(
        graph: fx.Graph, ctx: Context, node: fx.Node, topks: dict[tuple[Any, ...], fx.Node], written: Any, mode: Any
    ) -> None:
        options = [_arg(node, i, name, default) for i, name, default in _TOPK_OPTIONS]
        kept = topks.setdefault((_arg(node, 0, "input"), *options, mode[node]), node)
        taken = outputs(node)
        if kept is node or len(node.users) != len(taken):
            return
        kept_outputs = outputs(kept)
        shared = [n for i, user in taken.items() for n in (user, kept_outputs.get(i)) if n is not None]
        if any(map(written, shared)) or any(kept < w < node for w in written(node.all_input_nodes[0])):
            ctx.rejected(node, "its values, or what it reads, are written in place")
            return
        for i, user in taken.items():
            if i in kept_outputs and kept_outputs[i] < user:
                replace(graph, user, kept_outputs[i])
            else:
                user.args = (kept, i)
        graph.erase_node(node)
        ctx.matched(kept)


_TOPK_OPTIONS = ((1, "k", None), (2, "dim", -1), (3, "largest", True), (4, "sorted", True))


def _calls(graph: fx.Graph, methods: tuple[str, ...], *functions: Any) -> list[fx.Node]:
    found = set(find(graph, *functions))
    return [n for n in graph.nodes if n in found or (n.op == "call_method" and n.target in methods)]


def _arg(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


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
    return [u for u in node.users if u.target in (torch.topk, "topk")]
