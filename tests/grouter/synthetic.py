"""Routing by topics of equal size: expert logits per topic ~ N(0, temp^2), Gumbel noise per token, top-k."""

from __future__ import annotations

import numpy as np


def topical_routing(
    seed: int, temp: float, *, samples: int = 256, length: int = 64, experts: int = 32, k: int = 4, topics: int = 8
) -> np.ndarray:
    """Expert ids int64 [samples, length, k]; temp = 0 has no topics."""
    rng = np.random.default_rng(seed)
    logits = temp * rng.normal(size=(topics, experts))
    topic = rng.permutation(samples) % topics
    noisy = logits[topic][:, None, :] + rng.gumbel(size=(samples, length, experts))
    return np.argpartition(-noisy, k, axis=-1)[..., :k]
