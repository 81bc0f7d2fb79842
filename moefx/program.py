"""The runtime of one compiled variant: flat callables for forward and backward behind one autograd function.

torch's own AOT runtime is not used because it fills the tangents of unused outputs with zeros. Here a missing tangent
stays missing and selects a backward that was specialised to it (`tangents.prune_tangents`); each is compiled when first
needed and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from . import compat
from .delayed import keys_of, refuse_recompute
from .errors import InputError
from .graph.casts import DELAYED, QUANTIZE, is_weight
from .graph.edit import module_path
from .joint import Compiler, Joint
from .raising.replay import Assembly
from .tangents import like_traced, prune_tangents
from .weights import KeptCodes, WeightCodes

Tensor = torch.Tensor
VIEWS = frozenset({torch.ops.aten.permute.default, torch.ops.aten.transpose.int, torch.ops.aten.view.default})
Runner = Callable[[list[Any]], Sequence[Any]]
Push = Callable[[Tensor], None]
# Inputs that are made of several parameters at every call: name -> (path of the module that holds them, how).
Assemblies = dict[str, tuple[str, Assembly]]


class Program:
    """Runs a joint graph that was split into `fw` and (for training) `bw`.

    Attributes:
        assemblies: inputs called by their names are built from parameters.
        inputs: what each forward argument is (`Slot`s of parameters, buffers, plain inputs), in calling order.
        fw_graph, bw_graph: the graph modules before code generation.
        fw_weights, bw_weights: what makes the codes of weights that they take as inputs; None if they take none.
        saved_bytes: bytes kept for the backward besides parameters, buffers and inputs; None where sizes are symbolic.
    """

    def __init__(
        self,
        joint: Joint,
        fw: fx.GraphModule,
        bw: fx.GraphModule | None,
        compile_fw: Compiler,
        compile_bw: Compiler,
        assemblies: Assemblies | None = None,
        weights: Sequence[fx.GraphModule | None] = (None, None),
    ) -> None:
        self.assemblies = assemblies or {}
        placeholders = list(joint.graph.find_nodes(op="placeholder"))
        names = [n.name for n, s in zip(placeholders, joint.inputs, strict=True) if s.kind != "tangent"]
        self.inputs = [s for s in joint.inputs if s.kind != "tangent"]
        self.out_spec, self.passthrough, self.extras = joint.out_spec, joint.passthrough, joint.extras
        self.repeated = joint.repeated
        self.fw_graph, self.bw_graph, self._compile_bw = fw, bw, compile_bw

        outs = joint.outputs[: joint.fwd_outputs]
        self.mutations = [(i, s) for i, s in enumerate(outs) if s is not None and s.kind.startswith("mutation")]
        self.results = [i for i, s in enumerate(outs) if s is not None and s.kind == "output"]
        # The history of delayed scaling: an input, and the magnitudes of this step as an output of each half.
        self.history_keys = keys_of(joint.graph)
        self.history_input = next((i for i, s in enumerate(self.inputs) if s.kind == "state"), None)
        self.history_output = next((i for i, s in enumerate(outs) if s is not None and s.kind == "state"), None)
        self.count = len(outs)

        position = {name: i for i, name in enumerate(names)}
        self.fw_order = [position.get(n.name, n.name) for n in fw.graph.find_nodes(op="placeholder")]
        fw_out: Sequence[Any] = fw.graph.output_node().args[0]  # type: ignore[assignment]
        self.saved = [n.name for n in fw_out[self.count :]]
        mutated = {(s.kind.split(":")[1], s.key) for _, s in self.mutations}
        # A buffer that the forward updates and the backward reads must be kept as it was before the update.
        self.clone_inputs = [
            i for i, s in enumerate(self.inputs) if (s.kind, s.key) in mutated and names[i] in set(self.saved)
        ]
        self.saved_bytes = _bytes(fw_out[self.count :])
        self.saved_by_layer = saved_by_layer(fw_out[self.count :])

        tangents = [(n, int(s.key)) for n, s in zip(placeholders, joint.inputs, strict=True) if s.kind == "tangent"]
        self.tangents = [(n.name, key, n.meta["val"]) for n, key in tangents]
        self.differentiable = {key for _, key, _ in self.tangents}
        # Inputs whose gradient is None in every variant are kept out of autograd, as untouched inputs are in eager
        # execution.
        grads: Sequence[Any] = joint.graph.output_node().args[0][self.count :]  # type: ignore[index, assignment]
        self.no_grad_inputs = [i for i, g in enumerate(grads) if g is None] if joint.grad else []
        self.fw = compile_fw(fw)
        self.position = position
        self.fw_weights, self.bw_weights = (None if gm is None else WeightCodes(gm, compile_fw(gm)) for gm in weights)
        self._backwards: dict[frozenset[str], tuple[Runner, list[str]]] = {}

    @property
    def backward_variants(self) -> list[list[int]]:
        """For each backward compiled so far, the outputs whose tangents it expects."""
        return [sorted(key for name, key, _ in self.tangents if name not in absent) for absent in self._backwards]

    def __call__(self, primals: Sequence[Any], push: Push | None = None, kept: KeptCodes | None = None) -> Any:
        """Run on values in `inputs` order; returns the graph's outputs, which `finish` puts in the model's structure.

        `push` takes the magnitudes of each half when there is a history of them; `kept` holds codes of weights that
        calls share.
        """
        if compat.functorch_active():
            raise InputError(
                "an optimized model was called inside a transform of torch.func (grad, vjp, vmap, jvp, ...)",
                why="compiled graphs have no rules for these transforms",
                todo="use loss.backward() or torch.autograd.grad; transform opt.original otherwise",
            )
        primals = list(primals)  # the caller's list keeps the live tensors, some of which `finish` returns
        for i in self.clone_inputs:
            primals[i] = primals[i].detach().clone()
        codes = {}
        if self.fw_weights is not None:
            codes = self.fw_weights(lambda name: primals[self.position[name]], kept)
        if self.bw_graph is None or not torch.is_grad_enabled():
            with torch.no_grad(), compat.disable_autocast():
                outs: Sequence[Any] = self.fw(self._arguments(primals, codes))
        else:
            if self.history_output is not None:
                refuse_recompute()
            for i in self.no_grad_inputs:
                if isinstance(primals[i], Tensor) and primals[i].requires_grad:
                    primals[i] = primals[i].detach()
            anchors = [_anchor(p) for p in primals if isinstance(p, Tensor) and p.requires_grad]
            outs = _Run.apply(self, push, kept, codes, anchors, *primals)  # type: ignore[no-untyped-call]
            if push is not None and self.history_output is not None:
                push(outs[self.history_output])
        return outs

    def _arguments(self, primals: Sequence[Any], codes: dict[str, Tensor]) -> list[Any]:
        return [primals[i] if isinstance(i, int) else codes[i] for i in self.fw_order]

    def finish(self, outs: Sequence[Any], primals: Sequence[Any], targets: Callable[[Any], Tensor]) -> Any:
        """Write buffer updates back and rebuild the output structure. `primals` as `__call__` got them."""
        with torch.no_grad():
            for i, slot in self.mutations:
                targets(slot).copy_(outs[i])
        values = [outs[i] for i in self.results]
        for position, index in self.passthrough.items():
            values[position] = primals[index]
        for position, first in self.repeated.items():
            values[position] = values[first]
        return pytree.tree_unflatten(values[: len(values) - len(self.extras)], self.out_spec)

    def returned_extras(self, outs: Sequence[Any]) -> dict[tuple[str, str], Tensor]:
        """Values of losses, metrics and counts by kind and name."""
        behind = self.results[len(self.results) - len(self.extras) :]
        return {extra: outs[i].detach() for extra, i in zip(self.extras, behind, strict=True)}

    def backward(
        self, saved: dict[str, Any], tangents: Sequence[Tensor | None], kept: KeptCodes | None = None
    ) -> Sequence[Any]:
        """Gradients of all inputs, None where there is none.

        Args:
            saved: saved values by node name; consumed.
            tangents: one per differentiable output in graph order, None where that output has no gradient.
            kept: codes of weights that calls share.
        """
        absent = frozenset(name for (name, _, _), t in zip(self.tangents, tangents, strict=True) if t is None)
        if absent not in self._backwards:
            with compat.compiling:
                if absent not in self._backwards:
                    self._backwards[absent] = self._build_backward(absent)
        run, names = self._backwards[absent]
        for (name, _, val), tangent in zip(self.tangents, tangents, strict=True):
            if tangent is not None:
                saved[name] = like_traced(tangent, val)
        if self.bw_weights is not None:
            saved |= self.bw_weights(saved.__getitem__, kept)
        values = [saved.pop(n) for n in names]
        saved.clear()
        with torch.no_grad(), compat.disable_autocast():
            return run(values)

    def _build_backward(self, absent: frozenset[str]) -> tuple[Runner, list[str]]:
        assert self.bw_graph is not None
        gm = prune_tangents(self.bw_graph, absent)
        return self._compile_bw(gm), [n.name for n in gm.graph.find_nodes(op="placeholder")]


class _Run(torch.autograd.Function):
    """The one autograd node of a variant."""

    @staticmethod
    def forward(
        ctx: Any,
        program: Program,
        push: Push | None,
        kept: KeptCodes | None,
        codes: dict[str, Tensor],
        anchors: list[Tensor],
        *primals: Any,
    ) -> tuple[Any, ...]:
        with compat.disable_autocast():
            outs = program.fw(program._arguments(primals, codes))
        values = outs[program.count :]
        tensors = [v for v in values if isinstance(v, Tensor)]
        ctx.program, ctx.push, ctx.kept, ctx.anchors = program, push, kept, anchors
        ctx.save_for_backward(*tensors)
        ctx.others = [None if isinstance(v, Tensor) else v for v in values]
        ctx.set_materialize_grads(False)
        user = tuple(outs[: program.count])
        plain = set(program.results)
        position = {i: p for p, i in enumerate(program.results)}
        ctx.mark_non_differentiable(
            *[
                o
                for i, o in enumerate(user)
                if isinstance(o, Tensor) and (i not in plain or position[i] not in program.differentiable)
            ]
        )
        return user

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        program: Program = ctx.program
        tensors = iter(ctx.saved_tensors)
        saved = {n: next(tensors) if o is None else o for n, o in zip(program.saved, ctx.others, strict=True)}
        del tensors
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained: each can then die at its last use
        tangents = [grads[program.results[key]] for _, key, _ in program.tangents]
        gradients = list(program.backward(saved, tangents, ctx.kept))
        if (i := program.history_input) is not None:
            if ctx.push is not None and gradients[i] is not None:
                ctx.push(gradients[i])
            gradients[i] = None
        if torch.is_grad_enabled():
            gradients = _refuse_second(gradients, ctx.anchors)
        return (None, None, None, None, None, *gradients)


class _Once(torch.autograd.Function):
    """Lets gradients through; going through it backward means a second derivative."""

    @staticmethod
    def forward(ctx: Any, anchors: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors[anchors:]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise InputError(
            "a gradient of an optimized model was differentiated again",
            why="a compiled backward has no backward of its own",
            todo="call opt.original(...) for terms that need create_graph=True (gradient penalties, Hessians)",
        )


def _anchor(x: Tensor) -> Tensor:
    """What leads to the place of `x` in the autograd graph, without keeping the memory of an activation."""
    if x.is_leaf:
        return x
    with torch.enable_grad():
        return x.reshape(-1)[:0].clone() if x.dim() == 0 else x.narrow(0, 0, 0).clone()


def _refuse_second(gradients: Sequence[Any], anchors: Sequence[Tensor]) -> list[Any]:
    """Under `create_graph=True`: the same gradients, attached to the graph so that differentiating them is an error.

    Left alone they would count as constants, and a gradient penalty would silently train nothing. They hang on what the
    gradients are of: a backward that is asked for these alone goes nowhere else.
    """
    tensors = [g for g in gradients if isinstance(g, Tensor)]
    attached = iter(_Once.apply(len(anchors), *anchors, *tensors))  # type: ignore[no-untyped-call]
    return [next(attached) if isinstance(g, Tensor) else g for g in gradients]


def _is_view_of_input(node: fx.Node) -> bool:
    """Whether a saved value is a view of a parameter or an input, and so keeps nothing alive by itself."""
    if "moefx_weight" in node.meta:
        return False
    while node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        info = schema.returns[0].alias_info if schema is not None and schema.returns else None
        if info is None or info.is_write or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return node.op == "placeholder"


def _bytes(nodes: Sequence[fx.Node]) -> int | None:
    sizes = [size for n in nodes for size in _size(n)]
    return None if None in sizes else sum(s for s in sizes if s is not None)


def _size(node: fx.Node) -> list[int | None]:
    """Bytes that a saved node keeps alive by itself: one number, None where it is symbolic; [] for none of its own."""
    val = None if _is_view_of_input(node) else node.meta.get("val")
    if not isinstance(val, Tensor):
        return []
    return [val.numel() * val.element_size() if all(isinstance(s, int) for s in val.shape) else None]


def saved_by_layer(nodes: Sequence[fx.Node]) -> dict[str, dict[str, int]]:
    """What routed experts keep for the backward: module path -> bytes of `activations` (and gradients' inputs like
    them), of `weights` as codes, and of `routing` (row maps and weights). Symbolic sizes are left out."""
    found: dict[str, dict[str, int]] = {}
    for node in nodes:
        kind = _kind(node)
        for size in _size(node) if kind else []:
            row = found.setdefault(module_path(node), {"activations": 0, "weights": 0, "routing": 0})
            row[str(kind)] += size or 0
    return found


def _kind(node: fx.Node) -> str | None:
    """What a saved node of an experts module is; None for nodes of other modules."""
    if "moefx_weight" in node.meta:
        return "weights"
    source = node
    while source.target is compat.getitem or source.target in VIEWS:
        source = source.args[0]  # type: ignore[assignment]
    if getattr(source.target, "namespace", "") != "moefx":
        return None
    if source.target in QUANTIZE | DELAYED and is_weight(source):
        return "weights"
    val = node.meta.get("val")
    if not isinstance(val, Tensor) or val.dim() < 2:
        return "routing"
    return "activations" if val.is_floating_point() or val.dtype == torch.uint8 else "routing"
