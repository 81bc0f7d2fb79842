"""Pointwise dialect ops become ATen nodes, for a code generator that fuses them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from moefx.dialect.glu import glu_backward_reference, glu_reference
from moefx.graph.edit import arguments, find, inline, map_values
from moefx.kernels import registry
from moefx.manager import Context, Pass

ops = torch.ops.moefx


@dataclass(frozen=True)
class InlinePointwise(Pass):
    """Write the definitions of `glu` and `glu_backward` into the graph, for Inductor to fuse with what is around them.

    The partitioner can then recompute activations from the pre-activations instead of saving both. Runs last: passes
    before it see the activation as one node. On a GPU an op with a Triton kernel stays: Inductor would read h three
    times in the backward, and write dh once for each product that reads it.
    """

    level: ClassVar[str] = "training"
    provides: ClassVar[set[str]] = {"pointwise_inlined"}
    numerics: ClassVar[str] = "rounding"

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        for op, fn in ((ops.glu, glu_reference), (ops.glu_backward, glu_backward_reference)):
            for node in ctx.at(find(graph, op)):
                if registry.choose(op.__name__, *map_values(arguments(node).values())).name != "triton":
                    inline(graph, node, fn)
                    ctx.row.matched += 1
