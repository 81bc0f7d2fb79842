"""Stages 4 and 6: the training graph (forward and backward in one), and its split into two callables.

A `Joint` is flat: placeholders are parameters, buffers, inputs, then one tangent per differentiable output; outputs are
buffer updates, the model's own outputs, then one gradient per input. Each placeholder and output says what it is by a
`Slot`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from . import compat
from .capture import Captured
from .errors import CaptureError, first_line
from .graph.checkpointed import recompute_checkpointed
from .graph.edit import copy_graph, size_node, source_line

Tensor = torch.Tensor
Compiler = Callable[[fx.GraphModule], Callable[[list[Any]], Sequence[Any]]]


@dataclass
class Joint:
    """A training graph (or, with no tangents, a forward-only graph) that training-level passes edit in place."""

    gm: fx.GraphModule
    inputs: list[compat.Slot]
    outputs: list[compat.Slot | None]
    out_spec: pytree.TreeSpec
    fake_mode: Any
    passthrough: dict[int, int]  # plain outputs that are an input unchanged: {output position: index into `inputs`}
    grad: bool
    repeated: dict[int, int] = field(default_factory=dict)  # output that is an earlier one again: {position: first}
    extras: list[tuple[str, str]] = field(default_factory=list)  # kind and name of the outputs behind the model's own

    @property
    def graph(self) -> fx.Graph:
        """The FX graph that training-level passes edit in place."""
        return self.gm.graph

    @property
    def fwd_outputs(self) -> int:
        """How many leading graph outputs belong to the forward; the rest are gradients."""
        primals = sum(s.kind != "tangent" for s in self.inputs)
        return len(self.outputs) - (primals if self.grad else 0)


def trace_joint(captured: Captured, *, grad: bool, codegen: str) -> Joint:
    """Trace forward and backward of a captured model into one ATen graph (forward alone without `grad`).

    Parameters keep their dotted names; nodes carry module path, source line and, in the backward, `partitioner_tag`.
    Raises `CaptureError` for aliasing or mutation that the runtime does not reproduce.
    """
    inductor = codegen == "inductor"
    extras = list(captured.graph.output_node().meta.get("moefx_extras", ()))
    places = compat.output_places(captured.gm, captured.args, captured.kwargs)
    first: dict[int, int] = {}
    repeated = {at: first[i] for at, i in places.items() if first.setdefault(i, at) != at}
    compat.return_once(captured.gm, frozenset(repeated), len(extras))
    exported = _export(captured, grad, inductor)
    views = [places[i] for i in exported.aliases if i not in exported.input_outputs and i in places]
    if views:
        # A returned view of another tensor would have to be rebuilt from its base at run time. A copy has no base.
        _clone_outputs(captured.gm, views)
        exported = _export(captured, grad, inductor)
    joint = Joint(
        exported.gm,
        exported.inputs,
        exported.outputs,
        exported.out_spec.child(0),
        exported.fake_mode,
        exported.input_outputs,
        grad,
        repeated,
        extras,
    )
    _refuse_unknown(joint)
    for node in joint.graph.nodes:
        if "nn_module_stack" not in node.meta and "fwd_nn_module_stack" in node.meta:
            node.meta["nn_module_stack"] = node.meta["fwd_nn_module_stack"]
    return joint


def _export(captured: Captured, grad: bool, inductor: bool) -> compat.ExportedGraph:
    try:
        with captured.holder.as_model():
            return compat.export_graph(captured.gm, captured.args, captured.kwargs, grad=grad, inductor=inductor)
    except Exception as e:
        first = first_line(e)
        _refuse_numbers(captured, e)
        raise CaptureError(
            "the captured model could not be traced into a training graph",
            why=f"{type(e).__name__}: {first}",
            todo="check that forward and backward run without moefx (a tensor changed in place that the backward needs "
            "fails there too), and that outputs are tensors and plain containers (use_cache=False: no cache)",
        ) from e


def _refuse_numbers(captured: Captured, e: Exception) -> None:
    """A clearer error for a model that could not be traced and returns Python numbers read off tensors."""
    returned: Any = captured.graph.output_node().args[0]
    for node in returned:
        if isinstance(node, fx.Node) and node.target is torch.scalar_tensor:  # Dynamo's way to hand a float over
            raise CaptureError(
                "the model returns a Python number that it reads off a tensor",
                where=source_line(node) or None,
                why="a graph computes tensors; the number would be known to the process alone, after it ran",
                todo="return the tensor, as loss.detach() instead of loss.item(), and read it outside of forward",
            ) from e


def _clone_outputs(gm: fx.GraphModule, positions: list[int]) -> None:
    """Positions are those of the graph's own outputs."""
    out = gm.graph.output_node()
    args = list(out.args[0])  # type: ignore[arg-type]
    for i in positions:
        with gm.graph.inserting_before(out):
            node = args[i]
            assert isinstance(node, fx.Node)
            args[i] = gm.graph.call_method("clone", (node,))
            args[i].meta = {k: v for k, v in node.meta.items() if k != "tensor_dict"}
    out.args = (tuple(args),)
    gm.recompile()


