"""Every cast that a recipe asks for becomes a node of the training graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from moefx.compat import size_hint
from moefx.graph.casts import QUANTIZE, Pair, by_spec, mark
from moefx.graph.edit import (
    arguments,
    find,
    inheriting,
    is_backward,
    module_path,
    origin,
    replace,
    targets,
    unpack,
    value,
)
from moefx.graph.products import KEPT, Operand, Product, products
from moefx.graph.widths import check_halves, check_packed, check_width
from moefx.kernels import decisions
from moefx.manager import Context, Pass
from moefx.precision.recipe import BF16, Recipe, lookup
from moefx.precision.spec import QuantSpec

ops = torch.ops.moefx
aten = torch.ops.aten
NAMES = {("up", "input"): "Xp", ("down", "input"): "A", ("up", "grad"): "dH", ("down", "grad"): "dO",
         ("up", "weight"): "W1", ("down", "weight"): "W2"}  # fmt: skip
HISTORY = "moefx_amax_history"
GLU_BACKWARD = targets(ops.glu_backward)
_OUT = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Why = tuple[str, str, str, str]  # role, tensor, layer, use


@dataclass(frozen=True)
class Quantize(Pass):
    """Products run on codes of their operands, wires carry codes, and the backward reads what the recipe stores.

    Nothing is shared but what is one cast in any library: one quantize node per tensor and side, with all orientations
    that are wanted there. `propagate_scales` and the passes behind it remove what is redundant.
    """

    recipe: Recipe = BF16

    level: ClassVar[str] = "training"
    requires: ClassVar[set[str]] = {"experts_expanded"}
    provides: ClassVar[set[str]] = {"quantized"}
    numerics: ClassVar[str] = "changes"

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        found = products(graph)
        used = [self.recipe.rule(p.path) for p in found]
        for rule in [r for r in self.recipe.rules if r not in used]:
            earlier = [u for p, u in zip(found, used, strict=True) if u is not None and rule.matches(p.path)]
            why = (
                f"decides for no module: {earlier[0].path!r} stands in front of it" if earlier else "matched no module"
            )
            ctx.row.notes.append(f"rule {rule.path!r} {why}")
        slower = self._slower(found)
        for node in ctx.at(find(graph, ops.dispatch)):
            if module_path(node) not in slower:
                self._wire(graph, node, ctx)
        kinds: dict[fx.Node, set[str]] = {}
        for p in found:
            for o in p.operands:
                kinds.setdefault(o.node, set()).add(p.kind)
        layer = _Layer(graph, kinds, self.recipe.out)
        of_node = {p.node: p for p in found}
        for p in map(of_node.__getitem__, ctx.at(list(of_node))):
            specs = self.recipe.for_module(p.path)
            if specs is None:
                if self.recipe.specs:
                    ctx.rejected(p.node, "a rule of the recipe keeps this module wide")
                continue
            if p.path in slower:
                ctx.rejected(p.node, f"measured slower than wide: {slower[p.path]}; Recipe(force=True) quantizes it")
                continue
            layer.rewrite(p, specs, ctx)
        layer.return_magnitudes()

    def _slower(self, found: Sequence[Product]) -> dict[str, decisions.Row]:
        """The modules for which a measured layer like them was slower under this recipe."""
        slower: dict[str, decisions.Row] = {}
        for p in found if self.recipe.specs and not self.recipe.force else ():
            if (p.gemm, p.kind) == ("down", "fprop"):
                x, w = (value(o.node) for o in p.operands)
                E, H, I = (size_hint(s) for s in w.shape)
                # The rows include those that fill each expert up to `align`; how many pairs there are is known to
                # within that.
                align = self.recipe.gpu_align if x.device.type == "cuda" else self.recipe.align
                pairs = size_hint(x.shape[0]) - E * (align - 1) + align // 2
                row = decisions.verdict(decisions.device_name(x.device), self.recipe.specs, pairs, H, I, E)
                if row is not None and row.speedup < 1:
                    slower[p.path] = row
        return slower

    def _wire(self, graph: fx.Graph, node: fx.Node, ctx: Context) -> None:
        x: Any = node.args[0]
        role, tensor = ("grad", "dY") if is_backward(node) else ("input", "X")
        specs = self.recipe.for_module(module_path(node))
        text = None if specs is None else specs.get(f"{role}.wire")
        if text is None or _is_encoded(x):
            return
        check_width(text, value(x).shape[-1], node, tensor)
        with inheriting(graph, node) as call:
            codes, scales = _encode(call, x, None, [text], (role, tensor, module_path(node), "wire"))[text]
            sent = call(ops.dispatch.default, codes), call(ops.dispatch.default, scales)
            wide = _decode(call, *sent, None, text, value(x).dtype, (role, tensor, module_path(node), "wire"))
        replace(graph, node, wide)
        ctx.matched(wide)


@dataclass
class _Layer:
    """What has been quantized so far, so that a tensor is quantized once per side."""

    graph: fx.Graph
    kinds: Mapping[fx.Node, set[str]]  # operand -> the products that read it
    out: Mapping[str, str]  # product -> dtype of its result
    delayed: dict[str, fx.Node] = field(default_factory=dict)  # name of a delayed cast -> its magnitude
    made: dict[tuple[fx.Node, bool], dict[str, Pair]] = field(default_factory=dict)
    weights: dict[tuple[fx.Node, str], Pair] = field(default_factory=dict)

    def rewrite(self, p: Product, specs: Mapping[str, str], ctx: Context) -> None:
        """Replace one product by its quantized form, if the recipe has specs for it."""
        wanted = [lookup(specs, p.gemm, f"{o.role}.{p.kind}") for o in p.operands]
        if wanted[0] is None or wanted[1] is None:
            p.node.meta[KEPT] = p.gemm
            return
        offsets = arguments(p.node)["offsets"]
        dtype = value(p.node).dtype
        out = _OUT.get(self.out.get(p.kind, "wide"), dtype)
        with inheriting(self.graph, p.node) as call:
            pairs: list[fx.Node] = []
            for o, text in zip(p.operands, wanted, strict=True):
                assert text is not None
                check = check_packed if p.kind == "wgrad" else check_width
                check(text, value(o.node).shape[-1], p.node, NAMES[p.gemm, o.role])
                if o.role == "weight":
                    pairs += self._weight(call, p, o, text)
                elif o.role == "input" and p.kind == "wgrad":
                    pairs += self._stored(call, p, o.node, text, specs, offsets)
                else:
                    together = self._together(p, o.node, o.role, specs)
                    pairs += self._rows(call, p, o.node, o.role, text, together, offsets)
            op = ops.scaled_grouped_wgrad if p.kind == "wgrad" else ops.scaled_grouped_mm
            new = call(op.default, *pairs, offsets, *wanted, out)
            if out != dtype:
                new = call(torch.ops.prims.convert_element_type.default, new, dtype)
        replace(self.graph, p.node, new)
        ctx.matched(new)

    def _together(self, p: Product, node: fx.Node, role: str, specs: Mapping[str, str]) -> list[str]:
        """All specs that this side wants of a tensor: one pass over it makes them all."""
        if role == "input":
            return _distinct(lookup(specs, p.gemm, "input.fprop"), lookup(specs, p.gemm, "input.stored"))
        read_by = [kind for kind in ("dgrad", "wgrad") if kind in self.kinds[node]]
        return _distinct(*(lookup(specs, p.gemm, f"grad.{kind}") for kind in read_by))

    def _rows(
        self, call: Callable[..., fx.Node], p: Product, x: fx.Node, role: str, text: str, together: list[str],
        offsets: fx.Node,
    ) -> Pair:  # fmt: skip
        made, tensor = self.made.setdefault((x, is_backward(p.node)), {}), NAMES[p.gemm, role]
        missing = [s for s in together if s not in made]
        for spec in missing:
            self._check(spec, x, p, role)
        if missing:
            made |= self._encode(call, x, offsets, missing, (role, tensor, p.path, p.kind))
        return made[text]

    def _check(self, spec: str, x: fx.Node, p: Product, role: str) -> None:
        """Raise `RecipeError` where a spec does not fit the width of rows that are about to be cast."""
        tensor, width = NAMES[p.gemm, role], value(x).shape[-1]
        # Columns of a weight gradient's operands are not summed over: their last block may be smaller.
        summed = not (p.kind == "wgrad" or (role == "grad" and QuantSpec.parse(spec).axis != -1))
        (check_width if summed else check_packed)(spec, width, p.node, tensor)
        producer = x.args[0] if x.args and isinstance(x.args[0], fx.Node) else x
        if producer.target in GLU_BACKWARD:
            check_halves(spec, arguments(producer)["kind"], width, p.node, tensor)

    def _stored(
        self, call: Callable[..., fx.Node], p: Product, x: fx.Node, text: str, specs: Mapping[str, str],
        offsets: fx.Node,
    ) -> Pair:  # fmt: skip
        """The input of a wgrad: from what the forward stored, or from the wide tensor when it stores that."""
        stored = lookup(specs, p.gemm, "input.stored")
        kept = self.made.get((x, False), {})
        tensor = NAMES[p.gemm, "input"]
        if stored is None or stored not in kept:
            return self._rows(call, p, x, "input", text, [text], offsets)
        if stored == text:
            return kept[stored]
        key = (x, True)
        if key not in self.made:
            wide = _decode(call, *kept[stored], offsets, stored, value(x).dtype, ("input", tensor, p.path, "wgrad"))
            self.made[key] = self._encode(call, wide, offsets, [text], ("input", tensor, p.path, "wgrad"))
        return self.made[key][text]

    def _weight(self, call: Callable[..., fx.Node], p: Product, o: Operand, text: str) -> Pair:
        """Codes of a weight as the product reads it; both orientations of one parameter are one cast where they can."""
        spec = QuantSpec.parse(text)
        view = o.transposed and spec.format.per_byte == 1  # two codes in a byte lie along one axis: no view turns them
        w, own = (o.source, str(spec.transposed())) if view else (o.node, text)
        if (w, own) not in self.weights:
            why = ("weight", NAMES[p.gemm, "weight"], p.path, p.kind)
            self.weights[w, own] = self._encode(call, w, None, [own], why)[own]
        pair = self.weights[w, own]
        return _turned(call, *pair) if view else pair

    def _encode(
        self, call: Callable[..., fx.Node], x: fx.Node, offsets: fx.Node | None, specs: list[str], why: Why
    ) -> dict[str, Pair]:
        if not any(QuantSpec.parse(s).delayed for s in specs):
            return _encode(call, x, offsets, specs, why)
        (history,) = [n for n in self.graph.find_nodes(op="placeholder") if n.meta.get("moefx_name") == HISTORY]
        past = call(aten.select.int, history, 0, len(self.delayed))
        q = mark(call(ops.quantize_delayed.default, x, offsets, past, specs), *why)
        *items, amax = unpack(call, q, 2 * len(specs) + 1)
        self.delayed["/".join(why[2:] + why[:2])] = amax
        history.meta["moefx_keys"] = list(self.delayed)
        return by_spec(items, specs)

    def return_magnitudes(self) -> None:
        """The magnitudes of delayed casts become outputs of the half that computes them."""
        for placed in [n for n in self.graph.nodes if n.meta.get("moefx_amax")]:
            half = [(row, a) for row, a in enumerate(self.delayed.values()) if is_backward(a) == is_backward(placed)]
            if not half:
                continue
            rows, amax = (list(t) for t in zip(*half, strict=True))
            last = max(amax)
            with self.graph.inserting_after(last):
                count = value(placed).shape[0]
                gathered = self.graph.call_function(ops.gather_amax.default, (amax, rows, count))
            gathered.meta = origin(last)
            replace(self.graph, placed, gathered)


def _turned(call: Callable[..., fx.Node], codes: fx.Node, scales: fx.Node) -> Pair:
    return call(aten.permute.default, codes, [0, 2, 1]), call(aten.permute.default, scales, [0, 2, 1])


def _distinct(*specs: str | None) -> list[str]:
    return list(dict.fromkeys(s for s in specs if s is not None))


def _is_encoded(x: fx.Node) -> bool:
    source = x.args[0] if x.args else None
    return isinstance(source, fx.Node) and source.target in QUANTIZE


def _encode(
    call: Callable[..., fx.Node], x: fx.Node, offsets: fx.Node | None, specs: list[str], cast: Why
) -> dict[str, Pair]:
    rows = offsets if any(QuantSpec.parse(s).br != 1 for s in specs) else None
    q = call(ops.quantize.default, x, rows, specs)
    mark(q, *cast)
    return by_spec(unpack(call, q, 2 * len(specs)), specs)


def _decode(
    call: Callable[..., fx.Node], codes: fx.Node, scales: fx.Node, offsets: fx.Node | None, spec: str,
    dtype: torch.dtype, cast: Why,
) -> fx.Node:  # fmt: skip
    rows = None if QuantSpec.parse(spec).br == 1 else offsets
    d = call(ops.dequantize.default, codes, scales, rows, spec, dtype)
    return mark(d, *cast)
