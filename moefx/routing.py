"""Routing by token ids: `optimize(router=...)`. What is asked for, and how a capture comes to compute it.

A router of token ids (`moefx.Grouter`) reads no hidden state, so that one result serves all layers. For the length of a
capture the model's forward runs it first; the graph then holds the router's nodes behind one `moefx.token_route`, from
which the pass `route_by_token` feeds every MoE layer. The router's parameters are inputs of the graph like the model's
own, but they belong to no module of the model: its `state_dict` and `parameters` stay as they are.
"""

from __future__ import annotations

import contextlib
import inspect
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from . import compat
from .dialect.token_route import token_route
from .errors import InputError
from .graph.edit import find, value
from .graph.trial import values_of

Tensor = torch.Tensor
GATES, LAYOUTS, NORMALISERS = ("router", "layer"), ("batch", "sequence"), ("softmax", "sigmoid")
TOLERANCE = 1e-4  # of the largest logit; attention over another number of keys rounds differently
INSIDE = "moefx_router"  # the router's name in the model while it is captured


class FutureTokensWarning(UserWarning):
    """The routing of a token depends on tokens behind it, which a language model is there to predict."""


@dataclass(frozen=True)
class Routing:
    """How every MoE layer of a model is routed: by a function of the token ids, frozen, the same for all layers.

    Attributes:
        router: module from token ids [B,S] to logits [B,S,E] (a `moefx.Grouter`), or `Precomputed`. Its forward is
            given those arguments of a call whose names it has: `input_ids`, and `position_ids`, `document_ids` and a
            two-dimensional `attention_mask` where the call has them. A buffer `selection_bias` [E], if it has one, is
            added for the choice alone. It is frozen: put in evaluation mode, its parameters need no gradient.
        gates: "router": the weights of the chosen experts are the router's, times each layer's own factor. "layer":
            each layer weighs the given experts by its own, trained router.
        scale: instead of each layer's own factor ("router" gates only).
        normalise: gates from the k chosen logits: "softmax" over them, or "sigmoid" divided by their sum.
        ids: the argument of the model that holds the token ids.
        causal: whether a router that reads future tokens is an error; with False it is a warning.

    Raises:
        InputError: values outside of these.
    """

    router: nn.Module
    gates: str = "router"
    scale: float | None = None
    normalise: str = "softmax"
    ids: str = "input_ids"
    causal: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.router, nn.Module):
            raise InputError(
                f"the router is a {type(self.router).__name__}, not an nn.Module",
                todo="pass a moefx.Grouter, a moefx.Precomputed, or a moefx.Routing around one",
            )
        for name, given, known in (("gates", self.gates, GATES), ("normalise", self.normalise, NORMALISERS)):
            if given not in known:
                raise InputError(f"routing with {name}={given!r}", todo=f"choose one of {', '.join(map(repr, known))}")
        if self.scale is not None and self.gates == "layer":
            raise InputError("scale is given for gates='layer'", todo="a layer's own router has its own scale")
        self.router.eval().requires_grad_(False)

    def inputs(self, named: dict[str, Any]) -> dict[str, Any]:
        """Those arguments of a call that the router reads, by the router's names; `InputError` for missing ones."""
        parameters = inspect.signature(self.router.forward).parameters
        found = _read(named, parameters, self.ids)
        for name, p in parameters.items():
            source = self.ids if name == "input_ids" else name
            if name not in found and p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                raise InputError(
                    f"the router reads {source!r}, which the call does not have",
                    where=type(self.router).__qualname__,
                    why=f"the call has {', '.join(named) or 'no arguments'}",
                    todo="call the model with token ids (not embeddings), or name them: moefx.Routing(..., ids=...)",
                )
        return found

    @property
    def extra(self) -> tuple[str, ...]:
        """Keywords of a call that the router alone reads."""
        return tuple(getattr(self.router, "extra_inputs", ()))


class Precomputed(nn.Module):
    """Routing that was computed beforehand, as two more keyword arguments of every call of the optimized model.

    `routing_idx` [B,S,k] integer, different experts of a token in any order, and `routing_gates` [B,S,k] floating; or
    with a leading axis of MoE layers in both, [L,B,S,k].
    """

    extra_inputs = ("routing_idx", "routing_gates")

    def forward(self, routing_idx: Tensor, routing_gates: Tensor) -> tuple[Tensor, Tensor]:
        """Both unchanged."""
        return routing_idx, routing_gates


