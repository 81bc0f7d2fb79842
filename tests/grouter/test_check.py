"""Prefix consistency: causal routers have it, others are caught."""

from __future__ import annotations

import pytest
import torch

from moefx.errors import InputError
from moefx.grouter import assert_causal, prefix_consistency

from .test_network import KINDS, VOCAB, make, some_ids


@pytest.mark.parametrize("kind", KINDS)
def test_causal_routers_are_consistent(kind: str) -> None:
    found = prefix_consistency(make(kind=kind), some_ids(2, 24), k=2)
    assert found.consistent
    assert found.max_difference < 1e-5
    assert found.changed_sets == 0
    assert found.prefixes == 16


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "linear"])
def test_routers_that_see_the_future_are_caught(kind: str) -> None:
    g = make(kind=kind, causal=False)
    found = prefix_consistency(g, some_ids(2, 24), k=2)
    assert not found.consistent
    assert found.max_difference > 0.05
    assert found.changed_sets > 0.1
    with pytest.raises(InputError, match="sees the future") as e:
        assert_causal(g)
    assert "of the largest one" in str(e.value.why)


def test_a_leak_from_the_last_token_alone_is_caught() -> None:
    g = make()

    def leaking(ids: torch.Tensor) -> torch.Tensor:
        return g(ids) + 0.01 * (ids[:, -1:, None] % 2)

    assert not prefix_consistency(leaking, some_ids()).consistent
    assert prefix_consistency(g.forward, some_ids()).consistent
    with pytest.raises(InputError, match="vocabulary of this router"):
        assert_causal(leaking)
    with pytest.raises(InputError, match="sees the future"):
        assert_causal(leaking, vocab_size=VOCAB)


def test_a_router_in_training_mode_comes_back_so() -> None:
    g = make().train()
    assert assert_causal(g).consistent
    assert g.training


def test_wrong_arguments() -> None:
    g = make()
    for lengths in ([], [0], [12]):
        with pytest.raises(InputError, match="prefix lengths"):
            prefix_consistency(g, some_ids(), lengths=lengths)
    with pytest.raises(InputError, match="no later tokens"):
        prefix_consistency(g, some_ids(2, 1))
    with pytest.raises(InputError, match="top-9"):
        prefix_consistency(g, some_ids(), k=9)


def test_every_part_keeps_its_own_mode() -> None:
    g = make().train()
    g.norm.eval()
    prefix_consistency(g, some_ids())
    assert (g.training, g.norm.training, g.score.training) == (True, False, True)


def test_ids_outside_of_the_vocabulary() -> None:
    for bad in (VOCAB, -1):
        ids = some_ids()
        ids[1, 3] = bad
        with pytest.raises(InputError, match=f"token id {bad} is outside"):
            assert_causal(make(), ids)
