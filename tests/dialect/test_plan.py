"""`plan`, and the ops that read one: rows, weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from . import oracles
from .oracles import ARMS, Plan, Routing, Tensor, each_arm, each_case, each_dtype, ops, randn, running


def as_lists(outputs: tuple[Tensor, ...]) -> Plan:
    token, order, slot, offsets = outputs
    assert (token.dtype, order.dtype, slot.dtype, offsets.dtype) == (torch.int64,) * 3 + (torch.int32,)
    return Plan(token.tolist(), order.tolist(), slot.tolist(), offsets.tolist())


@each_arm
@each_case
def test_all_four_outputs(r: Routing, arm: str) -> None:
    with running(arm):
        assert as_lists(ops.plan(r.idx, r.E, r.align)) == r.lists


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    E=st.integers(1, 40),
    k=st.integers(1, 5),
    T=st.integers(0, 30),
    align=st.sampled_from([1, 4, 8, 128]),
)
def test_any_indices(data: st.DataObject, E: int, k: int, T: int, align: int) -> None:
    choice = st.integers(-3, E + 3) if data.draw(st.booleans()) else st.integers(0, E - 1)
    rows = data.draw(st.lists(st.lists(choice, min_size=k, max_size=k), min_size=T, max_size=T))
    dtype = data.draw(st.sampled_from([torch.int64, torch.int32]))
    idx = torch.tensor(rows, dtype=dtype).view(T, k)
    want = oracles.plan(rows, E, align)
    for arm in ARMS:
        with running(arm):
            assert as_lists(ops.plan(idx, E, align)) == want


@each_arm
def test_pairs_of_one_expert_keep_their_order(arm: str) -> None:
    # Long enough that an unstable sort would show.
    idx = torch.arange(5000).view(-1, 2) % 3
    with running(arm):
        token, order, slot, offsets = ops.plan(idx, 3)
    for e in range(3):
        rows = order[offsets[e] : offsets[e + 1]]
        assert torch.equal(rows, torch.arange(e, 5000, 3))
    assert torch.equal(token, order // 2)
    assert torch.equal(slot.view(-1)[order], torch.arange(5000))


@each_arm
@pytest.mark.parametrize("E", [255, 256, 257, 65535, 65536])
def test_expert_counts_around_the_widths_of_small_integers(E: int, arm: str) -> None:
    idx = torch.tensor([[0, E - 1], [E - 1, E], [-1, 0], [2**40, -(2**40)], [254, 255]])
    with running(arm):
        _, order, slot, offsets = ops.plan(idx, E)
    kept = sorted((e, p) for p, e in enumerate(idx.view(-1).tolist()) if 0 <= e < E)
    assert order.tolist() == [p for _, p in kept] + [-1] * (10 - len(kept))
    assert [slot.view(-1)[p].item() for _, p in kept] == list(range(len(kept)))
    assert int((slot >= 0).sum()) == len(kept)
    counts = offsets.diff()
    assert {e: int(counts[e]) for e in counts.nonzero().view(-1).tolist()} == {
        e: sum(1 for other, _ in kept if other == e) for e, _ in kept
    }


@each_arm
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8])
def test_narrow_index_dtypes(dtype: torch.dtype, arm: str) -> None:
    idx = torch.tensor([[0, 5], [120, 3], [5, 7]], dtype=dtype)
    want = oracles.plan(idx.tolist(), 300, 1)
    with running(arm):
        assert as_lists(ops.plan(idx, 300)) == want


@each_arm
def test_indices_of_any_strides(arm: str) -> None:
    r = oracles.CASES["dropped"]
    expanded = torch.tensor([[1], [4], [9]]).expand(3, 4)
    with running(arm):
        for name, idx in oracles.layouts(r.idx).items():
            assert as_lists(ops.plan(idx, r.E)) == r.lists, name
        assert as_lists(ops.plan(expanded, 5)) == oracles.plan(expanded.tolist(), 5, 1)


# -- weights along a plan --------------------------------------------------------------------------------------------


@each_arm
@each_case
@each_dtype
def test_gather_and_scatter_weights(r: Routing, dtype: torch.dtype, arm: str) -> None:
    T, k = r.idx.shape
    w, dw = randn(T, k, dtype=dtype), randn(r.rows, dtype=dtype, seed=1)
    gathered = [0.0 if p < 0 else w[p // k, p % k].item() for p in r.lists.order]
    scattered = [[0.0 if s < 0 else dw[s].item() for s in row] for row in r.lists.slot]
    with running(arm):
        got, back = ops.gather_weights(w, r.order), ops.scatter_weights(dw, r.order, T, k)
    assert (got.dtype, back.dtype) == (dtype, dtype)
    assert got.tolist() == gathered
    assert back.tolist() == scattered
    assert back.shape == (T, k)


@each_arm
def test_weights_of_any_strides(arm: str) -> None:
    r = oracles.CASES["padded_and_dropped"]
    T, k = r.idx.shape
    w, dw = randn(T, k), randn(r.rows)
    with running(arm):
        want, want_back = ops.gather_weights(w, r.order), ops.scatter_weights(dw, r.order, T, k)
        for name, variant in oracles.layouts(w).items():
            assert torch.equal(ops.gather_weights(variant, r.order), want), name
        for name, variant in oracles.layouts(dw).items():
            assert torch.equal(ops.scatter_weights(variant, r.order, T, k), want_back), name
        for name, variant in oracles.layouts(r.order).items():
            assert torch.equal(ops.gather_weights(w, variant), want), name
            assert torch.equal(ops.scatter_weights(dw, variant, T, k), want_back), name
        expanded = w[:, :1].expand(T, k)
        assert torch.equal(ops.gather_weights(expanded, r.order), ops.gather_weights(expanded.clone(), r.order))