def as_routing(router: Any) -> Routing | None:
    """What the `router` argument of `optimize` means."""
    return router if router is None or isinstance(router, Routing) else Routing(router)


@contextlib.contextmanager
def routed(model: nn.Module, routing: Routing | None) -> Iterator[None]:
    """For the length of a capture, the model runs the router before its own forward."""
    if routing is None:
        yield
        return
    cls = type(model)
    names = tuple(inspect.signature(routing.router.forward).parameters)
    # A forward of the instance hides the class's: that of a raised block, or one that was assigned to it.
    hiding = model.__dict__.get("forward")
    bound = types.MethodType(cls.forward, model) if hiding is None else hiding
    # As a method: a capture takes parameters for constants that are not reached through `self`.
    method = bound.__func__ if getattr(bound, "__self__", None) is model else None
    signature = inspect.signature(bound)
    positional, extra, ids = list(signature.parameters), routing.extra, routing.ids
    biased = isinstance(getattr(routing.router, "selection_bias", None), Tensor)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(positional, args, strict=False)), **kwargs}
        router = self.moefx_router
        out = router(**_read(named, names, ids))
        given = list(out) if isinstance(out, tuple) else [out, router.selection_bias] if biased else [out]
        token_route([t.detach() for t in given])
        kwargs = {k: v for k, v in kwargs.items() if k not in extra}
        return bound(*args, **kwargs) if method is None else method(self, *args, **kwargs)

    body = {"forward": forward, "moefx_signature": _with_keywords(signature, extra)}
    model._modules[INSIDE] = routing.router
    model.__dict__.pop("forward", None)
    model.__class__ = type(
        cls.__name__, (cls,), {**body, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    )
    try:
        yield
    finally:
        model.__class__ = cls
        del model._modules[INSIDE]
        if hiding is not None:
            model.__dict__["forward"] = hiding


def _read(named: dict[str, Any], names: Iterable[str], ids: str) -> dict[str, Tensor]:
    """Those tensors of a call that a router with arguments `names` is given; of masks only one of tokens."""
    found = {}
    for name in names:
        given = named.get(ids if name == "input_ids" else name)
        if isinstance(given, Tensor) and (name != "attention_mask" or given.dim() == 2):
            found[name] = given
    return found


def _with_keywords(own: inspect.Signature, extra: tuple[str, ...]) -> inspect.Signature:
    """A forward's signature with keyword arguments that it does not have."""
    parameters = list(own.parameters.values())
    keywords = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in extra]
    at = len(parameters) - bool(parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return own.replace(parameters=[*parameters[:at], *keywords, *parameters[at:]])


def check_vocabulary(routing: Routing, model: nn.Module, named: dict[str, Any]) -> None:
    """Raise `InputError` for token ids that the router does not know; warn when it was made for another vocabulary."""
    ids, check = named.get(routing.ids), getattr(routing.router, "check_ids", None)
    if isinstance(ids, Tensor) and check is not None:
        check(ids)
    mine, theirs = (getattr(getattr(m, "config", None), "vocab_size", None) for m in (routing.router, model))
    if isinstance(mine, int) and isinstance(theirs, int) and mine != theirs:
        warnings.warn(
            f"the router has a vocabulary of {mine} token ids, the model of {theirs}: both must use one tokenizer",
            stacklevel=3,
        )


def compare_prefixes(
    logits: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor], lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Logits at the last token of prefixes, with the whole window and with the prefix alone: float64 [B, n, E] each.

    `inputs` are what the router reads, [B, S] each; they are cut to each length.
    """
    S = inputs["input_ids"].shape[1]
    with torch.no_grad():
        whole = logits(inputs)[:, [n - 1 for n in lengths]]
        cut = [{k: v[:, :n] if v.dim() > 1 and v.shape[1] == S else v for k, v in inputs.items()} for n in lengths]
        alone = torch.stack([logits(c)[:, -1] for c in cut], 1)
    return whole.double(), alone.double()


def check_causal(routing: Routing, named: dict[str, Any]) -> None:
    """Raise `InputError` (or warn, with `causal=False`) when the routing of a token changes with tokens behind it.

    `moefx.grouter.prefix_consistency` measures the same more finely, on any router and ids.
    """
    inputs = routing.inputs(named)
    ids = inputs.get("input_ids")
    if ids is None or ids.dim() != 2 or ids.shape[1] < 2:
        return
    S = ids.shape[1]
    with compat.no_fake():
        lengths = sorted({1, S // 3 or 1, S // 2, S - 1})
        whole, alone = compare_prefixes(lambda cut: routing.router(**cut), inputs, lengths)
    gap = float((whole - alone).abs().max())
    if gap <= TOLERANCE * float(whole.abs().max()):
        return
    what = f"the routing of a token depends on tokens behind it (logits change by {gap:.2g} when they are cut off)"
    if routing.causal:
        raise InputError(
            what,
            where=type(routing.router).__qualname__,
            why="a language model trained so is told about the tokens that it is to predict, and loses that when it "
            "generates",
            todo="build the router with causal=True; moefx.Routing(router, causal=False) accepts it as it is",
        )
    warnings.warn(f"{what}: report losses with routing of prefixes alone as well", FutureTokensWarning, stacklevel=3)


def mark_layout(gm: fx.GraphModule, values: list[Any], names: dict[str, str], ids: str) -> None:
    """Note at the marker in which order the rows of the experts' inputs are: "batch" for b*S+s, "sequence" for s*B+b.

    By trial: another first sequence changes exactly the rows that belong to it. Raises `InputError` for other orders.
    """
    (marker,) = find(gm.graph, token_route)
    _check_experts(gm, marker, values)
    B, S = (compat.size_hint(n) for n in value(marker.args[0][0]).shape[-3:-1])  # type: ignore[index, arg-type]
    experts = find(gm.graph, torch.ops.moefx.experts)
    at = next((i for i, n in enumerate(gm.graph.find_nodes(op="placeholder")) if names.get(n.name) == ids), None)
    marker.meta["moefx_layout"] = "batch"
    if B == 1 or S == 1 or not experts or at is None:
        return
    x: fx.Node = experts[0].args[0]  # type: ignore[assignment]
    other = list(values)
    other[at] = values[at].clone()
    other[at][0] = (
        other[at][0].flip(0).roll(1) if not bool((values[at][0] == values[at][0, 0]).all()) else values[at][1]
    )
    was, now = (values_of(gm, [_own(v) for v in vs], [x])[x] for vs in (values, other))
    moved = (was != now).flatten(1).any(1)
    rows = torch.arange(B * S, device=moved.device)
    changed = values[at][0] != other[at][0]
    first = int(changed.nonzero()[0]) if bool(changed.any()) else S
    for layout, b, s in (("batch", rows // S, rows % S), ("sequence", rows % B, rows // B)):
        if len(moved) == B * S and not bool(moved[b != 0].any()) and bool(moved[(b == 0) & (s == first)].all()):
            marker.meta["moefx_layout"] = layout
            return
    raise InputError(
        f"the rows of the experts' input are not the {B} x {S} tokens of {ids!r} in order",
        why=f"with another first sequence, rows {moved.nonzero().flatten().tolist()[:8]} of {len(moved)} changed",
        todo="routing by token ids needs one row per token, batch-major or sequence-major",
    )


def _check_experts(gm: fx.GraphModule, marker: fx.Node, values: list[Any]) -> None:
    """Precomputed choices of the example must be experts of every layer, k different ones per token."""
    source: Any = marker.args[0][0]  # type: ignore[index]
    if value(source).is_floating_point():
        return
    while isinstance(source, fx.Node) and source.op != "placeholder" and source.args:
        source = source.args[0]
    idx = dict(zip(gm.graph.find_nodes(op="placeholder"), values, strict=True)).get(source)
    if not isinstance(idx, Tensor) or not idx.numel():
        return
    E = min((int(value(n.args[3][0]).shape[0]) for n in find(gm.graph, torch.ops.moefx.experts)), default=None)  # type: ignore[index, arg-type]
    low, high = int(idx.min()), int(idx.max())
    if low < 0 or (E is not None and high >= E):
        raise InputError(
            f"routing_idx holds experts {low} to {high}, a layer has {E}",
            todo="give routing that was computed for this number of experts",
        )
    if bool((idx.sort(-1).values.diff(dim=-1) == 0).any()):
        raise InputError("routing_idx gives a token one expert twice", todo="give k different experts for each token")


def _own(v: Any) -> Any:
    return v.clone() if isinstance(v, Tensor) else v


__all__ = ["FutureTokensWarning", "Precomputed", "Routing", "as_routing", "check_causal", "mark_layout", "routed"]
