"""Placement against brute force, the closed formula and a flow solver; the effect on topical data."""

from __future__ import annotations

import itertools
import math
import os
import signal
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx.errors import InputError
from moefx.grouter import Placement, affinity, coactivation_graph, place, uniform_traffic
from moefx.grouter.place import CHUNK, place_experts, place_samples, placement_report
from moefx.grouter.traffic import profiles, remote, slot_hits, token_hits
from moefx.train.checkpoint import CheckpointError
from moefx.train.interrupt import TrainingInterrupted

from ..disk import full_after
from .synthetic import topical_routing

SEEDS = range(8)


def hits_by_hand(idx: np.ndarray, where: np.ndarray, places: int, *, slots: bool) -> np.ndarray:
    hits = np.zeros((len(idx), places), dtype=np.int64)
    for s, sample in enumerate(idx.tolist()):
        for token in sample:
            on = [int(where[e]) for e in token]
            for n in on if slots else set(on):
                hits[s, n] += 1
    return hits


# -- counting --------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 999), places=st.sampled_from([1, 2, 3, 6]), k=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_hits_are_those_of_a_loop_over_tokens(seed: int, places: int, k: int) -> None:
    idx = topical_routing(seed, 1.0, samples=5, length=7, experts=12, k=k)
    where = np.random.default_rng(seed).permutation(12) % places
    np.testing.assert_array_equal(token_hits(idx, where, places), hits_by_hand(idx, where, places, slots=False))
    np.testing.assert_array_equal(slot_hits(idx, where, places), hits_by_hand(idx, where, places, slots=True))
    home = np.arange(5) % places
    by_hand = sum(n for s, row in enumerate(token_hits(idx, where, places)) for i, n in enumerate(row) if i != home[s])
    assert remote(token_hits(idx, where, places), home) == by_hand
    np.testing.assert_allclose(profiles(idx, 12).sum(1), 1, rtol=1e-12)


def test_chunks_of_samples_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    idx = topical_routing(0, 1.0, samples=9, length=7)
    where = np.arange(32) % 4
    monkeypatch.setitem(token_hits.__globals__, "_CELLS", 300)
    np.testing.assert_array_equal(token_hits(idx, where, 4), hits_by_hand(idx, where, 4, slots=False))


@pytest.mark.parametrize(
    ("experts", "k", "places", "tokens"),
    [(128, 8, 2, 0.997), (128, 8, 4, 2.722), (128, 8, 8, 4.672), (64, 6, 4, 2.509), (32, 4, 4, 2.114)],
)
def test_closed_formula(experts: int, k: int, places: int, tokens: float) -> None:
    assert uniform_traffic(experts, k, places) == pytest.approx(tokens, abs=5e-4)
    assert uniform_traffic(experts, k, places, count="slots") == k * (places - 1) / places


