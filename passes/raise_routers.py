"""Routers in their normal form become `moefx.route`: recognised by what they compute, not by how they are written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from moefx import compat
from moefx.dialect.route import NAMES
from moefx.graph.edit import arguments, find, inheriting, same_sizes, value
from moefx.graph.effects import is_random, name_of
from moefx.graph.router import PRODUCTS, Form, NoRouter, form_of, route_of, vector
from moefx.graph.slices import Slice, Slicer, Unsliceable
from moefx.manager import Context, Pass

ops = torch.ops.moefx
Tensor = torch.Tensor
# What ends the search for logits: behind a product there are activations.
ENDS = (*PRODUCTS, "embedding")
# Between a router and its experts: other shapes and integer types of the same numbers.
RESHAPES = ("view", "reshape", "flatten", "contiguous", "squeeze")
CASTS = ("to", "int", "long", "type")
NEAR = 100  # nodes in front of the experts among which the logits are looked for
# What logits are made with between their product and the score function: bias, scale, cap, mask, noise.
PREPARES = frozenset({
    "add", "sub", "mul", "div", "truediv", "neg", "tanh", "clamp", "masked_fill", "dropout", "clone", "float", "half",
    "bfloat16", "double", "type_as", "unsqueeze", "permute", "transpose", "detach", *RESHAPES, *CASTS,
})  # fmt: skip


@dataclass(frozen=True)
class RaiseRouters(Pass):
    """Put `moefx.route` (dialect/route.py) in the place of the routers in front of `moefx.experts`.

    The nodes from the logits to idx and w are run on trial logits: normal ones, ties, near ties, and values at which
    scores underflow. A router is raised when its normal form gives the same idx, weights, and gradient of the logits
    (and of a scale per expert) bit for bit, so that `expand_routers` gives the model's own numbers. Full scores that
    others read, such as an auxiliary loss, become an output of the op.
    """

    requires: ClassVar[set[str]] = {"captured"}
    provides: ClassVar[set[str]] = {"routers_raised"}

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        known: dict[str, Form | NoRouter] = {}  # layers are alike: each distinct router is tried once
        slicer = Slicer(graph)
        for experts in ctx.at(find(graph, ops.experts)):
            a = arguments(experts)
            if route_of(a["idx"]) is not None:
                continue
            misses = list[NoRouter]()
            for logits in _candidates(slicer, a["idx"], a["w"], value(a["weights"][0]).shape[0]):
                try:
                    noise = _has_noise(logits)
                    part = _cut(slicer, logits, a["idx"], a["w"], experts)
                    node = _emit(slicer, part, _known_form(part, known), noise)
                except NoRouter as e:
                    misses.append(e)
                else:
                    ctx.matched(node)
                    break
            else:
                nearest = max(misses, key=lambda e: e.stage, default=NoRouter("no logits [.., E] in front of it", 0))
                experts.meta["moefx_router"] = nearest.why  # for losses, which need to know the router
                ctx.rejected(experts, f"router left as it is: {nearest.why}")


def _candidates(slicer: Slicer, idx: fx.Node, w: fx.Node, E: int) -> list[fx.Node]:
    """Nodes that may be the logits, nearest to the product that makes them first."""
    stack, seen = [idx, w], set[fx.Node]()
    while stack and len(seen) < NEAR:
        n = max(stack, key=slicer.position.__getitem__)  # the nearest to the experts
        stack.remove(n)
        seen.add(n)
        if name_of(n) not in ENDS:
            stack += [i for i in n.all_input_nodes if i not in seen and i not in stack and i.op != "placeholder"]
    found = [n for n in seen if _is_row_of(value(n), E) and value(n).dim() > 1]
    return sorted(found, key=slicer.position.__getitem__)


def _is_row_of(val: Any, E: int) -> bool:
    # A symbolic size is not compared: that would add a guard.
    return isinstance(val, Tensor) and val.dtype in NAMES and val.dim() > 0 and same_sizes(val.shape[-1:], (E,))


def _has_noise(logits: fx.Node) -> bool:
    """Whether random numbers were added to the logits. Raises `NoRouter` if they are more than that: scores, say."""
    stack, seen, E, noise = [logits], set[fx.Node](), value(logits).shape[-1], False
    if _is_noise(logits):
        raise NoRouter("the experts are chosen at random", 0)
    while stack and len(seen) < NEAR:
        n = stack.pop()
        if n in seen or n.op == "placeholder" or name_of(n) in ENDS or not _is_row_of(value(n), E):
            continue
        seen.add(n)
        if _is_noise(n):
            noise = True
            continue
        if name_of(n).rstrip("_") not in PREPARES and name_of(n).removeprefix("i") not in PREPARES:
            raise NoRouter(f"the experts are chosen by {name_of(n)} of the logits", 0)
        stack += n.all_input_nodes
    return noise


def _is_noise(n: fx.Node, depth: int = 8) -> bool:
    """Random numbers, or what was made of them before they were added to something."""
    if "dropout" in name_of(n) or name_of(n).strip("i_") in ("add", "sub") or name_of(n) in ENDS or not depth:
        return False
    return is_random(n) or any(_is_noise(i, depth - 1) for i in n.all_input_nodes)


def _cut(slicer: Slicer, logits: fx.Node, idx: fx.Node, w: fx.Node, experts: fx.Node) -> Slice:
    rows = value(logits).shape[:-1]
    idx, w = _unshaped(idx, rows, cast=True), _unshaped(w, rows)
    for name, n in (("idx", idx), ("w", w)):
        if not isinstance(value(n), Tensor) or not same_sizes(value(n).shape[:-1], rows):
            raise NoRouter(f"{name} has another shape than logits of {tuple(value(logits).shape)}", 0)
    try:
        return slicer.cut(logits, (idx, w), experts)
    except Unsliceable as e:
        raise NoRouter(str(e), 1) from e


def _unshaped(n: fx.Node, rows: Any, cast: bool = False) -> fx.Node:
    """The node in front of reshapes (and integer casts) whose rows are those of the logits."""
    while isinstance(n.args[0] if n.args else None, fx.Node) and isinstance(value(n), Tensor):
        wrong = not same_sizes(value(n).shape[:-1], rows)
        if not (wrong and name_of(n) in RESHAPES) and not (cast and name_of(n) in CASTS):
            break
        n = n.args[0]  # type: ignore[assignment]
    return n


def _known_form(part: Slice, known: dict[str, Form | NoRouter]) -> Form:
    key = part.text()
    if key not in known:
        try:
            known[key] = form_of(part)
        except NoRouter as e:
            known[key] = e
    if isinstance(found := known[key], NoRouter):
        raise found
    return found


# --- the rewrite


def _emit(slicer: Slicer, part: Slice, form: Form, noise: bool) -> fx.Node:
    """Put the op in front of the first node that it replaces; returns it. Raises `NoRouter` where it cannot stand."""
    graph, at, E = part.source.graph, slicer.position, value(part.source).shape[-1]
    idx, w = part.targets
    bias, scale = (None if i is None else vector(part.sides[i], E) for i in (form.bias, form.scale))
    ready = max(at[n] for n in (part.source, bias, scale) if n is not None)
    mode = part.modes[part.nodes[0]]
    outside = list(part.outside_readers().items())
    for n in part.nodes:
        if part.modes[n][1:] != mode[1:]:
            raise NoRouter("a part of it stands in an autocast region of its own", 6)
    first = next((n for n in part.nodes if at[n] > ready and part.modes[n] == mode), None)
    readers = [u for n in (idx, w) for u in n.users if u not in part.nodes] + [u for _, us in outside for u in us]
    early = [u for u in readers if first is None or at[u] < at[first]]
    # Autograd adds the gradients of a value in the order of its readers: from three on, the order is in the sum.
    scores = [u for (_, us), o in zip(outside, form.outside, strict=True) if o == 0 for u in us]
    if first is None or early or (len(scores) > 1 and min(at[u] for u in scores) < at[w]):
        raise NoRouter("its values are read by others before the choice is made", 6)
    with inheriting(graph, first) as call:
        node = call(ops.route, part.source, bias, scale, str(replace(form.spec, noise=noise)))
        slicer.add(node, first)
        wanted = {1: [idx], 2: [w]}
        for (n, _), i in zip(outside, form.outside, strict=True):
            wanted.setdefault(i, []).append(n)
        for i, olds in sorted(wanted.items()):
            new = call(compat.getitem, node, i)
            slicer.add(new, first)
            for old in olds:
                old.replace_all_uses_with(new, delete_user_cb=lambda u: u not in part.nodes)
    for n in reversed(part.nodes):
        graph.erase_node(n)
    return node
