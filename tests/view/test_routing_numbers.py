"""Pooling of calls, and what is said of paths, against counting by hand and scikit-learn."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx.view import routing as view
from moefx.view.routing_numbers import RoutingSum, numbers, path_counts, scalars, step_numbers

from .made import choices, metrics


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(1, 4), st.sampled_from([[6, 6], [4, 7, 5], [5]]))
def test_calls_add_up_to_one_call_with_all_their_tokens(seed: int, calls: int, sizes: list[int]) -> None:
    idx = choices(seed, sizes, 2, 5 * calls)
    whole, pooled = metrics(idx, sizes), RoutingSum()
    for c in range(calls):
        pooled.add({n: v.clone() for n, v in metrics([layer[5 * c : 5 * c + 5] for layer in idx], sizes).items()})
        pooled.add({})  # a call that measured nothing
    found = pooled.result()
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, check_dtype=False, rtol=1e-5, atol=1e-6, msg=name)


def test_an_expert_is_dead_when_no_call_chose_it() -> None:
    sizes, pooled = [4], RoutingSum()
    calls = [metrics([[[0, 1]] * 3], sizes), metrics([[[2, 1]] * 3], sizes)]
    assert [float(c["dead_experts"]) for c in calls] == [2, 2]
    for call in calls:
        pooled.add(call)
    assert pooled.result()["dead_experts"].tolist() == [1]  # the mean over calls would be 2
    assert RoutingSum().result() == {}
    assert numbers({}) == {}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(2, 6))
def test_information_of_random_transitions(seed: int, E: int) -> None:
    sk = pytest.importorskip("sklearn.metrics")
    counts = np.random.default_rng(seed).integers(0, 9, (E, E)) + np.eye(E, dtype=int)
    here, there = (a.repeat(counts.flatten()) for a in np.divmod(np.arange(E * E), E))
    found = step_numbers(torch.from_numpy(counts))
    information = sk.mutual_info_score(here, there)
    assert found["mutual_information"] == pytest.approx(information / math.log(E), abs=1e-9)
    after = {e: Counter(there[here == e].tolist()) for e in range(E)}
    entropy = sum(-n / len(here) * math.log(n / c.total()) for c in after.values() for n in c.values())
    assert found["conditional_entropy"] == pytest.approx(entropy / math.log(E), abs=1e-9)
    for q in (1, 2):
        hits = sum(n for c in after.values() for _, n in c.most_common(q))
        assert found[f"hit_rate_{q}"] == pytest.approx(hits / len(here))
        chance = sum(n for _, n in Counter(there.tolist()).most_common(q))
        assert found[f"chance_{q}"] == pytest.approx(chance / len(here))


def test_information_at_its_ends() -> None:
    followed = step_numbers(torch.eye(4)[[2, 0, 3, 1]] * 5)
    assert followed == pytest.approx({
        "hit_rate_1": 1, "hit_rate_2": 1, "chance_1": 0.25, "chance_2": 0.5, "conditional_entropy": 0,
        "mutual_information": 1,
    })  # fmt: skip
    free = step_numbers(torch.outer(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 1, 4])))
    assert free["hit_rate_1"] == pytest.approx(free["chance_1"])
    assert free["mutual_information"] == pytest.approx(0, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(1, 60), st.integers(1, 3))
def test_paths(seed: int, tokens: int, layers: int) -> None:
    idx = choices(seed, [4] * layers, 2, tokens)
    counts = Counter(tuple(layer[t][0] for layer in idx) for t in range(tokens))
    left, needed = 0.9 * tokens, 0
    for _, n in counts.most_common():
        if left > 1e-9:
            left, needed = left - n, needed + 1
    assert path_counts(torch.tensor(idx)) == {"seen_paths": len(counts), "distinct_paths": needed}
    masked = torch.cat([torch.tensor(idx), torch.full((layers, 7, 2), -1)], 1)
    assert path_counts(masked) == path_counts(torch.tensor(idx))  # tokens that do not count


def test_a_layer_without_a_choice_has_no_load_to_be_uneven_and_no_paths() -> None:
    """A capacity may drop everything, and -1 would pass for better than balance."""
    sizes, pooled = [4, 4], RoutingSum()
    call = metrics(choices(0, sizes, 2, 10), sizes)
    for name in ("load", "slots", "choices", "max_violation", "transitions"):
        fill = -1 if name in ("choices", "max_violation") else 0
        call[name][0] = torch.full_like(call[name][0], fill)
    pooled.add(call)
    found = numbers(pooled.result(), ["a", "b\nc"])
    rows = [row["max_violation"] for row in found["layers"]]
    assert math.isnan(rows[0])
    assert found["mean"]["max_violation"] == rows[1] > 0
    assert (found["seen_paths"], found["distinct_paths"]) == (0, 0)
    lines = view.text(found).splitlines()
    assert [line.split()[:4] for line in lines[2:4]] == [["0", "a", "4", "none"], ["1", r"b\nc", "4", f"{rows[1]:.2f}"]]
    again = numbers(call)  # of one call, whatever it says
    assert [math.isnan(row["max_violation"]) for row in again["layers"]] == [True, False]
    assert again["mean"]["max_violation"] == pytest.approx(rows[1])
    call["load"], call["slots"] = torch.zeros(2, 4), torch.zeros(2)
    pooled = RoutingSum()
    pooled.add(call)
    assert math.isnan(numbers(pooled.result())["mean"]["max_violation"])


def test_numbers_name_layers_and_leave_out_what_is_not_there() -> None:
    sizes = [4, 6, 4]
    found = numbers(metrics(choices(0, sizes, 2, 30), sizes), ["a", "b", "c"])
    assert [(row["layer"], row["path"], row["experts"]) for row in found["layers"]] == [
        (0, "a", 4), (1, "b", 6), (2, "c", 4),
    ]  # fmt: skip
    assert [len(row) for row in found["load"]] == sizes
    assert [math.fsum(row) for row in found["load"]] == pytest.approx([1, 1, 1])
    assert set(found["mean"]) == {"max_violation", "dead_experts", "overlap"}
    assert found["mean"]["overlap"] == pytest.approx(0.05)
    assert [(row["from"], row["to"]) for row in found["steps"]] == [(0, 1), (1, 2)]
    logged = scalars(found)
    assert logged["overlap/1"] == pytest.approx(0.05)
    assert logged["dead_experts/mean"] == found["mean"]["dead_experts"]
    assert set(logged) == {f"{n}/{i}" for n in found["mean"] for i in (0, 1, 2, "mean")} | {
        "hit_rate_1/0", "hit_rate_1/1", "chance_1/0", "chance_1/1",
    }  # fmt: skip
    assert logged["chance_1/1"] == found["steps"][1]["chance_1"]
    rows = [{"layer": i, "remote": 1.0 + i, "uniform": 1.5, "max_over_mean": 2.0} for i in range(3)]
    logged = scalars({**found, "places": 2, "traffic": rows})
    assert (logged["traffic_remote/2"], logged["traffic_remote/mean"], logged["traffic_uniform/mean"]) == (3, 2, 1.5)
    assert logged["traffic_max_over_mean/0"] == 2
    apart = metrics(choices(0, sizes, 2, 30), sizes)
    del apart["choices"]
    apart["transitions"][1] = 0  # layers that do not see the same tokens
    found = numbers(apart)
    assert [(row["from"], row["to"]) for row in found["steps"]] == [(0, 1)]
    assert "distinct_paths" not in found
