"""The one door to torch's private compiler API: Dynamo capture, the AOT joint export, partitioners, Inductor.

Nothing else in moefx imports `torch._dynamo`, `torch._functorch`, `torch._inductor`, `torch._guards` or
`torch._subclasses`, so a torch upgrade is a change to this file. Run with torch 2.11.0 and 2.13.0. The compiler is
imported where it is first used: it takes as long as torch itself, and the optimizers do without it.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import logging
import operator
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointPolicy

Tensor = torch.Tensor
DynamicDims = Mapping[str, Sequence[int]]
# Held while a graph is made: Dynamo, AOT and the registries of transformers keep their state per process.
compiling = threading.RLock()
# Calls that a forward may make to tell people something, all of which return None: no part of a graph.
_TELLING = (
    print,
    warnings.warn,
    *(getattr(logging.Logger, n) for n in ("debug", "info", "warning", "error", "exception", "critical", "log")),
)
_SIDE_EFFECTS = re.compile(r"side effects happened in the model.forward.*?(\[.*\])", re.DOTALL)


# --- stage 2: forward capture
# ---------------------------------------------------------------------------------------------------


def capture_errors() -> tuple[type[Exception], ...]:
    """What Dynamo raises of a forward that it cannot capture."""
    from torch._dynamo.exc import TorchDynamoException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    # Questions about sizes that only values tell mostly come wrapped in Dynamo's errors, not from `tensor.tolist()`.
    return TorchDynamoException, GuardOnDataDependentSymNode


def capture_forward(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """Dynamo's whole-graph capture of `module(*args, **kwargs)`: torch-level nodes, original parameter names.

    `meta["side_effects"]` lists the Python objects that the forward changes; a graph does not repeat that.
    Dynamo's own errors come through (`capture_errors`); the caller words them for users.
    """
    from torch._dynamo.functional_export import dynamo_graph_capture_for_export

    config: Any = torch._dynamo.config
    telling = "ignore_logging_functions" if hasattr(config, "ignore_logging_functions") else "ignore_logger_methods"
    settings = config.patch(
        # Data-dependent sizes (nonzero, where) become unbacked symbols instead of graph breaks.
        capture_dynamic_output_shape_ops=True,
        capture_scalar_outputs=True,
        # A size or number that differed in an earlier capture stays a constant: variants are keyed by it.
        automatic_dynamic_shapes=False,
        specialize_int=True,
        specialize_float=True,
        # A checkpointed region may change Python state (transformers' recorders of router logits do); it is not run
        # again in the backward, only its nodes are.
        skip_fwd_side_effects_in_bwd_under_checkpoint=True,
        **{telling: {*_TELLING, *getattr(config, telling)}},
    )
    with settings, _globals_kept(module) as scope:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gm: fx.GraphModule = dynamo_graph_capture_for_export(module)(*args, **kwargs)
        halves: list[Any] = [gm._dynamo_bytecode_flatten, gm._dynamo_bytecode_unflatten]
        for half in halves:
            # Alone what the code names: among the other globals there may be models. torch 2.11 looks builtins (`type`)
            # up there too, and does not find them.
            named = _globals_of(half.out.graph_capture_output.bytecode)
            half.f_globals = {name: v for name, v in {**vars(builtins), **scope}.items() if name in named}
    gm.meta["side_effects"] = []
    for w in caught:
        if (found := _SIDE_EFFECTS.search(str(w.message))) is not None:
            gm.meta["side_effects"] += ast.literal_eval(found[1])
        else:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    return gm


@contextlib.contextmanager
def _globals_kept(module: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """The globals of the module's forward. What a capture adds to them is taken out at the end.

    Dynamo names its graph there, which leads to the model. It takes its names out when the code that it compiled dies,
    but a capture makes no such code: the model would live as long as the process.
    """
    from torch._dynamo.convert_frame import get_traced_fn
    from torch._dynamo.utils import CleanupHook

    scope: dict[str, Any] = get_traced_fn(module)[0].__globals__
    before = set(scope)
    try:
        yield scope
    finally:
        for name in [n for n in scope if n not in before and n.startswith("__")]:
            CleanupHook(scope, name)()


def _globals_of(code: CodeType) -> set[str]:
    """Names that some code, or a function made in it, may look up."""
    return {*code.co_names}.union(*(_globals_of(c) for c in code.co_consts if isinstance(c, CodeType)))


def flat_inputs(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Values of a captured graph's placeholders for a call: parameters and buffers of the model, and the call's
    tensors.
    """
    flatten: Any = gm._dynamo_bytecode_flatten
    return list(flatten(*args, *kwargs.values()))


