"""`experts` and `expert_choice` markers become dialect ops.

These are dispatch, plan, permute, product, activation, product, unpermute and combine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from moefx.dialect.experts import ExpertsSpec
from moefx.graph.edit import arguments, find, inheriting, replace, unpack, value
from moefx.manager import Context, Pass

ops = torch.ops.moefx


@dataclass(frozen=True)
class ExpandExperts(Pass):
    """Write the definition of `moefx.experts` (dialect/experts.py) into the graph, node by node."""

    requires: ClassVar[set[str]] = {"moe_raised"}
    provides: ClassVar[set[str]] = {"experts_expanded"}

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        for node in ctx.at(find(graph, ops.experts, ops.expert_choice)):
            a = arguments(node)
            spec = ExpertsSpec.parse(a["spec"])
            up, down = a["weights"][0], a["weights"][2 if spec.bias else 1]
            biases = (a["weights"][1], a["weights"][3]) if spec.bias else (None, None)
            with inheriting(graph, node) as call:

                def linear(x: fx.Node, w: fx.Node, bias: fx.Node | None, offsets: fx.Node, call: Any = call) -> fx.Node:
                    if spec.layout == "kn":  # noqa: B023  used within this iteration only
                        w = call(torch.transpose, w, 1, 2)
                    y: fx.Node = call(ops.grouped_mm, x, w, offsets)
                    return y if bias is None else call(ops.grouped_bias, y, bias, offsets)

                if "idx" in a:
                    plan, weight = call(ops.plan, a["idx"], value(up).shape[0], 1), a["w"]
                else:
                    tokens = value(a["x"]).shape[0]
                    tokens = tokens if isinstance(tokens, int) else call(torch.ops.aten.sym_size.int, a["x"], 0)
                    plan = call(ops.choice_plan, a["token"], tokens, 1)
                    zeros = call(torch.ops.aten.new_zeros, a["w"], [tokens, value(up).shape[0]])
                    weight = call(torch.scatter, zeros, 0, call(torch.t, a["token"]), call(torch.t, a["w"]))
                token, order, slot, offsets = unpack(call, plan, 4)
                h = linear(call(ops.permute, call(ops.dispatch, a["x"]), token, slot), up, biases[0], offsets)
                y = linear(call(ops.glu, h, None, str(spec.glu)), down, biases[1], offsets)
                new = call(ops.combine, call(ops.unpermute, y, token, order, slot, weight))
            replace(graph, node, new)
            ctx.matched(new)
