"""On one process, dispatch and combine are nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from moefx.graph.edit import find, replace
from moefx.manager import Context, Pass

ops = torch.ops.moefx


@dataclass(frozen=True)
class LowerWires(Pass):
    """Take the wires between ranks out of a graph that runs on one process; what a wire carried is read directly.

    Runs after the precision passes, which need to see what travels.
    """

    level: ClassVar[str] = "training"
    provides: ClassVar[set[str]] = {"wires_lowered"}

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        for node in ctx.at(find(graph, ops.dispatch, ops.combine)):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            # An output that is an input, or two outputs in one memory, would change calling semantics.
            shared = source.op == "placeholder" or any(u.op == "output" for u in source.users)
            if shared and any(u.op == "output" for u in node.users):
                ctx.rejected(node, "it is an output of the graph, and what it copies is an input or output too")
                continue
            replace(graph, node, source)
            ctx.row.matched += 1
