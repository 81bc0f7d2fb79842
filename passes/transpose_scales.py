"""Codes in blocks of one orientation become codes in blocks of the other, without the wide tensor in between."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from moefx import compat
from moefx.graph.casts import DEQUANTIZE, QUANTIZE, Codes, Pair, add_spec, keep_specs, quantize_nodes, read_codes
from moefx.graph.edit import arguments, inheriting, targets, unpack
from moefx.manager import Context, Pass
from moefx.precision.convert import exactness
from moefx.precision.quantize import double_quantization
from moefx.precision.recipe import BF16, Recipe
from moefx.precision.spec import QuantSpec

ops = torch.ops.moefx
FUSABLE = targets(ops.glu, ops.glu_backward)
"""Producers that can write both orientations from one tile."""


@dataclass(frozen=True)
class TransposeScales(Pass):
    """`quantize(dequantize(c))` of another spec than c's becomes one op on codes, or a second output of c's own cast.

    A producer that is about to be fused with its cast writes both orientations (R22). Elsewhere a scaling-aware
    transpose (R11, R12) or a conversion of formats (R14 to R17) takes the codes. Scales that are no powers of two allow
    neither (R13): then both orientations are quantized from the wide tensor where that is still at hand, and otherwise
    the cast stays and the ledger says why.

    What comes from the wide tensor instead of from codes is the same number where both are of one format with
    power-of-two scales. Under recipes with other specs it is nearer to the original, so the pass `changes` numbers; and
    so it does where they round stochastically, since a conversion rounds to nearest and leaves a draw out.
    """

    recipe: Recipe = BF16

    level: ClassVar[str] = "training"
    requires: ClassVar[set[str]] = {"quantized", "casts_folded"}
    provides: ClassVar[set[str]] = {"scales_transposed"}
    numerics: ClassVar[str] = "rounding"

    def __post_init__(self) -> None:
        for role in ("input", "grad"):
            specs = [QuantSpec.parse(text) for text in self.recipe.specs_of(role)]
            apart = any(s.scale not in ("po2", "e8m0") or s.stochastic for s in specs)
            if len({s.elem for s in specs}) > 1 or apart:
                object.__setattr__(self, "numerics", "changes")  # of this instance; the dataclass is frozen

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        for q in ctx.at(quantize_nodes(graph)):
            x: Any = q.args[0]
            if x.target not in DEQUANTIZE:
                continue
            source = read_codes(x)
            have: dict[str, Pair] = {}
            how: dict[str, str] = {}
            for text in arguments(q)["specs"]:
                pair = self._turn(graph, q, source, text, ctx, how)
                if pair is not None:
                    have[text] = pair
            if have:
                ctx.matched(q)
                for d in (d for d in (q, x) if d is q or len(x.users) == 1):
                    ctx.fate(d, "; ".join(how.values()))
                keep_specs(graph, q, [s for s in arguments(q)["specs"] if s not in have], have)

    def _turn(
        self, graph: fx.Graph, q: fx.Node, source: Codes, text: str, ctx: Context, how: dict[str, str]
    ) -> Pair | None:
        # Where a scale came from is past: codes of delayed scales are read as any others.
        spec = str(replace(QuantSpec.parse(source.spec), delayed=False))
        found, block = exactness(spec, text), QuantSpec.parse(text).block
        producer = _own_cast(source)
        refused = found.kind == "refused"
        if producer is not None and (refused or _is_fusable(producer.args[0])):
            how[text] = f"R22: {block} is a second output of the cast that wrote the codes"
            return add_spec(graph, producer, text, arguments(q)["offsets"])
        if refused:
            q.meta["moefx_kept"] = f"{source.spec} to {text}: {found.reason}"
            if self.recipe.allow_double_quant:
                once, twice = double_quantization(spec, text)
                ctx.row.notes.append(
                    f"{q.meta['moefx_cast'].tensor} is quantized twice: relative error {twice:.4f} instead of "
                    f"{once:.4f} on normal numbers"
                )
            else:
                ctx.rejected(q, found.reason)
            return None
        op = ops.transpose_scaled if found.rule in ("R10", "R11/R12", "R13") else ops.convert
        rows = arguments(q)["offsets"] if QuantSpec.parse(text).br != 1 else source.offsets
        how[text] = f"{found.rule}: codes become {block} without widening"
        with inheriting(graph, q) as call:
            rule = () if op is ops.convert else (self.recipe.turn,)
            new = call(op.default, source.codes, source.scales, rows, spec, text, *rule)
            new.meta["moefx_turned"] = q.meta["moefx_cast"]
            codes, scales = unpack(call, new, 2)
        return codes, scales


def _own_cast(source: Codes) -> fx.Node | None:
    """The quantize node that made these codes from a wide tensor, when nothing moved them since."""
    q = source.codes.args[0] if source.codes.target is compat.getitem else None
    return q if isinstance(q, fx.Node) and q.target in QUANTIZE else None


def _is_fusable(x: Any) -> bool:
    return x.target in FUSABLE or (x.target is compat.getitem and x.args[0].target in FUSABLE)
