"""`route` markers become plain torch nodes: scores, top-k, weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from moefx.dialect.route import RouteSpec, write
from moefx.graph.edit import arguments, find, inheriting, outputs, replace, value
from moefx.manager import Context, Pass

ops = torch.ops.moefx


@dataclass(frozen=True)
class ExpandRouters(Pass):
    """Write the definition of `moefx.route` (dialect/route.py) into the graph, as far as its outputs are read."""

    requires: ClassVar[set[str]] = {"captured"}
    provides: ClassVar[set[str]] = {"routers_expanded"}

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        for node in ctx.at(find(graph, ops.route)):
            a, made = arguments(node), list[fx.Node]()
            logits, taken = a["logits"], outputs(node)
            with inheriting(graph, node) as make:

                def call(target: Any, *args: Any, _call: Any = make, **kw: Any) -> Any:
                    new = _call(target, *args, **kw)
                    made.append(new)  # noqa: B023  used within this iteration only
                    return new

                spec, dtype = RouteSpec.parse(a["spec"]), value(logits).dtype
                new = write(call, spec, logits, a["bias"], a["scale"], dtype, value(logits).shape[-1])
            for i, user in taken.items():
                replace(graph, user, new[i])
            graph.erase_node(node)
            for n in reversed(made):
                if not n.users:
                    graph.erase_node(n)
            ctx.matched(logits)
