"""Banks of experts in a model graph, found by isomorphism: names of parameters and modules are not looked at.

The parameters of E unrolled experts have neighbourhoods that are equal but for an integer (`colour`). Colours are
refined for as long as the classes of parameters still come in multiples of E: one round too many would tell the first
expert of a chain of additions from the second.

A tensor [E, out, in], or [E * out, in] that is viewed so, is a stack by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moefx.graph.edit import module_path, value
from moefx.graph.effects import name_of

from .bank import Bank, Stack
from .colour import orders, refined, tensor

ROUNDS = 4
_ROUTERS = frozenset({"topk", "argmax", "max", "sort", "argsort"})
# What rearranges a parameter without computing with it.
# fmt: off
LAYOUT = frozenset({
    "transpose", "t", "permute", "view", "reshape", "unflatten", "flatten", "contiguous", "to", "float", "bfloat16",
    "half", "double", "type_as", "detach", "T", "mT", "stack", "cat", "unbind", "getitem", "select", "chunk", "split",
    "squeeze", "unsqueeze", "flip", "expand", "narrow", "movedim", "swapaxes",
})
# fmt: on


@dataclass(frozen=True)
class Site:
    """A bank of experts in a graph: readings of its order to try, and where it is used."""

    banks: tuple[Bank, ...]
    router: fx.Node
    uses: tuple[fx.Node, ...]

    @property
    def names(self) -> frozenset[str]:
        """Names of the nodes that hold its parameters."""
        return self.banks[0].names


def layout(node: fx.Node) -> bool:
    """Whether a node only rearranges its inputs; their memory, a copy, or another precision."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in LAYOUT
    return node.op in ("call_function", "call_method") and name_of(node) in LAYOUT


def readers(node: fx.Node) -> list[fx.Node]:
    """Nodes that compute with a parameter, as it is or rearranged."""
    found: dict[fx.Node, None] = {}
    todo, seen = [node], {node}
    while todo:
        for user in todo.pop().users:
            if user in seen:
                continue
            seen.add(user)
            indexed = name_of(user) == "getitem" and not all(map(_plain, user.args[1:]))
            if layout(user) and not indexed:
                todo.append(user)
            elif user.op != "output":
                found[user] = None
    return list(found)


def _plain(index: Any) -> bool:
    """Whether an index takes parts that are known beforehand."""
    found: list[fx.Node] = []
    fx.map_arg((index,), found.append)
    return not found


def routers(graph: fx.Graph) -> list[fx.Node]:
    """Nodes that choose among floating values along an axis, and those that tell experts apart as one-hot vectors."""
    found = []
    for n in graph.nodes:
        if n.op not in ("call_function", "call_method") or not n.args or not isinstance(n.args[0], fx.Node):
            continue
        t, name = value(n.args[0]), name_of(n)
        if not isinstance(t, torch.Tensor) or not t.dim():
            continue
        if (name in _ROUTERS and t.is_floating_point() and t.dim() > 1) or name == "one_hot":
            found.append(n)
    return found


def _counts(router: fx.Node, across: bool) -> set[int]:
    """Numbers of experts that a router may choose from; `across`: or that may choose, by the other axes."""
    if name_of(router) == "one_hot":
        E = router.args[1] if len(router.args) > 1 else router.kwargs.get("num_classes")
        return {E} if type(E) is int and E > 1 and not across else set()
    scores: torch.Tensor = value(router.args[0])  # type: ignore[arg-type]
    at = 2 if name_of(router) == "topk" else 1
    dim = router.kwargs.get("dim", router.args[at] if len(router.args) > at else -1)
    axis = dim % scores.dim() if type(dim) is int else scores.dim() - 1
    found = [s for i, s in enumerate(scores.shape) if (i != axis) == across]
    return {s for s in found if type(s) is int and s > 1}


def sites(graph: fx.Graph) -> list[Site]:
    """Banks of experts of a graph that are not in the dialect yet, in the order of their use. First those of as many
    experts as a router chooses from, then those of as many as choose, so that a parameter may be in several.
    """
    choosers = routers(graph)
    return [s for across in (False, True) for s in _sites_of(graph, choosers, across)] if choosers else []


def _sites_of(graph: fx.Graph, choosers: list[fx.Node], across: bool) -> list[Site]:
    numbers: set[int] = set().union(*(_counts(r, across) for r in choosers))
    if not numbers:
        return []
    free = [n for n in graph.nodes if n.op in ("placeholder", "get_attr") and _free(n)]
    if not free:
        return []
    order = {n: i for i, n in enumerate(graph.nodes)}
    uses = {n: sorted(readers(n), key=order.__getitem__) for n in free}
    free = [n for n in free if uses[n] and not any("moefx" in str(u.target) for u in uses[n])]
    groups: dict[tuple[fx.Node, int, bool, str], list[_Placed]] = {}
    for p in (*_listed(free, uses, order, numbers), *_whole(free, uses, numbers)):
        E = p.stack.shape[0]
        fitting = [r for r in choosers if E in _counts(r, across) and "one_hot" not in name_of(r)]
        fitting = fitting or [r for r in choosers if E in _counts(r, across)]
        last = max(order[u] for m in p.members for u in uses[m])
        before = [r for r in fitting if order[r] < last]
        router = before[-1] if before else fitting[0]
        if len(p.stack.shape) == 2 and all(order[u] < order[router] for m in p.members for u in uses[m]):
            continue  # the router's own weight
        groups.setdefault((router, E, len(p.members) > 1, ""), []).append(p)
    found = [s for key, placed in groups.items() for s in _sites(key[0], placed, uses, order)]
    return sorted(found, key=lambda s: order[s.uses[0]])


