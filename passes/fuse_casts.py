"""The activation writes codes itself: its cast is part of its own pass over memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from moefx import compat
from moefx.graph.casts import is_weight, quantize_nodes
from moefx.graph.edit import arguments, inheriting, outputs, replace, targets, unpack
from moefx.manager import Context, Pass

ops = torch.ops.moefx
GLU, GLU_BACKWARD = targets(ops.glu), targets(ops.glu_backward)


@dataclass(frozen=True)
class FuseCasts(Pass):
    """`quantize(glu(h))` is `glu_quantize(h)`, and the backward alike (R19).

    Exact: the fused op is defined to round to the activation's dtype before it quantizes. The wide activation must have
    no other reader, or it would be computed twice.
    """

    level: ClassVar[str] = "training"
    requires: ClassVar[set[str]] = {"quantized"}
    provides: ClassVar[set[str]] = {"casts_fused"}

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        for q in ctx.at(quantize_nodes(graph)):
            x: Any = q.args[0]
            backward = x.target is compat.getitem and x.args[0].target in GLU_BACKWARD and x.args[1] == 0
            if is_weight(q) or not (backward or x.target in GLU):
                continue
            if len(x.users) > 1:
                others = ", ".join(u.name for u in x.users if u is not q)
                ctx.rejected(q, f"{others} reads the wide activation too")
                continue
            new = _backward(graph, q, x) if backward else _forward(graph, q, x)
            new.meta["moefx_fused"] = (q.meta["moefx_cast"],)
            ctx.fate(q, f"R19: written by {new.target._schema.name.split('::')[-1]}")  # type: ignore[union-attr]
            producer = x.args[0] if backward else None
            for dead in (q, x, producer):
                if dead is not None and not dead.users:
                    graph.erase_node(dead)
            ctx.matched(new)


def _forward(graph: fx.Graph, q: fx.Node, x: fx.Node) -> fx.Node:
    a, c = arguments(x), arguments(q)
    with inheriting(graph, q) as call:
        new = call(ops.glu_quantize.default, a["h"], a["w"], c["offsets"], a["kind"], list(c["specs"]), [])
        items = unpack(call, new, 2 * len(c["specs"]))
    for i, old in outputs(q).items():
        replace(graph, old, items[i])
    return new


def _backward(graph: fx.Graph, q: fx.Node, x: fx.Node) -> fx.Node:
    glu: Any = x.args[0]
    a, c = arguments(glu), arguments(q)
    with inheriting(graph, glu) as call:
        new = call(
            ops.glu_backward_quantize.default, a["da"], a["h"], None, a["w"], c["offsets"], a["kind"], "",
            list(c["specs"]), [],
        )  # fmt: skip
        dw, *items = unpack(call, new, 1 + 2 * len(c["specs"]))
    for i, old in outputs(q).items():
        replace(graph, old, items[i])
    weight = outputs(glu).get(1)
    if weight is not None:
        replace(graph, weight, dw)
    elif not dw.users:
        graph.erase_node(dw)
    return new
