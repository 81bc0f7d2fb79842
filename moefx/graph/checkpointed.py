"""Activation checkpointing (`torch.utils.checkpoint`) in a captured model.

Dynamo hides a checkpointed region in a graph of its own behind one node, where no pass would find the experts in it.
`inline_checkpointed` puts the region's nodes into the model graph and marks them; nodes that passes make of them
inherit the mark, through the joint trace too, and `recompute_checkpointed` tells the partitioner to compute them again
in the backward instead of saving them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from moefx import compat
from moefx.errors import CaptureError

from .edit import is_backward, module_path, source_line

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
REGION = "moefx_checkpoint"  # key in meta["custom"], which both the joint trace and passes carry along


def inline_checkpointed(gm: fx.GraphModule) -> int:
    """Put checkpointed regions, nested ones included, into the graph around them; returns how many there were.

    A region with a policy of its own (`context_fn`, selective checkpointing) stays a node: what it saves is decided
    while it runs.

    Raises:
        CaptureError: such a region holds experts, which no pass would reach.
    """
    count = 0
    while regions := [n for n in gm.graph.find_nodes(op="call_function", target=CHECKPOINT) if not _selective(gm, n)]:
        for node in regions:
            count += 1
            _inline(gm, node, (node.meta.get("custom") or {}).get(REGION, count))
    for node in gm.graph.find_nodes(op="call_function", target=CHECKPOINT):
        experts = [n for n in _nodes(_body(gm, node)) if str(n.target).startswith("moefx.")]
        if experts:
            raise CaptureError(
                "experts stand inside a checkpointed region that has a policy of its own (context_fn)",
                where=f"{module_path(experts[0])}  {source_line(node)}".strip(),
                why="what such a region saves is decided while it runs, so that passes do not see into it",
                todo="checkpoint this region without context_fn, or leave the experts out of it",
            )
    gm.graph.lint()
    gm.recompile()
    return count


def recompute_checkpointed(graph: fx.Graph) -> None:
    """Mark the forward nodes of checkpointed regions for the partitioner, over what passes asked for."""
    for node in graph.nodes:
        region = (node.meta.get("custom") or {}).get(REGION)
        if region is not None and node.op == "call_function" and not is_backward(node):
            compat.recompute(node, region=region)


def _body(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    source: Any = node.args[0]
    body = gm.get_submodule(str(source.target))
    assert isinstance(body, fx.GraphModule)
    return body


def _selective(gm: fx.GraphModule, node: fx.Node) -> bool:
    return "_checkpoint_context_fn" in _body(gm, node).meta


def _nodes(body: fx.GraphModule) -> list[fx.Node]:
    """Nodes of a body and of the bodies inside it."""
    return [n for m in body.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes]


def _inline(gm: fx.GraphModule, node: fx.Node, region: int) -> None:
    graph, body = gm.graph, _body(gm, node)
    source: Any = node.args[0]
    table: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[1:], strict=True))
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op in ("placeholder", "output"):
                continue
            new = table[inner] = graph.node_copy(inner, table.__getitem__)
            if inner.op == "get_attr":
                new.target = _moved(gm, body, str(inner.target))
            else:
                new.meta["custom"] = {**(new.meta.get("custom") or {}), REGION: region}
    result = fx.map_arg(body.graph.output_node().args[0], table.__getitem__)
    for user in list(node.users):
        part: Any = result[user.args[1]] if user.target is compat.getitem else None  # type: ignore[index]
        user.replace_all_uses_with(part)
        graph.erase_node(user)
    graph.erase_node(node)
    if not source.users:
        graph.erase_node(source)


def _moved(gm: fx.GraphModule, body: fx.GraphModule, target: str) -> str:
    """The name under which an attribute of a body is found on the outer module from now on."""
    value = operator.attrgetter(target)(body)
    plain, number = target.replace(".", "_"), 0
    while hasattr(gm, f"{plain}_{number}"):
        number += 1
    setattr(gm, f"{plain}_{number}", value)
    return f"{plain}_{number}"
