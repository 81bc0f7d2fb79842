"""Rows of each expert are padded to a multiple that kernels ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from moefx.graph.edit import arguments, find, set_arguments, value
from moefx.manager import Context, Pass
from moefx.precision.recipe import BF16, Recipe

ops = torch.ops.moefx


@dataclass(frozen=True)
class AlignPlans(Pass):
    """Plans start every expert at a multiple of the recipe's `align`; rows between hold no token and are zero.

    Scaled products of a library need it (16 rows for FP8, 32 for MX formats); sums over rows do not see it. On
    `devices` it is the recipe's `gpu_align`.
    """

    recipe: Recipe = BF16
    devices: tuple[str, ...] = ("cuda",)

    requires: ClassVar[set[str]] = {"experts_expanded"}
    provides: ClassVar[set[str]] = {"plans_aligned"}
    numerics: ClassVar[str] = "rounding"

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        for plan in ctx.at(find(graph, ops.plan, ops.choice_plan)):
            indices = next(n for n in plan.all_input_nodes if isinstance(value(n), torch.Tensor))
            align = self.recipe.gpu_align if value(indices).device.type in self.devices else self.recipe.align
            if arguments(plan)["align"] % align:
                set_arguments(plan, align=align)
                ctx.matched(plan)
