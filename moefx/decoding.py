"""`generate` of a model that is routed by token ids: the original's code and cache, with the router's experts.

Graphs take no key-value cache, so that `generate` runs the original's modules. While it does, what every MoE layer's
experts are called with is replaced by the decision of the router of token ids, which is run on the same window of
tokens with a cache of its own. The cache is found by content: a row is continued from the row whose tokens begin it,
whatever the search did to the order of the rows.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .capture import warm_up
from .errors import InputError
from .graph.routed import RoutedLayer
from .passes.raise_experts import is_interface, raised, to_observe
from .raising.probe import observed, undisturbed
from .routing import Precomputed, Routing, check_causal

Tensor = torch.Tensor
PREPARE = "prepare_inputs_for_generation"
# Arguments of a hand-written generate's forward that do not hide tokens that the router has to read.
PLAIN = frozenset({"position_ids", "attention_mask", "document_ids", "labels", "targets"})


def routed_method(opt: Any, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """`generate` of the original with the routing of `opt`; other ways of generating are refused."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        where = f"{type(opt.original).__qualname__}.{name}"
        if name != "generate":
            raise InputError(
                f"{name} does not decode with the router of token ids",
                where=where,
                why="it packs sequences into one row, and the router reads rows",
                todo="use opt.generate(...), or opt.original for the model with its own routers",
            )
        with routed_original(opt, _call_of(opt, args, kwargs, where), where) as state:
            if state.by_transformers:
                kwargs = _refused(kwargs, where)
            return method(*args, **kwargs)

    return run


def _call_of(opt: Any, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> dict[str, Any]:
    """The prompt as arguments of the model's forward: token ids and, where given, their mask."""
    name, mask = opt.options.routing.ids, kwargs.get("attention_mask")
    ids = kwargs.get(name, kwargs.get("inputs", args[0] if args else None))
    if (
        not isinstance(ids, Tensor)
        or ids.dim() != 2
        or ids.is_floating_point()
        or kwargs.get("inputs_embeds") is not None
    ):
        raise InputError(
            "generate was not given token ids [B, S] alone",
            where=where,
            why="the experts of a token are chosen from the ids of the tokens up to it",
            todo=f"give the prompt as {name}",
        )
    for other in ("position_ids", "document_ids"):
        if kwargs.get(other) is not None:
            raise InputError(
                f"generate was given {other}",
                where=where,
                why="a cache of the router holds one document per row, counted from its first token",
                todo="leave it out, and mask padding with attention_mask",
            )
    return {name: ids} if mask is None else {name: ids, "attention_mask": mask}


def _refused(kwargs: dict[str, Any], where: str) -> dict[str, Any]:
    """Arguments of transformers' generate, with compilation switched off; raises for what is not possible."""
    config = kwargs.get("generation_config")
    asked = {n: kwargs.get(n, getattr(config, n, None)) for n in ("custom_generate", "cache_implementation")}
    if asked["custom_generate"] is not None or asked["cache_implementation"] == "paged":
        what = "a custom_generate" if asked["custom_generate"] is not None else "a paged cache"
        raise InputError(
            f"generate with {what} does not decode with the router of token ids",
            where=where,
            todo="leave it out, or use opt.original for the model with its own routers",
        )
    return {**kwargs, "disable_compile": True}  # a compiled forward would keep the routing of its first window


@contextlib.contextmanager
def routed_original(opt: Any, call: dict[str, Any], where: str) -> Iterator[Decoding]:
    """While active, the original's forward routes by token ids.

    Args:
        call: token ids and mask of a call, for what has to be found out by one.

    Raises:
        InputError: the model, the router or the way of generating does not allow it.
    """
    model, routing = opt.original, opt.options.routing
    layers = _layers(opt, routing, call, where)
    state = Decoding(model, routing, layers, opt.tensors(), where)
    with contextlib.ExitStack() as undo:
        by_hand = {p for p in layers if not is_interface(model.get_submodule(p))}
        if by_hand:
            with observed(to_observe(model)) as calls, undisturbed(model):
                warm_up(model, (), call)
            blocks = undo.enter_context(raised(model, calls=calls, experts=state.at_block))
            if left := by_hand - {b.path for b in blocks if b.raised and b.raising is not None}:
                raise _undecodable(where, min(left), "its experts were found in the graph, not as a module that runs")
        for path in layers.keys() - by_hand:
            hook = functools.partial(state.at_interface, layers[path])
            undo.callback(model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True).remove)
        undo.enter_context(state.installed())
        yield state


