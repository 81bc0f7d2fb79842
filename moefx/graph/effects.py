"""What nodes do besides returning a value: writes in place (also through views), random draws, switches of mode.

Training graphs are functional, so that most of this concerns model graphs, which hold what the user wrote.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx

from moefx import compat

from .edit import value

_IN_PLACE_OPERATORS = frozenset(
    f"i{n}" for n in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul")
)
# fmt: off
_DRAWS = frozenset({
    "rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "normal", "bernoulli",
    "multinomial", "poisson", "binomial", "gumbel_softmax", "rrelu_", "uniform_", "normal_", "bernoulli_", "random_",
    "exponential_", "cauchy_", "geometric_", "log_normal_",
})
# These return their input where there is nothing to cast or move.
_CASTS = frozenset({
    "to", "float", "half", "bfloat16", "double", "int", "long", "bool", "type", "type_as", "cpu", "cuda",
})
# fmt: on
_VIEW_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})


def name_of(node: fx.Node) -> str:
    """Name of a node's function, method or op, without namespace and overload."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[-1]
    return str(getattr(node.target, "__name__", node.target))


def mutated(node: fx.Node) -> list[fx.Node]:
    """The nodes that this node writes into (`x.add_()`, `x += y`, `x[i] = y`, `inplace=True`, `out=`, in-place ops)."""
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        hit = [node.kwargs.get(n, node.args[i] if i < len(node.args) else None) for i, n in _written(node.target)]
        return [a for a in hit if isinstance(a, fx.Node)]
    name = name_of(node)
    writes = name.endswith("_") and not name.endswith("__")
    if node.op == "call_method":
        writes = writes or name == "__setitem__"
    else:
        writes = writes or name in _IN_PLACE_OPERATORS or name == "setitem" or _inplace_flag(node)
    found = [node.args[0] if node.args else node.kwargs.get("input")] if writes else []
    found.append(node.kwargs.get("out"))
    return [a for a in found if isinstance(a, fx.Node)]


@cache
def _written(op: torch._ops.OpOverload[..., Any]) -> list[tuple[int, str]]:
    """Position and name of the arguments that an op writes into."""
    arguments = enumerate(op._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _inplace_flag(node: fx.Node) -> bool:
    at = _inplace_position(node.target)
    return bool(node.kwargs.get("inplace", at is not None and len(node.args) > at and node.args[at]))


@cache
def _inplace_position(target: Any) -> int | None:
    """Where a function of torch.nn.functional takes `inplace` positionally (`nn.Dropout` passes it so)."""
    if not getattr(target, "__module__", "").startswith("torch.nn"):
        return None
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def is_random(node: fx.Node) -> bool:
    """Whether a node draws from a random stream."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in node.target.tags
    name, args = name_of(node), node.args
    if name == "scaled_dot_product_attention":
        return bool(node.kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
    if "dropout" in name:
        return bool(node.kwargs.get("training", args[2] if len(args) > 2 else True))
    if name == "rrelu":
        return bool(node.kwargs.get("training", len(args) > 3 and args[3]))
    return name in _DRAWS


def erase_unread(graph: fx.Graph) -> int:
    """Take out nodes that nobody reads and that do nothing else (`is_effect`); how many there were."""
    before = len(graph.nodes)
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output") and not is_effect(node):
            graph.erase_node(node)
    return before - len(graph.nodes)


def is_effect(node: fx.Node) -> bool:
    """Whether a node must stay although nobody reads it: writes, mode switches, assertions, random draws, regions."""
    return bool(
        node.is_impure()
        or mutated(node)
        or is_random(node)
        or isinstance(node.target, torch._ops.HigherOrderOperator)
        or name_of(node).startswith(("_set_grad", "_assert", "_enter", "_exit", "sym_constrain"))
    )


def view_source(node: fx.Node) -> fx.Node | None:
    """The input whose memory a node's result may share, or None when the result is memory of its own."""
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source, name = node.args[0], name_of(node)
    if node.target is compat.getitem:
        return view_source(source) if isinstance(value(source), tuple | list) else source
    if node.target is getattr:
        return source if node.args[1] in _VIEW_ATTRIBUTES else None
    if name in _CASTS and getattr(value(source), "dtype", None) != getattr(value(node), "dtype", None):
        return None  # another dtype is a copy
    if source in mutated(node) or name in _CASTS or "dropout" in name or _returns_alias(name):
        return source
    return None


@cache
def _returns_alias(name: str) -> bool:
    """Whether an aten op of this name returns a view of its input, by its schema."""
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    returns = [r.alias_info for o in packet.overloads() for r in getattr(packet, o)._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returns)


def writers(graph: fx.Graph) -> Callable[[fx.Node], list[fx.Node]]:
    """A function from a node to the nodes that write into its memory, directly or through any view of it."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        for target in mutated(node):
            found.setdefault(_base(target), []).append(node)
    return lambda node: found.get(_base(node), []) if found else []


def _base(node: fx.Node) -> fx.Node:
    while (source := view_source(node)) is not None:
        node = source
    return node


def modes(graph: fx.Graph) -> dict[fx.Node, tuple[Any, ...]]:
    """For each node, the switches that are in force where it runs: grad mode and autocast regions."""
    switches = [n.args[0] for n in graph.nodes if name_of(n) == "_set_grad_enabled"]
    state: list[Any] = [switches[-1] if switches else None]  # the last one puts back what was before the graph
    out: dict[fx.Node, tuple[Any, ...]] = {}
    for node in graph.nodes:
        out[node] = tuple(state)
        name = name_of(node)
        if name == "_set_grad_enabled":
            state[0] = node.args[0]
        elif name.startswith("_enter"):
            state.append((name, node.args))
        elif name.startswith("_exit") and len(state) > 1:
            state.pop()
    return out
