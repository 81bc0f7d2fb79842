"""Losses of routing become part of the model graph, before autograd sees it."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import fx

from moefx import compat
from moefx.dialect.glu import GluKind
from moefx.dialect.route import DTYPES, RouteSpec
from moefx.errors import CaptureError, InputError, PassError
from moefx.graph.edit import arguments, find, module_path, origin, place, targets, value
from moefx.graph.effects import name_of
from moefx.graph.removal import downstream
from moefx.graph.router import MOVES, computed_again, linear_weight, route_of
from moefx.graph.tokens import Tokens
from moefx.losses import BiasUpdate, Item, LoadBalance, Loss, RoutingMetrics, Taps
from moefx.manager import Context, Pass

ops = torch.ops.moefx


@dataclass(frozen=True)
class AddLosses(Pass):
    """Write each loss beside the layers that it reads, add their weighted sum to the model's loss, return the values.

    Runs where experts are expanded and routers are still `moefx.route`, which names the logits, the choice and how the
    router scores. The sum goes into the output called `loss`; a model without one gets it through `moefx.inject`, in
    the backward of its first differentiable output. Values of losses, metrics and counts become outputs of the graph
    behind the model's own ones; they have no gradient.

    Attributes:
        losses: what to add (`moefx.losses`).
        training: whether the graph is one that trains; else only metrics are written.
    """

    losses: tuple[Item, ...] = ()
    training: bool = True

    requires: ClassVar[set[str]] = {"routers_raised", "experts_expanded"}
    provides: ClassVar[set[str]] = {"losses_added"}
    numerics: ClassVar[str] = "changes"
    adds_outputs: ClassVar[bool] = True

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        out = graph.output_node()
        items = [i for i in self.losses if self.training or isinstance(i, RoutingMetrics)]
        if not items or "moefx_extras" in out.meta:
            return
        write = Writer(graph)
        layers = list(ctx.at(find(graph, ops.unpermute)))
        if not layers and find(graph, ops.experts):
            raise PassError(
                "experts are not expanded, and losses read them so", todo="put add_losses behind expand_experts"
            )
        if not layers:
            raise CaptureError(
                f"{', '.join(i.name for i in items)}: there is nothing to read, for no MoE layer was raised",
                why="the graph has no experts that moefx knows",
                todo="see docs/models.md for what is recognised, or leave losses out for this model",
            )
        tokens = Tokens(graph, [_experts_input(n) for n in layers])
        seen = [_rows(tokens, x, items) for x in ctx.at(tokens.layers)]  # trials run the graph as it was
        for ignored in dict.fromkeys(rows.ignored for rows in seen if rows.ignored):
            warnings.warn(f"losses and metrics of routing count masked tokens like all others: {ignored}", stacklevel=2)
        taps: list[Taps] = []
        parts: dict[str, list[Any]] = {item.name: [] for item in items}
        for node, own in zip(ctx.at(layers), seen, strict=True):
            with write.behind(node):
                tap = _taps(write, node, own)
                for item in items:
                    if (why := item.refuses(tap)) is not None:
                        raise _refused(item, node, why)
                    parts[item.name].append(item.local(tap))  # type: ignore[attr-defined]
            taps.append(tap)
            ctx.matched(node, f"{tap.path}: {', '.join(i.name for i in items)} of top-{tap.k} of {tap.experts} experts")
        try:
            for item in items:
                item.check(taps)
        except InputError as e:
            raise PassError(e.what, e.where, e.why, e.todo) from e
        with write.behind(layers[-1], last=True):
            _finish(write, items, parts, taps)
        write.sweep()
        out.meta["moefx_losses"] = [_row(item, taps) for item in items]


class Writer(fx.proxy.GraphAppendingTracer):
    """Writes torch calls on proxies into a graph; the nodes inherit the origin of the layer that they belong to."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph)
        self.anchor: fx.Node = graph.output_node()
        self.made: list[fx.Node] = []

    def behind(self, node: fx.Node, *, last: bool = False) -> Any:
        """Write directly behind a node, or in front of the graph's outputs."""
        self.anchor = node
        return self.graph.inserting_before(self.graph.output_node() if last else node.next)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A node with the origin of the anchor."""
        node = super().create_node(*args, **kwargs)
        node.meta = origin(self.anchor)
        self.made.append(node)
        return node

    def __call__(self, node: Any) -> Any:
        """A node as a proxy; None stays None."""
        return fx.Proxy(node, self) if isinstance(node, fx.Node) else node

    def sweep(self) -> None:
        """Take out what was written and is not read."""
        for node in reversed(self.made):
            if not node.users:
                self.graph.erase_node(node)


# --- what there is of a layer


@dataclass(frozen=True)
class Rows:
    """What the rows of a layer are: the mask [B, S] of its tokens, an input [B, S, ..] of them, and their order.

    `ignored` says why a mask that was given is none of these tokens.
    """

    chain: str
    mask: fx.Node | None
    tokens: fx.Node | None
    layout: str
    ignored: str | None


def _rows(tokens: Tokens, x: fx.Node, items: Sequence[Item]) -> Rows:
    """The order is looked for where something depends on it: trials run the model up to its first experts."""
    mask, ignored = tokens.mask(x)
    asked = any(getattr(i, "form", "") == "sequence" or getattr(i, "choices", False) for i in items)
    layout = tokens.layout(x) if mask is not None or asked else None
    if mask is not None and layout is None:
        raise PassError(
            f"it is not known which row of the experts is which token of {tokens.mask_name(x)}",
            where=place(x, named=True),
            why="with another first sequence, other rows change than its own in batch-major or sequence-major order",
            todo="leave the mask out of example inputs, or losses out of optimize",
        )
    return Rows(tokens.chain(x), mask, tokens.sources(x)[0] if layout else None, layout or "batch", ignored)


def _experts_input(node: fx.Node) -> fx.Node:
    """[T, H] what the experts read whose rows `node` brings back to token order."""
    while node.target not in targets(ops.permute):
        node = node.args[0]  # type: ignore[assignment]
    x: fx.Node = arguments(node)["x"]
    return x


def _taps(write: Writer, node: fx.Node, rows: Rows) -> Taps:
    """Everything that a loss may read of the layer whose rows `node` brings back to token order."""
    a = arguments(node)
    plan = a["slot"].args[0]
    if plan.target in targets(ops.choice_plan):
        raise PassError(
            "losses are not defined where experts choose their tokens",
            where=place(node, named=True),
            why="a token has no k experts of its own",
            todo="leave losses out for this model",
        )
    idx = arguments(plan)["idx"]
    product = a["y"]
    while product.target in targets(ops.grouped_bias):
        product = arguments(product)["y"]
    activation = arguments(product)["x"]
    k = value(a["slot"]).shape[1]
    found: dict[str, Any] = {
        "path": module_path(node), "k": int(k), "experts": int(arguments(plan)["E"]), "idx": write(idx),
        "w": write(a["w"]), "z": write(activation), "y": write(a["y"]),
        "slot": write(a["slot"]), "order": write(a["order"]),
        "mask": _mask(write, rows), "batch": _batch(write, rows), "layout": rows.layout, "chain": rows.chain,
    }  # fmt: skip
    route = route_of(idx)
    return Taps(**found, **(_unscored(write, node, idx) if route is None else _router(write, route, activation)))


def _unscored(write: Writer, node: fx.Node, idx: fx.Node) -> dict[str, Any]:
    """Why a layer has no scores, as `route_by_token` or `raise_routers` noted it on the experts."""
    if by_token := node.meta.get("moefx_by_token"):
        return {"unscored": f"it needs the layer's router, but {by_token}", "by_token": _token_logits(write, idx)}
    why = node.meta.get("moefx_router")
    return {"unscored": f"{Taps.unscored} ({why})"} if why else {}


def _token_logits(write: Writer, idx: fx.Node) -> Any:
    """[T, E] logits behind a choice that `route_by_token` made of a router's logits [B, S, E]; None of a given one."""
    turned = False
    while name_of(idx) in (*MOVES, "narrow", "transpose"):
        turned, idx = turned or name_of(idx) == "transpose", idx.args[0]  # type: ignore[assignment]
    top = idx.args[0] if idx.target is compat.getitem else None
    if not isinstance(top, fx.Node) or name_of(top) != "topk":
        return None
    logits: Any = top.args[0]
    if name_of(logits) == "add" and value(logits.args[1]).dim() == 1:  # the bias of the choice
        logits = logits.args[0]
    rows = write(logits)
    return (rows.transpose(0, 1) if turned else rows).flatten(0, 1)


