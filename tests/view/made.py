"""Routing of random tokens as `RoutingMetrics(choices=True)` gives it, counted by hand."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


def choices(seed: int, sizes: list[int], k: int, tokens: int) -> list[list[list[int]]]:
    """[L][T][k] different experts, best first; the last expert of every layer is never chosen."""
    rng = np.random.default_rng(seed)
    return [[rng.permutation(E - 1)[:k].tolist() for _ in range(tokens)] for E in sizes]


def metrics(idx: list[list[list[int]]], sizes: list[int]) -> dict[str, Tensor]:
    """What one call with these choices measures (scores left out)."""
    E, tokens, k = max(sizes), len(idx[0]), len(idx[0][0])
    load, between = torch.zeros(len(idx), E), torch.zeros(len(idx) - 1, E, E)
    for row, layer in zip(load, idx, strict=True):
        for e, count in Counter(e for token in layer for e in token).items():
            row[e] = count / (tokens * k)
    for counts, (here, there) in zip(between, pairwise(idx), strict=True):
        for a, b in zip(here, there, strict=True):
            counts[a[0], b[0]] += 1
    dead = [sum(float(v) == 0 for v in row[:size]) for row, size in zip(load, sizes, strict=True)]
    return {
        "experts": torch.tensor(sizes, dtype=torch.float32), "load": load, "dead_experts": torch.tensor(dead).float(),
        "max_violation": torch.stack([row.max() * size - 1 for row, size in zip(load, sizes, strict=True)]),
        "overlap": torch.linspace(0, 0.1, len(idx)), "transitions": between, "choices": torch.tensor(idx),
        "tokens": torch.full([len(idx)], float(tokens)), "slots": torch.full([len(idx)], float(tokens * k)),
        "pairs": torch.full([len(idx)], float(tokens * k * (k - 1))),
    }  # fmt: skip
