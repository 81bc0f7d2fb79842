"""The rows behind a product that one sum per token reads are made a few columns at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from moefx.compat import size_hint
from moefx.graph.edit import arguments, find, inheriting, replace, targets, value
from moefx.manager import Context, Pass
from moefx.precision.spec import QuantSpec

ops = torch.ops.moefx
aten = torch.ops.aten
WIDE, SCALED = targets(ops.grouped_mm), targets(ops.scaled_grouped_mm)
STEP = 128  # columns: a tile of a product


@dataclass(frozen=True)
class BoundWorkspace(Pass):
    """`unpermute(x W)` becomes the concatenation of `unpermute(x W_c)` over blocks of columns c of W.

    The output rows of the experts in the forward, and the gradients of their input rows in the backward, are k times as
    many as there are tokens and live for a moment: at 32768 tokens, top-8 and H=2048, 1 GiB each in bfloat16, which is
    more than what such a layer keeps. Columns are independent of each other, so that the same products and sums are
    made in blocks of at most `mib` MiB of rows; x is read once more for each block.

    Args:
        mib: the most that the rows of one product may take, in MiB of 2^20 bytes.
    """

    mib: float = 256.0

    level: ClassVar[str] = "training"
    requires: ClassVar[set[str]] = {"experts_expanded"}
    provides: ClassVar[set[str]] = {"workspace_bounded"}
    numerics: ClassVar[str] = "rounding"

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        for combine in ctx.at(find(graph, ops.unpermute)):
            a = arguments(combine)
            y: Any = a["y"]
            if y.target not in WIDE | SCALED:
                continue
            rows, columns = (size_hint(s) for s in value(y).shape)
            per = _block_height(y)
            step = math.lcm(STEP, per or 1)  # a slice of W begins at a block of its scales
            a_column = rows * value(y).element_size()
            if a_column * columns <= self.mib * 2**20:
                continue
            if a["w"] is not None:
                ctx.rejected(combine, "the gradient of its weights reads all columns of a row")
            elif len(y.users) > 1:
                ctx.rejected(combine, "others read the rows, too")
            elif columns <= step:
                ctx.rejected(combine, f"{step} columns of {rows} rows are the least that is made at once")
            else:
                width = max(int(self.mib * 2**20 / a_column) // step, 1) * step
                ctx.matched(_by_columns(graph, combine, y, width, columns, per))


def _block_height(product: fx.Node) -> int | None:
    """Rows of W under one scale; None: all of them, or none has a scale."""
    return QuantSpec.parse(arguments(product)["w_spec"]).br if product.target in SCALED else None


def _by_columns(graph: fx.Graph, combine: fx.Node, y: fx.Node, width: int, columns: int, per: int | None) -> fx.Node:
    a, product = arguments(combine), arguments(y)
    parts = []
    with inheriting(graph, combine) as call:

        def slice_rows(t: fx.Node, start: int, end: int) -> fx.Node:
            return call(aten.slice.Tensor, t, 1, start, end)

        for start in range(0, columns, width):
            end = min(start + width, columns)
            args = {**product, "w": slice_rows(product["w"], start, end)}
            if per is not None:
                args["w_scales"] = slice_rows(product["w_scales"], start // per, -(-end // per))
            rows = call(y.target, *args.values())
            parts.append(call(ops.unpermute.default, *{**a, "y": rows}.values()))
        new = call(aten.cat.default, parts, 1)
    replace(graph, combine, new)
    graph.erase_node(y)
    return new