def _router(write: Writer, route: fx.Node, activation: fx.Node) -> dict[str, Any]:
    r, rows = arguments(route), value(arguments(route)["logits"]).shape
    spec = RouteSpec.parse(r["spec"])

    def flat(p: Any) -> Any:
        return p.flatten(0, -2) if len(rows) > 2 else p

    own = spec.score == "softmax" and DTYPES[spec.dtype] == torch.float32
    found: dict[str, Any] = {
        "logits": flat(write(r["logits"])),
        "score": spec.score,
        "full": flat(write(route)[0]) if own else None,
        "bias": _name(r["bias"]),
    }
    w, gate = linear_weight(r["logits"]), _gate(write, activation)
    if w is not None and gate is not None and value(w).shape[-1] == value(gate[0]).shape[-1]:
        found |= {"router": write(w), "gate": gate[1]}
    return found


def _name(bias: Any) -> str:
    """Dotted name of the buffer or parameter behind casts and views."""
    while isinstance(bias, fx.Node) and bias.op != "placeholder":
        if name_of(bias) not in (*MOVES, "unsqueeze"):
            return ""
        bias = bias.args[0]
    return str(bias.meta.get("moefx_name", "")) if isinstance(bias, fx.Node) else ""


def _gate(write: Writer, activation: fx.Node) -> tuple[fx.Node, Any] | None:
    """The up weights [E, 2I, H], and their gate half [E, I, H]."""
    a = arguments(activation)
    kind, h = GluKind.parse(a["kind"]), a["h"]
    while h.target in targets(ops.grouped_bias):
        h = arguments(h)["y"]
    if h.target not in targets(ops.grouped_mm):
        return None
    w = arguments(h)["w"]
    if not kind.gated:
        return w, write(w)
    half = value(w).shape[1] // 2
    return w, write(w)[:, ::2] if kind.interleaved else write(w)[:, :half]


