"""Grouping: greedy against a transcription, refined against greedy and brute force. Folding: its invariants."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx.errors import InputError
from moefx.grouter import affinity, fold, fold_report, group_experts, retained
from moefx.grouter.fold import membership
from moefx.grouter.groups import METHODS

from .matrices import noisy, planted, zipf_routing
from .small import Grouter, small

sizes = st.tuples(st.integers(2, 14), st.integers(1, 14)).filter(lambda s: s[1] <= s[0])


def greedy_by_hand(P: np.ndarray, targets: int) -> list[set[int]]:
    free, groups = set(range(len(P))), []
    for t in range(targets):
        members = [min(free)]
        free -= set(members)
        while len(members) < len(P) // targets + (t < len(P) % targets):
            best = max(sorted(free), key=lambda j: sum(P[c, j] for c in members))
            members.append(best)
            free.remove(best)
        groups.append(set(members))
    return groups


def partitions(experts: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[list[tuple[int, ...]]]:
    if not sizes:
        yield []
        return
    for first in itertools.combinations(experts, sizes[0]):
        for rest in partitions(tuple(e for e in experts if e not in first), sizes[1:]):
            yield [first, *rest]


# -- grouping --------------------------------------------------------------------------------------------------------


@given(size=sizes, seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_greedy_is_the_published_procedure(size: tuple[int, int], seed: int) -> None:
    P = np.round(noisy(size[0], seed), 1) + 1e-3 * (1 - np.eye(size[0]))  # rounded: there are ties
    assert [set(g) for g in group_experts(P, size[1], method="greedy")] == greedy_by_hand(P, size[1])


@given(size=sizes, seed=st.integers(0, 999), method=st.sampled_from(METHODS))
@settings(max_examples=60, deadline=None)
def test_every_method_makes_a_partition_of_the_published_sizes(size: tuple[int, int], seed: int, method: str) -> None:
    experts, targets = size
    groups = group_experts(noisy(experts, seed), targets, method=method)
    m, r = divmod(experts, targets)
    assert sorted(i for g in groups for i in g) == list(range(experts))
    assert [len(g) for g in groups] == [m + 1] * r + [m] * (targets - r)
    assert groups == group_experts(noisy(experts, seed), targets, method=method)


@given(size=sizes, seed=st.integers(0, 9999), power=st.sampled_from([0.3, 1.0, 8.0]))
@settings(max_examples=60, deadline=None)
def test_refined_never_retains_less_than_greedy(size: tuple[int, int], seed: int, power: float) -> None:
    P = noisy(size[0], seed) ** power
    greedy, refined = (retained(P, group_experts(P, size[1], method=m)) for m in ("greedy", "refined"))
    assert refined >= greedy


@pytest.mark.parametrize(("experts", "targets"), [(6, 2), (6, 3), (8, 2), (8, 4), (7, 3), (8, 3), (7, 2), (5, 4)])
def test_refined_finds_the_best_partition_of_small_matrices(experts: int, targets: int) -> None:
    m, r = divmod(experts, targets)
    shape = (m + 1,) * r + (m,) * (targets - r)
    for seed in range(5):
        P = noisy(experts, seed)
        best = max(retained(P, p) for p in partitions(tuple(range(experts)), shape))
        assert retained(P, group_experts(P, targets)) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("method", ["greedy", "refined"])
@pytest.mark.parametrize(("blocks", "size"), [(8, 2), (4, 4), (16, 8)])
def test_planted_blocks_are_recovered(method: str, blocks: int, size: int) -> None:
    for seed in range(3):
        P, truth = planted(blocks, size, seed, outside=0.5)
        assert {frozenset(g) for g in group_experts(P, blocks, method=method)} == truth


def test_refined_recovers_blocks_that_greedy_breaks() -> None:
    # Expert 0 is with 2 a little more often than with 1: greedy takes it, and the strong pair (2, 3) is lost.
    P = np.zeros((4, 4))
    P[0, 1], P[0, 2], P[2, 3] = 0.10, 0.11, 0.40
    P += P.T
    assert group_experts(P, 2, method="greedy") == ((0, 2), (1, 3))
    assert group_experts(P, 2) == ((0, 1), (2, 3))
    # The same at scale: one expert of each block is with one of another block a little more often than with its own.
    for seed in range(5):
        P, truth = planted(8, 4, seed, outside=0.3)
        blocks = sorted(map(sorted, truth))
        for block, other in zip(blocks, blocks[1:] + blocks[:1], strict=True):
            P[block[0], other[1]] = P[other[1], block[0]] = 1.05
        assert {frozenset(g) for g in group_experts(P, 8, method="greedy")} != truth
        assert {frozenset(g) for g in group_experts(P, 8)} == truth


def test_exchange_moves_experts_between_groups_of_unequal_size() -> None:
    # The best partition gives the third seat to {1, 2, 3}; greedy gives it to the group of expert 0.
    P = np.zeros((5, 5))
    P[0, 4], P[1, 2], P[1, 3], P[2, 3] = 0.5, 1.0, 1.0, 1.0
    P += P.T
    assert group_experts(P, 2, method="greedy") != ((1, 2, 3), (0, 4))
    assert group_experts(P, 2) == ((1, 2, 3), (0, 4))


def test_balance_pairs_the_light_with_the_heavy() -> None:
    counts = affinity(zipf_routing(0, experts=8, k=2), 8)
    order = np.argsort(counts.load)
    groups = group_experts(counts, 4, method="balance")
    assert {frozenset(g) for g in groups} == {frozenset((order[i], order[-1 - i])) for i in range(4)}


def test_random_depends_on_the_seed() -> None:
    a, b = (group_experts(noisy(16, 0), 4, method="random", seed=s) for s in (0, 1))
    assert a != b


@pytest.mark.parametrize(
    ("P", "targets", "method", "said"),
    [
        (noisy(4, 0), 5, "refined", "use expand"),
        (noisy(4, 0), 0, "refined", "at least one"),
        (noisy(4, 0), 2, "greddy", "did you mean 'greedy'"),
        (noisy(4, 0)[:3], 2, "greedy", "shape"),
        (np.triu(noisy(4, 0)), 2, "greedy", "not symmetric"),
        (-noisy(4, 0), 2, "greedy", "negative"),
        (np.full((4, 4), np.nan), 2, "greedy", "infinite"),
        (np.zeros((4, 4)), 2, "refined", "top-1"),
    ],
)
def test_wrong_arguments_are_named(P: np.ndarray, targets: int, method: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        group_experts(P, targets, method=method)


# -- folding ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def router() -> Grouter:
    grouter = small(num_experts=10)
    grouter.selection_bias.copy_(torch.linspace(-1, 2, 10))
    return grouter


IDS = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0))
EVEN = ((0, 3), (1, 9), (2, 4), (5, 8), (6, 7))
UNEVEN = ((0, 3, 9), (1, 2, 4), (5, 8), (6, 7))


def member(groups: tuple[tuple[int, ...], ...], experts: int = 10) -> np.ndarray:
    return np.array([[float(i in g) for g in groups] for i in range(experts)])


@pytest.mark.parametrize("groups", [EVEN, UNEVEN])
@pytest.mark.parametrize("reduce", ["sum", "mean", "logsumexp"])
def test_folded_logits_are_the_unfolded_ones_reduced(router: Grouter, groups: tuple, reduce: str) -> None:
    L = router(IDS).double().numpy()
    b = router.selection_bias.double().numpy()
    M = member(groups)
    np.testing.assert_array_equal(membership(groups, 10).numpy(), M)
    assert (M.sum(1) == 1).all()
    if reduce == "sum":
        if groups is UNEVEN:
            L, b = L - L.mean(-1, keepdims=True), b - b.mean()
        want, want_bias = L @ M, b @ M
    elif reduce == "mean":
        want, want_bias = L @ (M / M.sum(0)), b @ (M / M.sum(0))
    else:
        want, want_bias = np.log(np.exp(L) @ M), b @ (M / M.sum(0))
    folded = fold(router, groups, reduce=reduce)
    np.testing.assert_allclose(folded(IDS).numpy(), want, atol=2e-6)
    np.testing.assert_allclose(folded.selection_bias.numpy(), want_bias, atol=1e-6)
    assert folded.config.num_experts == folded.score.out_features == (10 if reduce == "logsumexp" else len(groups))
    assert folded.route(IDS, 2)[0].max() < len(groups)


def test_centring_takes_a_common_offset_out_of_unequal_groups(router: Grouter) -> None:
    # Equal logits everywhere: no group may win. Without centring, the groups of three would have 3/2 of the others.
    router.score.weight[:] = router.score.weight.mean(0)
    assert fold(router, UNEVEN)(IDS).abs().max() < 1e-6
    uncentred = router(IDS) @ torch.from_numpy(member(UNEVEN)).float()
    assert (uncentred[..., 0] - uncentred[..., 3]).abs().max() > 0.1
    assert fold(router, EVEN)(IDS).abs().max() > 0.1  # equal sizes are folded as published


def test_as_many_targets_as_experts_is_the_identity(router: Grouter) -> None:
    P = affinity(router.route(IDS, 3)[0], 10)
    same = fold(router, P, 10)
    assert torch.equal(same.score.weight, router.score.weight)
    assert torch.equal(same.selection_bias, router.selection_bias)


def test_the_source_is_untouched_and_the_copy_loads_any_number_of_times(router: Grouter) -> None:
    before = copy.deepcopy(router.state_dict())
    rng = torch.get_rng_state()
    folded = fold(router.double(), EVEN)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(router.state_dict()[n].float(), t) for n, t in before.items())
    assert folded.score.weight.dtype == torch.float64
    assert not folded.score.weight.requires_grad
    fresh = Grouter(folded.config).double()
    for _ in range(2):
        fresh.load_state_dict(folded.state_dict())
    assert torch.equal(fresh(IDS), folded(IDS))


def test_fold_by_affinity_is_fold_by_its_groups(router: Grouter) -> None:
    P = affinity(router.route(IDS, 3)[0], 10)
    for given_P in (P, P.P, torch.from_numpy(P.P)):
        by_P = fold(router, given_P, 4, method="greedy")
        assert torch.equal(by_P.score.weight, fold(router, group_experts(P, 4, method="greedy")).score.weight)


def test_folds_that_cannot_be_are_refused(router: Grouter) -> None:
    P = affinity(router.route(IDS, 3)[0], 10)
    for arguments, said in (
        ((P, 12), "use expand"),
        ((P, 0), "at least one"),
        ((P,), "num_targets is needed"),
        ((EVEN, 4), "5 groups"),
        ((((0, 1), (1, 2, 3, 4, 5, 6, 7, 8, 9)),), "not a partition"),
        (((tuple(range(10)), ()),), "not a partition"),
        ((noisy(8, 0), 4), "8 experts for a Grouter of 10"),
    ):
        with pytest.raises(InputError, match=said):
            fold(router, *arguments)
    with pytest.raises(InputError, match="'logsumexp'"):
        fold(router, EVEN, reduce="logsum")
    with pytest.raises(InputError, match="folded by logsumexp already"):
        fold(fold(router, EVEN, reduce="logsumexp"), ((0, 1, 2), (3, 4)))


def test_report_compares_with_greedy_and_random() -> None:
    counts = affinity(zipf_routing(1), 16)
    groups = group_experts(counts, 4)
    report = fold_report(counts, groups)
    total = counts.P.sum() / 2
    assert report.sizes == (4, 4, 4, 4)
    assert report.retained == pytest.approx(retained(counts.P, groups) / total, rel=1e-12)
    assert report.retained_greedy == pytest.approx(
        retained(counts.P, group_experts(counts, 4, method="greedy")) / total, rel=1e-12
    )
    assert report.retained > report.retained_random
    assert sum(report.load) == pytest.approx(4)
    assert report.max_vio == pytest.approx(max(report.load) - 1)
    assert report.to_dict()["groups"] == groups
    with pytest.raises(InputError, match="not a partition"):
        fold_report(counts, groups[:-1])


def test_a_router_of_one_expert_per_token_is_balanced_by_its_load() -> None:
    """Loads 1, 2, .. 8 for experts in a shuffled order: pairs of the lightest with the heaviest are 9 each."""
    load = np.array([5, 1, 8, 3, 7, 2, 6, 4])
    counts = affinity(np.repeat(np.arange(8), load)[:, None], 8)
    groups = group_experts(counts, 4, method="balance")
    report = fold_report(counts, groups)
    assert [int(load[list(g)].sum()) for g in groups] == [9, 9, 9, 9]
    assert (report.retained, report.retained_greedy, report.retained_random) == (None, None, None)
    assert report.max_vio == pytest.approx(0)
    assert fold(small(), counts, 4, method="balance").score.weight.equal(fold(small(), groups).score.weight)