def test_closed_formula_by_enumeration() -> None:
    sets = list(itertools.combinations(range(8), 3))
    total = sum(len({e // 2 for e in chosen} - {home}) for chosen in sets for home in range(4))
    assert uniform_traffic(8, 3, 4) == pytest.approx(total / (4 * math.comb(8, 3)), rel=1e-12)


# -- samples ---------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 9999), samples=st.integers(1, 7), places=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_homes_are_the_best_by_brute_force(seed: int, samples: int, places: int) -> None:
    hits = np.random.default_rng(seed).integers(0, 6, (samples, places))
    free = place_samples(hits, equal=False)
    for s, home in enumerate(free):
        sends = [sum(hits[s, m] for m in range(places) if m != n) for n in range(places)]
        assert home == sends.index(min(sends))
    equal = place_samples(hits)
    allowed = {samples // places, -(-samples // places)}
    best = min(
        remote(hits, np.array(h))
        for h in itertools.product(range(places), repeat=samples)
        if all(h.count(n) in allowed for n in range(places))
    )
    assert remote(hits, equal) == best
    assert set(np.bincount(equal, minlength=places)) <= allowed


def test_equal_counts_at_least_cost_by_a_flow_solver() -> None:
    hits = token_hits(topical_routing(0, 2.0, samples=40, length=16), np.arange(32) // 8, 4)
    graph = nx.DiGraph()
    for s, row in enumerate(hits.tolist()):
        graph.add_node(("s", s), demand=-1)
        for n, hit in enumerate(row):
            graph.add_edge(("s", s), ("n", n), weight=sum(row) - hit, capacity=1)
    for n in range(4):
        graph.add_node(("n", n), demand=10)
    assert remote(hits, place_samples(hits)) == nx.min_cost_flow_cost(graph)


@pytest.mark.parametrize("samples", [5000, 4097])
def test_many_samples_are_assigned_in_chunks_no_worse_than_round_robin(
    samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(place_samples.__globals__, "CHUNK", CHUNK // 4)  # 510 for three places
    hits = np.random.default_rng(0).integers(0, 65, (samples, 3))
    home = place_samples(hits)
    assert np.ptp(np.bincount(home, minlength=3)) <= 1
    for start in range(0, samples, 510):
        part = slice(start, start + 510)
        assert remote(hits[part], home[part]) <= remote(hits[part], np.arange(len(hits[part])) % 3)


# -- experts ---------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 99), shape=st.sampled_from([(8, 1), (8, 2), (12, 3), (12, 6), (16, 16)]),
    temp=st.sampled_from([0.0, 1.0, 3.0]),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_every_expert_has_one_place_and_every_place_its_share(seed: int, shape: tuple[int, int], temp: float) -> None:
    experts, places = shape
    idx = topical_routing(seed, temp, samples=20, length=8, experts=experts, k=2)
    found = place(idx, experts, places)
    assert (np.bincount(found.place, minlength=places) == experts // places).all()
    assert np.ptp(found.report.samples) <= 1
    assert sorted(found.slot) == list(range(experts))
    for i in range(experts):
        lower = [j for j in range(i) if found.place[j] == found.place[i]]
        assert found.slot[i] == found.place[i] * (experts // places) + len(lower)


def test_topics_with_experts_of_their_own_get_a_place_each() -> None:
    rng = np.random.default_rng(0)
    of_topic = rng.permutation(16).reshape(4, 4)
    topic = rng.integers(0, 4, 40)
    idx = np.stack([np.stack([rng.permutation(of_topic[t])[:2] for _ in range(10)]) for t in topic])
    found = place(idx, 16, 4, equal=False)
    assert {frozenset(np.flatnonzero(found.place == n)) for n in range(4)} == {frozenset(g) for g in of_topic}
    assert found.report.tokens_after == found.report.slots_after == 0
    assert found.report.tokens_before > 1
    assert (found.place[idx] == found.home[:, None, None]).all()


def test_flat_samples_are_left_out_of_the_clusters() -> None:
    flat = np.tile(np.arange(8).reshape(1, 4, 2), (30, 1, 1))
    rng = np.random.default_rng(0)
    topical = np.stack([np.stack([rng.permutation(4)[:2] + 4 * (s % 2) for _ in range(4)]) for s in range(10)])
    phi = profiles(np.concatenate([flat, topical]), 8)
    found = place_experts(phi, 2, max_entropy=2.5)  # a flat sample has 3 bits, one about a topic 2 at most
    assert len(set(found[:4])) == len(set(found[4:])) == 1
    with pytest.raises(InputError, match="raise max_entropy"):
        place_experts(phi, 2, max_entropy=0.5)


# -- the effect on topical data --------------------------------------------------------------------------------------


def test_traffic_falls_where_there_are_topics() -> None:
    ratios, capped, before = [], [], []
    for seed in SEEDS:
        idx = topical_routing(seed, 2.0)
        found = place(idx, 32, 4)
        report, hits = found.report, token_hits(idx, found.place, 4)
        ratios.append(report.tokens_after / report.tokens_before)
        capped.append(remote(hits, found.home) / remote(hits, place_samples(hits, equal=False)))
        before.append(report.tokens_before)
        assert report.samples == (64, 64, 64, 64)
        assert remote(hits, found.home) <= remote(hits, np.arange(256) % 4)
        assert report.slots_after < report.slots_before
        assert report.tokens_after <= report.slots_after
    assert max(ratios) <= 0.80
    assert np.mean(ratios) <= 0.72
    assert 1 <= min(capped) <= max(capped) <= 1.08


def test_without_topics_there_is_next_to_nothing_to_gain() -> None:
    for seed in SEEDS:
        report = place(topical_routing(seed, 0.0), 32, 4).report
        assert 0.94 <= report.tokens_after / report.tokens_before <= 1.0
        assert report.tokens_before == pytest.approx(report.tokens_uniform, rel=0.015)
        assert report.slots_before == pytest.approx(report.slots_uniform, rel=0.015)


def test_the_report_names_what_grouping_unbalances() -> None:
    idx = topical_routing(0, 3.0)
    found = place(idx, 32, 4, equal=False)
    work = np.bincount(found.place[idx].reshape(-1), minlength=4)
    assert found.report.work_after == pytest.approx(work.max() / work.mean(), rel=1e-12)
    assert found.report.samples == tuple(len(found.samples_of(n)) for n in range(4))
    for n in (-1, 4):
        with pytest.raises(InputError, match=f"there is no place {n}"):
            found.samples_of(n)
    assert found.report.samples_max_over_mean == pytest.approx(max(found.report.samples) / 64)
    same = placement_report(idx, np.arange(32) // 8, np.arange(256) % 4, 4)
    assert (same.tokens_after, same.work_after) == (same.tokens_before, same.work_before)


# -- use -------------------------------------------------------------------------------------------------------------


def test_relabelled_experts_compute_the_same() -> None:
    idx = topical_routing(0, 2.0, samples=8, length=4)
    found = place(idx, 32, 4)
    rng = np.random.default_rng(0)
    weights, x, gates = rng.normal(size=(32, 6, 6)), rng.normal(size=(8, 4, 6)), rng.random((8, 4, 4))

    def moe(weights: np.ndarray, idx: np.ndarray) -> np.ndarray:
        return np.einsum("stk,stkoi,sti->sto", gates, weights[idx], x)

    moved = weights[np.argsort(found.slot)]
    np.testing.assert_allclose(moe(moved, found.slot[idx]), moe(weights, idx), atol=1e-12)
    assert np.abs(moe(weights, found.slot[idx]) - moe(weights, idx)).max() > 0.1  # the negative control


def test_places_that_do_not_divide_the_experts_leave_what_an_earlier_run_reached(tmp_path: Path) -> None:
    (tmp_path / "places.npz").write_text("earlier")
    with pytest.raises(InputError, match="32 experts cannot be placed evenly on 5"):
        place(topical_routing(0, 2.0, samples=16), 32, 5, checkpoint=tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["places.npz"]


def test_placement_is_saved_and_loaded(tmp_path: Path) -> None:
    found = place(topical_routing(0, 2.0, samples=16), 32, 4)
    found.save(tmp_path / "placement.json")
    again = Placement.open(tmp_path / "placement.json")
    np.testing.assert_array_equal(again.place, found.place)
    np.testing.assert_array_equal(again.home, found.home)
    assert (again.num_places, again.report) == (4, found.report)
    for text, why in (("{}", "it lacks 'report'"), ("no json", "Expecting value")):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(InputError, match="no placement") as caught:
            Placement.open(tmp_path / "other.json")
        assert why in str(caught.value.why)


def test_graph_of_coactivation() -> None:
    counts = affinity(topical_routing(0, 2.0, samples=4), 32)
    graph = coactivation_graph(counts, np.arange(32) // 8)
    for i, j in itertools.combinations(range(32), 2):
        assert graph.edges[i, j]["weight"] == counts.P[i, j] if counts.pairs[i, j] else not graph.has_edge(i, j)
    assert graph.number_of_nodes() == 32
    assert graph.nodes[9] == {"load": counts.load[9], "place": 1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_places": 5}, "divisor of 32"),
        ({"num_places": 0}, "divisor of 32"),
        ({"num_experts": 16}, "for 16 experts"),
        ({"idx": topical_routing(0, 2.0, samples=3)}, "3 different samples are too few"),
        ({"idx": topical_routing(0, 2.0)[0]}, r"\[64, 4\]"),
        ({"idx": topical_routing(0, 2.0).astype(float)}, "float64"),
        ({"seed": -1}, "seed -1 of k-means"),
        ({"seed": 2**32}, "seed 4294967296 of k-means"),
    ],
)
def test_placements_that_cannot_be_are_refused(change: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        place(**{"idx": topical_routing(0, 2.0, samples=16), "num_experts": 32, "num_places": 4} | change)


def test_a_full_disk_leaves_the_earlier_placement(tmp_path: Path) -> None:
    found = place(topical_routing(0, 2.0, samples=16), 32, 4)
    found.save(tmp_path / "placement.json")
    with pytest.raises(InputError, match="placement could not be written"), full_after(100):
        place(topical_routing(1, 2.0, samples=16), 32, 4).save(tmp_path / "placement.json")
    np.testing.assert_array_equal(Placement.open(tmp_path / "placement.json").place, found.place)


def test_an_interrupted_placement_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Places of experts are found once; homes are kept by chunks."""
    idx, names = topical_routing(0, 2.0, samples=70, length=8), place.__globals__
    monkeypatch.setitem(names, "CHUNK", 16)
    want, assign, calls = place(idx, 32, 4), place_samples, itertools.count(1)

    def stopped(*args: Any, **kwargs: Any) -> np.ndarray:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return assign(*args, **kwargs)

    monkeypatch.setitem(names, "place_samples", stopped)
    with pytest.raises(TrainingInterrupted):
        place(idx, 32, 4, checkpoint=tmp_path)
    with np.load(tmp_path / "places.npz") as kept:
        np.testing.assert_array_equal(kept["home"], want.home[:32])
    monkeypatch.setitem(names, "place_experts", None)
    found = place(idx, 32, 4, checkpoint=tmp_path, resume=True)
    assert next(calls) == 6
    np.testing.assert_array_equal(found.place, want.place)
    np.testing.assert_array_equal(found.home, want.home)
    assert found.report == want.report
    with pytest.raises(CheckpointError, match="equal was True, is False"):
        place(idx, 32, 4, equal=False, checkpoint=tmp_path, resume=True)
