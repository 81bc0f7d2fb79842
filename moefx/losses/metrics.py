"""What routing does, measured: nothing of it has a gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .base import Item
from .taps import Taps

SHAPES = {
    "load": "[L, E] share of all choices that fall on each expert",
    "max_violation": "[L] largest load divided by the mean one, minus 1 (MaxVio)",
    "dead_experts": "[L] number of experts that no token chose",
    "token_entropy": "[L] mean entropy of a token's scores, divided by ln E",
    "marginal_entropy": "[L] entropy of the mean scores, divided by ln E",
    "mass": "[L] mean probability of the chosen experts together",
    "overlap": "[L] mean cos^2 over pairs of a token's experts; 0 for k = 1",
    "transitions": "[L-1, E, E] tokens whose first choice is e in one layer and v in the next",
}


@dataclass(frozen=True)
class RoutingMetrics(Item):
    """Routing statistics of every MoE layer, in `opt.routing` after each step, on this rank's tokens that count.

    Names, shapes and meanings are in `moefx.losses.metrics.SHAPES`. All fp32. Where layers have different numbers of
    experts, rows are filled up with zeros. Entries of `transitions` between layers that do not see the same tokens are
    zero.
    """

    name: ClassVar[str] = "metrics"

    def local(self, tap: Taps) -> dict[str, Any]:
        """One layer's numbers, and each token's first choice."""
        load = tap.counts / tap.counts.sum().clamp_min(1)
        mean = tap.mean_rows(tap.scores)
        pairs = tap.k * (tap.k - 1)
        best = torch.gather(tap.scores, -1, tap.idx).argmax(-1, keepdim=True)
        return {
            "load": load,
            "max_violation": load.amax() * tap.experts - 1,
            "dead_experts": (tap.counts == 0).sum().to(tap.dtype),
            "token_entropy": tap.mean(torch.special.entr(tap.scores).sum(-1)) / math.log(max(tap.experts, 2)),
            "marginal_entropy": torch.special.entr(mean).sum() / math.log(max(tap.experts, 2)),
            "mass": tap.mean(tap.mass),
            "overlap": tap.mean(tap.overlap(1e-12)) / pairs if pairs else torch.zeros_like(tap.counts[0]),
            "first": torch.gather(tap.idx, -1, best).squeeze(-1),
        }

    def combine(self, parts: Sequence[dict[str, Any]], taps: Sequence[Taps]) -> dict[str, Any]:
        """The numbers of all layers, by name."""
        E = max(t.experts for t in taps)
        found = {name: [p[name] for p in parts] for name in SHAPES if name in parts[0]}
        pad = torch.nn.functional.pad
        found["load"] = [pad(v, (0, E - t.experts)) for v, t in zip(found["load"], taps, strict=True)]
        stacked = {name: torch.stack(values) for name, values in found.items()}
        pairs = list(zip(parts, taps, parts[1:], taps[1:], strict=False))
        if pairs:
            between = [_transitions(a["first"], t, b["first"], u, E) for a, t, b, u in pairs]
            stacked["transitions"] = torch.stack(between)
        return stacked


def _transitions(first: Any, tap: Taps, then: Any, behind: Taps, E: int) -> Any:
    zeros = tap.counts.new_zeros((E * E,))
    if tap.chain == behind.chain:
        zeros = zeros.index_add(0, first * E + then, tap.ones.select(-1, 0))
    return zeros.view((E, E))
