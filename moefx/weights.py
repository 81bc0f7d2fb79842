"""Casts of weights, taken out of forward and backward into graphs of their own, so that microbatches can share them.

A weight is cast at each call, though it changes once a step: with many experts and few tokens that is a large part of
what low precision costs (pytorch/ao PR 2864: from 10 % gain to 1 %). The graphs `weights` and `weights_backward` make
codes of parameters, which `forward` and `backward` take as inputs. Within `OptimizedModule.microbatches()` they run
once, and again after any parameter has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import compat
from .graph.casts import QUANTIZE, is_weight
from .graph.edit import arguments
from .precision.spec import QuantSpec

Tensor = torch.Tensor


def hoist_weight_casts(gm: fx.GraphModule, parameters: set[str]) -> fx.GraphModule | None:
    """Move casts of weights out of a graph, which then takes codes and scales as inputs, by the same names.

    With them go transposed copies of codes.

    Args:
        gm: forward or backward of a partitioned graph; edited.
        parameters: names of the placeholders that are parameters.

    Returns:
        a graph module from some of these placeholders to the codes, both by name; None if there is nothing to move.
        Casts that round stochastically stay, or microbatches would share their random numbers.
    """
    moved, order = [], {n: i for i, n in enumerate(gm.graph.nodes)}
    needed: set[fx.Node] = set()
    for q in (n for n in gm.graph.nodes if n.op == "call_function" and n.target in QUANTIZE and is_weight(n)):
        ancestors = _ancestors(q)
        fixed = all(n.name in parameters if n.op == "placeholder" else n.op == "call_function" for n in ancestors)
        if fixed and not any(QuantSpec.parse(s).stochastic for s in arguments(q)["specs"]):
            items = [item for item in q.users if item.target is compat.getitem]
            copies = [(view, copy) for item in items for view in item.users for copy in _copies(view)]
            moved += items + [copy for _, copy in copies]
            needed |= ancestors | {q} | {view for view, _ in copies}
    if not moved:
        return None
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in sorted(needed | set(moved), key=order.__getitem__):
        made[node] = graph.node_copy(node, made.__getitem__)
        made[node].name = node.name
    graph.output(tuple(made[n] for n in moved)).meta["names"] = [n.name for n in moved]
    first = next(n for n in gm.graph.nodes if n.op != "placeholder")
    for node in moved:
        with gm.graph.inserting_before(first):
            given = gm.graph.placeholder(node.name)
        given.meta = {**node.meta, "moefx_weight": True}
        node.replace_all_uses_with(given)
        gm.graph.erase_node(node)
        given.name = given.target = node.name  # the backward knows saved values by name
    for node in sorted(needed, key=order.__getitem__, reverse=True):
        if node.op == "call_function" and not node.users:
            gm.graph.erase_node(node)
    gm.recompile()
    return fx.GraphModule(gm, graph)


def _copies(view: fx.Node) -> list[fx.Node]:
    """Copies of a node that turns codes around."""
    turns = view.target is torch.ops.aten.permute.default
    return [n for n in view.users if n.target is torch.ops.aten.clone.default] if turns else []


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        n = stack.pop()
        if n not in found:
            found.add(n)
            stack += n.all_input_nodes
    return found


class KeptCodes:
    """Codes that calls within `microbatches()` share, until a parameter of the model changes.

    A change is seen by a parameter's identity, version counter or memory; torch's fused optimizers show in none of
    them, so that any optimizer's step drops everything. `p.data.mul_(...)` shows nowhere, which is why nothing is kept
    unless the caller says for which calls the weights stay.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.made = model, dict[int, tuple[Any, dict[str, Tensor]]]()

    def __enter__(self) -> KeptCodes:
        self._hook = register_optimizer_step_post_hook(lambda *_: self.made.clear())
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self.made.clear()

    def state(self) -> Any:
        """Equal at two times only if no parameter was replaced, moved or written in place in between."""
        parameters = list(self.model.parameters())
        if any(p.is_inference() for p in parameters):
            return object()  # these count no versions
        return [(id(p), p._version, p.data_ptr()) for p in parameters]


class WeightCodes:
    """Runs a graph that makes codes of weights."""

    def __init__(self, gm: fx.GraphModule, run: Callable[[list[Any]], Sequence[Any]]) -> None:
        self.run = run
        self.reads = [n.name for n in gm.graph.find_nodes(op="placeholder")]
        self.names: list[str] = gm.graph.output_node().meta["names"]

    def __call__(self, read: Callable[[str], Any], kept: KeptCodes | None) -> dict[str, Tensor]:
        """Codes and scales by name; `read` gives a parameter by the name of its placeholder."""
        state = None if kept is None else kept.state()
        if kept is not None and id(self) in kept.made:
            then, codes = kept.made[id(self)]
            if then == state:
                return codes
        with torch.no_grad(), compat.disable_autocast():
            codes = dict(zip(self.names, self.run([read(name) for name in self.reads]), strict=True))
        if kept is not None:
            kept.made[id(self)] = (state, codes)
        return codes
