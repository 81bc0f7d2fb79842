"""k-means, by scikit-learn, as expansion and placement use it."""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from ..packages import optional

SEEDS = 2**32  # scikit-learn takes no larger ones


def kmeans(clusters: int, purpose: str, *, starts: int, iterations: int = 300, seed: int) -> Any:
    """An unfitted `sklearn.cluster.KMeans`. `purpose` is what an error says it is needed for.

    Raises:
        InputError: `iterations` or `seed` is out of range.
        MissingPackageError: scikit-learn is not installed.
    """
    check_kmeans(iterations, seed)
    found = optional("sklearn.cluster", purpose)
    return found.KMeans(clusters, n_init=starts, max_iter=iterations, random_state=seed)


def check_kmeans(iterations: int, seed: int) -> None:
    """Raise InputError unless `iterations` is 1 or more and `seed` in 0..2^32 - 1."""
    if iterations < 1:
        raise InputError(f"{iterations} iterations of k-means", todo="choose iterations >= 1")
    if not 0 <= seed < SEEDS:
        raise InputError(f"seed {seed} of k-means is out of range", todo="choose one from 0 to 2**32 - 1")
