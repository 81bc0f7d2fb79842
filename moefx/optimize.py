"""`moefx.optimize`: the whole compiler on one page. The stages are those of docs/architecture.md, in order."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from . import compat
from .capture import as_call, capture, check_call, check_dynamic, check_plain, check_symbolic, distinct
from .delayed import attach
from .errors import CaptureError, InputError, PassError, nearest
from .graph.edit import copy_plain, value
from .graph.tokens import called
from .joint import compiler, split, trace_joint
from .ledger import ledger
from .losses import Item, as_losses
from .manager import Pass, PassManager
from .module import OptimizedModule, Variant
from .passes import AddLosses, RouteByToken, as_pipeline, observing, with_losses
from .passes.raise_experts import Block, raised, to_observe
from .precision.recipe import Recipe, get_recipe
from .precision_metrics import Meter
from .program import Assemblies, Program
from .raising.calls import calls_of
from .report import Report
from .routing import Routing, as_routing, check_causal, check_vocabulary, routed
from .slots import guard_of, label_inputs, names_of, parameters_of, values_of
from .stages import Stages, describe, shapes
from .verify import Verifier
from .weights import hoist_weight_casts

CODEGENS = ("inductor", "eager")
GRAPH_LEVEL = ("raise_idioms", "unbind_experts")  # passes that find experts where no module was raised


def check_names(recipe: Any = "bf16", codegen: str = "inductor", **_: Any) -> None:
    """Raise what `optimize` refuses of these two of its keywords; for who builds a model first."""
    if codegen not in CODEGENS:
        raise InputError(f"unknown codegen {codegen!r}", todo=nearest(str(codegen), CODEGENS))
    get_recipe(recipe)


@dataclass(frozen=True)
class Options:
    """The arguments of `optimize` that every variant is compiled with."""

    recipe: Recipe
    passes: PassManager
    codegen: str
    verify: bool
    dynamic: compat.DynamicDims | None
    strict: bool = False
    losses: tuple[Item, ...] = ()
    routing: Routing | None = None

    @functools.cached_property
    def over_ranks(self) -> bool:
        """Whether a loss of the pipeline sums over ranks (losses that were given stand in it, too)."""
        return any(item.over_ranks for p in self.passes.passes if isinstance(p, AddLosses) for item in p.losses)


def optimize(
    model: nn.Module,
    example_inputs: Any,
    *,
    recipe: str | Recipe | Mapping[str, str] = "bf16",
    router: Any = None,
    losses: str | Sequence[Any] | Mapping[str, float] = (),
    passes: PassManager | Sequence[Pass | str] | None = None,
    regions: str = "model",
    codegen: str = "inductor",
    verify: bool = False,
    dynamic: compat.DynamicDims | None = None,
    mesh: Any = None,
    strict: bool = False,
) -> OptimizedModule:
    """Compile a Mixture-of-Experts model for training. It keeps its parameters; none of its tensors is changed.

    Args:
        model: any nn.Module with MoE blocks that moefx can raise (transformers 5 models; docs/models.md).
        example_inputs: a dict of keyword tensors or a tuple of positional ones. The signature they make (mode, shapes,
        dtypes) is
            compiled now; others when they are first met.
        recipe: precision recipe: a name, a `moefx.Recipe`, or a dict of its specs alone; "bf16" computes in the dtypes
            that the model has.
        passes: a pipeline, or a list of passes and names, instead of the recipe's own. It must be for the same recipe;
            `recipe` may be left out where a pipeline says it.
        codegen: "inductor" (needs a C++ or CUDA compiler) or "eager" (plain graph execution).
        verify: compare outputs and gradients around every pass on the example inputs, within its numerics class.
        dynamic: input name -> axes whose size may vary without a new compilation.
        strict: an MoE-looking block that cannot be raised is an error; otherwise the report says why it was left alone.
        router: a `moefx.Grouter`, a `moefx.Precomputed` or a `moefx.Routing` around one: every MoE layer is routed by
            it, from token ids alone, and the layers' own routers go (docs/grouter.md).
        regions, mesh: reserved; only the defaults are accepted in this version.
        losses: what to add to the model's loss, or to measure: objects of `moefx.losses` or their short names, as
            ["sp", "cp", "lb", "metrics"], or {"sp": 1e-3, "lb": 1e-2} with weights. Their values are in `.losses` and
            `.routing` after each call.

    Returns:
        An `OptimizedModule` with `.original`, `.report` and `.graphs`.

    Raises:
        InputError, CaptureError, RecipeError, PassError: with what, where, why and what to do.
    """
    reserved = {
        "mesh": (mesh, None),
        "regions": (regions, "model"),
    }
    for name, (given, only) in reserved.items():
        if given != only:
            raise InputError(
                f"{name}={given!r} is not available in this version", todo=f"leave {name} at its default {only!r}"
            )
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}, not an nn.Module", todo="pass the module itself")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise InputError(
            f"the model is wrapped in {type(model).__name__}",
            why="its forward communicates and copies, which is no part of a graph",
            todo="optimize what is inside, and wrap that: DistributedDataParallel(moefx.optimize(model.module, ...))",
        )
    inside = model.original if isinstance(model, OptimizedModule) else model
    for path, m in inside.named_modules():
        if isinstance(m, OptimizedModule):
            raise InputError(
                f"the model holds a module that is optimized already, {path}",
                where=type(inside).__qualname__,
                why="compiled graphs are no part of another graph",
                todo="put its original in its place (`.original`) and optimize the whole, or optimize parts alone",
            )
    check_names(recipe, codegen)
    routing, wanted = as_routing(router), as_losses(losses)
    chain, chosen = as_pipeline(passes, recipe, codegen)
    if routing is not None and "route_by_token" not in chain.names:
        by_token = RouteByToken(routing.gates, routing.scale, routing.normalise, routing.causal)
        chain = chain.insert(by_token, after="raise_routers")
    chain = with_losses(chain, wanted)
    options = Options(chosen, chain, codegen, verify, dynamic, strict, wanted, routing)
    options.passes.ordered()  # an unsatisfiable order is an error now, not after a long capture
    opt = reoptimize(model.original if isinstance(model, OptimizedModule) else model, options)
    args, kwargs = as_call(example_inputs)
    with routed(opt.original, routing):
        named = check_call(opt.original, args, kwargs)
    check_dynamic(named, dynamic or {})
    if routing is not None:
        check_vocabulary(routing, opt.original, named)
        check_causal(routing, named)
    opt.prepare(args, kwargs)
    return opt


def reoptimize(model: nn.Module, options: Options) -> OptimizedModule:
    """An optimized module without compiled variants; each is compiled when its signature is first called."""
    report = Report(type(model).__qualname__, options.recipe.name, options.codegen)
    return OptimizedModule(model, compile_variant, options, report)


def compile_variant(opt: OptimizedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
    """Stages 1 to 6 for one call signature, in the model's present mode and the caller's grad mode and autocast."""
    model, o, first = opt.original, opt.options, not opt.report.signatures
    report = opt.report if first else Report(opt.report.model, o.recipe.name, o.codegen)
    check_plain(model)
    args, kwargs = distinct(model, args, kwargs)
    if o.routing is not None:
        with routed(model, o.routing):
            named = check_call(model, args, kwargs)
        o.routing.check(named)
    leaves = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
    again = "" if first else f", signature {len(opt.report.signatures) + 1} of {', '.join(shapes(leaves))}"
    stage = Stages(report, show=f"{type(model).__qualname__}{again}")
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (*model.parameters(), *leaves))

    own = {k: v for k, v in kwargs.items() if o.routing is None or k not in o.routing.extra}
    with stage("warm-up"):
        calls = calls_of(to_observe(model), model, args, own)
    with contextlib.ExitStack() as undo:
        with stage("raise"):  # stage 1; what it installs stays until the joint graph is there
            blocks = undo.enter_context(raised(model, calls=calls, live=False, symbolic=bool(o.dynamic)))
            report.blocks = [b.to_dict() for b in blocks]
            later = not o.strict and set(GRAPH_LEVEL) & set(o.passes.names)  # these work on the graph
            if not (blocks or later) or (o.strict and not all(b.raised for b in blocks)):
                raise _not_raised(model, blocks)
        with stage("capture") as done, routed(model, o.routing), _with_reasons(blocks):  # stage 2
            captured = done(capture(model, args, kwargs, o.dynamic))
        label_inputs(captured.graph, captured.names)
        report.graphs.keep("captured", captured.gm, copy_plain(captured.graph))

        with stage("model passes") as done:  # stage 3
            verifier = Verifier(compat.flat_inputs(captured.gm, args, kwargs), grad) if o.verify else None
            fakes = [value(n) for n in captured.graph.find_nodes(op="placeholder")]
            chain = o.passes if grad and model.training else observing(o.passes)
            with called(captured), _with_reasons(blocks):
                chain.run("model", captured.gm, report, compat.fake_mode_of(fakes), verifier)
            noted = captured.graph.output_node().meta
            report.losses, by_token = noted.get("moefx_losses", []), tuple(noted.get("moefx_routed", ()))
            chosen_from = tuple(noted.get("moefx_chosen_from", ()))
            rows = [r for r in report.passes if r.name in GRAPH_LEVEL]
            if not blocks and not any(r.matched for r in rows):
                raise _not_raised(model, blocks)
            done(captured)

        # Without an output to differentiate (token ids, detached values) there is no backward to trace.
        grad = grad and bool(noted["moefx_differentiable"])
        with stage("joint") as done:  # stage 4
            joint = done(trace_joint(captured, grad=grad, codegen=o.codegen))
            check_symbolic(captured)
            if o.recipe.amax_history:
                attach(joint, o.recipe.amax_history, model.training)
    assemblies = _assemblies(model, blocks)
    label_inputs(joint.graph, names_of(joint, args, kwargs))
    report.graphs.keep("joint", joint.gm, copy_plain(joint.graph))

    with stage("training passes") as done:  # stage 5
        values = values_of(joint, args, kwargs, _state(opt, assemblies)) if o.verify else []
        verifier = Verifier(values, False) if o.verify else None
        with compat.disable_autocast():
            o.passes.run("training", joint.gm, report, joint.fake_mode, verifier)
        done(joint)
    report.casts = ledger(report.graphs.graph("quantize"), joint.graph, report.passes)

    with stage("partition") as done:  # stage 6
        fw, bw = split(joint, codegen=o.codegen) if grad else (joint.gm, None)
        weights = (
            [hoist_weight_casts(half, parameters_of(joint)) for half in (fw, bw)] if bw is not None else (None, None)
        )
        done(fw)
    for name, half in (*zip(("weights", "weights_backward"), weights, strict=True), ("forward", fw), ("backward", bw)):
        if half is not None:
            report.graphs.keep(name, half, copy_plain(half.graph))
    with stage("codegen") as done:
        make = compiler(o.codegen, backward=True, progress=stage.backward)
        program = Program(joint, fw, bw, compiler(o.codegen, inference=bw is None), make, assemblies, weights)
        done(fw)
    report.memory = {"saved_bytes": program.saved_bytes if grad else 0, "layers": program.saved_by_layer}

    signature = describe(model, leaves, grad, stage.total)
    opt.report.signatures.append(signature)
    guard = guard_of(joint) if o.dynamic else None
    return Variant(program, signature, guard, meter=Meter.of(joint), routed=by_token, chosen_from=chosen_from)


@contextmanager
def _with_reasons(blocks: list[Block]) -> Iterator[None]:
    """Why blocks were not raised is part of why a model cannot be captured, or has nothing that losses could read."""
    try:
        yield
    except CaptureError as e:
        left = "; ".join(
            f"{b.path or 'the model itself'} ({b.cls}) was not raised: {b.reason}" for b in blocks if not b.raised
        )
        raise CaptureError(e.what, e.where, f"{e.why}; {left}" if left else e.why, e.todo) from e


def _not_raised(model: nn.Module, blocks: list[Block]) -> CaptureError:
    left = [b for b in blocks if not b.raised]
    if not left:
        return CaptureError(
            "no MoE block was found",
            where=type(model).__qualname__,
            why="no module carries transformers' experts interface, and none looks like a bank of experts",
            todo="moefx optimizes Mixture-of-Experts models; see docs/models.md for what is recognised",
        )
    return CaptureError(
        f"{len(left)} MoE block{'s' if len(left) > 1 else ''} of {type(model).__qualname__} could not be raised",
        where=f"{left[0].path or 'the model itself'} ({left[0].cls})",
        why=left[0].reason,
        todo="see docs/models.md for what is recognised"
        + ("; without strict=True the others are optimized" if any(b.raised for b in blocks) else ""),
    )


def _assemblies(model: nn.Module, blocks: list[Block]) -> Assemblies:
    """Tensors made of several parameters, under every name that a graph may know them by.

    A block may be registered in several places (layers that share it); the capture picks one of them.
    """
    raised_blocks = {id(model.get_submodule(b.path)): b for b in blocks if b.assemblies}
    return {
        f"{place}.{name}".lstrip("."): (b.path, assembly)
        for place, module in model.named_modules(remove_duplicate=False)
        if (b := raised_blocks.get(id(module))) is not None
        for name, assembly in b.assemblies.items()
    }


def _state(opt: OptimizedModule, assemblies: Assemblies) -> dict[str, torch.Tensor]:
    """Parameters and buffers by the names that a joint graph has for them, assembled ones included."""
    built = {name: a.build(opt.original.get_submodule(path).get_parameter) for name, (path, a) in assemblies.items()}
    return {**opt.tensors(), **built}


__all__ = ["CODEGENS", "Options", "PassError", "check_names", "compile_variant", "optimize", "reoptimize"]
