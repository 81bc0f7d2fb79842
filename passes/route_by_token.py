"""Every MoE layer is routed by the router of token ids that the graph computes; the layers' own routers go."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from moefx import compat
from moefx.dialect.route import RouteSpec, write_gates, write_scores, write_weights
from moefx.errors import InputError, PassError
from moefx.graph.edit import arguments, find, module_path, origin, outputs, place, same_sizes, value
from moefx.graph.effects import erase_unread, name_of
from moefx.graph.removal import downstream, take_out
from moefx.graph.routed import RoutedLayer, routed_layer
from moefx.graph.router import PRODUCTS, computed_again, route_of
from moefx.graph.tokens import Tokens
from moefx.manager import Context, Pass
from moefx.routing import FutureTokensWarning, check_choice

ops = torch.ops.moefx
Tensor = torch.Tensor
# What is left of the layers' own routers, for losses, which need to know them.
KEPT = {"router": "and its own routers are gone", "layer": "and its own routers only weigh what these choose"}


@dataclass(frozen=True)
class RouteByToken(Pass):
    """Put the choice (and with gates="router" the weights) of `moefx.token_route` in the place of every layer's own.

    The k best experts are chosen once, for the largest k of the layers; layers with a smaller k take the first of them.
    What was computed from the old logits besides, an auxiliary or z loss, is taken out of the sum that it was added to;
    where the model returns the logits themselves it returns the router's. `optimize(router=...)` puts the pass in.

    In which order the rows of the layers are is found by trial on the example inputs (`moefx.graph.tokens`). Where that
    is not known, where rows do not depend on the token that they are routed by (a warning with `causal=False` and for
    precomputed routing), and where precomputed choices of the example are no experts of a layer, it is an `InputError`.
    """

    requires: ClassVar[set[str]] = {"routers_raised"}
    provides: ClassVar[set[str]] = {"routed_by_token"}
    numerics: ClassVar[str] = "changes"

    gates: str = "router"
    scale: float | None = None
    normalise: str = "softmax"
    causal: bool = True

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        markers = find(graph, ops.token_route)
        if not markers:
            return  # no router was captured, or it has been read already
        if odd := find(graph, ops.expert_choice):
            raise _error(odd[0], "experts that choose their tokens cannot be routed by token", "leave router= out")
        layers, old = _layers(graph), list[fx.Node]()
        tokens, noted = _tokens(graph, layers), graph.output_node().meta
        layout = _layout(tokens, markers[0])
        self._check_shift(tokens, precomputed=not value(arguments(markers[0])["given"][0]).is_floating_point())
        noted["moefx_routed"] = self._noted(graph, layers, layout)
        source = _Source(graph, markers[0], self, max(layer.k for layer in layers), layout)
        if source.ready:
            noted["moefx_chosen_from"] = [layer.E for layer in layers]
            _check_precomputed(tokens, source, [layer.E for layer in layers])
        for n, layer in enumerate(layers):
            ctx.node = layer.experts
            idx, w = self._new(source, layer, n)
            for mine, theirs in ((layer.idx, idx), (layer.w, w)):
                mine.replace_all_uses_with(theirs, delete_user_cb=lambda u: u not in source.made)
            old += [*layer.old, *(n for node in layer.old for n in computed_again(node))]
            ctx.matched(layer.experts)
            if layer.spec is None:
                where = module_path(layer.experts) or layer.experts.name
                ctx.row.notes.append(
                    f"{where}: its own router has no normal form (see raise_routers); what it did besides choosing k "
                    "experts and weighing them, as dropping choices beyond a capacity, is gone"
                )
        ctx.node = None
        for experts in find(graph, ops.experts):
            experts.meta["moefx_by_token"] = f"the model is routed by token ids, {KEPT[self.gates]}"
        for where in take_out(graph, old, source.made, lambda node, i: _returned(node, i, source)):
            ctx.row.notes.append(f"what old routers added at {where} is no longer added")
        source.marker.replace_all_uses_with(source.given[0])
        erase_unread(graph)

    def _check_shift(self, tokens: Tokens, precomputed: bool) -> None:
        """A row that does not depend on its own token is there to predict it, and would be routed by it."""
        x = tokens.layers[0]
        if not tokens.shifted(x):
            return
        what = "the model shifts its tokens: a row in front of the experts does not depend on the token it is routed by"
        if self.causal and not precomputed:
            raise InputError(
                what,
                where=place(x) or None,
                why="another token changes later rows and not its own, which is then there to predict it and would be "
                "told by its routing",
                todo="shift the ids before the call, so that the router reads what the model reads; "
                "moefx.Routing(router, causal=False) accepts it as it is",
            )
        warnings.warn(f"{what}: see that the routing was made of shifted ids", FutureTokensWarning, stacklevel=2)

    def _noted(self, graph: fx.Graph, layers: list[_Layer], layout: str) -> list[RoutedLayer]:
        """The layers as decoding needs to know them."""
        found = []
        for experts in find(graph, ops.experts):
            idx = arguments(experts)["idx"]
            layer = next((n for n in layers if n.experts is experts or n.route is route_of(idx)), None)
            layer = layer or next(n for n in layers if idx in downstream(graph, [n.idx], but=_floating(graph)))
            found.append(routed_layer(
                experts, layer.idx, layer.w, None if layer.spec is None else layer.route, factor=self.scale,
                gates=self.gates, sequence_major=layout == "sequence",
            ))  # fmt: skip
        return found

    def _new(self, source: _Source, layer: _Layer, n: int) -> tuple[fx.Node, fx.Node]:
        idx = source.idx(layer, n)
        if self.gates == "router":
            own = 1.0 if layer.spec is None else layer.spec.factor
            factor = own if self.scale is None else self.scale
            w = source.gates(layer, n, factor)
            if layer.spec is not None and layer.spec.per_expert:  # no part of the router: it scales outputs
                call = source.at(layer.route)
                w = call(torch.mul, w, call(compat.getitem, arguments(layer.route)["scale"], idx))
            return idx, w
        if layer.spec is None:
            raise _error(
                layer.experts,
                "the layer's own router has no normal form that could weigh given experts",
                "use gates='router'; the report's raise_routers row says what the router is",
            )
        a, call = arguments(layer.route), source.at(layer.route)
        logits = a["logits"]
        scores = write_scores(call, layer.spec, logits, value(logits).dtype)
        start = call(torch.gather, scores, -1, idx)
        return idx, write_weights(call, layer.spec, start, idx, a["scale"])


@dataclass
class _Layer:
    """The routing of one `moefx.experts` call or one raised router: what is to be replaced, and what it was."""

    experts: fx.Node  # where errors point
    idx: fx.Node
    w: fx.Node
    E: int
    route: fx.Node
    spec: RouteSpec | None
    old: list[fx.Node]

    @property
    def k(self) -> int:
        return int(value(self.idx).shape[-1])


def _layers(graph: fx.Graph) -> list[_Layer]:
    """Raised routers, and the operands of experts whose router was not raised, in graph order."""
    found = list[_Layer]()
    for route in find(graph, ops.route):
        a, outs = arguments(route), outputs(route)
        spec = RouteSpec.parse(a["spec"])
        if 1 in outs and 2 in outs:
            E = int(value(a["logits"]).shape[-1])
            found.append(_Layer(route, outs[1], outs[2], E, route, spec, [*_back_to_product(a["logits"], E), route]))
    fed = downstream(graph, [layer.idx for layer in found], but=_floating(graph))
    for experts in find(graph, ops.experts):
        a = arguments(experts)
        if a["idx"] not in fed:
            E = int(value(a["weights"][0]).shape[0])
            old = [*_back_to_product(a["w"], E), a["idx"], a["w"]]
            found.append(_Layer(experts, a["idx"], a["w"], E, experts, None, old))
    loose = [p for p in find(graph, ops.plan) if p.args[0] not in fed]
    if loose or not found:
        raise _error(
            loose[0] if loose else graph.output_node(),
            "an MoE layer keeps its own router, which was not raised" if loose else "there is no router to replace",
            "see the report's raise_routers row for the reason",
        )
    return sorted(found, key=lambda layer: layer.experts)


def _tokens(graph: fx.Graph, layers: list[_Layer]) -> Tokens:
    """What is known of the rows of all experts, or of the routers where no experts are `moefx.experts`."""
    experts = [arguments(n)["x"] for n in find(graph, ops.experts)]
    tokens = Tokens(graph, experts or [arguments(layer.route)["logits"] for layer in layers])
    stacks = {tokens.stack(x): x for x in tokens.layers}
    if tokens.two_stacks and {"encoder", "decoder"} <= stacks.keys():
        raise _error(
            stacks["decoder"],
            "encoder and decoder have MoE layers, and one routing of token ids is that of one of them",
            "routing by token ids is for models with one sequence of tokens",
        )
    return tokens


def _layout(tokens: Tokens, marker: fx.Node) -> str:
    """The order of the rows, "batch" (b*S+s) or "sequence" (s*B+b)."""
    B, S = (compat.size_hint(n) for n in value(arguments(marker)["given"][0]).shape[-3:-1])
    if B == 1 or S == 1:
        return "batch"  # both are the same
    x = tokens.layers[0]
    if (layout := tokens.layout(x)) is None:
        read = ", ".join(name for name, n in tokens.inputs.items() if n in tokens.sources(x))
        raise InputError(
            f"the order of the rows in front of the experts is not known, for {B} sequences of {S} tokens",
            where=place(x) or None,
            why=f"with other tokens in the first sequence ({read}) no rows change, or others than its own in "
            "batch-major or sequence-major order"
            if read
            else "no input of the graph has a token for each row",
            todo="routing by token ids needs one row per token, b * S + s or s * B + b",
        )
    return layout


def _check_precomputed(tokens: Tokens, source: _Source, experts: list[int]) -> None:
    """As many layers as experts were chosen for, and choices of the example that these layers have."""
    given = value(source.given[0])
    if source.per_layer and given.shape[0] != len(experts):
        raise InputError(
            f"routing_idx holds the choices of {given.shape[0]} layers, the model has {len(experts)} MoE layers",
            where=f"routing_idx {tuple(given.shape)}",
            todo="give routing [L, B, S, k] of all L layers in order, or [B, S, k] for all of them",
        )
    idx = tokens.call.named.get("routing_idx") if tokens.call is not None else None
    if idx is not None:
        check_choice(idx, experts)


def _floating(graph: fx.Graph) -> set[fx.Node]:
    return {n for n in graph.nodes if isinstance(value(n), Tensor) and value(n).is_floating_point()}


def _back_to_product(logits: fx.Node, E: int) -> set[fx.Node]:
    """The forms that the logits had since the product that made them: before a cast, a bias, a cap."""
    stack, found = [logits], set[fx.Node]()
    while stack:
        n = stack.pop()
        val = value(n)
        if n in found or n.op == "placeholder" or not isinstance(val, Tensor) or val.dim() < 2:
            continue
        if not same_sizes(val.shape[-1:], (E,)):
            continue
        found.add(n)
        if name_of(n) not in PRODUCTS:
            stack += n.all_input_nodes
    return found


class _Source:
    """The nodes made of `token_route`: one choice, its gates by k, and their forms for the layers' rows."""

    def __init__(self, graph: fx.Graph, marker: fx.Node, options: RouteByToken, k: int, layout: str) -> None:
        self.graph, self.marker, self.options = graph, marker, options
        self.given: list[fx.Node] = list(arguments(marker)["given"])
        self.made = set[fx.Node]()
        self.cache: dict[tuple[Any, ...], fx.Node] = {}
        self.sequence_major = layout == "sequence"
        self.ready = not value(self.given[0]).is_floating_point()
        self.experts = None if self.ready else int(value(marker).shape[-1])
        self.last = marker
        self.k = int(value(self.given[0]).shape[-1]) if self.ready else k
        self.per_layer = self.ready and value(self.given[0]).dim() == 4
        call = self.at(None)
        if self.ready:
            self.choice, self.logits = self.given
            if self.k < k:
                raise _error(marker, f"the routing has {self.k} experts per token, a layer has {k}", "store more")
            return
        biased = call(torch.add, marker, self.given[1]) if len(self.given) > 1 else marker
        if self.experts is not None and k > self.experts:
            raise _error(marker, f"a layer takes {k} experts per token of the router's {self.experts}", "expand it")
        self.choice = call(compat.getitem, call(torch.topk, biased, k, -1), 1)
        self.logits = call(torch.gather, marker, -1, self.choice)

    def at(self, node: fx.Node | None) -> Callable[..., fx.Node]:
        """A `call` that inserts in front of a node, or behind what was made so far; the nodes are remembered."""

        def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            place = self.graph.inserting_after(self.last) if node is None else self.graph.inserting_before(node)
            with place:
                if isinstance(target, str):
                    new = self.graph.call_method(target, args, kwargs)
                else:
                    new = self.graph.call_function(target, args, kwargs)
            new.meta = origin(node or self.marker)
            self.made.add(new)
            if node is None:
                self.last = new
            return new

        return call

    def _once(self, key: tuple[Any, ...], make: Callable[[], fx.Node]) -> fx.Node:
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def idx(self, layer: _Layer, n: int) -> fx.Node:
        """The layer's experts, in the shape and integer type of its own idx."""
        if self.experts is not None and self.experts != layer.E:
            todo = "moefx.grouter.fold or moefx.grouter.expand gives a router for this number"
            raise _error(layer.experts, f"the router has {self.experts} experts, the layer has {layer.E}", todo)
        return self._shaped("idx", self.choice, layer, n, value(layer.idx), lambda t, _: t)

    def gates(self, layer: _Layer, n: int, factor: float) -> fx.Node:
        """The layer's weights, in the shape and dtype of its own."""
        call = self.at(None)

        def normalised(t: fx.Node, of: fx.Node) -> fx.Node:
            if not self.ready:
                w: fx.Node = write_gates(call, t, self.options.normalise, factor)
                return w
            t = call("to", t, torch.float32)
            if self.k > layer.k:  # fewer experts share what all have together: the scale that gates were made with
                total = call(torch.sum, call("to", of, torch.float32), -1, keepdim=True)
                kept = call("clamp_min", call(torch.sum, t, -1, keepdim=True), torch.finfo(torch.float32).tiny)
                t = call(torch.mul, t, call(torch.div, total, kept))
            return t if factor == 1 else call(torch.mul, t, factor)

        return self._shaped(f"gates {factor}", self.logits, layer, n, value(layer.w), normalised)

    def _shaped(
        self, what: str, source: fx.Node, layer: _Layer, n: int, like: Tensor, make: Callable[..., fx.Node]
    ) -> fx.Node:
        call, flat, own = self.at(None), like.dim() == 2, n if self.per_layer else None
        rows = value(self.given[0]).shape[-3:-1]
        tokens = (rows[0] * rows[1],) if flat else rows[::-1] if self.sequence_major else rows
        if like.dim() not in (2, 3) or not same_sizes(like.shape[:-1], tokens):
            raise _error(
                layer.experts,
                f"its routing has rows {tuple(like.shape[:-1])}, the token ids are {tuple(rows)}",
                "routing by token ids needs one row per token",
            )

        def build() -> fx.Node:
            whole = t = call(compat.getitem, source, own) if self.per_layer else source
            if layer.k < self.k:
                t = call(torch.narrow, t, -1, 0, layer.k)
            t = make(t, whole)
            if self.sequence_major:
                t = call(torch.transpose, t, 0, 1)
            t = call(torch.flatten, t, 0, 1) if flat else t
            return call("to", t, like.dtype)

        return self._once((what, layer.k, like.dtype, flat, own), build)


def _returned(node: fx.Node, i: int, source: _Source) -> fx.Node:
    """What stands for an output that was made of old logits: zero for a loss, the router's logits for logits."""
    val, call = value(node), source.at(None)
    if val.dim() == 0:
        return call(torch.zeros, (), dtype=val.dtype, device=val.device)
    logits = source.marker
    if not source.ready and val.dim() in (2, 3) and same_sizes(val.shape[-1:], value(logits).shape[-1:]):
        t = call(torch.transpose, logits, 0, 1) if source.sequence_major else logits
        return call("to", call(torch.flatten, t, 0, 1) if val.dim() == 2 else t, val.dtype)
    raise _error(
        node,
        f"output {i} of the model is made of logits of the replaced routers",
        "call the model so that it does not return them",
    )


def _error(node: fx.Node, what: str, todo: str) -> PassError:
    return PassError(what, where=place(node) or None, todo=todo)
