"""Editing FX graphs so that nothing is lost: every new node gets its module path, source line and shape from where it
came.

Both graph levels are served. Model graphs (from Dynamo) keep a node's value under `example_value`, training graphs
under `val`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from moefx import compat

# Meta keys that say where a node came from; they are inherited by what replaces it.
ORIGIN_KEYS = (
    "nn_module_stack",
    "fwd_nn_module_stack",
    "stack_trace",
    "seq_nr",
    "partitioner_tag",
    "custom",
    "moefx_router",
    "moefx_by_token",
)


def value(node: fx.Node) -> Any:
    """The fake value of a node on either graph level, or None when it has none."""
    return node.meta.get("val", node.meta.get("example_value"))


def size_node(graph: fx.Graph, symbol: Any) -> tuple[fx.Node, int, torch.SymInt] | None:
    """An input of the graph one of whose axes has exactly this symbol as its size."""
    for node in graph.find_nodes(op="placeholder"):
        val = value(node)
        for axis, s in enumerate(val.shape if isinstance(val, torch.Tensor) else ()):
            if isinstance(s, torch.SymInt) and s.node.expr == symbol:
                return node, axis, s
    return None


def set_value(node: fx.Node, val: Any, level: str) -> None:
    """Store a node's fake value under the key of its graph level."""
    node.meta["val"] = val
    if level == "model":
        node.meta["example_value"] = val


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that the node was traced in, or ''."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = path.replace("L['self']", "").replace("L['fn']", "").replace("L['s']", "")
    path = path.replace(".forward.__self__", "")  # a proven forward that stands in for the block's own
    for junk in ("._modules['", "']", "['"):
        path = path.replace(junk, ".")
    return path.strip(".").replace("..", ".").removeprefix("_orig_mod.")


def source_line(node: fx.Node) -> str:
    """`file:line` of the user's code behind the node, or ''."""
    trace = str(node.meta.get("stack_trace") or "")
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    # Frames of moefx itself (the stand-in for an experts forward) are not the user's code; the caller above them is.
    user = [f for f in frames if not f[0].endswith("raise_experts.py")] or frames
    return f"{user[-1][0]}:{user[-1][1]}" if user else ""


def place(node: fx.Node, *, named: bool = False) -> str:
    """Module path, the node's name if `named`, and source line: the `where` of an error, or ''."""
    return ", ".join(p for p in (module_path(node), f"node {node.name}" if named else "", source_line(node)) if p)


def is_backward(node: fx.Node) -> bool:
    """Whether a training-graph node belongs to the backward."""
    return node.meta.get("partitioner_tag") == "is_backward"


def origin(node: fx.Node) -> dict[str, Any]:
    """The part of a node's meta that a node made from it inherits."""
    return {k: node.meta[k] for k in ORIGIN_KEYS if k in node.meta}


