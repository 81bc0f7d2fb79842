"""Codes travel instead of wide values: casts move to where the fewest bytes are moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from moefx.graph.casts import DEQUANTIZE, Pair, mark, read_codes
from moefx.graph.edit import arguments, inheriting, is_backward, module_path, replace, unpack, value
from moefx.graph.placement import CODES, WIDE, solve
from moefx.graph.scales import CONCATS, GATHERS, VIEWS, Value, Values, moved_by, regions
from moefx.manager import Context, Pass
from moefx.precision.convert import exactness

ops = torch.ops.moefx
aten = torch.ops.aten


@dataclass(frozen=True)
class PropagateScales(Pass):
    """Row gathers and views that a minimum cut gives to the narrow side move codes and scales.

    `move(dequantize(c))` becomes `dequantize(move(c))` (a dequantize sinks), and `move(x)` becomes
    `dequantize(move(quantize(x)))` (a quantize is hoisted); both are exact for blocks within a row (R3, R5, R6). A
    dequantize that is then in front of a quantize goes in `fold_casts`.
    """

    level: ClassVar[str] = "training"
    requires: ClassVar[set[str]] = {"quantized"}
    provides: ClassVar[set[str]] = {"scales_propagated"}
    numerics: ClassVar[str] = "rounding"

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        values = Values.of(graph)
        before = after = moved = 0
        for region in regions(graph, values, _convertible):
            forms = solve(region.problem)
            best, now = region.problem.cost(forms), region.problem.cost(region.now)
            assert best is not None
            before, after = before + (best if now is None else now), after + best
            for v in region.values:
                if v.step is not None and v.form == WIDE and forms[v] == CODES:
                    ctx.node = v.step
                    _move_codes(graph, v, region.spec)
                    ctx.matched(v.node)
                    moved += 1
        if moved:
            ctx.row.notes.append(f"minimum cut: {after:,} bytes moved by casts and row movement, {before:,} as written")


def _convertible(spec: str, to_spec: str, rounded: bool) -> bool:
    """Whether codes may stand for a cast of the same value: any conversion of what is codes already by the recipe's
    will, of a wide value only the other orientation, which loses no more than its own cast would."""
    found = exactness(spec, to_spec)
    return found.kind != "refused" and (rounded or found.rule in ("R10", "R11/R12"))


def _move_codes(graph: fx.Graph, v: Value, spec: str) -> None:
    step = v.step
    assert step is not None
    dtype = value(step).dtype
    with inheriting(graph, step) as call:
        pairs, cast = [], None
        for x in moved_by(step):
            if x.target in DEQUANTIZE and read_codes(x).spec == spec:
                pairs.append((read_codes(x).codes, read_codes(x).scales))
                cast = x.meta["moefx_cast"]
            else:
                q = call(ops.quantize.default, x, None, [spec])
                role, tensor = ("grad", "dY") if is_backward(step) else ("input", "X")
                cast = mark(q, role, tensor, module_path(step), "before row movement").meta["moefx_cast"]
                codes, scales = unpack(call, q, 2)
                pairs.append((codes, scales))
        codes, scales = _moved(call, step, pairs)
        wide = call(ops.dequantize.default, codes, scales, None, spec, dtype)
        wide.meta["moefx_cast"] = cast
    replace(graph, step, wide)
    v.node = v.step = wide


def _moved(call: Callable[..., fx.Node], step: fx.Node, pairs: list[Pair]) -> Pair:
    """The step on codes and scales: blocks within a row move with their row."""
    if step.target in GATHERS:
        a = arguments(step)
        codes, scales = unpack(call, call(ops.permute_scaled.default, *pairs[0], a["token"], a["slot"]), 2)
        return codes, scales
    target: Any = step.target
    if step.target in VIEWS:
        shape = [*list(step.args[1])[:-1], -1]  # type: ignore[arg-type]
        codes, scales = (call(aten.view.default, t, shape) for t in pairs[0])
    elif step.target in CONCATS:
        codes, scales = (call(target, [p[i] for p in pairs], *step.args[1:]) for i in (0, 1))
    else:
        codes, scales = (call(target, t, *step.args[1:], **step.kwargs) for t in pairs[0])
    return codes, scales
