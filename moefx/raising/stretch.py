"""A stretch of a model graph, run on made-up values: what a block's recorder sees, seen in a graph.

Shapes are those of the graph, sizes that depend on data are what they come to be. For recognition everything runs in
float32, whatever the graph says; for the proof in the graph's own precision, too.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from moefx import compat
from moefx.errors import first_line
from moefx.graph.edit import value
from moefx.graph.effects import modes, mutated, name_of, view_source

from .colour import tensor
from .record import Obj, Record, Snap, Step
from .refine import Site, layout

Tensor = torch.Tensor
_LOW = (torch.bfloat16, torch.float16)
_BEYOND = 24  # nodes behind the last use of a parameter in which the routed sum is looked for
_ABOVE = 16  # nodes above the router that are taken in
_LARGEST = 1 << 24
_MAKERS = ("zeros", "new_zeros", "full", "new_full", "empty", "new_empty", "ones", "new_ones")


class NoStretchError(Exception):
    """The part of the graph around the experts cannot be run by itself."""


@dataclass
class Stretch:
    """Nodes in graph order, what they read from before, and the switches in force where they begin."""

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    experts: frozenset[str]
    grad: bool

    def values(self, seed: int, kind: str, dtype: torch.dtype | None) -> dict[fx.Node, Any]:
        """Values of the inputs. `kind`: random, skewed (rows resemble each other), alike (rows are equal), large or
        zeros (where all experts are tied).
        """
        gen = torch.Generator().manual_seed(seed)
        found: dict[fx.Node, Any] = {}
        for n in self.inputs:
            t = tensor(n)
            if t is None:
                found[n] = fx.node.map_aggregate(value(n), _number)
                continue
            if any(compat.is_symbol(s) and not _backed(s) for s in t.shape):
                raise NoStretchError(f"it reads {n.name} from above, whose number of rows depends on data")
            shape = [compat.size_hint(s) for s in t.shape]
            if t.dtype == torch.bool:  # both values, or a mask could not be told from none
                found[n] = (torch.rand(shape, generator=gen) < 0.75).to(t.device)
                continue
            if not t.is_floating_point():
                found[n] = self._integers(n, shape, gen).to(t.device, t.dtype)
                continue
            made = torch.randn(shape, generator=gen)
            if self.is_state(n):
                made = made / max(1, shape[-1] if len(shape) > 1 else 1) ** 0.5
            elif kind in ("large", "zeros"):
                made = made * (30.0 if kind == "large" else 0.0)
            elif len(shape) > 1 and kind != "random":
                made = made.reshape(-1, shape[-1])[:1] + (0.15 if kind == "skewed" else 0.0) * made
            wide = torch.float32 if dtype is not None and t.dtype in _LOW else t.dtype
            found[n] = made.to(t.device, wide)
        return found

    def _integers(self, n: fx.Node, shape: list[int], gen: torch.Generator) -> Tensor:
        """Different numbers in every row, as of experts; where there are no rows, none but zeros."""
        E = max(
            (
                len(self.experts),
                *(
                    t.shape[0]
                    for m in self.inputs
                    if m.name in self.experts and (t := tensor(m)) is not None and t.dim() == 3
                ),
            )
        )
        if not shape or shape[-1] > E:
            return torch.zeros(shape, dtype=torch.long)
        return torch.rand(*shape[:-1], E, generator=gen).argsort(-1)[..., : shape[-1]]

    def is_state(self, n: fx.Node) -> bool:
        """Whether an input is a parameter."""
        return (
            n.op == "get_attr" or n.name in self.experts or n.type is nn.Parameter or isinstance(value(n), nn.Parameter)
        )

    def run(
        self,
        values: dict[fx.Node, Any],
        *,
        wide: bool,
        after: Callable[[int, fx.Node, Any], None] | None = None,
        upto: int | None = None,
    ) -> dict[fx.Node, Any]:
        """Values of all nodes; those that are written in place as they are at the end."""
        env = dict(values)
        with _switches(self.grad), compat.no_fake():
            for i, n in enumerate(self.nodes[:upto]):
                out = _call(n, env, wide)
                env[n] = out
                if after is not None:
                    after(i, n, out)
        return env

    def record(self, seed: int, kind: str) -> tuple[Record, dict[str, Tensor]]:
        """One run, the values that it left, and the experts' parameters. A node that fails behind them ends it."""
        values = self.values(seed, kind, torch.float32)
        found, objs = Record(), dict[fx.Node, Obj]()
        rearranged: dict[fx.Node, fx.Node] = {n: n for n in self.inputs if n.name in self.experts}
        for n, v in values.items():
            if isinstance(v, Tensor):
                state = self.is_state(n)
                objs[n] = Obj(v.requires_grad_(v.is_floating_point()), "state" if state else "input", name=n.name)
                if not state:
                    found.inputs.append(objs[n])
                    found.snaps.append(Snap(objs[n], -1, v.detach().clone(), False))
        params = {n.name: v for n, v in values.items() if n.name in self.experts}
        values = {n: v.view_as(v) if isinstance(v, Tensor) else v for n, v in values.items()}

        def snap(n: fx.Node, i: int) -> None:
            o = objs[n]
            t = tensor(n)
            fixed = t is not None and all(not compat.is_symbol(s) or _backed(s) for s in t.shape)
            if fixed and o.tensor.dtype != torch.bool and 0 < o.tensor.numel() <= _LARGEST and n not in rearranged:
                found.snaps.append(Snap(o, i, o.tensor.detach().clone(), o.tensor.requires_grad))

        def after(i: int, n: fx.Node, out: Any) -> None:
            if layout(n) and n.all_input_nodes and all(m in rearranged for m in n.all_input_nodes):
                rearranged[n] = rearranged[n.all_input_nodes[0]]
            # A rearranged parameter is used where somebody computes with it.
            reads = [objs[rearranged.get(m, m)] for m in n.all_input_nodes if m in objs] if n not in rearranged else []
            written = list({id(objs[b].tensor): b for m in mutated(n) for b in (m, base(m)) if b in objs}.values())
            if isinstance(out, Tensor):
                objs[n] = Obj(out, "step", i)
                if not any(objs[m].tensor is out for m in written):
                    snap(n, i)
            for m in written:
                snap(m, i)
            step = Step(
                i, n.target, reads, {}, objs.get(n), [objs[m] for m in written], (), torch.is_grad_enabled(), False
            )
            found.steps.append(step)

        last = max(
            (i for i, n in enumerate(self.nodes) if any(m.name in self.experts for m in n.all_input_nodes)), default=0
        )
        try:
            self.run(values, wide=True, after=after)
        except Exception as e:
            if len(found.steps) <= last:
                line = first_line(e)
                raise NoStretchError(f"it fails on random values: {type(e).__name__}: {line}") from e
            del self.nodes[len(found.steps) :]
        return found, params

    def node_of(self, o: Obj) -> fx.Node:
        """The node behind an object of a record."""
        return self.nodes[o.step] if o.source == "step" else next(n for n in self.inputs if n.name == o.name)


