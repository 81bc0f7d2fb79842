"""Routing metrics as plain numbers: pooled over calls, one row per layer, and what the paths of tokens say.

Definitions are in docs/routing.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PER_LAYER = ("max_violation", "dead_experts", "token_entropy", "marginal_entropy", "mass", "overlap")
# Means, and the number in the same call of what they are means over.
MEANS = {"load": "slots", "overlap": "pairs", "token_entropy": "tokens", "mass": "tokens", "mean_scores": "tokens"}
TRAFFIC = ("remote", "uniform", "max_over_mean")  # of `moefx.train.inspect_routing.traffic`
COUNTS = ("tokens", "slots", "pairs", "transitions")
COVERED = 0.9  # share of tokens that `distinct_paths` covers


class RoutingSum:
    """`opt.routing` of several calls as if they were one call, whatever number of tokens each had.

    Counts are added, and means weighted by them (`MEANS`). What is no mean over tokens is computed anew from what is:
    `max_violation` and `dead_experts` from the pooled load, `marginal_entropy` from the pooled mean of the scores. Kept
    on the CPU in float64.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._experts = torch.zeros(0)
        self._sums: dict[str, Tensor] = {}
        self._choices: list[Tensor] = []

    def add(self, routing: Mapping[str, Tensor]) -> None:
        """Add one call; a model that measures nothing adds nothing."""
        if not routing:
            return
        self.calls += 1
        wide = {n: v.to("cpu", torch.float64) for n, v in routing.items() if n != "choices"}
        self._experts = wide["experts"]
        for name, values in wide.items():
            if name in MEANS:
                weight = wide[MEANS[name]]
                self._add(name, values * (weight.unsqueeze(1) if values.dim() == 2 else weight))
            elif name in COUNTS:
                self._add(name, values)
        if "choices" in routing:
            self._choices.append(routing["choices"].cpu())

    def _add(self, name: str, values: Tensor) -> None:
        self._sums[name] = self._sums[name] + values if name in self._sums else values

    def result(self) -> dict[str, Tensor]:
        """The metrics by their names, `choices` of all calls one behind the other; empty without calls."""
        if not self._sums:
            return {}
        found, E = {"experts": self._experts, **self._sums}, self._experts
        for name in MEANS.keys() & found.keys():
            weight = found[MEANS[name]].clamp_min(1)
            found[name] = found[name] / (weight.unsqueeze(1) if found[name].dim() == 2 else weight)
        # Where every choice was dropped there is no load to be uneven, whatever its zeros would say.
        found["max_violation"] = (found["load"].amax(1) * E - 1).where(found["slots"] > 0, math.nan)
        zero = (found["load"] == 0).sum(1)  # with the columns that a layer with fewer experts does not have
        found["dead_experts"] = (zero - (found["load"].shape[1] - E)).to(torch.float64)
        if "mean_scores" in found:
            found["marginal_entropy"] = torch.special.entr(found["mean_scores"]).sum(1) / E.clamp_min(2).log()
        if self._choices:
            found["choices"] = torch.cat(self._choices, 1)
        return found


def numbers(routing: Mapping[str, Tensor], paths: Sequence[str] = ()) -> dict[str, Any]:
    """Routing metrics as JSON values.

    Args:
        routing: `opt.routing`, or a `RoutingSum.result()`.
        paths: module paths of the layers, where they are known.

    Returns:
        `layers`: a row per layer, {layer, path, experts, and those of `PER_LAYER` that were measured}; `mean` of each
        over layers; `load` [L][E]; `steps`: see `step_numbers`, a row per pair of adjacent layers; with `choices`,
        `distinct_paths` and `seen_paths` (see `path_counts`). Where no expert was chosen MaxVio is NaN, and in no mean.
        Empty when nothing was measured.
    """
    if not routing:
        return {}
    experts = [round(e) for e in routing["experts"].tolist()]
    measured = {name: routing[name].tolist() for name in PER_LAYER if name in routing}
    load = [row[:E] for row, E in zip(routing["load"].tolist(), experts, strict=True)]
    over = dict(measured)
    if "max_violation" in measured:
        pairs = list(zip(measured["max_violation"], map(any, load), strict=True))
        measured["max_violation"] = [v if chosen else math.nan for v, chosen in pairs]
        over["max_violation"] = [v for v, chosen in pairs if chosen]
    layers = [
        {"layer": i, "path": path, "experts": E, **{n: v[i] for n, v in measured.items()}}
        for i, (E, path) in enumerate(zip(experts, paths or [""] * len(experts), strict=True))
    ]
    found = {
        "layers": layers,
        "mean": {n: math.fsum(v) / len(v) if v else math.nan for n, v in over.items()},
        "load": load,
        "steps": [
            {"from": i, "to": i + 1, **step_numbers(counts[: experts[i], : experts[i + 1]])}
            for i, counts in enumerate(routing.get("transitions", ()))
            if bool(counts.any())
        ],
    }
    return found | path_counts(routing["choices"]) if "choices" in routing else found


