"""Putting a patch into a model graph, and taking out what nobody needs any more.

Out go the experts' nodes, also those that write into memory which nobody reads now, and checks of sizes that depended
on data and are gone. Random draws, other writes and switches of mode stay where they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moefx.graph.edit import ORIGIN_KEYS
from moefx.graph.effects import is_effect, mutated, name_of

from .colour import tensor
from .patch import Patch
from .slice import NoSlice
from .stretch import Stretch, base


def splice(graph: fx.Graph, stretch: Stretch, patch: Patch) -> fx.Node:
    """Replace the routed sum; the node that holds it now. Raises `NoSlice`, with the graph as it was, if it cannot."""
    span = stretch.nodes[: patch.end + 1]
    final = span[-1]
    place = {n: i for i, n in enumerate(graph.nodes)}
    memory = base(patch.y)
    names = [n for n in span if base(n) is memory]
    late = {n: [u for u in n.users if place[u] > place[final]] for n in names}
    aliases = [n for n in names if late[n]]
    for n in aliases:
        a, b = tensor(n), tensor(patch.y)
        if a is None or b is None or a.numel() != b.numel() or not (n is patch.y or a.is_contiguous()):
            raise NoSlice("a part of the memory that the routed sum is written to is read on its own")
    if not aliases:
        raise NoSlice("nobody reads the routed sum")
    dead = _dead(span, set(aliases), late, place, patch.inputs)
    for n in span:
        if n not in dead and any(m.name in stretch.experts for m in n.all_input_nodes):
            raise NoSlice(f"the experts' parameters are read elsewhere, too, by {n.name}")
    new = _copied(graph, patch, final, _meta(patch.y, span))
    for n in aliases:
        a, b = tensor(n), tensor(patch.y)
        assert a is not None
        assert b is not None
        source = new
        if a.shape != b.shape:
            with graph.inserting_after(new):
                source = graph.call_method("view", (new, tuple(a.shape)))
            source.meta = dict(new.meta)
        for user in late[n]:
            user.replace_input_with(n, source)
    for n in reversed(span):
        if n in dead:
            graph.erase_node(n)
    return new


def _meta(y: fx.Node, span: list[fx.Node]) -> dict[str, Any]:
    """Where the new nodes come from: the sum's own origin."""
    return {k: y.meta[k] for k in ORIGIN_KEYS if k in y.meta}


def _copied(graph: fx.Graph, patch: Patch, after: fx.Node, meta: dict[str, Any]) -> fx.Node:
    table = dict(zip(patch.graph.find_nodes(op="placeholder"), patch.inputs, strict=True))
    with graph.inserting_before(after.next):
        for n in patch.graph.nodes:
            if n.op in ("call_function", "call_method"):
                table[n] = graph.node_copy(n, table.__getitem__)
                table[n].meta = dict(meta)
    out: Any = patch.graph.output_node().args[0]
    made: fx.Node = table[out]
    return made


def _dead(
    span: list[fx.Node],
    aliases: set[fx.Node],
    late: dict[fx.Node, list[fx.Node]],
    place: dict[fx.Node, int],
    kept: list[fx.Node],
) -> set[fx.Node]:
    """Nodes of a span that nobody needs once the users of `aliases` behind it read something else."""
    inside = set(span)
    writers: dict[fx.Node, list[fx.Node]] = {}
    for n in span:
        for m in mutated(n):
            writers.setdefault(base(m), []).append(n)
    live: set[fx.Node] = set()
    todo: list[fx.Node] = []

    def need(n: fx.Node) -> None:
        if n in inside and n not in live:
            live.add(n)
            todo.append(n)

    def drain() -> None:
        while todo:
            n = todo.pop()
            for m in n.all_input_nodes:
                need(m)
            for b in {base(m) for m in (n, *n.all_input_nodes)}:
                for w in writers.get(b, ()):
                    if place[w] < place[n]:
                        need(w)

    checks = []
    for n in span:
        outside = (
            [u for u in n.users if u not in inside and u not in late.get(n, ())]
            if n in aliases
            else [u for u in n.users if u not in inside]
        )
        written = mutated(n)
        if outside or n in kept:
            need(n)
            for w in writers.get(base(n), ()):  # who reads it behind the span reads what was written
                if outside:
                    need(w)
        elif _check(n):
            checks.append(n)
        elif written:
            if any(base(m) not in inside for m in written):
                need(n)
        elif is_effect(n):
            need(n)
    drain()
    for n in checks:
        if _sources(n, inside) <= live or not _sources(n, inside):
            need(n)
            drain()
    return inside - live


def _check(n: fx.Node) -> bool:
    """Whether a node checks sizes and does nothing else."""
    scalar = all(not isinstance(_held(m), torch.Tensor) for m in n.all_input_nodes)
    return scalar and name_of(n).startswith(("_assert_scalar", "sym_constrain", "_check"))


def _held(n: fx.Node) -> Any:
    return n.meta.get("val", n.meta.get("example_value"))


def _sources(n: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    """The tensors of a span that numbers come from."""
    found: set[fx.Node] = set()
    todo = list(n.all_input_nodes)
    while todo:
        m = todo.pop()
        if m not in inside:
            continue
        if isinstance(_held(m), torch.Tensor | list | tuple) or name_of(m) in ("getitem", "item"):
            found.add(m)
            if name_of(m) == "item":
                found.discard(m)
                todo += m.all_input_nodes
        else:
            todo += m.all_input_nodes
    return found