@dataclass
class _Placed:
    stack: Stack
    members: tuple[fx.Node, ...]
    orders: list[tuple[int, ...]]  # permutations of the members

    def ordered(self, i: int) -> Stack:
        """The stack in its i-th order, the last one if there are fewer."""
        if not self.orders:
            return self.stack
        order = self.orders[min(i, len(self.orders) - 1)]
        return Stack(tuple(self.stack.names[j] for j in order), self.stack.shape, self.stack.dtype)


def _free(node: fx.Node) -> bool:
    t = tensor(node)
    return t is not None and t.is_floating_point() and 0 < t.dim() < 4 and all(type(s) is int for s in t.shape)


def _sites(
    router: fx.Node, placed: list[_Placed], uses: dict[fx.Node, list[fx.Node]], order: dict[fx.Node, int]
) -> Iterator[Site]:
    def span(p: _Placed) -> list[fx.Node]:
        return sorted({u for m in p.members for u in uses[m]}, key=order.__getitem__)

    parts = [placed]
    if sum(len(p.stack.shape) == 3 for p in placed) > 3:
        by_path: dict[str, list[_Placed]] = {}
        for p in placed:
            path = module_path(span(p)[0])
            by_path.setdefault(path if len(p.members) == 1 else path.rpartition(".")[0].rpartition(".")[0], []).append(
                p
            )
        parts = list(by_path.values())
    for part in parts:
        part = sorted(part, key=lambda p: order[span(p)[0]])
        matrices = sum(len(p.stack.shape) == 3 for p in part)
        if not 2 <= matrices <= 3 or len(part) - matrices > 3:
            continue
        banks = []
        for i in range(max(1, *(len(p.orders) for p in part))):
            stacks = [p.ordered(i) for p in part]
            three = tuple(s for s in stacks if len(s.shape) == 3)
            banks.append(Bank(stacks[0].shape[0], three, tuple(s for s in stacks if len(s.shape) == 2)))
        nodes = sorted({u for p in part for u in span(p)}, key=order.__getitem__)
        yield Site(tuple(dict.fromkeys(banks)), router, tuple(nodes))


def _whole(free: list[fx.Node], uses: dict[fx.Node, list[fx.Node]], numbers: set[int]) -> Iterator[_Placed]:
    """Tensors that hold all experts."""
    for n in free:
        t = tensor(n)
        assert t is not None
        shapes = [tuple(t.shape)] if t.dim() == 3 or (t.dim() == 2 and t.shape[0] in numbers) else []
        if t.dim() == 2:
            views = [value(u) for u in n.users if name_of(u) in ("view", "reshape", "unflatten")]
            shapes += [tuple(v.shape) for v in views if isinstance(v, torch.Tensor) and v.dim() == 3]
        for shape in shapes[-1:]:
            if shape[0] in numbers:
                yield _Placed(Stack((n.name,), shape, t.dtype), (n,), [])


def _listed(
    free: list[fx.Node], uses: dict[fx.Node, list[fx.Node]], order: dict[fx.Node, int], numbers: set[int]
) -> Iterator[_Placed]:
    """Stacks of one parameter per expert."""
    small = [n for n in free if (t := tensor(n)) is not None and t.dim() < 3]
    shapes: dict[Any, list[fx.Node]] = {}
    for n in small:
        t = tensor(n)
        assert t is not None
        shapes.setdefault((tuple(t.shape), t.dtype), []).append(n)
    if not any(len(c) >= E for c in shapes.values() for E in numbers):
        return
    colours = list(refined(small[0].graph, ROUNDS))
    taken: set[fx.Node] = set()
    for E in sorted(numbers, reverse=True):
        classes = [c for c in shapes.values() if len(c) >= E]
        for colour in colours:
            finer = [(c, _split(c, colour)) for c in classes]
            classes = [part for c, parts in finer for part in (parts if _multiples(parts, E) else [c])]
        for c in classes:
            if len(c) % E or taken.intersection(c):
                continue
            c = sorted(c, key=lambda n: (order[uses[n][0]], order[n]))
            for i in range(0, len(c), E):
                members = tuple(c[i : i + E])
                t = tensor(members[0])
                assert t is not None
                stack = Stack(tuple(n.name for n in members), (E, *t.shape), t.dtype)
                yield _Placed(stack, members, list(orders(members, colours[0])))
            taken.update(c)


def _multiples(parts: list[list[fx.Node]], E: int) -> bool:
    """Whether classes are multiples of E, but for such as are no experts at all (fewer than E)."""
    return any(len(p) % E == 0 for p in parts) and all(len(p) % E == 0 or len(p) < E // 2 for p in parts)


def _split(nodes: Iterable[fx.Node], colour: dict[fx.Node, int]) -> list[list[fx.Node]]:
    parts: dict[int, list[fx.Node]] = {}
    for n in nodes:
        parts.setdefault(colour[n], []).append(n)
    return list(parts.values())