def _mask(write: Writer, rows: Rows) -> Any:
    """[T] bool, which tokens count."""
    if rows.mask is None:
        return None
    mask = write(rows.mask)
    return (mask.transpose(0, 1) if rows.layout == "sequence" else mask).flatten().bool()


def _batch(write: Writer, rows: Rows) -> Any:
    """Number of sequences."""
    if rows.tokens is None:
        return None
    B = value(rows.tokens).shape[0]
    return B if isinstance(B, int) else write(rows.tokens).size(0)


# --- what comes of it


def _finish(write: Writer, items: Sequence[Item], parts: dict[str, list[Any]], taps: Sequence[Taps]) -> None:
    """Losses of all layers, their sum into the backward, and everything that is returned."""
    kept: list[tuple[str, str, Any]] = []
    weighted = []
    for item in items:
        if isinstance(item, Loss):
            loss = item.combine(parts[item.name], taps)
            kept.append(("loss", item.name, loss))
            weighted.append(loss * item.weight)
        elif isinstance(item, RoutingMetrics):
            kept += [("routing", name, v) for name, v in item.combine(parts[item.name], taps).items()]
        elif isinstance(item, BiasUpdate):
            counts: dict[str, Any] = {}  # layers may share a bias
            for tap, v in zip(taps, parts[item.name], strict=True):
                counts[tap.bias] = counts[tap.bias] + v if tap.bias in counts else v
            kept += [("count", name, v) for name, v in counts.items()]
    out = write.graph.output_node()
    outputs = list(out.args[0])  # type: ignore[arg-type]
    if weighted:
        total = reduce(operator.add, weighted)
        kept.append(("loss", "total", total))
        _add(write, outputs, total, any(isinstance(i, LoadBalance) for i in items))
    out.args = ((*outputs, *(v.detach().clone().node for _, _, v in kept)),)
    out.meta["moefx_extras"] = [(kind, name) for kind, name, _ in kept]


