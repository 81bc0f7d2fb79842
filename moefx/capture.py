"""Stage 2: a model and example inputs become the model graph, a forward FX graph at the level of torch functions.

Route: one warm-up forward, then Dynamo's whole-graph capture. The warm-up is needed because transformers installs its
recording hooks under a lock at the first forward, which Dynamo cannot trace; it leaves no trace on buffers or random
state.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import compat
from .errors import CaptureError, InputError, first_line, nearest
from .graph.checkpointed import inline_checkpointed
from .holder import HOOKS, Holder

Tensor = torch.Tensor
RECORDING = "transformers/utils/output_capturing.py"


@dataclass
class Captured:
    """A model graph with the call it was captured from. `graph` nodes carry `example_value`, module stack and source
    line.
    """

    gm: fx.GraphModule
    holder: Holder
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: dict[str, str] = field(default_factory=dict)  # placeholder -> dotted parameter or buffer name, or input name
    dynamic: dict[str, list[int]] = field(default_factory=dict)  # input name -> axes that were captured as symbols
    tensors: dict[str, Tensor] = field(default_factory=dict)  # arguments of the call by their names, read or not
    accepts: frozenset[str] = frozenset()  # names of all arguments of the forward

    @property
    def graph(self) -> fx.Graph:
        """The FX graph that model-level passes edit in place."""
        return self.gm.graph


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`example_inputs` as (args, kwargs): a dict of keywords, a tuple of positional arguments, or one tensor."""
    if isinstance(example_inputs, dict) or hasattr(example_inputs, "keys"):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise InputError(
        f"example_inputs has type {type(example_inputs).__name__}",
        todo="pass a dict of keyword tensors, like {'input_ids': ids, 'labels': ids}, or a tuple of positional ones",
    )


def check_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Bind a call to the model's forward; the arguments by name. Raises `InputError` when they do not fit its
    signature.
    """
    signature = _signature(model)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as e:
        unknown = next((k for k in kwargs if k not in signature.parameters), None)
        hint = nearest(unknown, signature.parameters) if unknown else f"the signature is forward{signature}"
        raise InputError(
            "the inputs do not fit the model's forward", where=type(model).__qualname__, why=str(e), todo=hint
        ) from e
    if not any(isinstance(v, Tensor) for v in pytree.tree_leaves((args, kwargs))):
        raise InputError("the inputs hold no tensor", where=type(model).__qualname__, todo="pass at least one tensor")
    flat = dict(bound.arguments)
    for p in signature.parameters.values():
        if p.kind is p.VAR_KEYWORD:
            flat.update(flat.pop(p.name, {}))
    return flat


def _check_gradients(model: nn.Module) -> None:
    """Raise `InputError` for a gradient that no longer fits its parameter, which tracing would stumble over."""
    for name, p in model.named_parameters():
        if p.grad is not None and p.grad.shape != p.shape:
            raise InputError(
                f"the gradient of {name} is {list(p.grad.shape)}, the parameter {list(p.shape)}",
                where=type(model).__qualname__,
                why="the parameter was resized (resize_token_embeddings, for example) after a backward",
                todo="call zero_grad() first",
            )


def check_plain(model: nn.Module) -> None:
    """Raise InputError for a parameter or buffer that is a tensor subclass with tensors inside, as a sharded one is."""
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if is_traceable_wrapper_subclass(t):
            why, todo = "a graph is made of plain tensors", "optimize the model with plain parameters"
            if hasattr(t, "placements"):
                why += "; layers that are sharded gather them in hooks of their own, which do not run around a graph"
                todo = "shard the model as a whole, and last: fully_shard(moefx.optimize(model, inputs))"
            raise InputError(f"{name} is a {type(t).__name__}", where=type(model).__qualname__, why=why, todo=todo)


def _signature(model: nn.Module) -> inspect.Signature:
    """Of the forward; a model that is routed by token ids takes the router's arguments too (`moefx.routing.routed`)."""
    return getattr(model, "moefx_signature", None) or inspect.signature(model.forward)


def check_dynamic(named: dict[str, Any], dynamic: compat.DynamicDims) -> None:
    """Raise `InputError` when `dynamic` names an input or axis that the call does not have."""
    tensors = {k: v for k, v in named.items() if isinstance(v, Tensor)}
    for name, axes in dynamic.items():
        if name not in tensors or any(not 0 <= a < tensors[name].dim() for a in axes):
            raise InputError(
                f"dynamic names {name!r}, axes {list(axes)}, which the example inputs do not have",
                todo=f"name tensors and axes of { ({k: tuple(v.shape) for k, v in tensors.items()}) }",
            )


