"""Affinity matrices with known structure."""

from __future__ import annotations

import numpy as np


def planted(blocks: int, size: int, seed: int, *, inside: float = 1.0, outside: float = 0.0) -> tuple[np.ndarray, set]:
    """Shuffled blocks: pairs within a block have about `inside`, others up to `outside`. Returns matrix and blocks."""
    rng = np.random.default_rng(seed)
    experts = blocks * size
    order = rng.permutation(experts)
    block_of = np.empty(experts, dtype=int)
    block_of[order] = np.arange(experts) // size
    upper = np.triu(rng.random((experts, experts)), 1)
    noise = upper + upper.T
    same = block_of[:, None] == block_of
    P = np.where(same, inside * (0.9 + 0.1 * noise), outside * noise)
    np.fill_diagonal(P, 0)
    return P, {frozenset(np.flatnonzero(block_of == b).tolist()) for b in range(blocks)}


def noisy(experts: int, seed: int) -> np.ndarray:
    upper = np.triu(np.random.default_rng(seed).random((experts, experts)), 1)
    return upper + upper.T


def zipf_routing(seed: int, tokens: int = 4000, experts: int = 16, k: int = 4) -> np.ndarray:
    """Top-k ids [tokens, k] of experts whose popularity falls as 1/rank, in a random order."""
    rng = np.random.default_rng(seed)
    popularity = 1 / (1 + rng.permutation(experts))
    return np.argsort(-(np.log(popularity) + rng.gumbel(size=(tokens, experts))), axis=1)[:, :k]
