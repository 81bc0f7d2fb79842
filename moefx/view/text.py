"""Graphs as text: one line per node with shape, dtype, module path, source line and the pass that made it; and their
difference.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import fx

from moefx.graph.edit import is_backward, module_path, source_line, value

_SHORT = {
    "float32": "f32",
    "float64": "f64",
    "float16": "f16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint8": "u8",
    "bool": "b8",
    "float8_e4m3fn": "e4m3",
    "float8_e5m2": "e5m2",
    "float8_e8m0fnu": "e8m0",
}


def render(graph: fx.Graph | fx.GraphModule, *, origin: bool = True, lines: bool = True) -> str:
    """A graph as readable text.

    Args:
        origin: add module path and the passes that made or changed a node.
        lines: add the user's `file:line` (leave out for text that is compared across machines).
    """
    g = graph.graph if isinstance(graph, fx.GraphModule) else graph
    return "\n".join(_line(n, origin, lines) for n in g.nodes) + "\n"


def diff(before: fx.Graph | fx.GraphModule, after: fx.Graph | fx.GraphModule, *, context: int = 1) -> str:
    """What changed between two stages, as a unified diff of their texts; empty when nothing did."""
    a, b = (render(g, lines=False).splitlines() for g in (before, after))
    return "\n".join(difflib.unified_diff(a, b, "before", "after", lineterm="", n=context))


def typed(val: Any) -> str:
    """`f32[64, 8]` of a tensor value; tuples in parentheses; '' when unknown."""
    if isinstance(val, torch.Tensor):
        name = str(val.dtype).removeprefix("torch.")
        return f"{_SHORT.get(name, name)}[{', '.join(str(s) for s in val.shape)}]"
    if isinstance(val, tuple | list):
        return f"({', '.join(typed(v) for v in val)})"
    return type(val).__name__ if isinstance(val, torch.SymInt) else ""


def target_name(node: fx.Node) -> str:
    """`moefx.grouped_mm`, `aten.mm`, `torch.softmax`, `.view`: an op's name without overloads and addresses."""
    t: Any = node.target
    if node.op == "call_method":
        return f".{t}"
    if isinstance(t, torch._ops.OpOverload):
        name = f"{t.namespace}.{t._opname}"
        return name if t._overloadname == "default" else f"{name}.{t._overloadname}"
    if isinstance(t, torch._ops.OpOverloadPacket):
        return str(t)
    if isinstance(t, str):
        return t
    module = (getattr(t, "__module__", None) or "torch").split(".")[0].lstrip("_")
    return f"{module}.{getattr(t, '__name__', t)}"


def _line(node: fx.Node, origin: bool, lines: bool) -> str:
    if node.op == "placeholder":
        text = f"%{node.name}: {typed(value(node))} = input {node.meta.get('moefx_name', node.target)}"
    elif node.op == "output":
        return f"return {_args(node.args)}"
    else:
        call = ", ".join([*map(_arg, node.args), *(f"{k}={_arg(v)}" for k, v in node.kwargs.items())])
        kind = typed(value(node))
        text = f"%{node.name}{': ' + kind if kind else ''} = {target_name(node)}({call})"
    notes = []
    if origin:
        if is_backward(node):
            notes.append("backward")
        if path := module_path(node):
            notes.append(path)
        if made := node.meta.get("moefx_passes"):
            notes.append(f"[{', '.join(made)}]")
    if lines and (line := source_line(node)):
        notes.append(line)
    return text + (f"  # {'  '.join(notes)}" if notes else "")


def _args(args: Any) -> str:
    return ", ".join(_arg(a) for a in args)


def _arg(a: Any) -> str:
    if isinstance(a, fx.Node):
        return f"%{a.name}"
    if isinstance(a, tuple | list):
        return f"[{_args(a)}]"
    if isinstance(a, slice):
        return f"slice({_args((a.start, a.stop, a.step))})"
    if isinstance(a, dict):
        return "{" + ", ".join(f"{k!r}: {_arg(v)}" for k, v in a.items()) + "}"
    return getattr(a, "__name__", "function") if callable(a) and not isinstance(a, type) else repr(a)