def check_symbolic(captured: Captured) -> None:
    """Raise `CaptureError` when tracing fixed a size that was to stay symbolic. Sizes of 0 and 1 are always fixed."""
    for node in captured.graph.find_nodes(op="placeholder"):
        name, val = captured.names.get(node.name, ""), node.meta.get("example_value")
        for axis in captured.dynamic.get(name, ()):
            if compat.is_fixed(val.shape[axis]) and (size := int(val.shape[axis])) > 1:
                raise CaptureError(
                    f"axis {axis} of {name!r} cannot be dynamic: the model works for size {size} alone",
                    why="something in the forward compares this size with a number, or with the size of a parameter",
                    todo=f"leave the axis out of dynamic={{{name!r}: ...}}",
                )


def distinct(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with every tensor an object of its own.

    Dynamo makes one graph input of a tensor that is passed twice (`labels=input_ids`), and later calls with two
    different tensors would run on the first alone.
    """
    seen = {id(t) for t in (*model.parameters(), *model.buffers())}
    leaves, spec = pytree.tree_flatten((args, kwargs))
    for i, v in enumerate(leaves):
        if isinstance(v, Tensor) and id(v) in seen:
            leaves[i] = v.detach().requires_grad_(v.requires_grad)
        seen.add(id(v))
    return pytree.tree_unflatten(leaves, spec)  # type: ignore[no-any-return]


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: compat.DynamicDims | None = None
) -> Captured:
    """Capture `model(*args, **kwargs)` in its present mode (train or eval). The model comes back unchanged.

    Args:
        dynamic: input name -> axes whose size stays symbolic; names that this call does not have are passed over.

    Raises:
        InputError: the inputs do not fit the model's signature, or a gradient its parameter.
        CaptureError: the model runs but cannot be traced into one graph.
    """
    named = check_call(model, args, kwargs)
    _check_gradients(model)
    tensors = {k: v for k, v in named.items() if isinstance(v, Tensor)}
    axes = {k: [a for a in v if a < tensors[k].dim()] for k, v in (dynamic or {}).items() if k in tensors}
    _say_what_packs(model, tensors, named)
    with _no_cache(model), _no_hooks(model), compat.no_fake(), compat.dynamic_dims(tensors, axes):
        try:
            gm = compat.capture_forward(model, args, kwargs)
        except compat.capture_errors() as e:
            raise _explained(e, model) from e
    inline_checkpointed(gm)
    # Transformers' output recorder is put back by the forward itself; `buffer += 1` rebinds the same tensor.
    changed = [s for s in gm.meta["side_effects"] if not s.endswith("._buffers") and not _by_transformers(model, s)]
    if changed:
        warnings.warn(
            f"{type(model).__qualname__}'s forward changes Python state, which compiled graphs do not repeat: "
            f"{', '.join(changed)}. Keep what must change at every call in a buffer, or return it.",
            stacklevel=2,
        )
    known = {id(t): n for n, t in (*tensors.items(), *model.named_buffers(), *model.named_parameters())}
    placeholders = gm.graph.find_nodes(op="placeholder")
    values = compat.flat_inputs(gm, args, kwargs)
    names = {p.name: known.get(id(v), p.name) for p, v in zip(placeholders, values, strict=True)}
    out = gm.graph.output_node()
    out.meta["moefx_outputs"] = compat.output_names(gm, args, kwargs)
    out.meta["moefx_differentiable"] = _differentiable(out)
    accepts = frozenset(_signature(model).parameters)
    return Captured(gm, Holder(gm, model), args, kwargs, names, axes, tensors, accepts)


def _differentiable(out: fx.Node) -> frozenset[int]:
    """Positions of the outputs that the model computed and that have a gradient.

    Noted at capture, because the values of nodes that passes make do not tell.
    """
    returned: Any = out.args[0]
    made = {i: n.meta.get("example_value") for i, n in enumerate(returned) if isinstance(n, fx.Node)}
    inputs = {i for i in made if returned[i].op == "placeholder"}
    return frozenset(i for i, v in made.items() if isinstance(v, Tensor) and v.requires_grad and i not in inputs)


def _by_transformers(model: nn.Module, effect: str) -> bool:
    """Whether a side effect is the library's bookkeeping: a router notes its input's dtype, binds its classifier."""
    module = model
    for name in re.findall(r"_modules\['(.*?)'\]", effect):
        module = module._modules.get(name) or module
    library = type(module).__module__.startswith("transformers.") and "_hooks" not in effect
    return "transformers" in effect or library


def warm_up(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """One forward of the unchanged model without gradients; buffers and random state come back as they were.

    Raises `InputError` when the model itself fails on these inputs.
    """
    check_call(model, args, kwargs)
    buffers = [
        (f"{path}.{name}".lstrip("."), m._buffers, name, b, b.detach().clone())
        for path, m in model.named_modules()
        for name, b in m._buffers.items()
        if b is not None
    ]
    rebound = []
    devices = {t.device for t in model.parameters() if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad(), _no_hooks(model):
        try:
            model(*args, **kwargs)
        except Exception as e:
            known = _signature(model).parameters
            odd = [f"; forward names no argument {k!r}: {nearest(k, known)}" for k in kwargs if k not in known]
            raise InputError(
                "the model itself fails on these inputs, before anything was traced",
                where=type(model).__qualname__,
                why=f"{type(e).__name__}: {e}",
                todo=f"call model(...) with the same inputs and mend that first{''.join(odd)}",
            ) from e
        finally:
            for path, registry, name, live, kept in buffers:
                now = registry.get(name)
                live.copy_(kept)
                if now is not live:
                    registry[name] = live
                    rebound.append((path, now, kept))
    changed = [path for path, now, kept in rebound if now is None or now.shape != kept.shape or not (now == kept).all()]
    if changed:
        raise CaptureError(
            f"the forward puts a new tensor in the place of {', '.join(changed)}",
            where=type(model).__qualname__,
            why="a graph can update a buffer in place, but not bind its name to another tensor",
            todo="write the new value into the buffer: self.buffer.copy_(value), or lerp_, add_, ...",
        )


@contextlib.contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    """Switch `use_cache` off in every config object of the model: a training graph returns no key-value cache."""
    found: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    configs = {id(c): c for c in found if getattr(c, "use_cache", None)}
    try:
        for c in configs.values():
            c.use_cache = False
        yield
    finally:
        for c in configs.values():
            c.use_cache = True


def _say_what_packs(model: nn.Module, tensors: dict[str, Tensor], named: dict[str, Any]) -> None:
    """Warn when the model itself would make another attention mask of packed positions: with a cache.

    transformers takes positions that start again for several documents, each of which sees itself alone, only where no
    cache is given or made.
    """
    positions, asked = tensors.get("position_ids"), named.get("use_cache")
    configs = [getattr(m, "config", None) for m in model.modules()]
    cached = any(getattr(c, "use_cache", None) for c in configs) if asked is None else bool(asked)
    if positions is None or positions.dim() < 2 or not cached or "attention_mask" in tensors:
        return
    if bool((positions.diff(dim=-1) != 1).any()):
        warnings.warn(
            f"{type(model).__qualname__} is given packed position_ids and no attention_mask. Compiled graphs make no "
            "key-value cache, and without one transformers lets tokens see their own document alone. The model itself, "
            "with use_cache on, lets them see all before them; opt.original(..., use_cache=False) does as graphs do.",
            stacklevel=2,
        )


@contextlib.contextmanager
def _no_hooks(model: nn.Module) -> Iterator[None]:
    """Take off the model's own hooks, not those of its submodules: `OptimizedModule` runs them around its graphs."""
    kept = {name: model.__dict__[name] for name in HOOKS}
    try:
        model.__dict__.update({name: type(hooks)() for name, hooks in kept.items()})
        yield
    finally:
        model.__dict__.update(kept)


def _explained(e: Exception, model: nn.Module) -> CaptureError:
    """A CaptureError that names the user's own line rather than the tracer's."""
    stack: traceback.StackSummary | None = getattr(e, "real_stack", None)
    frames = [f for f in stack or [] if f"{'/'}torch{'/'}" not in f.filename]
    where = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}: {frames[-1].line}" if frames else None
    if where is None and (lines := re.findall(r'File "(.+)", line (\d+), in (\w+)\n\s+(.+)', str(e))):
        where = "{}:{} in {}: {}".format(*lines[-1])  # errors without a stack of their own tell it in their text
    first = first_line(e, type(e).__name__)
    if inner := re.search(r"raised exception (\w+\(.*\))", str(e)):
        first = f"{first} {inner[1]}"
    if frames and frames[-1].filename.endswith(RECORDING):
        return CaptureError(
            f"{type(model).__qualname__} is part of a model whose outputs transformers records inside of it",
            where=where,
            why="a hook hands router logits or hidden states to the model around, which a graph of this part cannot do",
            todo="optimize the whole model: moefx.optimize(model, ...)",
        )
    hooked = [path for path, m in model.named_modules() if path and (m._backward_hooks or m._backward_pre_hooks)]
    if hooked and "backwards hooks" in str(e):
        return CaptureError(
            f"{type(model).__qualname__} could not be traced into one graph",
            where=", ".join(hooked),
            why="a backward hook of a submodule has no place in a compiled backward",
            todo="remove it (handle.remove()), or hook the tensor in a forward: x.register_hook(...)",
        )
    parameters = _signature(model).parameters
    unmasked = "NoneType" in first and any(name.endswith("attention_mask") for name in parameters)
    loop = re.search(r"data-dependent|dynamic shape operator|iterat", str(e))
    return CaptureError(
        f"{type(model).__qualname__} could not be traced into one graph",
        where=where,
        why=f"{type(e).__name__}: {first}",
        todo=(
            "this code runs Python control flow on tensor values (a loop over hit experts, an `if` on a count): "
            "write the experts so that moefx raises them (docs/models.md), or compute without looking at values"
            if loop
            else "some models make no attention mask of their own while they are traced: pass attention_mask"
            if unmasked
            else "rewrite the construct named above so that it does not leave the tracer, or move it out of forward"
        ),
    )
