"""What the backward keeps is codes, never a wide copy beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from moefx import compat
from moefx.graph.casts import MOVES, QUANTIZE, is_weight, mark
from moefx.graph.edit import (
    arguments,
    find,
    inheriting,
    is_backward,
    module_path,
    outputs,
    replace,
    targets,
    unpack,
    value,
)
from moefx.graph.scales import VIEWS
from moefx.graph.widths import check_halves, check_width
from moefx.manager import Context, Pass
from moefx.precision.recipe import BF16, Recipe, lookup
from moefx.precision.spec import QuantSpec

ops = torch.ops.moefx
FUSED = targets(ops.glu_quantize)
WGRAD = targets(ops.scaled_grouped_wgrad)
GLU_BACKWARD = targets(ops.glu_backward, ops.glu_backward_quantize)
PRODUCTS = targets(ops.grouped_mm, ops.scaled_grouped_mm)


@dataclass(frozen=True)
class StoreLowPrecision(Pass):
    """Pre-activations are stored under the recipe's `hidden.stored`, and routed rows as the tokens they are copies of.

    The activation's forward, which reads the pre-activations anyway, writes their codes; its backward reads those, and
    writes the activation again for the weight gradient, so that neither is kept wide and the activation not at all.
    Where the activation is the module's own code, the up product's epilogue writes the codes (R21) and the backward
    widens them.

    Gathered codes are gathered again in the backward (R24): T rows are kept instead of T * k. Where another reader
    keeps the wide tensor for the backward (a learned router), its codes are made again too, not kept beside it.
    """

    recipe: Recipe = BF16

    level: ClassVar[str] = "training"
    requires: ClassVar[set[str]] = {"quantized", "casts_fused", "wires_lowered"}
    provides: ClassVar[set[str]] = {"stored_low_precision"}
    numerics: ClassVar[str] = "changes"

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        for b in ctx.at(find(graph, ops.glu_backward_quantize)):
            specs = self.recipe.for_module(module_path(b))
            spec = specs and lookup(specs, "up", "hidden.stored")
            a = arguments(b)
            if not spec or a["h_scales"] is not None:
                continue
            forward = [f for f in a["h"].users if f.target in FUSED]
            if len(forward) != 1:
                ctx.rejected(b, "the activation's forward was not fused with its cast, so nothing writes codes of h")
                continue
            rows = arguments(forward[0])["offsets"] or a["offsets"] or _offsets_behind(a["h"])
            if rows is None and QuantSpec.parse(spec).br != 1:
                ctx.rejected(b, f"blocks of {spec!r} span rows, and no grouped product behind h says where experts end")
                continue
            _check_stored(spec, a["h"], [b])
            ctx.matched(_store_hidden(graph, forward[0], b, spec, rows))
        for product in ctx.at(find(graph, ops.scaled_grouped_mm)):
            specs = self.recipe.for_module(module_path(product))
            spec = specs and lookup(specs, "up", "hidden.stored")
            if spec and not is_backward(product) and (readers := [u for u in product.users if is_backward(u)]):
                _check_stored(spec, product, readers)
                ctx.matched(_store_product(graph, product, readers, spec))
        _recompute_moved(graph, ctx)


def _check_stored(spec: str, h: fx.Node, readers: list[fx.Node]) -> None:
    """Raise `RecipeError` where blocks do not divide h, or its halves where one of its readers takes gate and up."""
    width = value(h).shape[-1]
    check_width(spec, width, h, "H")
    for reader in readers:
        if reader.target in GLU_BACKWARD:
            check_halves(spec, arguments(reader)["kind"], width, h, "H")


def _offsets_behind(h: fx.Node) -> fx.Node | None:
    """The offsets of the grouped product that made h, through what acts on its rows (a bias, a view).

    Neither cast of the activation may have any: where experts are frozen, both are by rows alone.
    """
    todo, seen = [h], {h}
    while todo:
        node = todo.pop(0)
        if node.target in PRODUCTS:
            found: fx.Node = arguments(node)["offsets"]
            return found
        for x in node.all_input_nodes:
            if x not in seen and module_path(x) == module_path(h):
                seen.add(x)
                todo.append(x)
    return None


def _store_hidden(graph: fx.Graph, f: fx.Node, b: fx.Node, spec: str, offsets: fx.Node | None) -> fx.Node:
    """Codes of h from the forward into the backward, which writes the activation's codes for the weight gradient.

    Both halves follow the same `offsets`: casts that move into the backward may span rows where its own did not.
    """
    fa, ba = arguments(f), arguments(b)
    items = outputs(f)
    act = [s for i, s in enumerate(fa["specs"]) if _only_backward(items, i)]
    kept = [s for s in fa["specs"] if s not in act]
    with inheriting(graph, f) as call:
        new = call(ops.glu_quantize.default, fa["h"], fa["w"], offsets, fa["kind"], kept, [spec])
        made = unpack(call, new, 2 * len(kept) + 2)
    new.meta["moefx_fused"], new.meta["moefx_stored"] = f.meta["moefx_fused"], spec
    with inheriting(graph, b) as call:
        back = call(
            ops.glu_backward_quantize.default, ba["da"], made[-2], made[-1], ba["w"], offsets, ba["kind"], spec,
            list(ba["specs"]), [*ba["act_specs"], *act],
        )  # fmt: skip
        remade = unpack(call, back, 1 + 2 * (len(ba["specs"]) + len(ba["act_specs"]) + len(act)))
    back.meta["moefx_fused"] = b.meta["moefx_fused"]
    for i, old in outputs(b).items():
        replace(graph, old, remade[i])
    graph.erase_node(b)
    first = 1 + 2 * (len(ba["specs"]) + len(ba["act_specs"]))
    for i, s in enumerate(fa["specs"]):
        source = remade[first + 2 * act.index(s) :] if s in act else made[2 * kept.index(s) :]
        for j in (0, 1):
            reader = items.get(2 * i + j)
            if reader is None:
                continue
            if s in act:  # its readers run in the backward, but may stand before what they now read
                _behind(reader, remade[-1])
            replace(graph, reader, source[j])
    graph.erase_node(f)
    for node in (*made, *remade):
        if not node.users:
            graph.erase_node(node)
    return new


def _store_product(graph: fx.Graph, product: fx.Node, readers: list[fx.Node], spec: str) -> fx.Node:
    """Codes of a product, from its epilogue (R21), for the backward of an activation that is the module's own code."""
    a, dtype = arguments(product), value(product).dtype
    with inheriting(graph, product) as call:
        new = call(ops.scaled_grouped_mm_quantize.default, *product.args, [spec])
        y, codes, scales = unpack(call, new, 3)
    new.meta["moefx_stored"] = spec
    rows = None if QuantSpec.parse(spec).br == 1 else a["offsets"]
    with inheriting(graph, min(readers)) as call:
        wide = call(ops.dequantize.default, codes, scales, rows, spec, dtype)
        mark(wide, "hidden", "H", module_path(product), "activation")
    for reader in readers:
        reader.replace_input_with(product, wide)
    replace(graph, product, y)
    return new


