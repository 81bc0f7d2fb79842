"""Expansion: directions, lengths and signs of the new rows, what old tokens keep, and its limits."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx.errors import InputError
from moefx.grouter import expand, routed
from moefx.grouter.expand import hidden_states, new_rows
from moefx.grouter.windows import document_ids, sample_windows, window_batches
from moefx.train.checkpoint import CheckpointError
from moefx.train.interrupt import TrainingInterrupted

from .small import small

TOKENS = np.random.default_rng(0).integers(0, 64, 4096)


@given(
    experts=st.integers(1, 12), count=st.integers(1, 12), d=st.integers(24, 40), rank=st.integers(1, 12),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_new_rows(experts: int, count: int, d: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    old = rng.normal(size=(experts, min(rank, experts))) @ rng.normal(size=(min(rank, experts), d))
    rows, centroids = new_rows(old, rng.normal(size=(600, d)).astype(np.float32), count)
    length = np.linalg.norm(old, axis=1).mean()
    assert np.abs(rows @ old.T).max() < 1e-10 * length**2
    np.testing.assert_allclose(rows @ rows.T, length**2 * np.eye(count), atol=1e-10 * length**2)
    assert np.abs(centroids @ old.T).max() < 1e-10 * length * np.linalg.norm(centroids)
    assert ((rows * centroids).sum(1) > 0).all()


def test_without_the_sign_a_row_would_point_away() -> None:
    """The negative control of the sign: a plain QR of the same centroids gives some rows the other direction."""
    rng = np.random.default_rng(0)
    _, centroids = new_rows(rng.normal(size=(4, 32)), rng.normal(size=(600, 32)), 6)
    plain = np.linalg.qr(centroids.T)[0].T
    assert ((plain * centroids).sum(1) < 0).any()


def test_rows_are_aimed_at_the_tokens_that_no_expert_claims() -> None:
    # Two old experts claim clusters 0 and 1; 20 % of the tokens lie around two directions that nobody claims.
    rng = np.random.default_rng(1)
    at = np.repeat([0, 1, 2, 3], [400, 400, 120, 80])
    states = 4 * np.eye(16)[at] + 0.1 * rng.normal(size=(1000, 16))
    rows, _ = new_rows(np.eye(16)[:2], states, 2)
    np.testing.assert_allclose(rows[:, 2:4], np.eye(2), atol=0.05)  # the larger cluster first


def test_old_experts_keep_their_logits_and_tokens_unless_a_new_one_wins() -> None:
    router = small()
    router.selection_bias.copy_(torch.linspace(0, 1, 8))
    before = router.score.weight.clone()
    larger = expand(router, TOKENS, 12, window=64)
    assert torch.equal(router.score.weight, before)
    assert torch.equal(larger.score.weight[:8], before)
    assert larger.config.num_experts == larger.score.out_features == 12
    assert larger.selection_bias.tolist() == [*router.selection_bias.tolist(), 0, 0, 0, 0]
    ids = torch.from_numpy(TOKENS[:512].reshape(8, 64))
    (old, _), (new, _) = router.route(ids, 2), larger.route(ids, 2)
    untouched = (new < 8).all(-1)
    assert torch.equal(old[untouched], new[untouched])
    assert 0 < untouched.sum() < untouched.numel()


def test_it_is_a_function_of_its_arguments_and_draws_no_random_numbers() -> None:
    rng = torch.get_rng_state()
    a, b = (expand(small(), TOKENS, 12, window=64) for _ in range(2))
    assert torch.equal(a.score.weight, b.score.weight)
    torch.set_rng_state(rng)
    router = small()
    state = torch.get_rng_state()
    expand(router, TOKENS, 12, window=64)
    assert torch.equal(torch.get_rng_state(), state)


def test_documents_are_kept_apart_and_many_experts_from_few_tokens() -> None:
    router = small()
    windows = sample_windows(TOKENS, 64, 256)
    assert windows.shape == (4, 64)
    together, apart = hidden_states(router, windows), hidden_states(router, windows, eod_id=5)
    after = (document_ids(windows, 5) > 0).reshape(-1)
    np.testing.assert_array_equal(together[~after], apart[~after])
    assert (together[after] != apart[after]).any(1).mean() > 0.9
    few = expand(router, TOKENS, 32, window=64, max_tokens=64)  # 24 new ones, 13 tokens below the quantile
    assert few.config.num_experts == 32


def test_limits_are_named() -> None:
    router = small()
    for targets, said in ((33, "at most 32 experts"), (8, "use fold"), (6, "use fold")):
        with pytest.raises(InputError, match=said):
            expand(router, TOKENS, targets, window=64)
    assert expand(router, TOKENS, 32, window=64).config.num_experts == 32
    with pytest.raises(InputError, match="only 1 different"):
        new_rows(np.eye(16)[:2], np.ones((100, 16)), 2)
    flat = np.eye(16)[np.random.default_rng(0).integers(4, 6, 100)] * np.linspace(1, 2, 100)[:, None]
    with pytest.raises(InputError, match="only 2 directions"):
        new_rows(np.eye(16)[:2], flat, 3)


def test_windows_are_cut_alike_from_every_kind_of_tokens() -> None:
    want = TOKENS[:4032].reshape(63, 64)
    matrix = TOKENS.reshape(64, 64)[:63]
    batches = [matrix[:10], torch.from_numpy(matrix[10:11]), matrix[11:]]
    for tokens, window in ((TOKENS[:4090], 64), (matrix, None), (torch.from_numpy(matrix), 64), (iter(batches), None)):
        np.testing.assert_array_equal(np.concatenate(list(window_batches(tokens, window, 7))), want)
    np.testing.assert_array_equal(sample_windows(iter(batches), None, 600), want[:9])
    assert document_ids(np.array([[5, 1, 5, 5, 2]]), 5).tolist() == [[0, 1, 1, 2, 3]]


@pytest.mark.parametrize(
    ("tokens", "window", "said"),
    [
        (TOKENS, None, "window length"),
        (TOKENS[:10], 64, "fewer tokens than one window"),
        (TOKENS.reshape(64, 64), 32, "windows of 64"),
        ([TOKENS[:64].reshape(1, 64), TOKENS[:64].reshape(2, 32)], None, "windows of 32"),
        (TOKENS.astype(np.float32), 64, "float32"),
        ([], None, "no tokens"),
        ([], 64, "no tokens"),
        (["text"], 64, "str"),
    ],
)
def test_tokens_that_cannot_be_cut_are_refused(tokens: object, window: int | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        list(window_batches(tokens, window, 4))  # type: ignore[arg-type]


def test_options_and_ids_out_of_range_are_refused() -> None:
    for options, said in (
        ({"quantile": 1.5}, "quantile=1.5"),
        ({"quantile": float("nan")}, "quantile=nan"),
        ({"seed": 2**32}, "seed 4294967296"),
        ({"seed": -1}, "seed -1"),
        ({"iterations": 0}, "0 iterations"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"eod_id": 64}, "eod_id 64 is outside"),
        ({"tokens": TOKENS.astype(np.int64) + 1}, "token id 64 is outside"),
        ({"tokens": TOKENS.astype(np.int64) - 1}, "token id -1 is outside"),
    ):
        with pytest.raises(InputError, match=said):
            expand(**{"grouter": small(), "tokens": TOKENS, "num_targets": 9, "window": 64} | options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="token id 64 is outside"):
        list(routed(small(), TOKENS.astype(np.int64) + 1, 2, window=64))
    with pytest.raises(InputError, match="0 windows per forward"):
        list(routed(small(), TOKENS, 2, window=64, batch=0))


def test_interrupted_hidden_states_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    router = small()
    want, hidden, calls = expand(router, TOKENS, 12, window=64), router.hidden, itertools.count(1)

    def stopped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        found: torch.Tensor = hidden(*args, **kwargs)
        return found

    monkeypatch.setattr(router, "hidden", stopped)
    with pytest.raises(TrainingInterrupted) as caught:
        expand(router, TOKENS, 12, window=64, checkpoint=tmp_path)
    assert (caught.value.code, caught.value.step) == (130, 3)
    found = expand(router, TOKENS, 12, window=64, checkpoint=tmp_path, resume=True)
    assert next(calls) == 4 + (8 - 3)
    assert torch.equal(found.score.weight, want.score.weight)
    with pytest.raises(CheckpointError, match="tokens was"):
        expand(router, TOKENS[::-1].copy(), 12, window=64, checkpoint=tmp_path, resume=True)
