"""FP8 products on a GPU find the axis that they sum over contiguous: NVIDIA's tensor cores read nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from moefx import compat
from moefx.graph.casts import QUANTIZE
from moefx.graph.edit import arguments, find, inheriting, is_backward, origin, set_arguments, targets, value
from moefx.graph.products import source
from moefx.kernels.layout import ALIGN, by_columns
from moefx.manager import Context, Pass
from moefx.precision.spec import QuantSpec

ops = torch.ops.moefx
aten = torch.ops.aten
WRITERS = (ops.quantize, ops.glu_quantize, ops.glu_backward_quantize, ops.transpose_scaled, ops.convert)
PLANS = targets(ops.plan, ops.choice_plan, ops.plan_permute)


@dataclass(frozen=True)
class OrientCodes(Pass):
    """Codes that are summed over rows are written by columns, and transposed weights are copied once a step.

    Casts in blocks along columns, and the weight gradients that read them, are told that rows of experts begin at
    multiples of 16, which is what codes by columns need (`kernels.layout`); plans say whether it is so. A weight in
    blocks that serve both orientations is cast once: the product that reads it transposed gets a copy of its codes,
    bytes moved and no cast, one byte more for each parameter. It is made where the codes are made, so that microbatches
    share it, too.

    Elsewhere than on `devices`, products gain nothing from it.
    """

    devices: tuple[str, ...] = ("cuda",)

    level: ClassVar[str] = "training"
    requires: ClassVar[set[str]] = {"quantized"}
    provides: ClassVar[set[str]] = {"codes_oriented"}

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        for node in ctx.at(find(graph, *WRITERS, ops.scaled_grouped_wgrad)):
            if node.target in targets(*WRITERS) and not any(QuantSpec.parse(s).sums_rows for s in _written(node)):
                continue
            a = arguments(node)
            if not self._here(node) or a["align"] % ALIGN == 0:
                continue
            rows = a["offsets"]
            align = ALIGN if rows is None else _alignment(rows)
            if align % ALIGN:
                ctx.rejected(node, f"rows of experts begin at multiples of {align}, not of {ALIGN}")
                continue
            set_arguments(node, align=ALIGN)
            ctx.matched(node)
        copies: dict[fx.Node, fx.Node] = {}
        for product in ctx.at(find(graph, ops.scaled_grouped_mm, ops.scaled_grouped_mm_quantize)):
            w = arguments(product)["w"]
            codes, flipped = source(w)
            if not flipped or not self._here(product) or value(w).element_size() != 1 or _written_by_columns(codes):
                continue
            if codes not in copies:
                copies[codes] = _copy(graph, codes)
            product.replace_input_with(w, copies[codes])
            if is_backward(product) and not is_backward(codes):
                compat.keep(copies[codes])  # or a partitioner would transpose again in the backward
            ctx.matched(product)

    def _here(self, node: fx.Node) -> bool:
        first: Any = node.args[0]
        return value(first).device.type in self.devices


def _written(node: fx.Node) -> list[str]:
    """Specs of the codes that a node writes."""
    a = arguments(node)
    if "to_spec" in a:
        return [a["to_spec"]]
    return [*a["specs"], *a.get("h_specs", ()), *a.get("act_specs", ())]


def _alignment(offsets: fx.Node) -> int:
    """What rows of experts begin at multiples of, as their plan says; 1 where no plan is seen."""
    plan: Any = offsets.args[0] if offsets.target is compat.getitem else None
    return int(arguments(plan)["align"]) if plan is not None and plan.target in PLANS else 1


def _written_by_columns(codes: fx.Node) -> bool:
    """Whether codes of a weight lie by columns: then they are contiguous in a product that reads them transposed."""
    q: Any = codes.args[0] if codes.target is compat.getitem else None
    if q is None or q.target not in QUANTIZE:
        return False
    a = arguments(q)
    return by_columns(a["specs"][codes.args[1] // 2], a["align"])  # type: ignore[operator]


def _copy(graph: fx.Graph, codes: fx.Node) -> fx.Node:
    with inheriting(graph, codes.next) as call:
        turned = call(aten.permute.default, codes, [0, 2, 1])
        copy = call(aten.clone.default, turned, memory_format=torch.contiguous_format)
    turned.meta, copy.meta = origin(codes), origin(codes)
    return copy
