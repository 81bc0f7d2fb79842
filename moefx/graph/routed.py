"""What an MoE layer that a graph routes by token ids does, kept for running the same layer outside of the graph.

`route_by_token` notes it while it rewrites the graph; `moefx.decoding` routes the original's modules by it, one window
of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from moefx.dialect.route import RouteSpec, eager, write_gates, write_scores, write_weights

from .edit import arguments, module_path, same_sizes, value
from .effects import name_of
from .removal import downstream
from .router import MOVES
from .rows import NotRowwise, Rows, rows_of

Tensor = torch.Tensor


@dataclass(frozen=True)
class RoutedLayer:
    """One call of experts whose choice is made by a router of token ids.

    Attributes:
        path: of the module whose forward calls the experts.
        k: experts per token.
        dtype: of the weights where they are made; the experts may take another.
        spec: the normal form of the layer's own router, None where it has none.
        factor: what the layer multiplies weights by.
        sequence_major: rows are s * B + b instead of b * S + s.
        logits: of the layer's own router, for gates="layer".
        scale: per expert, of the layer's outputs.
        refused: why the layer can only be run in the graph; empty where nothing is against it.
    """

    path: str
    k: int
    dtype: torch.dtype
    spec: RouteSpec | None
    factor: float
    sequence_major: bool
    logits: Rows | None = None
    scale: Rows | None = None
    refused: str = ""

    @property
    def facts(self) -> tuple[object, ...]:
        """What must be the same for two calls of one module."""
        return self.k, self.dtype, self.spec, self.factor, self.sequence_major

    def rows(self, idx_BSk: Tensor) -> Tensor:
        """[B, S, k] in the order of the layer's rows [T, k]."""
        return (idx_BSk.transpose(0, 1) if self.sequence_major else idx_BSk).flatten(0, 1)

    def weights(
        self, x: Tensor, idx: Tensor, chosen: Tensor, normalise: str, gates: str, tensors: Mapping[str, Tensor]
    ) -> Tensor:
        """Weights [T, k] of the experts idx [T, k] for the rows x [T, H].

        Args:
            chosen: logits of the router of token ids at `idx`, for gates="router".
            normalise, gates: as of `moefx.Routing`.
            tensors: the model's parameters and buffers by name.
        """
        scale = None if self.scale is None else self.scale(x, tensors)
        if gates == "layer":
            assert self.logits is not None
            assert self.spec is not None
            logits = self.logits(x, tensors)
            start = torch.gather(write_scores(eager, self.spec, logits, logits.dtype), -1, idx)
            w: Tensor = write_weights(eager, self.spec, start, idx, scale)
            return w.to(self.dtype)
        w = write_gates(eager, chosen, normalise, self.factor).to(self.dtype)
        return w if scale is None else w * scale[idx]


def routed_layer(
    experts: fx.Node,
    idx: fx.Node,
    w: fx.Node,
    route: fx.Node | None,
    *,
    factor: float | None,
    gates: str,
    sequence_major: bool,
) -> RoutedLayer:
    """What is to be known of the experts call `experts`, whose routing (idx, w) is about to be replaced.

    Args:
        route: the raised router that made idx and w; None where the experts' own operands are replaced.
        factor: instead of the layer's own.
    """
    a = arguments(experts)
    spec = None if route is None else RouteSpec.parse(arguments(route)["spec"])
    own = 1.0 if spec is None else spec.factor
    logits = scale = None
    why = ""
    for name, made in (("idx", idx), ("w", w)):
        whole = (value(a["x"]).shape[0], *value(made).shape[-1:])
        if not _leads(made, a[name]) or not same_sizes(value(a[name]).shape, whole):
            what = "the choice" if name == "idx" else "the weights"
            why = f"something is done with {what} between router and experts"
        elif _read_besides(made, {idx, w, experts}, int(value(a["x"]).shape[-1])):
            why = "what its router gives goes into the hidden states by other ways than its experts"
    try:
        if gates == "layer" and route is not None:
            logits = rows_of(arguments(route)["logits"], a["x"], _parameter)
        if spec is not None and spec.per_expert:
            scale = rows_of(arguments(route)["scale"], a["x"], _parameter)  # type: ignore[arg-type]
    except NotRowwise as e:
        why = why or f"the logits of its router cannot be computed from the experts' input: {e}"
    k, dtype = int(value(idx).shape[-1]), value(w).dtype
    return RoutedLayer(
        module_path(experts), k, dtype, spec, own if factor is None else factor, sequence_major, logits, scale, why
    )


def _read_besides(made: fx.Node, replaced: set[fx.Node], hidden: int) -> bool:
    """Whether hidden states [.., hidden] are made of a choice or of weights in another way than by `replaced` nodes.

    In the graph all that reads them is given others, outside of it the experts alone. Auxiliary losses end in numbers.
    """
    ways, others = [made], list[fx.Node]()
    for n in ways:
        for user in n.users:
            if user not in replaced and user.op != "output":
                (ways if name_of(user) in MOVES else others).append(user)
    made_of = (value(n) for n in downstream(made.graph, others, but=replaced))
    return any(
        isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1 and same_sizes(v.shape[-1:], (hidden,))
        for v in made_of
    )


def _leads(made: fx.Node, n: fx.Node) -> bool:
    """Whether a node is another shape or type of `made`, or it."""
    while n is not made and name_of(n) in MOVES and n.args and isinstance(n.args[0], fx.Node):
        n = n.args[0]
    return n is made


def _parameter(n: fx.Node) -> str | None:
    name = n.meta.get("moefx_name")
    return name if isinstance(name, str) else None
