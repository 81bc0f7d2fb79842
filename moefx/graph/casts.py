"""Reading casts in training graphs: which nodes are codes, of what, under which spec.

A `quantize` node returns a list, codes and scales of each of its specs in turn; the getitem nodes behind it are what
other nodes read. Fused ops return codes in the same way behind their other outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import moefx.dialect  # noqa: F401  registers the ops

from .edit import arguments, find, inheriting, outputs, replace, targets, unpack

ops = torch.ops.moefx
Pair = tuple[fx.Node, fx.Node]  # codes, scales
QUANTIZE, DEQUANTIZE = targets(ops.quantize), targets(ops.dequantize)
DELAYED = targets(ops.quantize_delayed)
TURNS = targets(ops.transpose_scaled, ops.convert)
MOVES = targets(ops.permute_scaled)
WIRES = targets(ops.dispatch, ops.combine)


@dataclass(frozen=True)
class Cast:
    """What a cast is for, kept in `meta["moefx_cast"]` of its node.

    Attributes:
        role: input, weight, grad or hidden.
        tensor: its name in the equations: X, Xp, A, H, dY, dO, dH, W1, W2.
        layer: module path.
        use: what reads the result: a product, a wire, or what the backward stores.
        key: name of the cast in the ledger, kept when passes rebuild its node.
    """

    role: str
    tensor: str
    layer: str
    use: str
    key: str


@dataclass(frozen=True)
class Codes:
    """A value as codes: the two nodes, how to read them, and the offsets that its row blocks follow."""

    codes: fx.Node
    scales: fx.Node
    spec: str
    offsets: fx.Node | None


def mark(node: fx.Node, role: str, tensor: str, layer: str, use: str) -> fx.Node:
    """Note on a cast's node what it is for."""
    node.meta["moefx_cast"] = Cast(role, tensor, layer, use, node.name)
    return node


def cast_of(node: fx.Node) -> Cast:
    """What a cast is for."""
    found: Cast = node.meta["moefx_cast"]
    return found


def quantize_nodes(graph: fx.Graph) -> list[fx.Node]:
    """All explicit quantize nodes."""
    return find(graph, ops.quantize)


def dequantize_nodes(graph: fx.Graph) -> list[fx.Node]:
    """All explicit dequantize nodes."""
    return find(graph, ops.dequantize)


def codes_of(q: fx.Node) -> dict[str, tuple[fx.Node | None, fx.Node | None]]:
    """The codes and scales nodes that read a quantize node, by spec; None where nobody reads them."""
    items = outputs(q)
    specs: Any = arguments(q)["specs"]
    return {s: (items.get(2 * i), items.get(2 * i + 1)) for i, s in enumerate(specs)}


def by_spec(items: Sequence[fx.Node], specs: Sequence[str]) -> dict[str, Pair]:
    """What a cast gave, codes and scales of each spec in turn, by spec."""
    return {s: (items[2 * i], items[2 * i + 1]) for i, s in enumerate(specs)}


def read_codes(d: fx.Node) -> Codes:
    """What a dequantize node reads."""
    a = arguments(d)
    return Codes(a["codes"], a["scales"], a["spec"], a["offsets"])


def is_weight(q: fx.Node) -> bool:
    """Whether a cast is of a weight: once a step and counted apart."""
    cast = q.meta.get("moefx_cast")
    return cast is not None and cast.role == "weight"


def explicit_casts(graph: fx.Graph) -> Iterator[fx.Node]:
    """Quantize and dequantize nodes in graph order."""
    for node in graph.nodes:
        if node.op == "call_function" and (node.target in QUANTIZE | DEQUANTIZE | DELAYED):
            yield node


def _rebuilt(graph: fx.Graph, q: fx.Node, specs: list[str], offsets: fx.Node | None) -> dict[str, Pair]:
    with inheriting(graph, q) as call:
        new = call(ops.quantize.default, q.args[0], offsets, specs)
        new.meta["moefx_cast"] = q.meta["moefx_cast"]
        return by_spec(unpack(call, new, 2 * len(specs)), specs)


def _redirect(graph: fx.Graph, q: fx.Node, now: dict[str, Pair]) -> None:
    """Let readers of a quantize node's codes read the given nodes, and take it out."""
    for s, pair in codes_of(q).items():
        for old, new in zip(pair, now.get(s, (None, None)), strict=True):
            if old is not None:
                assert new is not None
                replace(graph, old, new)
    graph.erase_node(q)


def keep_specs(graph: fx.Graph, q: fx.Node, specs: list[str], others: dict[str, Pair]) -> dict[str, Pair]:
    """Leave a quantize node only `specs`; what was read under others is read from the given nodes. What remains."""
    a, x = arguments(q), q.args[0]
    assert isinstance(x, fx.Node)
    if not others:
        return {s: p for s, p in codes_of(q).items() if None not in p}  # type: ignore[misc]
    left = _rebuilt(graph, q, specs, a["offsets"]) if specs else {}
    _redirect(graph, q, {**others, **left})
    if not x.users and x.target in DEQUANTIZE:
        graph.erase_node(x)
    return left


def add_spec(graph: fx.Graph, q: fx.Node, spec: str, offsets: fx.Node | None) -> Pair:
    """Codes of a quantize node's input under one more spec, written by the same cast."""
    specs = list(arguments(q)["specs"])
    specs += [spec] if spec not in specs else []
    made = _rebuilt(graph, q, specs, arguments(q)["offsets"] or offsets)
    _redirect(graph, q, made)
    return made[spec]
