"""The routing weight moves from the output rows of the experts to their activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from moefx.graph.edit import arguments, find, inheriting, replace, targets
from moefx.graph.effects import writers
from moefx.manager import Context, Pass

ops = torch.ops.moefx


@dataclass(frozen=True)
class FoldCombine(Pass):
    """`sum_j w_j (a_j W)` is `sum_j (w_j a_j) W`: weight the activations of width I instead of the output rows of width
    H.

    The output rows then need not be kept for the backward, and the gradient of the weights is an inner product of width
    I computed where the activation's gradient is at hand (SonicMoE's identity, arXiv 2512.14080). Not legal with a bias
    behind the product. `moefx.overlap` reads the weighted activation as well: it does not see the length of a row.
    """

    requires: ClassVar[set[str]] = {"experts_expanded"}
    provides: ClassVar[set[str]] = {"combine_folded"}
    numerics: ClassVar[str] = "rounding"

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        written = writers(graph)
        for node in ctx.at(find(graph, ops.unpermute)):
            a = arguments(node)
            y, weight = a["y"], a["w"]
            if weight is None:
                continue
            if y.target in targets(ops.grouped_bias):
                ctx.rejected(node, "a bias is added after the down product, and it is weighted too")
                continue
            if y.target not in targets(ops.grouped_mm) or len(y.users) > 1:
                ctx.rejected(node, "its rows do not come from one product that nobody else reads")
                continue
            act = arguments(y)["x"]
            others = [u for u in act.users if u is not y]
            if (
                act.target not in targets(ops.glu)
                or any(u.target not in targets(ops.overlap) for u in others)
                or arguments(act)["w"] is not None
            ):
                ctx.rejected(node, "the product does not read an unweighted activation of its own")
                continue
            glu, product = arguments(act), arguments(y)
            # The weights are read at the product, where both they and the activation are known to exist.
            if weight > y or a["order"] > y:
                ctx.rejected(node, "the weights are computed after the product")
                continue
            if any(y < w < node for w in written(weight)) or any(act < w < y for w in written(glu["h"])):
                ctx.rejected(node, "the weights or the pre-activations are written in place in between")
                continue
            with inheriting(graph, y) as call:
                w_rows = call(ops.gather_weights, weight, a["order"])
                new_act = call(ops.glu, glu["h"], w_rows, glu["kind"])
                rows = call(ops.grouped_mm, new_act, product["w"], product["offsets"])
            with inheriting(graph, node) as call:
                new = call(ops.unpermute, rows, a["token"], a["order"], a["slot"], None)
            replace(graph, node, new)
            graph.erase_node(y)
            act.replace_all_uses_with(new_act)
            graph.erase_node(act)
            ctx.matched(new)
