"""One dispatch plan per distinct index tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from moefx.graph.edit import arguments, find, outputs, replace
from moefx.graph.effects import writers
from moefx.manager import Context, Pass


@dataclass(frozen=True)
class SharePlans(Pass):
    """Plans of the same indices, expert count and alignment are one plan: layers that share a routing sort it once."""

    requires: ClassVar[set[str]] = {"experts_expanded"}
    provides: ClassVar[set[str]] = {"plans_shared"}

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        first: dict[tuple[object, ...], fx.Node] = {}
        written = writers(graph)
        for node in ctx.at(find(graph, torch.ops.moefx.plan)):
            a = arguments(node)
            kept = first.setdefault((a["idx"], a["E"], a["align"]), node)
            if kept is node:
                continue
            if any(kept < w < node for w in written(a["idx"])):
                ctx.rejected(node, "the indices are written in place in between")
                continue
            replace(graph, node, kept)
            outputs(kept)
            ctx.matched(kept)
