"""A plan and the permute that reads it become one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from moefx.graph.edit import arguments, find, inheriting, outputs, replace, targets, unpack
from moefx.graph.effects import writers
from moefx.manager import Context, Pass

ops = torch.ops.moefx


@dataclass(frozen=True)
class FusePlanPermute(Pass):
    """Build the row maps and move the rows in one op, where exactly one permute reads a plan.

    A plan that several permutes share (one routing for many layers) stays on its own.
    """

    requires: ClassVar[set[str]] = {"plans_shared"}
    provides: ClassVar[set[str]] = {"plan_permute_fused"}

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        written = writers(graph)
        for plan in ctx.at(find(graph, ops.plan)):
            parts, p = outputs(plan), arguments(plan)
            token, slot = parts.get(0), parts.get(2)
            readers = [
                u
                for u in (token.users if token else ())
                if u.target in targets(ops.permute) and arguments(u)["token"] is token
            ]
            if len(readers) != 1 or arguments(readers[0])["slot"] is not slot:
                ctx.rejected(plan, f"{len(readers)} permutes read it")
                continue
            permute = readers[0]
            if any(u < permute for part in parts.values() for u in part.users):
                ctx.rejected(plan, "something reads the plan before the rows can be moved")
                continue
            if any(plan < w < permute for w in written(p["idx"])):
                ctx.rejected(plan, "the indices are written in place before the rows can be moved")
                continue
            with inheriting(graph, permute) as call:
                fused = call(ops.plan_permute, arguments(permute)["x"], p["idx"], p["E"], p["align"])
                rows, *maps = unpack(call, fused, 5)
            replace(graph, permute, rows)
            for i, part in parts.items():
                replace(graph, part, maps[i])
            graph.erase_node(plan)
            for m in maps:
                if not m.users:
                    graph.erase_node(m)
            ctx.matched(fused)