def _backed(size: Any) -> bool:
    """Whether a symbolic size belongs to an input, not to data."""
    node = size.node
    return bool(node.has_hint())


def _widened(v: Any) -> Any:
    return torch.float32 if isinstance(v, torch.dtype) and v in _LOW else v


def _number(v: Any) -> Any:
    return compat.size_hint(v) if isinstance(v, torch.SymInt) else v


def base(node: fx.Node) -> fx.Node:
    """The node whose memory a node's value lies in."""
    while (source := view_source(node)) is not None:
        node = source
    return node


@contextmanager
def _switches(grad: bool) -> Iterator[None]:
    """Grad mode as the stretch begins with it, and as it was when it is over; autocast likewise."""
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.set_grad_enabled(grad)
        yield


def _call(n: fx.Node, env: dict[fx.Node, Any], wide: bool) -> Any:
    args: Any = fx.map_arg(n.args, env.__getitem__)
    kwargs: Any = fx.map_arg(n.kwargs, env.__getitem__)
    target: Any = n.target
    if wide:
        args, kwargs = fx.node.map_aggregate(args, _widened), fx.node.map_aggregate(kwargs, _widened)
        if n.op == "call_method" and target in ("bfloat16", "half"):
            target = "float"
        if name_of(n) in ("_grouped_mm", "grouped_mm") and args[0].dtype == torch.float32 and len(args) == 2:
            return _grouped(*args, **kwargs)
    if n.op == "get_attr":
        return operator.attrgetter(target)(n.graph.owning_module)
    if n.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    if n.op == "call_module":
        return n.graph.owning_module.get_submodule(target)(*args, **kwargs)  # type: ignore[union-attr]
    return target(*args, **kwargs)


def _grouped(x: Tensor, w: Tensor, offs: Tensor | None = None, **_: Any) -> Tensor:
    """Grouped products in a precision that the op may not have."""
    assert offs is not None
    ends = [0, *offs.tolist()]
    return torch.cat([x[a:b] @ w[e] for e, (a, b) in enumerate(itertools.pairwise(ends))])


def around(site: Site, order: list[fx.Node], at: dict[fx.Node, int]) -> Stretch:
    """The stretch of a graph, its nodes given in order, that computes a site's routed sum: from above the router to a
    little behind the last use of the experts' parameters.
    """
    first, last = at[site.uses[0]], at[site.uses[-1]]
    last = max(last, at[site.router])
    begin = min(first, at[site.router])
    todo, above = [site.router], 0
    while todo and above < _ABOVE:
        n = todo.pop(0)
        for m in n.all_input_nodes if name_of(n) not in ("linear", "matmul", "mm") else ():
            if m.op not in ("placeholder", "get_attr"):
                begin = min(begin, at[m])
                todo.append(m)
                above += 1
    end = min(last + _BEYOND, len(order) - 1)
    chosen = {n for n in order[begin : end + 1] if n.op not in ("placeholder", "get_attr", "output")}
    inputs = [m for n in chosen for m in n.all_input_nodes if m not in chosen]
    todo = list(dict.fromkeys(inputs))
    while todo:  # parameters that are rearranged, and memory that is made, further above
        n = todo.pop()
        if n in chosen or n.op in ("placeholder", "get_attr"):
            continue
        if name_of(n).removesuffix("_like") in _MAKERS or _of_parameters(n, site.names):
            chosen.add(n)
            todo += n.all_input_nodes
    nodes = sorted(chosen, key=at.__getitem__)
    reads = dict.fromkeys(m for n in nodes for m in n.all_input_nodes if m not in chosen)
    state = modes(nodes[0].graph)[nodes[0]]
    if len(state) > 1:
        raise NoStretchError("it stands in an autocast region")
    return Stretch(nodes, sorted(reads, key=at.__getitem__), site.names, state[0] is not False)


def _of_parameters(node: fx.Node, names: frozenset[str]) -> bool:
    """Whether a node rearranges parameters of the experts and nothing else."""
    todo = [node]
    while todo:
        n = todo.pop()
        if n.name in names:
            continue
        if not layout(n) or not n.all_input_nodes:
            return False
        todo += n.all_input_nodes
    return True