def _add(write: Writer, outputs: list[Any], total: Any, balance: bool) -> None:
    """Put the sum of the losses into the model's own loss, or into the backward of its first output."""
    noted = write.graph.output_node().meta
    named: dict[str, int] = noted.get("moefx_outputs", {})
    trained: frozenset[int] = noted.get("moefx_differentiable", frozenset())
    if balance:
        _not_twice(write, outputs, named, trained)
    position = named.get("loss", -1)
    if position in trained and not (val := value(outputs[position])).dim():
        loss = write(outputs[position])
        outputs[position] = (loss + total.to(val.dtype)).node
        return
    if trained:
        first = min(trained)
        outputs[first] = ops.inject(write(outputs[first]), total).node
        return
    raise PassError(
        "no output of the model is differentiable, so that losses would train nothing",
        todo="return the loss (labels=...), or an output that requires gradients",
    )


def _not_twice(write: Writer, outputs: Sequence[Any], named: dict[str, int], trained: frozenset[int]) -> None:
    """Refuse a model that balances itself."""
    known = named.get("aux_loss")
    own = outputs[known] if known is not None else _balances(write, outputs, trained)
    if own is not None:
        raise PassError(
            "the model adds a load-balancing loss of its own" + (", its output aux_loss" if known is not None else ""),
            where=place(own),
            why="with LoadBalance beside it the experts would be balanced twice",
            todo="switch it off (in transformers: output_router_logits=False), or leave LoadBalance out of losses",
        )


def _balances(write: Writer, outputs: Sequence[Any], trained: frozenset[int]) -> fx.Node | None:
    """The trained scalar, if any, into which the model's own code counts choices of its routers.

    A loss that balances reads which experts are chosen: whole numbers or a mask made of the logits, which reach the
    output on another way than through the experts. A loss of the logits alone (z-loss) does not.
    """
    layers = find(write.graph, ops.unpermute)
    routes = [route for n in layers if (route := route_of(arguments(arguments(n)["slot"].args[0])["idx"])) is not None]
    logits = [arguments(r)["logits"] for r in routes]
    scored = downstream(write.graph, [*logits, *(n for x in logits for n in computed_again(x))], but=layers)
    choices = [n for n in scored if isinstance(v := value(n), torch.Tensor) and not v.is_floating_point()]
    counting = downstream(write.graph, choices, but=layers)
    return next((n for i in sorted(trained) if (n := outputs[i]) in counting and not value(n).dim()), None)


def _row(item: Item, taps: Sequence[Taps]) -> dict[str, Any]:
    """What the report says of a loss."""
    options = {k: v for k, v in vars(item).items() if k != "weight"}
    return {
        "name": item.name, "kind": type(item).__name__, "weight": getattr(item, "weight", None), "options": options,
        "layers": [t.path for t in taps],
    }  # fmt: skip


def _refused(item: Item, node: fx.Node, why: str) -> PassError:
    return PassError(
        f"loss {item.name!r} is not defined for {module_path(node) or 'this layer'}",
        where=place(node, named=True),
        why=why,
        todo=f"leave {item.name!r} out of losses for this model",
    )
