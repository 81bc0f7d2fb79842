"""Affinity counts against a count in plain Python, over shards, and with rows that sum to (k - 1) * load."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx.errors import InputError
from moefx.grouter import affinity as affinity_function
from moefx.grouter.affinity import AffinityResult, affinity
from moefx.train.checkpoint import CheckpointError
from moefx.train.interrupt import TrainingInterrupted

from ..disk import full_after


def random_routing(seed: int, tokens: int, experts: int, k: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((tokens, experts)) * rng.random(experts), axis=1)[:, :k]


def counted(idx: np.ndarray, experts: int) -> np.ndarray:
    pairs = np.zeros((experts, experts), dtype=np.int64)
    for token in idx.reshape(-1, idx.shape[-1]).tolist():
        for a, b in itertools.permutations(token, 2):
            pairs[a, b] += 1
    return pairs


@given(seed=st.integers(0, 999), tokens=st.integers(1, 40), experts=st.integers(1, 9), k=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_counts_are_those_of_a_loop_over_pairs(seed: int, tokens: int, experts: int, k: int) -> None:
    idx = random_routing(seed, tokens, experts, min(k, experts))
    found = affinity(idx, experts)
    np.testing.assert_array_equal(found.pairs, counted(idx, experts))
    np.testing.assert_array_equal(found.chosen, np.bincount(idx.reshape(-1), minlength=experts))
    assert (found.tokens, found.k) == (tokens, idx.shape[1])


def test_symmetric_zero_diagonal_and_row_sums() -> None:
    found = affinity(random_routing(1, 500, 16, 4), 16)
    assert found.P.dtype == np.float64
    np.testing.assert_array_equal(found.P, found.P.T)
    np.testing.assert_array_equal(found.P.diagonal(), 0)
    np.testing.assert_allclose(found.P.sum(1), 3 * found.load, rtol=1e-14)
    np.testing.assert_allclose(found.load.sum(), 4, rtol=1e-14)


@given(cuts=st.lists(st.integers(0, 60), max_size=4), data=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_shards_add_up_to_one_count(cuts: list[int], data: int) -> None:
    idx = random_routing(data, 60, 6, 3)
    shards = [s for s in np.split(idx, sorted(cuts)) if len(s)]
    whole, parts = affinity(idx, 6), [affinity(s, 6) for s in shards]
    merged = parts[0]
    for part in parts[1:]:
        merged = part + merged
    batched = affinity((torch.from_numpy(s) for s in shards), 6)
    for found in (merged, batched):
        np.testing.assert_array_equal(found.pairs, whole.pairs)
        np.testing.assert_array_equal(found.P, whole.P)
        assert found.tokens == 60


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    idx = random_routing(2, 97, 8, 3)
    monkeypatch.setitem(affinity.__globals__, "_CELLS", 40)
    np.testing.assert_array_equal(affinity(idx, 8).pairs, counted(idx, 8))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_shapes_and_dtypes_of_ids(dtype: type) -> None:
    idx = random_routing(3, 24, 8, 2)
    np.testing.assert_array_equal(affinity(idx.astype(dtype).reshape(2, 3, 4, 2), 8).pairs, counted(idx, 8))


@pytest.mark.parametrize(
    ("routing", "said"),
    [
        (np.array([[0, 8]]), "0 to 8 for 8 experts"),
        (np.array([[-1, 2]]), "-1 to 2"),
        (np.array([[3, 3]]), "same expert twice"),
        (np.array([[0.5, 1.0]]), "float64"),
        ([np.array([[0, 1]]), np.array([[0, 1, 2]])], "top-2, then top-3"),
        ([], "no routing"),
        (np.zeros((0, 2), dtype=np.int64), "no routing"),
        ([[0, 1]], "list"),
    ],
)
def test_unusable_routing_is_named(routing: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        affinity(routing, 8)  # type: ignore[arg-type]


def test_different_routers_do_not_add_up() -> None:
    a, b = affinity(np.array([[0, 1]]), 4), affinity(np.array([[0, 1, 2]]), 4)
    with pytest.raises(InputError, match="top-2 and 4 experts, top-3"):
        a + b


def test_public_name() -> None:
    assert affinity_function is affinity
    assert isinstance(affinity(np.array([[0, 1]]), 2), AffinityResult)


def test_counts_are_saved_and_read(tmp_path: Path) -> None:
    counts = affinity(random_routing(0, 50, 8, 3), 8)
    counts.save(tmp_path / "affinity.npz")
    again = AffinityResult.open(tmp_path / "affinity.npz")
    np.testing.assert_array_equal(again.pairs, counts.pairs)
    np.testing.assert_array_equal((again + counts).P, counts.P)
    np.savez(tmp_path / "other.npz", a=1)
    (tmp_path / "text.npz").write_text("text")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name in ("other.npz", "text.npz", "one.npy", "absent.npz"):
        with pytest.raises(InputError, match="no affinity") as caught:
            AffinityResult.open(tmp_path / name)
        assert "pickle" not in str(caught.value.why)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    counts = affinity(random_routing(0, 50, 8, 3), 8)
    counts.save(tmp_path / "whole.npz")
    whole = (tmp_path / "whole.npz").read_bytes()
    for damaged in (b"", whole[:10], whole[: len(whole) // 2], whole[:-1], whole[:200] + b"?" * 8 + whole[208:]):
        (tmp_path / "a.npz").write_bytes(damaged)
        with pytest.raises(InputError, match="no affinity") as caught:
            AffinityResult.open(tmp_path / "a.npz")
        assert caught.value.why
    for change in ({"pairs": counts.pairs[:7]}, {"chosen": counts.chosen / 2}, {"tokens": 0}, {"k": 9}):
        np.savez(tmp_path / "a.npz", **{**vars(counts), **change})
        with pytest.raises(InputError, match="no affinity"):
            AffinityResult.open(tmp_path / "a.npz")


def test_a_full_disk_leaves_the_earlier_counts(tmp_path: Path) -> None:
    earlier, later = (affinity(random_routing(seed, 50, 40, 3), 40) for seed in (0, 1))
    earlier.save(tmp_path / "affinity.npz")
    with pytest.raises(InputError, match="affinity could not be written"), full_after(1000):
        later.save(tmp_path / "affinity.npz")
    np.testing.assert_array_equal(AffinityResult.open(tmp_path / "affinity.npz").pairs, earlier.pairs)
    assert [f.name for f in tmp_path.iterdir()] == ["affinity.npz"]


# -- interruption ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_count_goes_on_to_the_same_counts(
    tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = np.split(random_routing(5, 120, 6, 3), 12)
    whole = affinity(np.concatenate(shards), 6)

    def stopped(first: int) -> Iterator[np.ndarray]:
        for n, shard in enumerate(shards[first:], first):
            if n == 4:
                os.kill(os.getpid(), number)
            yield shard

    options: dict[str, Any] = dict(checkpoint=tmp_path, checkpoint_every=100, identity={"data": "a"})
    with pytest.raises(TrainingInterrupted) as caught:
        affinity(stopped, 6, **options)
    assert (caught.value.code, caught.value.step, caught.value.checkpoint) == (130, 5, tmp_path / "affinity.npz")
    assert f"interrupted after 5 parts; {tmp_path / 'affinity.npz'} is kept" in capsys.readouterr().err
    begun = []
    for routing in (lambda n: begun.append(n) or shards[n:], shards, iter(())):  # the last: finished is finished
        found = affinity(routing, 6, resume=True, **options)
        np.testing.assert_array_equal(found.pairs, whole.pairs)
        np.testing.assert_array_equal(found.chosen, whole.chosen)
        assert (found.tokens, found.k) == (whole.tokens, whole.k)
    assert begun == [5]
    with pytest.raises(CheckpointError, match=r"identity.data was 'a', is 'b'"):
        affinity(shards, 6, resume=True, **{**options, "identity": {"data": "b"}})


def test_an_array_is_counted_in_pieces_that_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    idx = random_routing(2, 97, 8, 3)
    monkeypatch.setitem(affinity.__globals__, "_CELLS", 40)  # 5 tokens a piece
    bad = idx.copy()
    bad[60] = 0
    with pytest.raises(InputError, match="same expert twice"):
        affinity(bad, 8, checkpoint=tmp_path, checkpoint_every=4)
    with np.load(tmp_path / "affinity.npz") as kept:
        assert (int(kept["done"]), kept["counted"].tolist()) == (12, [60, 3])
    np.testing.assert_array_equal(affinity(idx, 8, checkpoint=tmp_path, resume=True).pairs, counted(idx, 8))
    affinity(idx, 8, checkpoint=tmp_path)  # anew: what was reached is moved aside
    assert (tmp_path / "previous-1" / "affinity.npz").is_file()
    (tmp_path / "affinity.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match="what was reached cannot be read"):
        affinity(idx, 8, checkpoint=tmp_path, resume=True)
    for folder in (None, tmp_path / "none"):
        with pytest.raises(InputError, match="nothing to resume from"):
            affinity(idx, 8, checkpoint=folder, resume=True)