def _refuse_unknown(joint: Joint) -> None:
    def value(node: fx.Node) -> Any:
        return getattr(joint.gm, str(node.target), None)

    constants = [n for n in joint.graph.find_nodes(op="get_attr") if isinstance(value(n), torch.nn.Parameter)]
    if constants:
        raise CaptureError(
            f"the captured model reads {len(constants)} parameter(s) as constants, which would never be trained",
            why="its forward reaches them through something else than the model: a closure, a global, a list",
            todo="register them (nn.Module, nn.ParameterList) and read them through `self`",
        )
    known_in = {"param", "buffer", "input", "tangent"}
    known_out = {"output", "grad", "mutation:buffer", "mutation:input", "mutation:param"}
    odd = [s for s in joint.inputs if s.kind not in known_in] + [
        s for s in joint.outputs if s and s.kind not in known_out
    ]
    written = [s.key for s in joint.inputs if s.kind == "tangent" and not isinstance(s.key, int)]
    if written:
        raise CaptureError(
            f"the forward writes into {written[0]}, which receives gradients",
            todo="update it in the training loop, or let it require no gradient",
        )
    if odd:
        raise CaptureError(
            f"the model's calling convention needs {odd[0].kind}, which moefx does not run",
            why=f"{odd[0].key}",
            todo="tensor subclasses, effect tokens and functionalised random states are not supported in a region",
        )


def split(joint: Joint, *, codegen: str) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Stage 6, first half: forward and backward graph modules. With Inductor, cheap work is recomputed rather than
    saved.
    """
    copy = copy_graph(joint.gm)
    recompute_checkpointed(copy.graph)
    fw, bw = compat.partition(copy, joint.fwd_outputs, recompute=codegen == "inductor")
    _carry_sizes(fw, bw)
    return fw, bw


def _carry_sizes(fw: fx.GraphModule, bw: fx.GraphModule) -> None:
    """Let the forward hand every symbolic size over that the backward's inputs are made of.

    A saved tensor may be batch * sequence long; a code generator needs both numbers, which no other input may show.
    """
    needed: dict[Any, None] = {}
    carried: set[Any] = set()
    for node in bw.graph.find_nodes(op="placeholder"):
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt):
            carried.add(val.node.expr)
        for s in (*val.shape, *val.stride()) if isinstance(val, Tensor) else ():
            needed |= dict.fromkeys(sorted(s.node.expr.free_symbols, key=str) if isinstance(s, torch.SymInt) else ())
    out, first = fw.graph.output_node(), next(iter(bw.graph.nodes))
    for symbol in [s for s in needed if s not in carried]:
        found = size_node(fw.graph, symbol)
        if found is None:
            continue
        source, axis, val = found
        with fw.graph.inserting_before(out):
            size = fw.graph.call_function(torch.ops.aten.sym_size.int, (source, axis))
        with bw.graph.inserting_before(first):
            handed = bw.graph.placeholder(size.name)
        size.meta, handed.meta = {"val": val}, {"val": val}
        if handed.name != size.name:
            size.name = handed.name  # both graphs know a saved value by one name
        out.args = ((*out.args[0], size),)  # type: ignore[misc]
    fw.recompile()
    bw.recompile()


def compiler(
    codegen: str,
    *,
    backward: bool = False,
    inference: bool = False,
    progress: Callable[[fx.GraphModule, float], None] | None = None,
) -> Compiler:
    """Stage 6, second half: a function that turns a flat graph module into a callable over one list, which it empties.

    `progress(graph_module, seconds)` is called after each compilation.
    """

    def compile_one(gm: fx.GraphModule) -> Callable[[list[Any]], Sequence[Any]]:
        start = time.perf_counter()
        run = (
            compat.inductor_compile(gm, backward=backward, inference=inference)
            if codegen == "inductor"
            else compat.boxed(gm)
        )
        if progress is not None:
            progress(gm, time.perf_counter() - start)
        return run

    return compile_one