@contextmanager
def inheriting(graph: fx.Graph, node: fx.Node) -> Iterator[Callable[..., fx.Node]]:
    """Insert before `node`; the yielded `call(target, *args, **kwargs)` makes nodes that inherit its origin.

    A target is a function, or the name of a method of the first argument.
    """

    def call(target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        if isinstance(target, str):
            new = graph.call_method(target, args, kwargs)
        else:
            new = graph.call_function(target, args, kwargs)
        new.meta = origin(node)
        return new

    with graph.inserting_before(node):
        yield call


def unpack(call: Callable[..., fx.Node], node: fx.Node, count: int) -> list[fx.Node]:
    """`count` getitem nodes of a multi-output node."""
    return [call(compat.getitem, node, i) for i in range(count)]


def outputs(node: fx.Node) -> dict[int, fx.Node]:
    """The getitem users of a multi-output node by index. Several of one index are made one, the first."""
    found: dict[int, fx.Node] = {}
    for user in sorted(u for u in node.users if u.target is compat.getitem):
        first = found.setdefault(int(user.args[1]), user)  # type: ignore[arg-type]
        if first is not user:
            replace(node.graph, user, first)
    return found


def replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    """Let every user of `old` read `new`, and take `old` out."""
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def targets(*ops: Callable[..., Any]) -> frozenset[Any]:
    """The spellings of ops as node targets: model graphs hold packets (`op`), training graphs overloads."""
    spelled: set[Any] = set()
    for op in ops:
        spelled.add(op)
        if isinstance(op, torch._ops.OpOverloadPacket):
            spelled.update(getattr(op, o) for o in op.overloads())
    return frozenset(spelled)


def find(graph: fx.Graph, *ops: Callable[..., Any]) -> list[fx.Node]:
    """Call nodes of the given functions or ops in graph order, in any spelling."""
    wanted = targets(*ops)
    return [n for n in graph.nodes if n.op == "call_function" and n.target in wanted]


def _schema(node: fx.Node) -> Any:
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else node.target.default._schema  # type: ignore[union-attr]


def set_arguments(node: fx.Node, **changes: Any) -> None:
    """Give an op node other arguments, by schema name."""
    bound = arguments(node) | changes
    node.args, node.kwargs = tuple(bound[a.name] for a in _schema(node).arguments), {}


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an op node by schema name, defaults filled in."""
    schema = _schema(node)
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound.update({a.name: v for a, v in zip(schema.arguments, node.args, strict=False)})
    bound.update(node.kwargs)
    return bound


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule with its own graph (nodes and meta copied) over the same submodules and tensors. Flat calling
    convention.
    """
    new = fx.Graph(owning_module=gm)
    table: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        table[node] = new.node_copy(node, lambda n: table[n])
    return fx.GraphModule(gm, new, class_name=gm.__class__.__name__)


def copy_plain(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph alone, for snapshots: same names, shallow-copied meta, plain code generation."""
    new = fx.Graph()
    table: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        table[node] = new.node_copy(node, lambda n: table[n])
        table[node].meta = copy.copy(node.meta)
    return new


def map_values(nodes: Iterable[Any]) -> list[Any]:
    """Fake values of a list of node arguments, constants unchanged."""
    return [value(n) if isinstance(n, fx.Node) else n for n in nodes]


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes or strides are equal for all values of their symbols. Adds no guard, as `==` would."""
    if all(type(x) is int for x in (*a, *b)):
        return tuple(a) == tuple(b)
    return len(a) == len(b) and all(compat.surely(x == y) for x, y in zip(a, b, strict=True))


def same_value(a: Any, b: Any, *, strides: bool = False) -> bool:
    """Whether two fake values agree in structure, shape, dtype and device, and if asked for in strides."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = same_sizes(a.shape, b.shape) and a.dtype == b.dtype and a.device == b.device
        return same and (not strides or same_sizes(a.stride(), b.stride()))
    if isinstance(a, Sequence) and isinstance(b, Sequence) and not isinstance(a, str):
        return len(a) == len(b) and all(same_value(x, y, strides=strides) for x, y in zip(a, b, strict=True))
    return type(a) is type(b)


def inline(graph: fx.Graph, node: fx.Node, fn: Callable[..., Any]) -> None:
    """Replace a training-level call by the ATen nodes of `fn` (same arguments), traced on the fake values of its
    inputs.

    Every traced node inherits the origin of `node`.
    """
    leaves = list(dict.fromkeys(node.all_input_nodes))
    traced = compat.trace_aten(
        lambda *values: fn(*fx.map_arg(node.args, dict(zip(leaves, values, strict=True)).__getitem__)),
        [value(n) for n in leaves],
    )
    table: dict[fx.Node, fx.Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), leaves, strict=True))
    out: Any = traced.graph.output_node().args[0]
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "call_function":
                table[inner] = graph.node_copy(inner, lambda n: table[n])
                table[inner].meta = {**origin(node), "val": inner.meta["val"]}
    if isinstance(out, fx.Node):
        node.replace_all_uses_with(table[out])
    else:
        for i, user in outputs(node).items():
            user.replace_all_uses_with(table[out[i]])
            graph.erase_node(user)
    graph.erase_node(node)
    # A result that nobody reads leaves nothing behind.
    for made in reversed([table[n] for n in traced.graph.nodes if n.op == "call_function"]):
        if not made.users:
            graph.erase_node(made)
