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
from torch import nn

from . import compat
from .dialect.token_route import token_route
from .errors import InputError

Tensor = torch.Tensor
GATES, LAYOUTS, NORMALISERS = ("router", "layer"), ("batch", "sequence"), ("softmax", "sigmoid")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
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
                    todo="give routing_idx and routing_gates with every call"
                    if name in self.extra
                    else "call the model with token ids (not embeddings), or name them: moefx.Routing(..., ids=...)",
                )
        return found

    def check(self, named: dict[str, Any]) -> None:
        """Raise `InputError` for a call, arguments by name, that has not what the router reads, or not in that form."""
        self.inputs(named)
        ids = named.get(self.ids)
        if isinstance(self.router, Precomputed):
            self.router.check(named, self.ids)
        elif isinstance(ids, Tensor) and ids.dim() != 2:
            raise InputError(
                f"the router takes token ids [sequences, tokens], the call has {self.ids} {tuple(ids.shape)}",
                where=type(self.router).__qualname__,
                why="which tokens make one sequence says what a token may be routed by",
                todo="call the model with ids [B, S], or give routing [1, T, k] for flat ids with moefx.Precomputed()",
            )

    def check_ids(self, ids: Any) -> None:
        """Raise `InputError` for token ids beyond the router's vocabulary, where it is one that has a `check_ids`.

        On a device nothing is looked at, which would wait for it: the embedding asserts there.
        """
        check = getattr(self.router, "check_ids", None)
        if check is not None and isinstance(ids, Tensor) and ids.device.type == "cpu":
            check(ids)

    @property
    def extra(self) -> tuple[str, ...]:
        """Keywords of a call that the router alone reads."""
        return tuple(getattr(self.router, "extra_inputs", ()))


class Precomputed(nn.Module):
    """Routing that was computed beforehand, as two more keyword arguments of every call of the optimized model.

    `routing_idx` [B,S,k] integer, different experts of a token in any order, and `routing_gates` [B,S,k] floating; or
    with a leading axis of MoE layers in both, [L,B,S,k]. Every expert is one of the layer's, 0 to E - 1: there are no
    dropped choices, and -1 is refused. Each call is checked (`check_choice`).
    """

    extra_inputs = ("routing_idx", "routing_gates")

    def forward(self, routing_idx: Tensor, routing_gates: Tensor) -> tuple[Tensor, Tensor]:
        """Both unchanged."""
        return routing_idx, routing_gates

    def check(self, named: dict[str, Any], ids: str) -> None:
        """Raise `InputError` when shapes and dtypes of a call's routing do not fit each other or its token ids.

        Args:
            named: arguments of the call by name.
            ids: the one that holds the token ids; a call need not have it.
        """
        idx, gates, tokens = (named.get(n) for n in (*self.extra_inputs, ids))
        given = {
            n: t for n, t in zip((*self.extra_inputs, ids), (idx, gates, tokens), strict=True) if isinstance(t, Tensor)
        }
        why = None
        if not isinstance(idx, Tensor) or not isinstance(gates, Tensor):
            why = "both must be tensors"
        elif idx.dim() not in (3, 4):
            why = "sequences, tokens and chosen experts take three axes, and layers a fourth"
        elif idx.shape != gates.shape:
            why = "both must have one shape"
        elif idx.dtype not in INTEGERS or not gates.is_floating_point():
            why = "indices must be integers, gates floating-point numbers"
        elif isinstance(tokens, Tensor) and tokens.dim() == 2 and tokens.shape != idx.shape[-3:-1]:
            why = "every token of the call needs its routing"
        if why is not None:
            raise InputError(
                "precomputed routing does not fit the call",
                where=", ".join(
                    f"{n} {str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for n, t in given.items()
                ),
                why=why,
                todo="give routing_idx and routing_gates [B, S, k], or with a leading axis of MoE layers",
            )


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
    """Raise `InputError` for token ids that the router does not know; see `fit_vocabulary` for those of the model."""
    routing.check_ids(named.get(routing.ids))
    fit_vocabulary(routing.router, vocabulary_of(model), stacklevel=4)


def vocab_size_of(model: nn.Module) -> int | None:
    """The number of token ids that a model says it accepts; None where it cannot be told."""
    config = getattr(model, "config", None)
    for holder in (config, getattr(config, "text_config", None), model):
        size = getattr(holder, "vocab_size", None)
        if isinstance(size, int):
            return size
    return None


def vocabulary_of(model: nn.Module) -> int | None:
    """The number of token ids that a model can be given: rows of its embedding; None where it cannot be told."""
    embedding = None
    with contextlib.suppress(NotImplementedError, AttributeError):  # of transformers, by a model without one
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    if isinstance(rows := getattr(embedding, "weight", None), Tensor) and rows.dim() == 2:
        return len(rows)
    if (size := vocab_size_of(model)) is not None:
        return size
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    return tables[0].num_embeddings if len(tables) == 1 else None  # of several, one may be of positions


def fit_vocabulary(router: nn.Module, size: int | None, stacklevel: int = 2) -> None:
    """See that a router (one whose `config` has a `vocab_size`, as a Grouter's) knows the token ids of a model.

    Args:
        size: of the model's vocabulary; None where it is not known, and nothing is looked at.

    Raises:
        InputError: the router knows fewer. More are a `UserWarning`: a router can be padded, or of another tokenizer.
    """
    known = getattr(getattr(router, "config", None), "vocab_size", None)
    if not isinstance(known, int) or size is None or known == size:
        return
    if known < size:
        raise InputError(
            f"the router knows {known} token ids, the model has {size}",
            where=type(router).__qualname__,
            why="a router of token ids and the model it routes must share a tokenizer",
            todo="distil a Grouter for the whole vocabulary of this model",
        )
    warnings.warn(
        f"the router has a vocabulary of {known} token ids, the model of {size}: both must use one tokenizer",
        stacklevel=stacklevel,
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


def check_choice(idx: Tensor, experts: Sequence[int]) -> None:
    """See that precomputed choices are experts of every layer, k different ones per token.

    On the CPU an `InputError` says what is wrong. On a device the check runs with the rest of the step, without waiting
    for it, and what is wrong stops the program there as `torch._assert_async` does.

    Args:
        idx: integer [B,S,k], for all layers, or [L,B,S,k].
        experts: [L] number of experts of each layer.

    Raises:
        InputError: an expert that is none of the layer's (-1 for a dropped choice, too), or is there twice.
    """
    parts = [(idx, min(experts))] if idx.dim() == 3 else list(zip(idx, experts, strict=True))
    for part_BSk, E in parts:
        if not part_BSk.numel() or part_BSk.is_meta:
            continue
        apart = part_BSk.sort(-1).values.diff(dim=-1) != 0
        if part_BSk.device.type != "cpu":
            torch._assert_async(((part_BSk >= 0) & (part_BSk < E)).all(), f"routing_idx: experts beyond 0 to {E - 1}")
            torch._assert_async(apart.all(), "routing_idx gives a token one expert twice")
            continue
        low, high = int(part_BSk.min()), int(part_BSk.max())
        if low < 0 or high >= E:
            raise InputError(
                f"routing_idx holds experts {low} to {high}, a layer has {E}",
                why="a choice that was dropped (-1) cannot be given" if low < 0 else None,
                todo="give routing that was computed for this number of experts",
            )
        if not bool(apart.all()):
            raise InputError(
                "routing_idx gives a token one expert twice", todo="give k different experts for each token"
            )


__all__ = ["FutureTokensWarning", "Precomputed", "Routing", "as_routing", "check_causal", "check_choice", "routed"]
