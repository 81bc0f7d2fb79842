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
COVERED = 0.9  # share of tokens that `distinct_paths` covers


class RoutingSum:
    """`opt.routing` of several calls as if they were one call. Calls with as many tokens each count alike.

    Load and transitions are pooled, and what follows from the load (`max_violation`, `dead_experts`) is computed from
    the pooled one: an expert is dead if no call chose it. All others are means over calls. Kept on the CPU in float64.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._sums: dict[str, Tensor] = {}
        self._choices: list[Tensor] = []

    def add(self, routing: Mapping[str, Tensor]) -> None:
        """Add one call; a model that measures nothing adds nothing."""
        if not routing:
            return
        self.calls += 1
        for name, values in routing.items():
            if name == "choices":
                self._choices.append(values.cpu())
            else:
                wide = values.to("cpu", torch.float64)
                self._sums[name] = self._sums[name] + wide if name in self._sums else wide

    def result(self) -> dict[str, Tensor]:
        """The metrics by their names, `choices` of all calls one behind the other; empty without calls."""
        found = {n: v if n == "transitions" else v / self.calls for n, v in self._sums.items()}
        if found:
            found["max_violation"] = found["load"].amax(1) * found["experts"] - 1
            zero = (found["load"] == 0).sum(1)  # with the columns that a layer with fewer experts does not have
            found["dead_experts"] = (zero - (found["load"].shape[1] - found["experts"])).to(torch.float64)
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
        `distinct_paths` and `seen_paths` (see `path_counts`). Empty when nothing was measured.
    """
    if not routing:
        return {}
    experts = [round(e) for e in routing["experts"].tolist()]
    measured = {name: routing[name].tolist() for name in PER_LAYER if name in routing}
    layers = [
        {"layer": i, "path": path, "experts": E, **{n: v[i] for n, v in measured.items()}}
        for i, (E, path) in enumerate(zip(experts, paths or [""] * len(experts), strict=True))
    ]
    found = {
        "layers": layers,
        "mean": {n: math.fsum(v) / len(v) for n, v in measured.items()},
        "load": [row[:E] for row, E in zip(routing["load"].tolist(), experts, strict=True)],
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
    of most frequent ones that 90 % of the tokens take.
    """
    first_TL = choices_LTk[:, :, 0].T
    counted = first_TL[(first_TL >= 0).all(1)]
    counts = torch.unique(counted, dim=0, return_counts=True)[1].sort(descending=True).values
    covered = counts.cumsum(0) >= math.ceil(COVERED * len(counted))
    return {"distinct_paths": int((~covered).sum()) + 1, "seen_paths": len(counts)}


def entropy(P: Tensor) -> float:
    """-sum p ln p, in nats."""
    return float(torch.special.entr(P).sum())


def scalars(found: Mapping[str, Any]) -> dict[str, float]:
    """Of `numbers` what goes into a log: {"max_violation/0": .., "max_violation/mean": .., "hit_rate_1/0": ..}."""
    out: dict[str, float] = {}
    for row in found["layers"]:
        out |= {f"{n}/{row['layer']}": row[n] for n in PER_LAYER if n in row}
    out |= {f"{n}/mean": v for n, v in found["mean"].items()}
    return out | {f"hit_rate_1/{row['from']}": row["hit_rate_1"] for row in found["steps"]}