def _layers(opt: Any, routing: Routing, call: dict[str, Any], where: str) -> dict[str, RoutedLayer]:
    """The routed layers by the path of their experts, as a compiled variant knows them."""
    if isinstance(routing.router, Precomputed):
        raise InputError(
            "a model with precomputed routing cannot generate",
            where=where,
            why="the routing of tokens that are not there yet is not known",
            todo="optimize the model with the Grouter that the routing was computed with",
        )
    if not routing.causal:
        check_causal(replace(routing, causal=True), call)
    variants = [v for v in opt.variants() if v.routed]
    if not variants:
        with torch.no_grad():
            variants = [opt.prepare((), call)[0]]
    mode = "train" if opt.training else "eval"
    chosen = next((v for v in variants if v.signature["mode"] == mode), variants[0])
    known, found = opt.tensors(), dict[str, RoutedLayer]()
    for layer in chosen.routed:
        reads = {n for rows in (layer.logits, layer.scale) if rows is not None for n in rows.names}
        if layer.refused or not reads <= known.keys():
            raise _undecodable(where, layer.path, layer.refused or "the logits of its router are made of other inputs")
        if found.setdefault(layer.path, layer).facts != layer.facts:
            raise _undecodable(where, layer.path, "it is called in several ways")
    return found


def _undecodable(where: str, path: str, why: str) -> InputError:
    return InputError(
        "this model cannot generate with the router of token ids",
        where=f"{where}, {path}",
        why=why,
        todo="call the optimized model on the whole sequence for every new token",
    )


