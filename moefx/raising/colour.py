"""Isomorphism in a model graph: colours of nodes, and the order of E neighbourhoods that are equal but for an integer.

Colours (function, shape of a parameter, colours of what a node reads and of who reads it) are refined round by round,
Weisfeiler-Lehman style. Where an expert stands is read off the integer in which it differs (`eq(idx, e)`, `split[e]`, a
place in a list): its neighbourhood and its brothers' are walked in step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from moefx.graph.edit import value
from moefx.graph.effects import name_of
from moefx.holder import attribute

_WALK = 60  # tuples of nodes that are looked at for an order of experts


def tensor(node: fx.Node) -> torch.Tensor | None:
    """The (fake) tensor of a node; that of a `get_attr` node may have to be looked up in the module."""
    found = value(node)
    if found is None and node.op == "get_attr":
        found = attribute(node.graph.owning_module, node.target)
    return found if isinstance(found, torch.Tensor) else None


def refined(graph: fx.Graph, rounds: int) -> Iterator[dict[fx.Node, int]]:
    """Colours of all nodes after one round of refinement, two rounds, and so on. Linear in the size of the graph."""
    ids: dict[Any, int] = {}

    def code(key: Any) -> int:
        return ids.setdefault(key, len(ids))

    reads: dict[fx.Node, list[tuple[int, fx.Node]]] = {n: [] for n in graph.nodes}
    colour: dict[fx.Node, int] = {}
    for n in graph.nodes:
        for i, arg in enumerate((*n.args, *n.kwargs.values())):
            fx.map_arg((arg,), lambda m, n=n, i=i: reads[n].append((i, m)))  # type: ignore[misc]
        t = tensor(n) if n.op in ("placeholder", "get_attr") else None
        label = name_of(n) if t is None else (str(tuple(t.shape)), str(t.dtype))
        colour[n] = code((n.op if t is None else "tensor", label, len(n.args)))
    read_by: dict[fx.Node, list[tuple[int, fx.Node]]] = {n: [] for n in graph.nodes}
    for n, inputs in reads.items():
        for i, m in inputs:
            read_by[m].append((i, n))
    for _ in range(rounds):
        before = colour
        # A set of readers: a value that all experts read looks the same whatever their number.
        colour = {
            n: code(
                (
                    before[n],
                    tuple(sorted({(i, before[m]) for i, m in reads[n]})),
                    tuple(sorted({(i, before[m]) for i, m in read_by[n]})),
                )
            )
            for n in graph.nodes
        }
        yield colour


def orders(members: Sequence[fx.Node], colour: dict[fx.Node, int]) -> Iterator[tuple[int, ...]]:
    """Orders of experts: by the integer in which their neighbourhoods differ, nearest first, and as they come.

    Members stand in the order of their use. An order lists positions in `members`.
    """
    E = len(members)
    found: dict[tuple[int, ...], None] = {}

    def note(numbers: list[int]) -> None:
        if sorted(numbers) == list(range(E)):
            at = {number: i for i, number in enumerate(numbers)}
            found[tuple(at[e] for e in range(E))] = None

    start = tuple(members)
    todo, seen = deque([start]), {start}

    def visit(nodes: tuple[fx.Node, ...]) -> None:
        if nodes not in seen and len(set(nodes)) == E:
            seen.add(nodes)
            todo.append(nodes)

    for _ in range(_WALK):
        if not todo:
            break
        nodes = todo.popleft()
        if len({n.target if n.op not in ("placeholder", "get_attr") else "" for n in nodes}) > 1:
            continue
        leaves = [_leaves((n.args, n.kwargs)) for n in nodes]
        if len(set(map(len, leaves))) == 1:
            for column in zip(*leaves, strict=True):
                if all(type(v) is int for v in column):
                    note(list(column))
                elif all(isinstance(v, fx.Node) for v in column):
                    visit(column)
        users = [sorted(n.users, key=lambda u: colour[u]) for n in nodes]
        if len(set(map(len, users))) == 1:
            for column in zip(*users, strict=True):
                if len(set(column)) == 1:
                    inputs = [v for v in _leaves(column[0].args) if isinstance(v, fx.Node)]
                    places = [inputs.index(n) for n in nodes]
                    note([sorted(places).index(p) for p in places] if len(set(places)) == E else [])
                else:
                    visit(column)
    plain = tuple(range(E))
    yield from found
    if plain not in found:
        yield plain


def _leaves(tree: Any) -> list[Any]:
    found: list[Any] = []
    fx.node.map_aggregate(tree, lambda v: found.append(v))
    return found
