"""Routed rows are gathered by the products that read them, and exist nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from moefx.dialect import GluKind
from moefx.graph.edit import arguments, find, inheriting, is_backward, outputs, replace, targets, unpack, value
from moefx.graph.effects import writers
from moefx.manager import Context, Pass

ops = torch.ops.moefx
PRODUCT, WGRAD, GLU, PLANNED = (targets(op) for op in (ops.grouped_mm, ops.grouped_wgrad, ops.glu, ops.plan_permute))


@dataclass(frozen=True)
class FuseGather(Pass):
    """`permute`, `grouped_mm` and `glu` become one op, and `permute` and `grouped_wgrad` another.

    Only where nothing but such products reads the rows, so that they are not written at all: the backward keeps the
    tokens, T rows, instead of T * k (as in SonicMoE, arXiv 2512.14080).

    `devices` are the types of devices where a kernel gathers as it multiplies, and `dtypes` what it multiplies.
    Elsewhere the fused ops would move the rows first, once for each product.
    """

    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)

    level: ClassVar[str] = "training"
    provides: ClassVar[set[str]] = {"gather_fused"}
    numerics: ClassVar[str] = "rounding"

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        written = writers(graph)
        for node in ctx.at(find(graph, ops.permute, ops.plan_permute)):
            rows = outputs(node).get(0) if node.target in PLANNED else node
            if rows is None or not any(u.target in PRODUCT | WGRAD for u in rows.users):
                continue
            x, readers, val = arguments(node)["x"], sorted(rows.users), value(rows)
            others = [u.name for u in readers if not _gathers(u, rows)]
            if others:
                ctx.rejected(node, f"{others[0]} reads the rows too, and cannot gather them")
            elif val.device.type not in self.devices or val.dtype not in self.dtypes:
                dtype = str(val.dtype).removeprefix("torch.")
                note = f"no kernel gathers rows of {dtype} on {val.device.type} as it multiplies"
                if note not in ctx.row.notes:  # once, not for every layer
                    ctx.row.notes.append(note)
            elif any(node < w < readers[-1] for w in written(x)):
                ctx.rejected(node, "the tokens are written in place before their rows are multiplied")
            else:
                source = (x, *_maps(graph, node))
                for reader in readers:
                    fuse = _fuse_product if reader.target in PRODUCT else _fuse_wgrad
                    ctx.matched(fuse(graph, reader, rows, source))
                for unread in dict.fromkeys((rows, node)):
                    graph.erase_node(unread)


def _gathers(reader: fx.Node, rows: fx.Node) -> bool:
    """Whether a product reads the rows as the operand that its fused form gathers, and as no other."""
    if reader.target in PRODUCT:
        a = arguments(reader)
        return a["x"] is rows and a["w"] is not rows
    return reader.target in WGRAD and [reader.args[0], reader.args[1]].count(rows) == 1


def _maps(graph: fx.Graph, node: fx.Node) -> tuple[Any, Any]:
    """Tokens and slots of a permute. A plan that was made with the rows is made alone."""
    a = arguments(node)
    if node.target not in PLANNED:
        return a["token"], a["slot"]
    with inheriting(graph, node) as call:
        maps = unpack(call, call(ops.plan.default, a["idx"], a["E"], a["align"]), 4)
    for i, old in outputs(node).items():
        if i:
            replace(graph, old, maps[i - 1])
    for unread in (m for m in (maps[1], maps[3]) if not m.users):
        graph.erase_node(unread)
    return maps[0], maps[2]


def _fuse_product(graph: fx.Graph, product: fx.Node, rows: fx.Node, source: tuple[Any, ...]) -> fx.Node:
    """The product, with its activation where that can be computed as soon as the product is."""
    p = arguments(product)
    acts = [u for u in product.users if u.target in GLU and _has_halves(arguments(u)["kind"]) and not is_backward(u)]
    if len(acts) != 1 or min(product.users) is not acts[0]:
        with inheriting(graph, product) as call:
            new = call(ops.permute_grouped_mm.default, *source, p["w"], p["offsets"])
        replace(graph, product, new)
        return new
    (act,) = acts
    a = arguments(act)
    with inheriting(graph, act) as call:
        operands = *source, p["w"], p["offsets"], a["w"], a["kind"]
        fused = call(ops.permute_grouped_mm_glu.default, *operands)
        h, new = unpack(call, fused, 2)
    replace(graph, act, new)
    replace(graph, product, h)
    return fused


def _has_halves(kind: str) -> bool:
    parsed = GluKind.parse(kind)
    return parsed.gated and not parsed.interleaved


def _fuse_wgrad(graph: fx.Graph, wgrad: fx.Node, rows: fx.Node, source: tuple[Any, ...]) -> fx.Node:
    a = arguments(wgrad)
    flip = a["a"] is rows
    with inheriting(graph, wgrad) as call:
        dy = a["b"] if flip else a["a"]
        new = call(ops.permute_grouped_wgrad.default, dy, *source, a["offsets"], flip)
    replace(graph, wgrad, new)
    return new