def _only_backward(items: dict[int, fx.Node], spec: int) -> bool:
    readers = [u for j in (0, 1) if (n := items.get(2 * spec + j)) is not None for u in n.users]
    return bool(readers) and all(is_backward(u) and u.target in WGRAD for u in readers)


def _behind(old: fx.Node, last: fx.Node) -> None:
    """Move the readers of `old` that stand in front of `last`, and whatever reads them, behind it in their order."""
    todo, found = [u for u in old.users if u < last], set()
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [u for u in node.users if u < last]
    for node in sorted(found, reverse=True):
        last.append(node)


def _recompute_moved(graph: fx.Graph, ctx: Context) -> None:
    """Gathered codes that the backward reads are gathered again there, from what is kept anyway."""
    for node in [n for n in graph.nodes if n.target in MOVES and not is_backward(n)]:
        parts = outputs(node)
        if compat.is_recomputed(node) or not any(is_backward(u) for part in parts.values() for u in part.users):
            continue
        ctx.matched(node)
        codes: Any = arguments(node)["codes"]
        compat.recompute(node, *parts.values())
        q = codes.args[0] if codes.target is compat.getitem else None
        if q is not None and q.target in QUANTIZE and not is_weight(q):
            items = outputs(q).values()
            if _kept_wide(arguments(q)["x"]):
                compat.recompute(q, *items)
            else:
                compat.keep(*items)


def _kept_wide(x: fx.Node) -> bool:
    """Whether the backward reads this tensor, or a view of it, for its own sake."""
    while x.target in VIEWS and isinstance(x.args[0], fx.Node):
        x = x.args[0]
    aliases, todo = {x}, [x]
    while todo:
        for u in todo.pop().users:
            if u.target in VIEWS and u not in aliases:
                aliases.add(u)
                todo.append(u)
    return any(is_backward(u) and u.target not in QUANTIZE and u not in aliases for n in aliases for u in n.users)
