"""Gradients of a model's outputs as the backward takes them: which of them are there, how they lie in memory.

Outputs that get no gradient cost nothing: `prune_tangents` specialises the backward to the tangents that are there. A
transformers model returns logits beside the loss; with a zero tangent in its place a plain backward would go through
the vocabulary twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from . import compat
from .errors import CaptureError
from .graph.edit import copy_graph

Tensor = torch.Tensor


def prune_tangents(bw: fx.GraphModule, absent: frozenset[str]) -> fx.GraphModule:
    """The backward graph when the tangents named in `absent` (placeholder names) do not exist.

    A backward is linear in its tangents and autograd's formulas are linear step by step, so a node is absent when it
    depends on tangents and everything that it depends on through them is absent: what eager autograd never runs. A sum
    of a present and an absent value is the present one; anywhere else an absent value meets a present one, zeros of its
    shape stand in, as eager does.
    """
    gm = copy_graph(bw)
    graph = gm.graph
    tangents = {n for n in graph.find_nodes(op="placeholder") if "tangents" in n.name}
    depends: set[fx.Node] = set(tangents)
    gone = {n for n in tangents if n.name in absent}
    add = torch.ops.aten.add.Tensor
    for node in list(graph.nodes):
        if node.op in ("placeholder", "output") or not depends.intersection(node.all_input_nodes):
            continue
        depends.add(node)
        via = [n for n in node.all_input_nodes if n in depends]
        dead = [n for n in via if n in gone]
        if len(dead) == len(via):
            gone.add(node)
        elif dead and node.target is add and not node.kwargs:
            other = next(a for a in node.args if a not in gone)
            if isinstance(other, fx.Node) and _same(other, node):
                with graph.inserting_before(node):
                    other = _laid_out(graph, other, node.meta["val"])
                node.replace_all_uses_with(other)
                graph.erase_node(node)
                depends.add(other)
            else:
                _fill(graph, node, dead, gone)
        elif dead:
            _fill(graph, node, dead, gone)
    out = graph.output_node()
    out.args = (tuple(None if a in gone else a for a in out.args[0]),)  # type: ignore[union-attr]
    graph.eliminate_dead_code()
    for n in [n for n in graph.find_nodes(op="placeholder") if n in gone]:
        graph.erase_node(n)  # refuses when the absent tangent is still read
    gm.recompile()
    return gm


def _same(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return bool(x.shape == y.shape and x.dtype == y.dtype)


def _order(val: torch.Tensor) -> list[int]:
    """Dimensions from the slowest in memory to the fastest; by hints, where strides are symbolic."""
    strides = [compat.size_hint(s) for s in val.stride()]
    return sorted(range(val.dim()), key=lambda i: -strides[i])


def _laid_out(graph: fx.Graph, node: fx.Node, like: torch.Tensor) -> fx.Node:
    """`node` in the memory layout of `like`, which is dense: views further down were traced for that one."""
    val = node.meta["val"]
    strides = (
        (compat.size_hint(x), compat.size_hint(y))
        for size, x, y in zip(val.shape, val.stride(), like.stride(), strict=True)
        if compat.size_hint(size) != 1
    )
    if all(x == y for x, y in strides):
        return node
    order = _order(like)
    steps: tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...] = (
        (torch.ops.aten.permute.default, (order,), {}),
        (torch.ops.aten.clone.default, (), {"memory_format": torch.contiguous_format}),
        (torch.ops.aten.permute.default, (_inverse(order),), {}),
    )
    for target, args, kwargs in steps:
        made = graph.call_function(target, (node, *args), kwargs)
        made.meta = {**node.meta, "val": target(node.meta["val"], *args, **kwargs)}
        node = made
    return node


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _fill(graph: fx.Graph, node: fx.Node, dead: list[fx.Node], gone: set[fx.Node]) -> None:
    """Let `node` read zeros in place of its absent inputs (all parts of a multi-output one)."""
    for d in dead:
        val, order = d.meta["val"], _order(d.meta["val"])
        with graph.inserting_before(node):
            zeros = graph.call_function(
                torch.ops.aten.full.default,
                ([_size(graph, node, val.shape[i], gone) for i in order], 0),
                {"dtype": val.dtype, "device": val.device, "layout": torch.strided, "pin_memory": False},
            )
            if order != sorted(order):
                zeros.meta = {**d.meta, "val": val.permute(order)}
                zeros = graph.call_function(torch.ops.aten.permute.default, (zeros, _inverse(order)))
        zeros.meta = {**d.meta}
        node.replace_input_with(d, zeros)


def _size(graph: fx.Graph, node: fx.Node, size: int | torch.SymInt, gone: set[fx.Node]) -> int | fx.Node:
    """A size as a graph argument: a symbolic one is read off a tensor that exists before `node`."""
    if isinstance(size, int):
        return size
    for n in graph.nodes:
        if n is node:
            break
        val = None if n in gone else n.meta.get("val")
        if isinstance(val, torch.SymInt) and val.node.expr == size.node.expr:
            found: fx.Node = n
            return found
        for axis, s in enumerate(val.shape if isinstance(val, torch.Tensor) else ()):
            if isinstance(s, torch.SymInt) and s.node.expr == size.node.expr:
                found = graph.call_function(torch.ops.aten.sym_size.int, (n, axis))
                found.meta = {"val": s}
                return found
    raise CaptureError(
        f"a backward without some of its tangents needs zeros of symbolic size {size}, which nothing else has",
        todo="differentiate all outputs together, or leave out dynamic=",
    )


def like_traced(tangent: Tensor, val: Tensor) -> Tensor:
    """A tangent in the memory layout that the backward was traced with."""
    if tuple(tangent.stride()) == tuple(val.stride()):
        return tangent
    return (
        tangent.contiguous()
        if val.is_contiguous()
        else torch.empty_strided(
            tangent.shape, [int(s) for s in val.stride()], dtype=tangent.dtype, device=tangent.device
        ).copy_(tangent)
    )
