"""What the placeholders of a joint graph stand for in a call: their names, values, and sizes that were assumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from . import compat
from .graph.edit import value
from .joint import Joint
from .tangents import like_traced


def label_inputs(graph: fx.Graph, names: Mapping[str, str]) -> None:
    """Note on every placeholder, under `moefx_name`, what people call it."""
    for node in graph.find_nodes(op="placeholder"):
        node.meta["moefx_name"] = names.get(node.name, node.name)


def names_of(joint: Joint, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, str]:
    """Placeholders by what they are: dotted parameter names, argument names, tangents by output."""
    paths = [path for path, _ in pytree.tree_flatten_with_path((args, kwargs))[0]]
    called = [".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path[1:]) for path in paths]
    names = {}
    for slot, node in zip(joint.inputs, joint.graph.find_nodes(op="placeholder"), strict=True):
        named = called[int(slot.key)] if slot.kind == "input" else str(slot.key)
        names[node.name] = f"gradient of output {slot.key}" if slot.kind == "tangent" else named
    return names


def parameters_of(joint: Joint) -> set[str]:
    """Names of the placeholders that are parameters."""
    placeholders = joint.graph.find_nodes(op="placeholder")
    return {n.name for s, n in zip(joint.inputs, placeholders, strict=True) if s.kind == "param"}


def values_of(
    joint: Joint, args: tuple[Any, ...], kwargs: dict[str, Any], state: Mapping[str, torch.Tensor]
) -> list[Any]:
    """A value for every placeholder: tensors of `state` by name, arguments of the call, tangents at random."""
    flat = pytree.tree_leaves((args, kwargs))
    gen = torch.Generator().manual_seed(0)
    values = []
    for slot, node in zip(joint.inputs, joint.graph.find_nodes(op="placeholder"), strict=True):
        if slot.kind == "state":
            values.append(torch.zeros(value(node).shape, device=value(node).device))
        elif slot.kind == "tangent":
            val = value(node)
            drawn = torch.randn([int(s) for s in val.shape], generator=gen).to(val.device, val.dtype)
            values.append(like_traced(drawn, val))
        else:
            values.append(flat[int(slot.key)] if slot.kind == "input" else state[str(slot.key)].detach())
    return values


def guard_of(joint: Joint) -> Callable[[list[Any]], bool]:
    """Whether a call, given as its leaves, has sizes that satisfy what tracing assumed about the symbolic ones."""
    fakes = {
        int(s.key): value(n)
        for s, n in zip(joint.inputs, joint.graph.find_nodes(op="placeholder"), strict=True)
        if s.kind == "input"
    }
    order = sorted(fakes)
    expression = compat.guard_expression(joint.fake_mode, [fakes[i] for i in order])

    def holds(leaves: list[Any]) -> bool:
        values = [leaves[i] for i in order]
        static = all(
            isinstance(w, torch.SymInt) or w == h
            for i, v in zip(order, values, strict=True)
            for w, h in zip(fakes[i].shape, v.shape, strict=True)
        )
        return static and compat.guards_hold(joint.fake_mode, expression, values)

    return holds
