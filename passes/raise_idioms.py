"""Experts that were captured as they are written, loops or vectorised idioms, become `moefx.experts`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from moefx.graph.effects import name_of
from moefx.manager import Context, Pass
from moefx.raising.explain import explain
from moefx.raising.fit import NoFit, fit
from moefx.raising.patch import NotProvedError, Patch, make_patch, prove
from moefx.raising.refine import Site, sites
from moefx.raising.slice import NoSlice
from moefx.raising.splice import splice
from moefx.raising.stretch import NoStretchError, Stretch, around

_TRIES = 4  # explanations of one run that are tried


@dataclass(frozen=True)
class RaiseIdioms(Pass):
    """Find routed experts in the graph and put `moefx.experts` (or `moefx.expert_choice`) in their place.

    For experts that are no module of their own, and for graphs that were captured without raising. Parameters of one
    role are grouped by isomorphism, not by name, and stacked in the graph, so that gradients reach the originals. What
    the experts compute, for which rows and with which weights, is found by running that part of the graph on random
    values (moefx/raising); nothing is replaced unless the outputs and all gradients agree on other values, with every
    expert chosen at least once.
    """

    requires: ClassVar[set[str]] = {"captured"}
    provides: ClassVar[set[str]] = {"moe_raised"}
    numerics: ClassVar[str] = "rounding"

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        raised: set[str] = set()
        refused: dict[fx.Node, tuple[Site, str]] = {}
        for site in sites(graph):
            if raised & site.names:
                continue
            ctx.node = site.uses[0]
            order = list(graph.nodes)
            try:
                stretch = around(site, order, {n: i for i, n in enumerate(order)})
                new = splice(graph, stretch, _recognised(stretch, site))
            except (NoStretchError, NoFit, NoSlice, NotProvedError) as e:
                refused.setdefault(site.uses[0], (site, str(e)))
                continue
            raised |= site.names
            ctx.matched(new)
        for node, (site, why) in refused.items():
            if not raised & site.names:
                ctx.rejected(node, why)
        ctx.node = None


def _recognised(stretch: Stretch, site: Site) -> Patch:
    """A proved patch; the reason why there is none is that of the attempt that came farthest."""
    worst: tuple[int, Exception] = (0, NoFit("nothing was found"))
    limits = _limits(stretch)
    for kind in ("random", "skewed"):
        record, params = stretch.record(0, kind)
        for bank in site.banks:
            try:
                for found in fit(_Holder(params), record, bank, limits):
                    try:
                        for weights in itertools.islice(explain(record, found), _TRIES):
                            try:
                                patch = make_patch(stretch, found, weights)
                                prove(stretch, patch, found)
                                return patch
                            except (NoSlice, NotProvedError) as e:
                                worst = max(worst, (3, e), key=lambda w: w[0])
                    except NoFit as e:
                        worst = max(worst, (2, e), key=lambda w: w[0])
            except NoFit as e:
                worst = max(worst, (1, e), key=lambda w: w[0])
    raise worst[1]


class _Holder(nn.Module):
    """Parameters under the names of graph nodes."""

    def __init__(self, params: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.found = params

    def named_parameters(self, *_: object, **__: object) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.found.items()  # type: ignore[misc]


def _limits(stretch: Stretch) -> tuple[tuple[float, float], ...]:
    """(limit, alpha) pairs of clamped activations: the numbers of clamps, and factors."""
    clamps: set[float] = set()
    factors: set[float] = set()
    for n in stretch.nodes:
        numbers = {float(v) for v in (*n.args, *n.kwargs.values()) if isinstance(v, int | float)}
        if "clamp" in name_of(n):
            clamps |= {v for v in numbers if v > 0}
        elif "mul" in name_of(n):
            factors |= {v for v in numbers if v > 0}
    return tuple(itertools.product(sorted(clamps), sorted(factors)))
