"""A dequantize in front of a quantize of the same spec is nothing, and one tensor is quantized once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from moefx.graph.casts import DEQUANTIZE, Pair, keep_specs, quantize_nodes, read_codes
from moefx.graph.edit import arguments
from moefx.manager import Context, Pass
from moefx.precision.spec import QuantSpec


@dataclass(frozen=True)
class FoldCasts(Pass):
    """`quantize(dequantize(c))` of one spec reads `c` itself (R1), and equal casts of one tensor are one (R22).

    The original codes are kept: quantizing again would give the same values but other codes for some blocks (rceil: a
    block whose largest value rounded down to half the range takes the next smaller scale).
    """

    level: ClassVar[str] = "training"
    requires: ClassVar[set[str]] = {"quantized"}
    provides: ClassVar[set[str]] = {"casts_folded"}
    numerics: ClassVar[str] = "rounding"

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        made: dict[tuple[Any, Any, str], Pair] = {}
        for q in ctx.at(quantize_nodes(graph)):
            x: Any = q.args[0]
            specs: list[str] = list(arguments(q)["specs"])
            have: dict[str, Pair] = {}
            if x.target in DEQUANTIZE:
                c = read_codes(x)
                have = {
                    s: (c.codes, c.scales) for s in specs if QuantSpec.parse(s).same_values(QuantSpec.parse(c.spec))
                }
            rows = arguments(q)["offsets"]
            for s in specs:
                earlier = made.get((x, rows if QuantSpec.parse(s).br != 1 else None, s))
                if s not in have and earlier is not None and not QuantSpec.parse(s).stochastic:
                    have[s] = earlier
            if have:
                ctx.matched(q)
                if x.target in DEQUANTIZE and len(x.users) == 1 and len(have) == len(specs):
                    ctx.fate(x, "R1: nothing reads the wide value any more")
                ctx.fate(
                    q, "R1: its codes are there already" if x.target in DEQUANTIZE else "R22: one cast of one tensor"
                )
            left = keep_specs(graph, q, [s for s in specs if s not in have], have)
            for s, pair in left.items():
                made[x, rows if QuantSpec.parse(s).br != 1 else None, s] = pair
