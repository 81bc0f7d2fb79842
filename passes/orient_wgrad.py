"""A weight gradient is computed in the layout in which the parameter is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from moefx.graph.edit import arguments, find, inheriting, replace
from moefx.manager import Context, Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class OrientWgrad(Pass):
    """`transpose(wgrad(a, b))` becomes `wgrad(b, a)`.

    Parameters stored [E, in, out] (gpt-oss, Llama4) are read through a transposed view, so their gradient would come
    back as one, and the optimizer would copy it.
    """

    level: ClassVar[str] = "training"
    provides: ClassVar[set[str]] = {"wgrad_oriented"}
    numerics: ClassVar[str] = "rounding"

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        for wgrad in ctx.at(find(graph, torch.ops.moefx.grouped_wgrad)):
            flips = [u for u in wgrad.users if u.target is aten.transpose.int and _axes(u) == {1, 2}]
            if not flips:
                continue
            if len(flips) != len(wgrad.users):
                ctx.rejected(wgrad, "it is read in both orientations")
                continue
            a = arguments(wgrad)
            with inheriting(graph, wgrad) as call:
                new = call(torch.ops.moefx.grouped_wgrad.default, a["b"], a["a"], a["offsets"])
            for flip in flips:
                replace(graph, flip, new)
            graph.erase_node(wgrad)
            ctx.matched(new)


def _axes(node: fx.Node) -> set[int]:
    return {d % 3 for d in node.args[1:3] if isinstance(d, int)}
