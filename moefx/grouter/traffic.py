"""What routing costs between places (devices or nodes): tokens sent away from the place that holds their sample.

Two counts. "tokens": a token is sent once to every remote place that holds at least one of its experts, and shared
among them there (node-limited dispatch, as DeepEP does). "slots": it is sent once per expert (plain all-to-all).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import networkx as nx
import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .affinity import AffinityResult, Floats, Ints

_CELLS = 1 << 22  # tokens times places looked at in one go


def token_hits(idx: npt.NDArray[Any], place: Ints, num_places: int) -> Ints:
    """hit[s, n]: tokens of sample s with at least one expert on place n.

    Args:
        idx: integer [samples, length, k], expert ids; may be a memory map.
        place: [E], the place of each expert.

    Returns:
        int64 [samples, num_places].
    """
    return _over_samples(idx, place, num_places, lambda on: on.any(2))


def slot_hits(idx: npt.NDArray[Any], place: Ints, num_places: int) -> Ints:
    """hit[s, n]: slots (token, expert) of sample s with the expert on place n; int64 [samples, num_places]."""
    return _over_samples(idx, place, num_places, lambda on: on.sum(2))


def remote(hits: Ints, home: Ints) -> int:
    """Sends to other places than the sample's home, in total."""
    return int(hits.sum() - hits[np.arange(len(hits)), home].sum())


def uniform_traffic(num_experts: int, k: int, num_places: int, *, count: str = "tokens") -> float:
    """Expected remote sends per token where every set of k experts is equally likely, E/N experts being on each place.

    For "tokens" (N - 1) (1 - C(E - E/N, k) / C(E, k)), for "slots" k (N - 1) / N.
    """
    if count == "slots":
        return k * (num_places - 1) / num_places
    elsewhere = num_experts - num_experts // num_places
    return (num_places - 1) * (1 - math.comb(elsewhere, k) / math.comb(num_experts, k))


def max_over_mean(values: npt.NDArray[Any] | Sequence[float]) -> float:
    """Largest over mean: 1 for perfect balance."""
    found = np.asarray(values, dtype=np.float64)
    return float(found.max() / found.mean())


def coactivation_graph(affinity: AffinityResult, place: Ints | None = None) -> nx.Graph:
    """Experts as nodes (`load`, `place` if given); an edge of `weight` P[i, j] per pair that was chosen together."""
    P, load = affinity.P, affinity.load
    graph = nx.Graph()
    for i in range(affinity.num_experts):
        graph.add_node(i, load=float(load[i]), **({} if place is None else {"place": int(place[i])}))
    for i, j in zip(*np.nonzero(np.triu(P)), strict=True):
        graph.add_edge(int(i), int(j), weight=float(P[i, j]))
    return graph


def profiles(idx: npt.NDArray[Any], num_experts: int) -> Floats:
    """phi[s, i]: share of the slots of sample s that go to expert i; float64 [samples, E], rows sum to 1."""
    counts = np.empty((len(idx), num_experts))
    for s, sample in enumerate(idx):
        counts[s] = np.bincount(np.asarray(sample, dtype=np.int64).reshape(-1), minlength=num_experts)
    phi: Floats = counts / counts.sum(1, keepdims=True)
    return phi


def check_routing(idx: Any, num_experts: int) -> None:
    """Raise InputError unless `idx` is integer [samples, length, k] with ids in [0, num_experts)."""
    if not isinstance(idx, np.ndarray) or idx.ndim != 3 or not np.issubdtype(idx.dtype, np.integer) or not idx.size:
        found = f"{idx.dtype} {list(idx.shape)}" if isinstance(idx, np.ndarray) else type(idx).__name__
        raise InputError(
            "placement needs the expert ids of samples, integers [samples, length, k]",
            why=f"found {found}",
            todo="give RoutingRecords.idx, or stack the indices of Grouter.route",
        )
    if not 0 <= int(idx.min()) <= int(idx.max()) < num_experts:
        raise InputError(f"expert ids from {idx.min()} to {idx.max()} for {num_experts} experts")


def _over_samples(idx: npt.NDArray[Any], place: Ints, num_places: int, per_token: Any) -> Ints:
    hits = np.empty((len(idx), num_places), dtype=np.int64)
    step = max(_CELLS // max(idx.shape[1] * num_places * idx.shape[2], 1), 1)
    for start in range(0, len(idx), step):
        on = place[np.asarray(idx[start : start + step], dtype=np.int64)][..., None] == np.arange(num_places)
        hits[start : start + step] = per_token(on).sum(1)
    return hits
