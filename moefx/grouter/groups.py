"""Partitions of experts that keep experts together which tokens choose together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..errors import InputError, nearest
from .affinity import AffinityResult, Floats, Ints

Groups = tuple[tuple[int, ...], ...]

METHODS = ("refined", "greedy", "balance", "random")
RESTARTS = 8  # random starts of the refined method, besides greedy from four orders of seeds
PATIENCE = (
    24  # exchanges without a new best after which a pass ends; whole passes take 256 experts several times as long
)
_EPS = 1e-12  # of the total affinity: gains below it are rounding


def group_experts(
    P: AffinityResult | npt.NDArray[Any] | Tensor, num_targets: int, *, method: str = "refined", seed: int = 0
) -> Groups:
    """Partition E experts into `num_targets` groups of floor(E / num_targets) members, the first E mod num_targets
    groups with one more.

    Args:
        P: affinity [E, E], symmetric and non-negative; the diagonal is ignored.
        num_targets: 1 to E.
        method: "greedy" is the published one: each group starts with the lowest free expert and takes the free expert
            of highest affinity to its members, ties to the lowest. "refined" is Kernighan-Lin exchange (Bell System
            Technical Journal 49, 1970) from several starts, the greedy result among them, so that it never retains
            less. "balance" fills each group from both ends of the experts sorted by load (by row sums, where P is a
            matrix). "random" is a permutation.
        seed: of the random partition and of the random starts; the result is a function of the arguments alone.

    Returns:
        Groups of expert numbers, ascending within a group.

    Raises:
        InputError: more targets than experts, fewer than one, an unusable matrix, or no affinity at all (top-1 routing)
            for a method that needs some.
    """
    matrix = affinity_matrix(P)
    experts = len(matrix)
    check_grouping(experts, num_targets, method)
    if method in ("refined", "greedy") and experts > 1 and not matrix.any():
        raise InputError(
            "no two experts are ever chosen together",
            why="the affinity is zero everywhere, as it is for top-1 routing",
            todo='count the affinity with k of 2 or more, or group by "balance" or at "random"',
        )
    sizes = _sizes(experts, num_targets)
    rng = np.random.default_rng(seed)
    if method == "greedy":
        return _greedy(matrix, sizes, np.arange(experts))
    if method == "random":
        return _cut(rng.permutation(experts), sizes)
    if method == "balance":
        # Row sums are (k - 1) times the load: no load at all for top-1, whose counts still know it.
        return _balance(P.load if isinstance(P, AffinityResult) else matrix.sum(1), sizes)
    greedy = _greedy(matrix, sizes, np.arange(experts))
    candidates = [greedy, *(_exchange(matrix, start) for start in _starts(matrix, sizes, rng))]
    return max(candidates, key=lambda groups: retained(matrix, groups))  # the first of equals


def check_grouping(experts: int, num_targets: int, method: str) -> None:
    """Raise InputError unless so many experts can be grouped so."""
    if not 1 <= num_targets <= experts:
        raise InputError(
            f"{experts} experts cannot be folded into {num_targets}",
            why="folding merges experts, so there are 1 to as many targets as experts",
            todo="use expand to get more experts" if num_targets > experts else "ask for at least one expert",
        )
    if method not in METHODS:
        raise InputError(f"unknown method of grouping {method!r}", todo=nearest(method, METHODS))


def retained(P: AffinityResult | npt.NDArray[Any] | Tensor, groups: Sequence[Sequence[int]]) -> float:
    """Sum of the affinity within groups, each pair counted once."""
    matrix = affinity_matrix(P)
    return float(sum(matrix[np.ix_(g, g)].sum() for g in groups)) / 2


def affinity_matrix(P: AffinityResult | npt.NDArray[Any] | Tensor) -> Floats:
    """A float64 copy [E, E] with a zero diagonal. Raises InputError unless square, symmetric, finite and >= 0."""
    found = P.P if isinstance(P, AffinityResult) else P.cpu().numpy() if isinstance(P, Tensor) else P
    matrix = np.array(found, dtype=np.float64)
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] and matrix.size > 0
    if not square or not np.isfinite(matrix).all() or (matrix < 0).any() or not np.allclose(matrix, matrix.T):
        raise InputError(
            "an affinity is a symmetric matrix of finite shares, one row per expert",
            why=f"shape {list(matrix.shape)}"
            if not square
            else "it is not symmetric, or has negative or infinite entries",
            todo="make it with moefx.grouter.affinity",
        )
    np.fill_diagonal(matrix, 0)
    return matrix


def check_partition(groups: Sequence[Sequence[int]], experts: int) -> Groups:
    """The groups as tuples. Raises InputError unless every expert is in exactly one, and no group is empty."""
    checked = tuple(tuple(int(i) for i in g) for g in groups)
    if sorted(i for g in checked for i in g) != list(range(experts)) or not all(checked):
        raise InputError(
            f"these groups are not a partition of {experts} experts",
            why=f"sizes {[len(g) for g in checked]}",
            todo="put every expert into exactly one group, and leave no group empty",
        )
    return checked


def _sizes(experts: int, targets: int) -> list[int]:
    m, r = divmod(experts, targets)
    return [m + (t < r) for t in range(targets)]


def _greedy(P: Floats, sizes: Sequence[int], order: npt.NDArray[Any]) -> Groups:
    """The published procedure; `order` says which free expert starts a group (the published one: ascending)."""
    free = np.ones(len(P), dtype=bool)
    groups = []
    for size in sizes:
        members = [int(order[free[order]][0])]
        free[members] = False
        while len(members) < size:
            best = int(np.where(free, P[members].sum(0), -1.0).argmax())
            members.append(best)
            free[best] = False
        groups.append(tuple(sorted(members)))
    return tuple(groups)


def _balance(load: Floats, sizes: Sequence[int]) -> Groups:
    light = list(np.argsort(load, kind="stable"))
    groups = []
    for size in sizes:
        half = size // 2
        members = light[:half] + light[len(light) - (size - half) :]
        light = light[half : len(light) - (size - half)]
        groups.append(tuple(sorted(int(i) for i in members)))
    return tuple(groups)


def _starts(P: Floats, sizes: Sequence[int], rng: np.random.Generator) -> Iterator[Groups]:
    """Greedy from the published order of seeds, its reverse, and by load; then random partitions."""
    load = np.argsort(P.sum(1), kind="stable")
    for order in (np.arange(len(P)), np.arange(len(P))[::-1], load, load[::-1]):
        yield _greedy(P, sizes, order)
    for _ in range(RESTARTS):
        yield _cut(rng.permutation(len(P)), sizes)


def _cut(order: npt.NDArray[Any], sizes: Sequence[int]) -> Groups:
    return tuple(tuple(sorted(int(i) for i in g)) for g in np.split(order, np.cumsum(sizes)[:-1]))


def _exchange(P: Floats, groups: Groups) -> Groups:
    """Kernighan-Lin: passes of tentative best exchanges, every expert at most once, of which the best prefix is kept.

    A group with one member less than the largest gets an empty seat. An exchange of an expert with an empty seat moves
    the expert, and the sizes stay a permutation of what they were, as no group ever holds two empty seats.
    """
    largest = max(map(len, groups))
    seats = len(groups) * largest
    padded = np.zeros((seats, seats))
    padded[: len(P), : len(P)] = P
    group_of = np.full(seats, -1)
    for g, members in enumerate(groups):
        group_of[list(members)] = g
    group_of[len(P) :] = [g for g, members in enumerate(groups) if len(members) < largest]
    tolerance = _EPS * P.sum()
    while True:
        better, gain = _pass(padded, group_of, len(P), len(groups))
        if gain <= tolerance:
            break
        group_of = better
    found = [tuple(int(i) for i in np.flatnonzero(group_of[: len(P)] == g)) for g in range(len(groups))]
    return tuple(sorted(found, key=lambda g: (-len(g), g)))


def _pass(P: Floats, group_of: Ints, experts: int, groups: int) -> tuple[Ints, float]:
    """One pass over seats; returns the best assignment met and its gain (0 and the given one if none is better)."""
    current, best, total, best_total, left = group_of.copy(), group_of, 0.0, 0.0, PATIENCE
    empty = np.arange(len(P)) >= experts
    open_ = np.ones(len(P), dtype=bool)
    to_group = np.stack([P[:, current == g].sum(1) for g in range(groups)], 1)  # affinity of a seat to a group
    while left and open_.sum() > 1:
        own = to_group[np.arange(len(P)), current]
        toward = to_group[:, current] - own[:, None]  # [i, j]: gain of i when it joins j's group, j still there
        gains = toward + toward.T - 2 * P
        has_empty = np.isin(current, current[empty])
        gains[current[:, None] == current] = -np.inf
        gains[(empty[:, None] != empty) & has_empty[:, None] & has_empty] = -np.inf
        gains[~open_] = -np.inf
        gains[:, ~open_] = -np.inf
        i, j = np.unravel_index(gains.argmax(), gains.shape)
        if gains[i, j] == -np.inf:
            break
        total += float(gains[i, j])
        a, b = current[i], current[j]
        to_group[:, a] += P[:, j] - P[:, i]
        to_group[:, b] += P[:, i] - P[:, j]
        current[i], current[j] = b, a
        open_[[i, j]] = False
        left -= 1
        if total > best_total:
            best, best_total, left = current.copy(), total, PATIENCE
    return best, best_total
