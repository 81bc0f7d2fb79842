"""Aliases, views and transposes that change nothing go from the training graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from moefx.graph.edit import is_backward, set_value, value
from moefx.passes import DeadCode, DropNoops
from moefx.passes.drop_noops import _same_as
from tests.passes.subject import (
    H,
    Made,
    Subject,
    T,
    count,
    experts,
    model_graph,
    nodes,
    put,
    rand,
    rewrite,
    route,
    training_graph,
    weights,
)

Tensor = torch.Tensor
aten = torch.ops.aten


@pytest.fixture(scope="module")
def plain() -> Subject:
    """exp of a matrix product, with its gradient."""
    return training_graph(Made(lambda m, x: torch.exp(x @ m.p), p=rand(H, H) * 0.1), rand(T, H))


@pytest.fixture
def subject(plain: Subject) -> Subject:
    """A copy to put nodes into."""
    return plain.copy()


def product(subject: Subject) -> fx.Node:
    """The forward product [T, H]."""
    return nodes(subject.graph, "mm")[0]


def test_detach_between_forward_and_backward() -> None:
    """Softmax saves a detached copy of itself: afterwards the backward reads the forward's node."""

    def fn(m: Any, x: Tensor) -> Tensor:
        return torch.softmax(x * m.p, -1).square()

    done = rewrite(DropNoops(), training_graph(Made(fn, p=rand(H)), rand(T, H)))
    assert count(done.before, "detach") >= 2
    assert count(done.graph, "detach") == 0
    (softmax,), (backward,) = nodes(done.graph, "_softmax"), nodes(done.graph, "_softmax_backward_data")
    assert backward.args[1] is softmax
    assert is_backward(backward)
    assert not is_backward(softmax)
    assert done.row.matched >= count(done.before, "detach")


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.detach.default, ()),
        (aten.alias.default, ()),
        (aten.view.default, ([T, H],)),
        (aten.view.default, ([-1, H],)),
        (aten.reshape.default, ([T, H],)),
        (aten._unsafe_view.default, ([T, H],)),
        (aten.expand.default, ([T, H],)),
        (aten.expand.default, ([-1, -1],)),
    ],
)
def test_no_change(subject: Subject, target: Any, args: tuple[Any, ...]) -> None:
    new = put(subject, product(subject), target, product(subject), *args)
    done = rewrite(DropNoops(), subject)
    assert new.name in {n.name for n in done.before.nodes}
    assert new.name not in {n.name for n in done.graph.nodes}
    assert done.row.matched >= 1


@pytest.mark.parametrize(
    ("target", "args", "back"),
    [
        (aten.view.default, ([H, T],), (aten.view.default, ([T, H],))),
        (aten.unsqueeze.default, (0,), (aten.squeeze.dim, (0,))),
        (aten.mul.Tensor, (1.0,), None),
        (aten.clone.default, (), None),
    ],
)
def test_a_change(
    subject: Subject, target: Any, args: tuple[Any, ...], back: tuple[Any, tuple[Any, ...]] | None
) -> None:
    """Other shapes, copies and arithmetic stay, also where another node undoes them."""
    before = rewrite(DropNoops(), subject.copy()).subject
    new = put(before, product(before), target, product(before), *args, users=back is None)
    if back is not None:
        readers = [u for u in product(before).users if u is not new]
        undone = put(before, new, back[0], new, *back[1])
        for u in readers:
            u.replace_input_with(product(before), undone)
    assert not rewrite(DropNoops(), before).changed


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((aten.t.default, ()), (aten.t.default, ())),
        ((aten.transpose.int, (0, 1)), (aten.t.default, ())),
        ((aten.transpose.int, (-1, 0)), (aten.transpose.int, (0, 1))),
        ((aten.transpose.int, (1, 0)), (aten.transpose.int, (-2, -1))),
    ],
)
def test_transposes_that_undo_each_other(subject: Subject, first: Any, second: Any) -> None:
    clean = rewrite(DeadCode(level="training"), rewrite(DropNoops(), subject).subject).subject
    target = product(clean)
    readers = list(target.users)
    flipped = put(clean, target, first[0], target, *first[1], users=False)
    back = put(clean, flipped, second[0], flipped, *second[1], users=False)
    for reader in readers:
        reader.replace_input_with(target, back)
    done = rewrite(DropNoops(), clean)
    assert done.row.matched == 1
    (reader,) = [n for n in done.graph.nodes if n.name == readers[0].name]
    assert reader.args[0] is product(done.subject)
    # The first of the pair is left to dead_code: others may read it.
    assert rewrite(DeadCode(level="training"), done.subject).row.matched == 1


def test_transposes_of_other_axes_stay() -> None:
    def fn(m: Any, x: Tensor) -> Tensor:
        return torch.exp(x.view(2, 5, H) * m.p).transpose(0, 1).transpose(1, 2).contiguous()

    done = rewrite(DropNoops(), training_graph(Made(fn, p=rand(H)), rand(T, H)))
    assert count(done.graph, "transpose") >= 2


def test_outputs_stay_nodes_of_their_own(subject: Subject) -> None:
    """An output that is another output, or an input, would change what callers may write into."""
    out: Any = subject.graph.output_node()
    first = out.args[0][0]
    copy = put(subject, first, aten.alias.default, first, users=False)
    out.args = ((copy, *out.args[0][1:]),)
    done = rewrite(DropNoops(), subject)
    assert copy.name in {n.name for n in done.graph.nodes}


def test_real_model(qwen_training: Subject) -> None:
    done = rewrite(DropNoops(), qwen_training)
    assert done.row.matched > 20
    assert len(done.graph.nodes) == len(done.before.nodes) - done.row.matched
    assert count(done.graph, "detach") == 0


def test_symbolic_sizes_are_not_guessed() -> None:
    """Two symbols that happen to be 10 are two: no view is dropped for it, and no guard is made."""
    two = model_graph(
        Made(lambda m, x, y: (x @ m.p, y @ m.p), p=rand(H, H)), rand(T, H), rand(T, H), dynamic={"x": (0,)}
    )
    s = two.fake_mode.shape_env
    x, *_ = [n for n in two.graph.find_nodes(op="placeholder") if n.meta["moefx_name"] == "x"]
    assert isinstance(value(x).shape[0], torch.SymInt)
    subject = two.copy()
    subject.level = "training"
    (mm,) = [n for n in nodes(subject.graph, "matmul") if x.name in [i.name for i in n.all_input_nodes]]
    view = put(subject, mm, aten.view.default, mm, [-1, H], users=False)
    with two.fake_mode:
        set_value(view, torch.empty(T, H), "training")
    guards = len(s.guards)
    assert _same_as(view) is None
    assert len(s.guards) == guards
    with two.fake_mode:
        set_value(view, torch.empty_like(value(mm)), "training")
    assert _same_as(view) is mm


def test_banks_of_experts() -> None:
    def fn(m: Any, x: Tensor) -> Tensor:
        _, w, idx = route(m, x)
        return experts(m, x, idx, w)

    assert rewrite(DropNoops(), training_graph(Made(fn, **weights()), rand(T, H))).row.matched > 0
