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
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from . import compat
from .errors import CaptureError, InputError, nearest

Tensor = torch.Tensor


@dataclass
class Captured:
    """A model graph with the call it was captured from. `graph` nodes carry `example_value`, module stack and source
    line.
    """

    gm: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: dict[str, str] = field(default_factory=dict)  # placeholder -> dotted parameter or buffer name, or input name

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
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as e:
        unknown = next((k for k in kwargs if k not in signature.parameters), None)
        hint = nearest(unknown, signature.parameters) if unknown else f"the signature is forward{signature}"
        raise InputError(
            "the example inputs do not fit the model's forward", where=type(model).__qualname__, why=str(e), todo=hint
        ) from e
    if not any(isinstance(v, Tensor) for v in (*args, *kwargs.values())):
        raise InputError(
            "the example inputs hold no tensor", where=type(model).__qualname__, todo="pass at least one tensor"
        )
    flat = dict(bound.arguments)
    for p in signature.parameters.values():
        if p.kind is p.VAR_KEYWORD:
            flat.update(flat.pop(p.name, {}))
    return flat


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: compat.DynamicDims | None = None
) -> Captured:
    """Capture `model(*args, **kwargs)` in its present mode (train or eval). The model comes back unchanged.

    Args:
        dynamic: input name -> axes whose size stays symbolic.

    Raises:
        InputError: the inputs do not fit the model's signature.
        CaptureError: the model runs but cannot be traced into one graph.
    """
    named = check_call(model, args, kwargs)
    tensors = {k: v for k, v in named.items() if isinstance(v, Tensor)}
    for name, axes in (dynamic or {}).items():
        if name not in tensors or any(not 0 <= a < tensors[name].dim() for a in axes):
            raise InputError(
                f"dynamic names {name!r}, axes {list(axes)}, which the example inputs do not have",
                todo=f"name tensors and axes of { ({k: tuple(v.shape) for k, v in tensors.items()}) }",
            )
    with _no_cache(model), compat.no_fake(), compat.dynamic_dims(tensors, dynamic or {}):
        try:
            gm = compat.capture_forward(model, args, kwargs)
        except compat.CAPTURE_ERRORS as e:
            raise _explained(e, model) from e
    known = {id(t): n for n, t in (*tensors.items(), *model.named_buffers(), *model.named_parameters())}
    placeholders = gm.graph.find_nodes(op="placeholder")
    values = compat.flat_inputs(gm, args, kwargs)
    names = {p.name: known.get(id(v), p.name) for p, v in zip(placeholders, values, strict=True)}
    return Captured(gm, args, kwargs, names)


def warm_up(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """One forward of the unchanged model without gradients; buffers and random state come back as they were.

    Raises `InputError` when the model itself fails on these inputs.
    """
    check_call(model, args, kwargs)
    buffers = {id(b): (b, b.detach().clone()) for b in model.buffers()}
    devices = {t.device for t in model.parameters() if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        try:
            model(*args, **kwargs)
        except Exception as e:
            raise InputError(
                "the model itself fails on the example inputs, before anything was traced",
                where=type(model).__qualname__,
                why=f"{type(e).__name__}: {e}",
                todo="call model(...) with the same inputs and mend that first",
            ) from e
        finally:
            for live, kept in buffers.values():
                live.copy_(kept)


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


def _explained(e: Exception, model: nn.Module) -> CaptureError:
    """A CaptureError that names the user's own line rather than the tracer's."""
    stack: traceback.StackSummary | None = getattr(e, "real_stack", None)
    frames = [f for f in stack or [] if f"{'/'}torch{'/'}" not in f.filename]
    where = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}: {frames[-1].line}" if frames else None
    first = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
    loop = re.search(r"data-dependent|dynamic shape operator|iterat", str(e))
    return CaptureError(
        f"{type(model).__qualname__} could not be traced into one graph",
        where=where,
        why=f"{type(e).__name__}: {first}",
        todo=(
            "this code runs Python control flow on tensor values (a loop over hit experts, an `if` on a count): "
            "write the experts so that moefx raises them (docs/models.md), or compute without looking at values"
            if loop
            else "rewrite the construct named above so that it does not leave the tracer, or move it out of forward"
        ),
    )