def step_numbers(counts_EE: Tensor) -> dict[str, float]:
    """How far the first choice in one layer tells the one in the next.

    Args:
        counts_EE: tokens by first choice in one layer (rows) and in the next (columns); at least one token.

    Returns:
        `hit_rate_1`, `hit_rate_2`: share of tokens whose next expert is among the 1 or 2 most frequent successors of
        the present one; `chance_1`, `chance_2`: the same for one list of successors for all tokens; both measured on
        the tokens that the lists were made of. `conditional_entropy` of the next choice given the present one and
        `mutual_information` of the two, divided by ln E.
    """
    P = counts_EE.to(torch.float64) / counts_EE.sum()
    here, there = P.sum(1), P.sum(0)
    largest = math.log(max(P.shape[1], 2))
    information = entropy(here) + entropy(there) - entropy(P)
    found = {}
    for q in (1, 2):
        q_ = min(q, P.shape[1])
        found[f"hit_rate_{q}"] = float(P.topk(q_, 1).values.sum())
        found[f"chance_{q}"] = float(there.topk(q_).values.sum())
    return found | {
        "conditional_entropy": (entropy(there) - information) / largest,
        "mutual_information": information / largest,
    }


def path_counts(choices_LTk: Tensor) -> dict[str, int]:
    """Paths are tuples of first choices over all layers: `seen_paths` different ones, and `distinct_paths`, the number
    of most frequent ones that 90 % of the tokens take. Both are 0 where no token has a first choice in every layer.
    """
    first_TL = choices_LTk[:, :, 0].T
    counted = first_TL[(first_TL >= 0).all(1)]
    if not len(counted):
        return {"distinct_paths": 0, "seen_paths": 0}
    counts = torch.unique(counted, dim=0, return_counts=True)[1].sort(descending=True).values
    covered = counts.cumsum(0) >= math.ceil(COVERED * len(counted))
    return {"distinct_paths": int((~covered).sum()) + 1, "seen_paths": len(counts)}


def entropy(P: Tensor) -> float:
    """-sum p ln p, in nats."""
    return float(torch.special.entr(P).sum())


def scalars(found: Mapping[str, Any]) -> dict[str, float]:
    """Of `numbers` what goes into a log: {"max_violation/0": .., "max_violation/mean": .., "hit_rate_1/0": ..}.

    Of a hit rate its chance, too, without which it says nothing.
    """
    out: dict[str, float] = {}
    for row in found["layers"]:
        out |= {f"{n}/{row['layer']}": row[n] for n in PER_LAYER if n in row}
    out |= {f"{n}/mean": v for n, v in found["mean"].items()}
    for row in found["steps"]:
        out |= {f"{n}/{row['from']}": row[n] for n in ("hit_rate_1", "chance_1")}
    rows = found.get("traffic", ())
    for row in rows:
        out |= {f"traffic_{n}/{row['layer']}": row[n] for n in TRAFFIC}
    return out | ({f"traffic_{n}/mean": mean_of(rows, n) for n in TRAFFIC} if rows else {})


def mean_of(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """The mean of one number over rows."""
    return math.fsum(row[name] for row in rows) / len(rows)
