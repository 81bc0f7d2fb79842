"""Weight gradients in the layout of the parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moefx.passes import DropNoops, OrientWgrad
from tests.passes.subject import (
    E,
    H,
    I,
    Made,
    Subject,
    T,
    count,
    nodes,
    ops,
    put,
    rand,
    rewrite,
    route,
    training_graph,
    weights,
)

Tensor = torch.Tensor
aten = torch.ops.aten


def bank(m: Any, x: Tensor) -> Tensor:
    """Experts whose weights are stored [E, in, out]."""
    _, w, idx = route(m, x)
    token, order, slot, offsets = ops.plan(idx, E, 1)
    h = ops.grouped_mm(ops.permute(x, token, slot), m.up.transpose(1, 2), offsets)
    y = ops.grouped_mm(ops.glu(h, None, "silu"), m.down.transpose(1, 2), offsets)
    return ops.unpermute(y, token, order, slot, w)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def stored_kn() -> Subject:
    """Training graph of one such bank."""
    return training_graph(Made(bank, **weights("kn")), rand(T, H))


def test_gradients_come_out_as_the_parameters_are_stored(stored_kn: Subject) -> None:
    done = rewrite(OrientWgrad(), stored_kn)
    assert done.row.matched == 2
    assert {tuple(n.meta["val"].shape) for n in nodes(done.graph, "grouped_wgrad")} == {(E, H, 2 * I), (E, I, H)}
    assert all(n.meta["val"].is_contiguous() for n in nodes(done.graph, "grouped_wgrad"))
    returned: Any = done.graph.output_node().args[0]
    assert set(nodes(done.graph, "grouped_wgrad")) <= set(returned)
    assert all(n.meta["partitioner_tag"] == "is_backward" for n in done.new())


def test_several_readers_of_the_transpose(stored_kn: Subject) -> None:
    """Two transposes of one gradient are one new gradient."""
    subject = stored_kn.copy()
    wgrad = nodes(subject.graph, "grouped_wgrad")[0]
    (flip,) = wgrad.users
    other = put(subject, wgrad, aten.transpose.int, wgrad, 2, 1, users=False)
    put(subject, flip, aten.add.Tensor, flip, other, users=True)
    done = rewrite(OrientWgrad(), subject)
    assert done.row.matched == 2
    assert count(done.graph, "grouped_wgrad") == 2


def test_transposes_in_the_other_order(stored_kn: Subject) -> None:
    """The transpose that was made first may stand second in the graph."""
    subject = stored_kn.copy()
    wgrad = nodes(subject.graph, "grouped_wgrad")[0]
    (flip,) = wgrad.users
    early = put(subject, wgrad, aten.transpose.int, wgrad, -1, -2, users=False)
    assert early < flip
    again = put(subject, early, aten.mul.Tensor, early, 2.0, users=False)
    put(subject, flip, aten.add.Tensor, flip, again, users=True)
    assert rewrite(OrientWgrad(), subject).row.matched == 2


def test_read_in_both_orientations(stored_kn: Subject) -> None:
    subject = stored_kn.copy()
    wgrad = nodes(subject.graph, "grouped_wgrad")[0]
    (flip,) = wgrad.users
    norm = put(subject, wgrad, aten.sum.default, wgrad, users=False)
    put(subject, flip, aten.mul.Tensor, flip, norm, users=True)
    done = rewrite(OrientWgrad(), subject)
    assert done.row.matched == 1
    assert done.reasons == ["it is read in both orientations"]
    assert done.row.rejected[0]["node"].endswith(wgrad.name)


def test_other_axes_are_no_candidates(stored_kn: Subject) -> None:
    subject = rewrite(OrientWgrad(), stored_kn).subject.copy()
    wgrad = nodes(subject.graph, "grouped_wgrad")[0]
    flip = put(subject, wgrad, aten.transpose.int, wgrad, 0, 1, users=False)
    back = put(subject, flip, aten.transpose.int, flip, 0, 1, users=False)
    put(subject, wgrad, aten.add.Tensor, wgrad, back, users=True)
    # The addition reads the gradient once as it is and once flipped twice; `put` redirected all readers but these.
    for node in (flip,):
        node.args = (wgrad, 0, 1)
    done = rewrite(OrientWgrad(), subject)
    assert not done.changed
    assert done.reasons == []


def test_parameters_stored_the_usual_way() -> None:
    def fn(m: Any, x: Tensor) -> Tensor:
        _, w, idx = route(m, x)
        token, order, slot, offsets = ops.plan(idx, E, 1)
        h = ops.grouped_mm(ops.permute(x, token, slot), m.up, offsets)
        return ops.unpermute(  # type: ignore[no-any-return]
            ops.grouped_mm(ops.glu(h, None, "silu"), m.down, offsets), token, order, slot, w
        )

    assert not rewrite(OrientWgrad(), training_graph(Made(fn, **weights()), rand(T, H))).changed


def test_real_model(gpt_oss_training: Subject) -> None:
    subject = rewrite(DropNoops(), gpt_oss_training).subject
    done = rewrite(OrientWgrad(), subject)
    assert done.row.matched == 4
    assert done.reasons == []


def test_real_model_stored_the_usual_way(qwen_training: Subject) -> None:
    assert not rewrite(OrientWgrad(), qwen_training).changed