class Decoding:
    """The routing of the window of tokens that the original's forward is run on."""

    def __init__(
        self,
        model: nn.Module,
        routing: Routing,
        layers: dict[str, RoutedLayer],
        tensors: Mapping[str, Tensor],
        where: str,
    ) -> None:
        self.model, self.routing, self.layers, self.tensors, self.where = model, routing, layers, tensors, where
        self.by_transformers = hasattr(model, PREPARE)
        self.k = max(layer.k for layer in layers.values())
        self.prefixes = Prefixes(routing)
        self.window: Tensor | None = None  # ids of the forward that is prepared or runs
        self.logits: Tensor | None = None
        self.choices: tuple[Tensor, Tensor] | None = None
        self.called = set[str]()
        self.longest = 0

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Note each window where it is prepared, and hand its routing to the forward."""
        model, own = self.model, self.model.__dict__.get(PREPARE)
        handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end),
        ]
        if self.by_transformers:
            object.__setattr__(model, PREPARE, self._prepared(getattr(model, PREPARE)))
        try:
            yield
        finally:
            for h in handles:
                h.remove()
            if self.by_transformers:
                model.__dict__.pop(PREPARE, None)
                if own is not None:
                    model.__dict__[PREPARE] = own

    def _prepared(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(prepare)
        def run(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            inputs = prepare(input_ids, *args, **kwargs)
            window, mask = inputs.get(self.routing.ids), kwargs.get("attention_mask")
            if not isinstance(window, Tensor):
                raise InputError(
                    f"generate runs the model without {self.routing.ids!r}",
                    where=self.where,
                    why=f"it has {', '.join(k for k, v in inputs.items() if v is not None)}",
                    todo="give the prompt as token ids; moefx.Routing(..., ids=...) names them",
                )
            whole = self._whole(input_ids, window.shape[1], kwargs.get("past_key_values"))
            if mask is not None and mask.shape != whole.shape:
                raise InputError(
                    f"an attention mask {tuple(mask.shape)} for {tuple(whole.shape)} tokens",
                    where=self.where,
                    todo="mask every token since the first, as transformers does",
                )
            self._route(whole, mask, window)
            return inputs

        return run

    def _whole(self, ids: Tensor, count: int, cache: Any) -> Tensor:
        """All tokens up to the end of a window of `count`: `ids`, or those of a window behind what the cache holds."""
        past = cache.get_seq_length() if ids.shape[1] == count and hasattr(cache, "get_seq_length") else 0
        known = self.prefixes.ids
        if not past:
            return ids
        if known is None or known.shape != (len(ids), past):
            raise InputError(
                f"generate goes on from a cache of {int(past)} tokens that are not given",
                where=self.where,
                why="the router has to read every token since the first",
                todo="give the whole sequence as input_ids, beside past_key_values",
            )
        return torch.cat((known.to(ids.device), ids), 1)

    def _route(self, whole: Tensor, mask: Tensor | None, window: Tensor) -> None:
        self.window, self.choices = window, None
        self.logits = self.prefixes.logits(whole, mask, window.shape[1])

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(type(self.model).forward).parameters)[1:]
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        ids = named.get(self.routing.ids)
        if not isinstance(ids, Tensor):
            raise InputError("the forward was called without token ids", where=self.where, todo="give input_ids")
        if not self.by_transformers:
            self._alone(named, ids)
        elif self.window is None or ids.shape != self.window.shape or not torch.equal(ids, self.window.to(ids.device)):
            raise InputError(
                f"generate calls the model without {PREPARE}",
                where=self.where,
                why="which tokens a window continues is not known",
                todo="leave out what makes it do so (an assistant, a custom loop)",
            )
        self.called.clear()

    def _alone(self, named: dict[str, Any], ids: Tensor) -> None:
        """A call by a generate that is not transformers': only whole sequences, without a cache, are understood."""
        odd = [n for n, v in named.items() if v is not None and v is not False and n not in {*PLAIN, self.routing.ids}]
        if odd or ids.shape[1] < self.longest:
            raise _undecodable(
                self.where,
                type(self.model).__qualname__,
                f"its generate passes {', '.join(odd)}"
                if odd
                else "its generate runs windows behind a cache of its own",
            )
        self.longest = ids.shape[1]
        mask = named.get("attention_mask")
        self._route(ids, mask if isinstance(mask, Tensor) and mask.dim() == 2 else None, ids)

    def _end(self, *_: Any) -> None:
        self.window = None
        if left := self.layers.keys() - self.called:
            raise _undecodable(self.where, min(left), "the forward of the original did not call its experts here")

    # --- what experts are called with

    def at_interface(
        self, layer: RoutedLayer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before experts of transformers run: their own arguments, hidden states aside, replaced."""
        names = list(inspect.signature(type(module).forward).parameters)[1:4]
        x, idx, w = (args[i] if i < len(args) else kwargs[n] for i, n in enumerate(names))
        return (x, *self._decide(layer, x, idx, w)), {k: v for k, v in kwargs.items() if k not in names}

    def at_block(self, path: str) -> Callable[..., Tensor]:
        """What a hand-written block calls in the place of `moefx.experts`."""

        def routed_experts(x: Tensor, idx: Tensor, w: Tensor, weights: list[Tensor], spec: str) -> Tensor:
            if path in self.layers:
                idx, w = self._decide(self.layers[path], x, idx, w)
            out: Tensor = torch.ops.moefx.experts(x, idx, w, weights, spec)
            return out

        return routed_experts

    def _decide(self, layer: RoutedLayer, x: Tensor, idx: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and weights [T, k] of the window, in the dtypes of the layer's own `idx` and `w`."""
        if self.logits is None:
            raise InputError("experts ran outside of the model's forward", where=f"{self.where}, {layer.path}")
        self.called.add(layer.path)
        if self.choices is None:
            bias = getattr(self.routing.router, "selection_bias", None)
            chosen = (self.logits if bias is None else self.logits + bias).topk(self.k, -1).indices
            self.choices = chosen, self.logits.gather(-1, chosen)
        B, S, _ = self.logits.shape
        if idx.shape != (B * S, layer.k) or x.shape[:-1] != (B * S,):
            raise _undecodable(self.where, layer.path, f"its routing is {tuple(idx.shape)} for {B} x {S} tokens")
        given, logits = (layer.rows(t[..., : layer.k]).to(w.device) for t in self.choices)
        r = self.routing
        made = layer.weights(x, given, logits, r.normalise, r.gates, self.tensors)
        return given.to(idx.dtype), made.to(w.dtype)


class Prefixes:
    """Logits of the router for the last tokens of sequences, each continued from one that it has read."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self.router: Any = routing.router
        self.ids: Tensor | None = None  # [B, P] that the cache holds
        self.mask: Tensor | None = None
        self.cache: Any = None

    @torch.no_grad()
    def logits(self, ids: Tensor, mask: Tensor | None, last: int) -> Tensor:
        """fp32 [B, last, E] of the last tokens of ids [B, N], with `mask` [B, N] of all of them or None."""
        tensors = [*self.router.parameters(), *self.router.buffers()]
        self.routing.check_ids(ids)
        ids = ids.to(tensors[0].device) if tensors else ids
        mask = None if mask is None else mask.to(ids)
        if not hasattr(self.router, "step"):  # any function of token ids: without a cache
            named = {self.routing.ids: ids} if mask is None else {self.routing.ids: ids, "attention_mask": mask}
            whole: Tensor = self.router(**self.routing.inputs(named))
            self.ids = ids
            return whole[:, -last:].detach()
        kept = torch.ones_like(ids) if mask is None else mask
        rows = self._continued(ids, kept, last)
        if rows is None:
            self.cache = self.router.new_cache()
            old = 0
        else:
            old = len(self.cache)
            if not torch.equal(rows, torch.arange(len(self.ids if self.ids is not None else ()), device=rows.device)):
                self.cache.select(rows)
        self.ids, self.mask = ids.clone(), kept.clone()
        out: Tensor = self.router.step(ids[:, old:], self.cache, kept[:, old:])
        return out[:, -last:]

    def _continued(self, ids: Tensor, mask: Tensor, last: int) -> Tensor | None:
        """int [B]: for each sequence one that the cache holds and that begins it; None where there is none for one."""
        if self.ids is None or self.mask is None:
            return None
        P = self.ids.shape[1]
        if ids.shape[1] - P < last:
            return None
        begin, kept = ids[:, :P], mask[:, :P]
        if begin.shape == self.ids.shape and torch.equal(begin, self.ids) and torch.equal(kept, self.mask):
            return torch.arange(len(ids), device=ids.device)
        same = torch.stack([((self.ids == b) & (self.mask == m)).all(1) for b, m in zip(begin, kept, strict=True)])
        return same.int().argmax(1) if bool(same.any(1).all()) else None
