"""Activations are made again where their gradients are, and not kept from the forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from moefx.graph.edit import arguments, find, inheriting, is_backward, outputs, replace, unpack, value
from moefx.graph.effects import writers
from moefx.manager import Context, Pass

ops = torch.ops.moefx


@dataclass(frozen=True)
class RecomputeActivations(Pass):
    """A `glu` that the backward reads, too, is computed there once more, by `glu_backward_again` with the gradients.

    The gradient of the next weight needs the activation, that of the pre-activations reads these: both come from one
    reading, and the backward keeps the pre-activations alone (as in SonicMoE, arXiv 2512.14080).

    `devices` are the types of devices where one kernel does so, and `dtypes` what it reads. Elsewhere Inductor finds it
    by itself, and plain execution would pay for it.
    """

    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)

    level: ClassVar[str] = "training"
    provides: ClassVar[set[str]] = {"activations_recomputed"}
    numerics: ClassVar[str] = "rounding"

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        gradients, written = find(graph, ops.glu_backward), writers(graph)
        for act in ctx.at(find(graph, ops.glu)):
            readers = sorted(u for u in act.users if is_backward(u))
            val = value(act)
            if is_backward(act) or not readers or val.device.type not in self.devices or val.dtype not in self.dtypes:
                continue
            same = _operands(act)
            found = [b for b in gradients if _operands(b) == same]
            if len(found) == 1 and _wait(readers, found[0], written):
                again = _with_gradients(graph, found[0])
                gradients.remove(found[0])
            else:  # no gradient of the pre-activations is wanted, or it depends on what reads the activation
                with inheriting(graph, readers[0]) as call:
                    again = call(ops.glu.default, *same)
            for reader in readers:
                reader.replace_input_with(act, again)
            ctx.matched(again)


def _operands(node: fx.Node) -> list[Any]:
    return [arguments(node)[name] for name in ("h", "w", "kind")]


def _wait(readers: list[fx.Node], gradient: fx.Node, written: Callable[[fx.Node], list[fx.Node]]) -> bool:
    """Move the readers, and what depends on them, behind the gradient of the pre-activations. False if it cannot be."""
    early = {n: None for n in readers if n < gradient}
    node = min(early, default=gradient)
    while node is not gradient:
        if any(i in early for i in node.all_input_nodes):
            early[node] = None
        node = node.next
    if any(i in early for i in gradient.all_input_nodes):
        return False
    if any(n < w < gradient for n in early for x in n.all_input_nodes for w in written(x)):
        return False
    last = max([gradient, *outputs(gradient).values()])
    for n in sorted(early):
        last.append(n)
        last = n
    return True


def _with_gradients(graph: fx.Graph, gradient: fx.Node) -> fx.Node:
    """`glu_backward_again` in the place of `glu_backward`; the activation that it makes."""
    with inheriting(graph, gradient) as call:
        dh, dw, again = unpack(call, call(ops.glu_backward_again.default, *gradient.args), 3)
    for i, old in outputs(gradient).items():
        replace(graph, old, (dh, dw)[i])
    for unread in (gradient, *(n for n in (dh, dw) if not n.users)):
        graph.erase_node(unread)
    return again
