"""One dispatch plan per distinct index tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moefx.passes import ExpandExperts, FusePlanPermute, SharePlans
from tests.passes.subject import (
    E,
    H,
    Made,
    Rewritten,
    Subject,
    T,
    count,
    experts,
    model_graph,
    nodes,
    ops,
    rand,
    rewrite,
    route,
    weights,
)

Tensor = torch.Tensor
Fn = Callable[[Any, Tensor], Any]


def share(fn: Fn, **options: Any) -> Rewritten:
    """Run the pass on a function of a module with one router and one bank."""
    return rewrite(SharePlans(), model_graph(Made(fn, **weights(), **options), rand(T, H)))


def layers(m: Any, x: Tensor, number: int) -> Tensor:
    """Layers that route alike."""
    _, w, idx = route(m, x)
    for _ in range(number):
        x = x + experts(m, x, idx, w)
    return x


@pytest.mark.parametrize("number", [2, 3])
def test_layers_of_one_routing_share_a_plan(number: int) -> None:
    done = share(lambda m, x: layers(m, x, number))
    assert count(done.graph, "plan") == 1
    assert done.row.matched == number - 1
    # Each map is one node, which all layers read.
    assert count(done.graph, "getitem") == 4 + 2
    assert count(done.graph, "permute") == number


def test_shared_plan_is_not_fused_with_one_of_its_permutes() -> None:
    done = share(lambda m, x: layers(m, x, 2))
    fused = rewrite(FusePlanPermute(), done.subject)
    assert not fused.changed
    assert fused.reasons == ["2 permutes read it"]


def test_after_expansion() -> None:
    def fn(m: Any, x: Tensor) -> Tensor:
        _, w, idx = route(m, x)
        for _ in range(2):
            x = x + ops.experts(x, idx, w, [m.up, m.down], "silu | nk")
        return x

    expanded = rewrite(ExpandExperts(), model_graph(Made(fn, **weights()), rand(T, H)))
    assert count(rewrite(SharePlans(), expanded.subject).graph, "plan") == 1


@pytest.mark.parametrize(
    "second",
    [
        lambda idx: ops.plan(idx, E + 1, 1),
        lambda idx: ops.plan(idx, E, 4),
        lambda idx: ops.plan(idx * 1, E, 1),
        lambda idx: ops.plan(idx[:5], E, 1),
    ],
)
def test_other_plans_are_left_alone(second: Callable[[Tensor], Any]) -> None:
    def fn(m: Any, x: Tensor) -> Any:
        _, w, idx = route(m, x)
        return (experts(m, x, idx, w), *second(idx))

    assert not share(fn).changed


def test_spelled_with_and_without_the_default() -> None:
    def fn(m: Any, x: Tensor) -> Any:
        _, _, idx = route(m, x)
        return (*ops.plan(idx, E), *ops.plan(idx, E, align=1), x * 1)

    assert count(share(fn).graph, "plan") == 1


def test_indices_written_in_between() -> None:
    """Dropping tokens in place after the first layer: the second plan is another one."""

    def fn(m: Any, x: Tensor) -> Tensor:
        _, w, idx = route(m, x)
        idx = idx.clone()
        y = experts(m, x, idx, w)
        idx.view(-1)[::3].fill_(E)
        return y + experts(m, x, idx, w)

    done = share(fn)
    assert count(done.graph, "plan") == 2
    assert done.reasons == ["the indices are written in place in between"]


def test_indices_written_before_both() -> None:
    def fn(m: Any, x: Tensor) -> Tensor:
        _, w, idx = route(m, x)
        idx = idx.clone()
        idx.view(-1)[::3].fill_(E)
        return experts(m, x, idx, w) + experts(m, x * 2, idx, w)

    assert count(share(fn).graph, "plan") == 1


def test_real_model_routes_every_layer_anew(qwen: Subject) -> None:
    expanded = rewrite(ExpandExperts(), qwen)
    done = rewrite(SharePlans(), expanded.subject)
    assert not done.changed
    assert len(nodes(done.graph, "plan")) == 2
    assert done.reasons == []


def test_real_model_with_one_routing(qwen: Subject) -> None:
    """The second layer is given the first one's indices: then its plan goes."""
    subject = rewrite(ExpandExperts(), qwen).subject.copy()
    first, second = nodes(subject.graph, "plan")
    second.args = (first.args[0], *second.args[1:])
    done = rewrite(SharePlans(), subject)
    assert done.row.matched == 1
    assert len(nodes(done.graph, "plan")) == 1
