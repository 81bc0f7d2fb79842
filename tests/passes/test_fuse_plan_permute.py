"""A plan and its one permute become one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moefx.passes import ExpandExperts, FusePlanPermute
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
    symbolic,
    weights,
)

Tensor = torch.Tensor


def fuse(fn: Callable[[Any, Tensor], Any], **options: Any) -> Rewritten:
    """Run the pass on a function of a module with a router and a bank."""
    return rewrite(FusePlanPermute(), model_graph(Made(fn, **weights()), rand(T, H), **options))


def bank(m: Any, x: Tensor) -> Tensor:
    """Router and bank."""
    _, w, idx = route(m, x)
    return experts(m, x, idx, w)


def test_fused() -> None:
    done = fuse(bank)
    assert done.row.matched == 1
    assert [count(done.graph, n) for n in ("plan", "permute", "plan_permute")] == [0, 0, 1]
    (fused,) = nodes(done.graph, "plan_permute")
    assert sorted(n.args[1] for n in fused.users) == [0, 1, 2, 3, 4]


def test_maps_that_nobody_reads_are_not_unpacked() -> None:
    def fn(m: Any, x: Tensor) -> Any:
        _, w, idx = route(m, x)
        maps = ops.plan(idx, E, 1)
        return ops.permute(x, maps[0], maps[2]) * 2, w * 1

    (fused,) = nodes(fuse(fn).graph, "plan_permute")
    assert sorted(n.args[1] for n in fused.users) == [0]


def test_maps_with_several_users() -> None:
    def fn(m: Any, x: Tensor) -> Any:
        _, w, idx = route(m, x)
        maps = ops.plan(idx, E, 1)
        rows = ops.permute(x, maps[0], maps[2])
        return rows * 2, maps[3] * 2, maps[3][1:] - maps[3][:-1], ops.unpermute(rows, *maps[:3], w), maps[0] + 1

    assert fuse(fn).row.matched == 1


def test_two_banks_and_symbolic_tokens() -> None:
    done = fuse(lambda m, x: bank(m, x + bank(m, x)), dynamic={"x": (0,)})
    assert done.row.matched == 2
    assert symbolic(done.graph, "permute") is False
    assert count(done.graph, "plan_permute") == 2


def two_permutes(m: Any, x: Tensor) -> Any:
    maps = ops.plan(route(m, x)[2], E, 1)
    return ops.permute(x, maps[0], maps[2]) * 1, ops.permute(x * 2, maps[0], maps[2]) * 1


def no_permute(m: Any, x: Tensor) -> Any:
    maps = ops.plan(route(m, x)[2], E, 1)
    return maps[0] * 2, maps[3] * 2, x * 2


def read_before(m: Any, x: Tensor) -> Any:
    maps = ops.plan(route(m, x)[2], E, 1)
    return ops.permute(x + maps[3].sum(), maps[0], maps[2])


def indices_written(m: Any, x: Tensor) -> Any:
    idx = route(m, x)[2].clone()
    maps = ops.plan(idx, E, 1)
    idx.fill_(0)
    return ops.permute(x, maps[0], maps[2]), idx * 1


def slots_of_another_plan(m: Any, x: Tensor) -> Any:
    idx = route(m, x)[2]
    return ops.permute(x, ops.plan(idx, E, 1)[0], ops.plan(idx.flip(0), E, 1)[2])


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (two_permutes, "2 permutes read it"),
        (no_permute, "0 permutes read it"),
        (read_before, "something reads the plan before the rows can be moved"),
        (indices_written, "the indices are written in place before the rows can be moved"),
        (slots_of_another_plan, "permutes read it"),
    ],
)
def test_near_misses_are_rejected_with_their_reason(fn: Callable[[Any, Tensor], Any], reason: str) -> None:
    done = fuse(fn)
    assert not done.changed
    assert reason in done.reasons[0]


def test_no_plan() -> None:
    done = fuse(lambda m, x: route(m, x)[1] * 2)
    assert not done.changed
    assert done.reasons == []


def test_real_model(qwen: Subject) -> None:
    done = rewrite(FusePlanPermute(), rewrite(ExpandExperts(), qwen).subject)
    assert done.row.matched == 2
    assert count(done.graph, "plan_permute") == 2
    assert count(done.graph, "plan") == 0
