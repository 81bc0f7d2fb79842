"""`route` markers become one op where there is a kernel for it, and plain torch nodes elsewhere."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from moefx.dialect.route import RouteSpec, write, write_scale
from moefx.dialect.topk_route import attributes, covers
from moefx.graph.edit import arguments, find, inheriting, outputs, replace, unpack, value
from moefx.kernels import registry
from moefx.manager import Context, Pass

ops = torch.ops.moefx


@dataclass(frozen=True)
class ExpandRouters(Pass):
    """Write the definition of `moefx.route` (dialect/route.py) into the graph, as far as its outputs are read.

    A router for whose tensors `moefx.topk_route` has a kernel (on CUDA, with triton) becomes that op, and a scale per
    expert a gather and a product behind it. The op rounds in its own way and takes the lowest index of equal experts,
    where `torch.topk` takes any: the run is then of the class "rounding".
    """

    requires: ClassVar[set[str]] = {"captured"}
    provides: ClassVar[set[str]] = {"routers_expanded"}

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        for node in ctx.at(find(graph, ops.route)):
            a, made = arguments(node), list[fx.Node]()
            logits, taken = a["logits"], outputs(node)
            new: Any
            with inheriting(graph, node) as make:

                def call(target: Any, *args: Any, _call: Any = make, **kw: Any) -> Any:
                    new = _call(target, *args, **kw)
                    made.append(new)  # noqa: B023  used within this iteration only
                    return new

                spec, dtype = RouteSpec.parse(a["spec"]), value(logits).dtype
                # What the op computes of it: behind a scale comes the cast.
                plain = dataclasses.replace(spec, per_expert=False, out=None) if spec.per_expert else spec
                if _has_kernel(plain, logits, a["bias"]):
                    new = unpack(call, call(ops.topk_route, logits, a["bias"], *attributes(plain)), 3)
                    if spec.per_expert:
                        new = *new[:2], write_scale(call, spec, new[2], new[1], a["scale"])
                    ctx.rounds()
                else:
                    new = write(call, spec, logits, a["bias"], a["scale"], dtype, value(logits).shape[-1])
            for i, user in taken.items():
                replace(graph, user, new[i])
            graph.erase_node(node)
            for n in reversed(made):
                if not n.users:
                    graph.erase_node(n)
            ctx.matched(logits)


def _has_kernel(spec: RouteSpec, logits: fx.Node, bias: fx.Node | None) -> bool:
    if not covers(spec, value(logits).dtype):
        return False
    args = (value(logits), None if bias is None else value(bias), *attributes(spec))
    return registry.choose("topk_route", *args).name != "reference"
