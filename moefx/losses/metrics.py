"""What routing does, measured: nothing of it has a gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from .base import Item
from .taps import Taps

SHAPES = {
    "experts": "[L] number E of experts",
    "load": "[L, E] share of all choices that fall on each expert",
    "max_violation": "[L] largest load divided by the mean one, minus 1 (MaxVio); NaN where no expert was chosen",
    "dead_experts": "[L] number of experts that no token chose",
    "token_entropy": "[L] mean entropy of a token's scores, divided by ln E",
    "marginal_entropy": "[L] entropy of the mean scores, divided by ln E",
    "mass": "[L] mean probability of the chosen experts together",
    "overlap": "[L] mean cos^2 over pairs of a token's experts; 0 for k = 1",
    "transitions": "[L-1, E, E] tokens whose first choice is e in one layer and v in the next",
    "mean_scores": "[L, E] mean of the scores",
    "tokens": "[L] tokens that count: what token_entropy, mass and mean_scores are means over",
    "slots": "[L] choices that fell on an expert: what load is the share of",
    "pairs": "[L] ordered pairs of a token's experts: what overlap is the mean over",
    "choices": "[L, T, k] int64 experts of every token b*S+s, best first, -1 for none; RoutingMetrics(choices=True)",
}
SCORED = ("token_entropy", "marginal_entropy", "mass", "mean_scores")


@dataclass(frozen=True)
class RoutingMetrics(Item):
    """Routing statistics of every MoE layer, in `opt.routing` after each step, on this rank's tokens that count.

    Names, shapes and meanings are in `moefx.losses.metrics.SHAPES`; all but `choices` are fp32. Where layers have
    different numbers of experts, rows are filled up with zeros. Entries of `transitions` between layers that do not see
    the same tokens are zero. `tokens`, `slots` and `pairs` say how much each mean counts where several calls are taken
    together (`moefx.view.routing_numbers.RoutingSum`).

    Those of `SCORED` need the scores of all experts. They are absent when a layer's router is not known, and with
    precomputed routing. Of a model that is routed by token ids they are those of the softmax over that router's logits.
    `transitions` of both goes by the largest routing weight of each token.

    Attributes:
        choices: return the chosen experts themselves, too; absent for layers that do not see the same tokens.
    """

    choices: bool = False

    name: ClassVar[str] = "metrics"
    needs_router: ClassVar[bool] = False

    def local(self, tap: Taps) -> dict[str, Any]:
        """One layer's numbers, and each token's first choice."""
        slots, n_T = tap.counts.sum(), tap.ones.sum(-1)
        # Of tokens of which choices were dropped there are fewer pairs.
        load, pairs = tap.counts / slots.clamp_min(1), (n_T * (n_T - 1)).sum()
        found = {
            "experts": torch.full_like(tap.counts[0], tap.experts),
            "load": load,
            "max_violation": tap.counts.amax() / slots * tap.experts - 1,  # of no choice 0 / 0
            "dead_experts": (tap.counts == 0).sum().to(tap.dtype),
            "overlap": _overlap(tap) / pairs.clamp_min(1) if tap.k > 1 else torch.zeros_like(tap.counts[0]),
            "tokens": tap.counted.sum(),
            "slots": slots,
            "pairs": pairs,
            "first": tap.first,
        }
        if self.choices:
            choices = torch.where(tap.counted.unsqueeze(-1) > 0, tap.ranked, -1).to(torch.int64)
            # Whoever reads them has tokens [B, S].
            found["choices"] = tap.by_sequence(choices).flatten(0, 1) if tap.layout == "sequence" else choices
        if tap.logits is None and tap.by_token is not None:
            tap = replace(tap, logits=tap.by_token, score="softmax")
        return found if tap.logits is None else found | _of_scores(tap)

    def combine(self, parts: Sequence[dict[str, Any]], taps: Sequence[Taps]) -> dict[str, Any]:
        """The numbers of all layers, by name."""
        E, k = max(t.experts for t in taps), max(t.k for t in taps)
        pad = torch.nn.functional.pad
        found = {name: [p[name] for p in parts] for name in SHAPES if all(name in p for p in parts)}
        for name in ("load", *(["mean_scores"] if "mean_scores" in found else [])):
            found[name] = [pad(v, (0, E - t.experts)) for v, t in zip(found[name], taps, strict=True)]
        if "choices" in found:
            found["choices"] = [pad(v, (0, k - t.k), value=-1) for v, t in zip(found["choices"], taps, strict=True)]
            if any(t.chain != taps[0].chain for t in taps):
                del found["choices"]
        stacked = {name: torch.stack(values) for name, values in found.items()}
        if pairs := list(itertools.pairwise(zip(parts, taps, strict=True))):
            between = [_transitions(a["first"], t, b["first"], u, E) for (a, t), (b, u) in pairs]
            stacked["transitions"] = torch.stack(between)
        return stacked


def _overlap(tap: Taps) -> Any:
    """Sum over all ordered pairs of a token's experts."""
    return torch.where(tap.ones.sum(-1) > 0, tap.overlap(1e-12), 0).sum()


def _of_scores(tap: Taps) -> dict[str, Any]:
    mean, largest = tap.mean_rows(tap.scores), math.log(max(tap.experts, 2))
    return {
        "token_entropy": tap.mean(torch.special.entr(tap.scores).sum(-1)) / largest,
        "marginal_entropy": torch.special.entr(mean).sum() / largest,
        "mass": tap.mean(tap.mass),
        "mean_scores": mean,
    }


def _transitions(first: Any, tap: Taps, then: Any, behind: Taps, E: int) -> Any:
    zeros = tap.counts.new_zeros((E * E,))
    if tap.chain == behind.chain:
        both = (first >= 0) & (then >= 0)  # a token without an expert in one of the layers takes part in neither
        zeros = zeros.index_add(0, torch.where(both, first * E + then, 0), both.to(tap.dtype) * tap.counted)
    return zeros.view((E, E))
