"""The part of a model graph between a value and what is made of it, and running that part on other values.

A pass that must know what a piece of a model computes, however it is written, cuts the piece out and tries it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moefx import compat

from .edit import value
from .effects import is_random, modes, mutated, name_of, writers

# Nodes of a slice; a piece that is larger is something else than what a pass looks for.
LIMIT = 200


class Unsliceable(Exception):  # noqa: N818  control flow: the reason why there is no slice, for the report
    """There is no such slice; the message says why."""


@dataclass(frozen=True)
class Slice:
    """Nodes that lead from `source` to `targets`, in graph order, writes in place included.

    `sides` are the other values that they read; they do not depend on the source.
    """

    source: fx.Node
    targets: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    sides: tuple[fx.Node, ...]
    modes: Mapping[fx.Node, tuple[Any, ...]]

    def run(self, values: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """Values of all nodes for given values of source and sides, as they are after the last write.

        Grad mode and autocast regions are those of the graph.
        """
        env = dict(values)
        for n in self.nodes:
            args, kwargs = fx.map_arg((n.args, n.kwargs), env.__getitem__)
            target: Any = getattr(args[0], str(n.target)) if n.op == "call_method" else n.target
            with self.mode(n):
                env[n] = target(*(args[1:] if n.op == "call_method" else args), **kwargs)
        return env

    @contextlib.contextmanager
    def mode(self, node: fx.Node) -> Iterator[None]:
        """Grad mode and autocast regions that are in force at a node."""
        grad, *regions = self.modes[node]
        with contextlib.ExitStack() as stack:
            if grad is not None:
                stack.enter_context(torch.set_grad_enabled(bool(grad)))
            for name, args in regions:
                if "autocast" in name:
                    stack.enter_context(torch.autocast(*args))
            yield

    def outside_readers(self) -> dict[fx.Node, list[fx.Node]]:
        """Nodes other than the targets that something outside reads, and what reads them."""
        inside = set(self.nodes)
        found = {n: [u for u in n.users if u not in inside] for n in self.nodes if n not in self.targets}
        return {n: users for n, users in found.items() if users}

    def text(self) -> str:
        """What is computed, without the names of nodes: equal for slices that compute the same."""
        names = {n: f"%{i}" for i, n in enumerate((self.source, *self.sides, *self.nodes))}
        lines = [f"{_typed(n)}" for n in (self.source, *self.sides)]
        for n in self.nodes:
            args = fx.map_arg((n.args, n.kwargs), names.__getitem__)
            lines.append(f"{n.op} {n.target!r} {args!r} {self.modes[n]!r} {_typed(n)}")
        outside = [names[n] for n in self.outside_readers()]
        return "\n".join([*lines, repr([names[t] for t in self.targets]), repr(outside)])


class Slicer:
    """Cuts slices out of one graph. Who puts nodes in meanwhile says so (`add`); nodes may go."""

    def __init__(self, graph: fx.Graph) -> None:
        self.position = {n: i for i, n in enumerate(graph.nodes)}
        self.modes = modes(graph)
        self._writers = writers(graph)

    def add(self, new: fx.Node, where: fx.Node) -> None:
        """A new node stands in front of `where`."""
        self.position[new], self.modes[new] = self.position[where], self.modes[where]

    def cut(self, source: fx.Node, targets: tuple[fx.Node, ...], reader: fx.Node) -> Slice:
        """The slice from `source` to `targets`, as `reader` behind them sees their values.

        Raises `Unsliceable` for random draws, regions, writes that reach outside, and targets that do not follow.
        """
        at, first, last = self.position, self.position[source], self.position[reader]
        if any(first < at[w] < last for w in self._writers(source)):
            raise Unsliceable("the logits are written in place on the way to the choice")
        local = self._local(targets, source, last)
        depends: set[fx.Node] = {source}
        constant: set[fx.Node] = set()
        for n in local:
            if depends & {*n.all_input_nodes}:
                depends.add(n)
            elif n.op in ("call_function", "call_method") and constant >= {*n.all_input_nodes}:
                constant.add(n)
        if missing := [t for t in targets if t not in depends]:
            raise Unsliceable(f"{missing[0].name} does not descend from the logits")
        inside = [n for n in local if n in depends or n in constant]
        for n in inside:
            if n.op not in ("call_function", "call_method") or isinstance(n.target, torch._ops.HigherOrderOperator):
                raise Unsliceable(f"{name_of(n)} is code of its own between the logits and the experts")
            if is_random(n):
                raise Unsliceable(f"random numbers ({name_of(n)}) are drawn between the logits and the experts")
        kept, known = {*inside}, {*inside, source}
        sides = list(dict.fromkeys(i for n in inside for i in n.all_input_nodes if i not in known))
        for n in sides:
            if any(at[inside[0]] < at[w] < last for w in self._writers(n)):
                raise Unsliceable(f"{n.name}, which it reads, is written in place on the way to the experts")
        for n in inside:
            if stray := [w for w in self._writers(n) if w not in kept]:
                raise Unsliceable(f"{name_of(stray[0])} writes into the router's values behind the experts")
            if mutated(n) and any(m in sides or m is source for m in mutated(n)):
                raise Unsliceable(f"{name_of(n)} writes into a value from outside the router")
        return Slice(source, targets, tuple(inside), tuple(sides), self.modes)

    def _local(self, targets: tuple[fx.Node, ...], source: fx.Node, last: int) -> list[fx.Node]:
        """Ancestors of the targets behind the source, what writes into them, and all parts of their tuples."""
        first, found = self.position[source], set[fx.Node]()
        stack = [*targets]
        while stack:
            n = stack.pop()
            if n in found or self.position[n] <= first:
                continue
            found.add(n)
            if len(found) > LIMIT:
                raise Unsliceable("the way from the logits to the experts is too long for a router")
            stack += n.all_input_nodes
            stack += [w for w in self._writers(n) if self.position[w] < last]
            if not isinstance(value(n), torch.Tensor):
                stack += [u for u in n.users if u.target is compat.getitem]
        return sorted(found, key=self.position.__getitem__)


def _typed(n: fx.Node) -> str:
    v = value(n)
    return f"{v.dtype} {tuple(v.shape)} {v.device}" if isinstance(v, torch.Tensor) else type(v).__name__