def _marked(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """What the model returns when the outputs of its graph are these marks."""
    marks = [torch.empty(()) for _ in gm.graph.output_node().args[0]]  # type: ignore[union-attr]
    unflatten: Any = gm._dynamo_bytecode_unflatten
    returned = unflatten(tuple(marks), (*args, *kwargs.values()))
    return returned, marks


def output_places(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, int]:
    """Which output of a captured graph each leaf of what the model returns is: {position: output}, in order.

    A graph returns a tensor once, however often the model does. Leaves that no output is (inputs, constants) have none.
    """
    returned, marks = _marked(gm, args, kwargs)
    position = {id(mark): i for i, mark in enumerate(marks)}
    return {i: position[id(v)] for i, v in enumerate(pytree.tree_leaves(returned)) if id(v) in position}


def output_names(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    """Positions of a captured graph's outputs by the keys under which the model returns them at its top level."""
    returned, marks = _marked(gm, args, kwargs)
    position = {id(mark): i for i, mark in enumerate(marks)}
    named = returned if isinstance(returned, Mapping) else getattr(returned, "__dict__", {})
    if isinstance(returned, tuple) and hasattr(returned, "_fields"):
        named = dict(zip(returned._fields, returned, strict=True))
    return {str(key): position[id(v)] for key, v in named.items() if id(v) in position}


def return_once(gm: fx.GraphModule, repeated: frozenset[int], extras: int) -> None:
    """Let a captured graph return (what the model returns, tuple of the last `extras` outputs).

    Leaves of the former at the positions `repeated` become None.
    """
    unflatten: Any = gm._dynamo_bytecode_unflatten

    def both(outputs: Any, inputs: Any) -> Any:
        own = len(outputs) - extras
        leaves, spec = pytree.tree_flatten(unflatten(outputs[:own], inputs))
        kept = [None if i in repeated else v for i, v in enumerate(leaves)]
        return pytree.tree_unflatten(kept, spec), tuple(outputs[own:])

    codegen: Any = gm.graph._codegen
    codegen.dynamo_bytecode_unflatten = both
    gm._dynamo_bytecode_unflatten = both  # type: ignore[assignment]


@contextlib.contextmanager
def dynamic_dims(tensors: Mapping[str, Tensor], dims: DynamicDims) -> Iterator[None]:
    """While active, the given axes of the given tensors are captured as symbols; marks are taken off at the end."""
    before = [(tensors[name], set(vars(tensors[name]))) for name in dims]
    try:
        for name, axes in dims.items():
            for axis in axes:
                torch._dynamo.mark_dynamic(tensors[name], axis)
        yield
    finally:
        for t, kept in before:
            for attr in set(vars(t)) - kept:
                delattr(t, attr)


# --- stage 4: joint graph
# -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """What one graph input or output stands for: `kind` is param, buffer, input, tangent (inputs); mutation, output,
    grad (outputs).

    `key` is the dotted name of a parameter or buffer, or the position of a plain input or output.
    """

    kind: str
    key: str | int


@dataclass
class ExportedGraph:
    """A flat ATen graph with the meaning of each placeholder and output, and what AOT found about aliases."""

    gm: fx.GraphModule
    inputs: list[Slot]
    outputs: list[Slot | None]
    fake_mode: FakeTensorMode
    out_spec: pytree.TreeSpec
    aliases: dict[int, str]  # plain outputs that are views or inputs: {position: AOT's name for it}
    input_outputs: dict[int, int]  # plain outputs that are exactly an input: {position: index into `inputs`}


def export_graph(
    gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], *, grad: bool, inductor: bool
) -> ExportedGraph:
    """AOT export of a captured graph: forward and backward together (`grad`), or the forward alone."""
    from torch._functorch.aot_autograd import aot_export_joint_with_descriptors

    fake_mode = gm.meta["fake_mode"]
    table = None
    with contextlib.ExitStack() as stack:
        context = TracingContext(fake_mode)
        # Dynamo's symbols for the same tensors; fresh ones would have no source that a guard could name.
        context.tensor_to_context = gm.meta["tracing_context"].tensor_to_context
        stack.enter_context(tracing(context))
        stack.enter_context(random_of_eager())
        stack.enter_context(torch.set_grad_enabled(grad))
        if inductor:
            from torch._inductor.decomposition import select_decomp_table

            table = select_decomp_table()
        joint = aot_export_joint_with_descriptors(stack, gm, args, kwargs, decompositions=table)
    out = joint.graph_module
    out.graph.set_codegen(fx.graph.CodeGen())
    placeholders = out.graph.find_nodes(op="placeholder")
    inputs = [_slot(n.meta["desc"]) for n in placeholders]
    node = out.graph.output_node()
    values = pytree.tree_leaves(node.args[0], is_leaf=lambda x: x is None)
    outputs = [None if d is None else _slot(d) for d in node.meta["desc"]]
    # Arguments that are no tensors are constants in the graph: their placeholders, and the gradients they would have,
    # only stand in the way of code generation. Parameters and buffers that nothing reads are no inputs either: among
    # them are those of single experts whose stack is an input.
    primals = sum(s.kind != "tangent" for s in inputs)
    first = len(values) - primals if grad else len(values)
    dropped = {
        i
        for i, (n, s) in enumerate(zip(placeholders, inputs, strict=True))
        if not n.users
        and (
            not isinstance(n.meta.get("val"), Tensor)
            or (s.kind in ("param", "buffer") and not (grad and values[first + i] is not None))
        )
    }
    kept = [i for i in range(len(placeholders)) if i not in dropped]
    keep = [i for i in range(len(values)) if i - first not in dropped]
    for i in dropped:
        out.graph.erase_node(placeholders[i])
    node.args = (tuple(values[i] for i in keep),)
    node.meta["desc"] = [node.meta["desc"][i] for i in keep]
    out.recompile()
    meta = joint._aot_state.fw_metadata
    odd = {i: o for i, o in enumerate(meta.output_info) if o.output_type.name != "non_alias"}
    same = {i: o.base_idx for i, o in odd.items() if o.output_type.name == "is_input" and o.base_idx is not None}
    return ExportedGraph(
        out,
        [inputs[i] for i in kept],
        [outputs[i] for i in keep],
        fake_mode,
        joint.out_spec,
        {i: o.output_type.name for i, o in odd.items()},
        {i: kept.index(int(b)) for i, b in same.items()},
    )


def _slot(desc: Any) -> Slot:
    """Translate AOT's descriptor objects; an exotic one keeps its class name as kind, for the caller to refuse."""
    kind = type(desc).__name__
    if kind in ("ParamAOTInput", "BufferAOTInput"):
        return Slot("param" if kind[0] == "P" else "buffer", desc.target)
    if kind == "PlainAOTInput":
        return Slot("input", desc.idx)
    if kind == "PlainAOTOutput":
        return Slot("output", desc.idx)
    if kind == "TangentAOTInput":
        return Slot("tangent", _slot(desc.output).key)
    if kind == "InputMutationAOTOutput":
        inner = _slot(desc.mutated_input)
        return Slot(f"mutation:{inner.kind}", inner.key)
    if kind == "GradAOTOutput":
        inner = _slot(desc.grad_of)
        return Slot("grad", inner.key)
    return Slot(kind, repr(desc))


def trace_aten(fn: Callable[..., Any], values: Sequence[Any]) -> fx.GraphModule:
    """`fn` on fake values as a graph of ATen nodes, in Inductor's decomposition."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = detect_fake_mode(list(values))
    with contextlib.ExitStack() as stack:
        stack.enter_context(disable_autocast())
        stack.enter_context(torch.no_grad())
        if mode is not None:
            stack.enter_context(mode)
        return make_fx(fn, decomposition_table=select_decomp_table())(*values)


# --- stage 6: partition and code generation
# ---------------------------------------------------------------------------------------


def partition(gm: fx.GraphModule, fwd_outputs: int, *, recompute: bool) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split a joint graph. `recompute` lets the min-cut partitioner trade cheap recomputation for saved bytes.

    Only worth it when a code generator fuses the recomputed pointwise work; plain execution would pay for it.
    """
    from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition

    fn = min_cut_rematerialization_partition if recompute else default_partition
    inputs = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    fake_mode = detect_fake_mode(inputs)
    context = tracing(TracingContext(fake_mode)) if fake_mode is not None else contextlib.nullcontext()
    # Draws of checkpointed regions are repeated from the generator's state, which crosses as a tensor on every device
    # with the random stream of eager PyTorch. Other draws are saved.
    repeated = any("recompute" in n.meta and "moefx_checkpoint" in (n.meta.get("custom") or {}) for n in gm.graph.nodes)
    stream = random_of_eager() if repeated else contextlib.nullcontext()
    with context, torch.no_grad(), disable_autocast(), stream:
        fw, bw = fn(gm, inputs, num_fwd_outputs=fwd_outputs, static_lifetime_input_indices=[])
    if fake_mode is not None:
        _settle_random_states(fw, bw, fake_mode)
    return fw, bw


def _settle_random_states(fw: fx.GraphModule, bw: fx.GraphModule, fake_mode: FakeTensorMode) -> None:
    """Give the random states that recomputed draws start from one name in both halves, as other saved values have, and
    a fixed size: the partitioner takes it for a symbol.

    It appends them to the forward's outputs in the order in which it numbers the backward's inputs.
    """
    results: Any = fw.graph.output_node().args[0]
    save = torch._prims.rng_prims.run_and_save_rng_state
    states = [n for n in results if isinstance(n, fx.Node) and n.op == "call_function" and n.target is operator.getitem]
    states = [n for n in states if n.args[0].target is save and n.args[1] == 0]  # type: ignore[union-attr]
    inputs = [n for n in bw.graph.find_nodes(op="placeholder") if n.name.startswith("rng_state_output_")]
    for state, read in zip(states, sorted(inputs, key=lambda n: int(n.name.rpartition("_")[2])), strict=True):
        state.name = read.name
        with fake_mode:
            val = torch.empty([size_hint(s) for s in state.meta["val"].shape], dtype=state.meta["val"].dtype)
        state.meta["val"] = read.meta["val"] = val
    if states:
        fw.recompile()


def recompute(*nodes: fx.Node, region: int = 0) -> None:
    """Let the partitioners compute these forward nodes again in the backward, whatever that costs.

    What a later region reads of an earlier one (a smaller number) is saved.
    """
    for n in nodes:
        n.meta["recompute"], n.meta["ac_graph_id"] = CheckpointPolicy.MUST_RECOMPUTE, region


def keep(*nodes: fx.Node) -> None:
    """Let the partitioners save these forward nodes if the backward needs them."""
    for n in nodes:
        n.meta["recompute"], n.meta["ac_graph_id"] = CheckpointPolicy.MUST_SAVE, 0


def is_recomputed(node: fx.Node) -> bool:
    """Whether `recompute` was asked for this node."""
    return node.meta.get("recompute") == CheckpointPolicy.MUST_RECOMPUTE


def inductor_compile(
    gm: fx.GraphModule, *, backward: bool, inference: bool = False
) -> Callable[[list[Any]], Sequence[Any]]:
    """Compile a flat ATen graph with Inductor. The callable takes one list, empties it, and returns a sequence."""
    from torch._inductor.compile_fx import compile_fx_inner

    inputs = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    out = gm.graph.output_node()
    # All outputs keep their strides: saved tensors cross to the backward, whose graph was traced with these layouts.
    out.meta["user_visible_output_idxs"] = [i for i, a in enumerate(out.args[0]) if isinstance(a, fx.Node)]  # type: ignore[arg-type]
    fake_mode = detect_fake_mode(inputs)
    context = tracing(TracingContext(fake_mode)) if fake_mode is not None else contextlib.nullcontext()
    with context, torch.no_grad(), disable_autocast(), random_of_eager():
        compiled = compile_fx_inner(gm, inputs, is_backward=backward, is_inference=inference)
    return compiled


def boxed(gm: fx.GraphModule) -> Callable[[list[Any]], Sequence[Any]]:
    """Plain execution of a flat graph. The list of inputs is emptied, so that saved tensors die at their last use."""
    gm.graph.set_codegen(fx.graph._BoxedCodeGen())
    gm.recompile()
    run: Callable[[list[Any]], Sequence[Any]] = gm.forward
    return run


def random_of_eager() -> contextlib.AbstractContextManager[None]:
    """Draw the random stream of eager PyTorch in what Inductor compiles."""
    import torch._inductor.config as inductor

    patched: contextlib.AbstractContextManager[None] = inductor.patch(fallback_random=True)
    return patched


def surely(condition: Any) -> bool:
    """Whether a condition on sizes is true for all values of their symbols. Adds no guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


@contextlib.contextmanager
def disable_autocast() -> Iterator[None]:
    """Run operations in the dtypes of their operands; of a traced graph, the casts are nodes in it already."""
    with torch._C._DisableAutocast():
        yield


def layouts_unchanged(tensors: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], bool]:
    """A check that tensors have the types, dtypes, devices, sizes and strides that these have now.

    What it is true of is so; a surrounding mode, as autocast, may make it false. It takes 0.05 us a tensor.
    """
    # A list for each tensor, whatever the stub says.
    sizes: Any = [list(t.shape) for t in tensors]
    strides: Any = [list(t.stride()) for t in tensors]
    guards = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    return lambda now: bool(guards.check(*now))


def functorch_active() -> bool:
    """Whether a transform of torch.func is running."""
    return bool(torch._C._are_functorch_transforms_active())


# --- fake tensors
# ---------------------------------------------------------------------------------------------------------------


def fake_mode_of(values: Sequence[Any]) -> FakeTensorMode | None:
    """The fake mode that the given values live in, if any."""
    mode: FakeTensorMode | None = detect_fake_mode(list(values))
    return mode


@contextlib.contextmanager
def no_fake() -> Iterator[None]:
    """Leave a surrounding fake mode, for code that needs real tensors."""
    with unset_fake_temporarily():
        yield


def guard_expression(fake_mode: FakeTensorMode, fakes: Sequence[Any]) -> str | None:
    """The condition on input sizes under which a graph with symbolic sizes is valid, or None when it has none."""
    env = fake_mode.shape_env
    return None if env is None else env.produce_guards_expression(list(fakes), ignore_static=False)


def guards_hold(fake_mode: FakeTensorMode, expression: str | None, values: Sequence[Any]) -> bool:
    """Evaluate `guard_expression` on real inputs."""
    env = fake_mode.shape_env
    return expression is None or env is None or bool(env.evaluate_guards_expression(expression, list(values)))


def is_fixed(size: int | torch.SymInt) -> bool:
    """Whether a size is a number, also one that was symbolic until something compared it with a number."""
    return isinstance(size, int) or bool(size.node.shape_env.replace(size.node.expr).is_number)


def size_hint(size: int | torch.SymInt) -> int:
    """A size as a number: of a symbolic one, that of the example inputs."""
    return size if isinstance(size, int) else int(size.node.hint)


def is_symbol(value: object) -> bool:
    """Whether a value is a symbolic size."""
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)


getitem = operator.getitem


@contextlib.contextmanager
def propagating(fake_mode: FakeTensorMode | None) -> Iterator[None]:
    """Compute fake values of rewritten nodes in a graph's own fake mode; new tensors made inside are fake too."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if fake_mode is not None:
            stack.enter_context(fake_mode)
        yield
