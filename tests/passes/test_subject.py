"""Controls of the checks that every pass test relies on: each notices what it is there for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx

from moefx.graph import edit
from moefx.manager import Context, Pass
from moefx.report import PassRow, Report
from tests.passes.subject import (
    H,
    Made,
    Rewritten,
    Subject,
    T,
    model_graph,
    nodes,
    origin_is_kept,
    rand,
    rewrite,
    run,
    same_results,
    training_graph,
    values_are_true,
)

Tensor = torch.Tensor


@pytest.fixture(scope="module")
def original() -> Subject:
    """exp(x * p), with a gradient."""
    return model_graph(Made(lambda m, x: torch.exp(x * m.p), p=rand(H)), rand(T, H))


@pytest.fixture
def subject(original: Subject) -> Subject:
    """A copy to spoil."""
    return original.copy()


@pytest.mark.parametrize(
    "wrong",
    [torch.empty(T, H, dtype=torch.float64), torch.empty(H, T), torch.empty(T, H, 1), (torch.empty(T, H),) * 2, None],
)
def test_wrong_values_are_noticed(subject: Subject, wrong: Any) -> None:
    values_are_true(subject)
    edit.set_value(nodes(subject.graph, "exp")[0], wrong, "model")
    with pytest.raises((AssertionError, ValueError)):
        values_are_true(subject)


def test_wrong_strides_are_noticed_at_the_training_level() -> None:
    s = training_graph(Made(lambda m, x: torch.exp(x * m.p), p=rand(H)), rand(T, H)).copy()
    values_are_true(s)
    edit.set_value(nodes(s.graph, "exp")[0], torch.empty(H, T).t(), "training")
    with pytest.raises(AssertionError, match="strides"):
        values_are_true(s)


@pytest.mark.parametrize(
    ("target", "numerics", "noticed"),
    [
        (lambda x: torch.exp(x), "exact", False),
        (lambda x: torch.exp(x) * (1 + 1e-6), "exact", True),
        (lambda x: torch.exp(x) * (1 + 1e-6), "rounding", False),
        (lambda x: torch.exp(x) * (1 + 1e-4), "rounding", True),
        (lambda x: torch.exp(x.detach()), "rounding", True),
        (lambda x: torch.exp(x.detach()) + 0 * x, "rounding", True),
        (lambda x: torch.exp(x).double(), "rounding", True),
    ],
)
def test_other_results_are_noticed(subject: Subject, target: Any, numerics: str, noticed: bool) -> None:
    """Values, gradients, lost gradients and dtypes."""
    before = run(subject)
    assert {"output 0", "gradient 0"} <= before.keys() or {"output 0", "gradient 1"} <= before.keys()
    nodes(subject.graph, "exp")[0].target = target
    if noticed:
        with pytest.raises(AssertionError):
            same_results(before, run(subject), numerics)
    else:
        same_results(before, run(subject), numerics)


def test_a_written_input_is_noticed() -> None:
    def fn(m: Any, x: Tensor) -> Tensor:
        m.p.add_(1.0)
        return x * 2

    s = model_graph(Made(fn, grad=False, p=rand(H)), rand(T, H)).copy()
    before = run(s)
    s.graph.erase_node(nodes(s.graph, "add_")[0])
    with pytest.raises(AssertionError, match="input"):
        same_results(before, run(s), "exact")


def test_lost_origins_are_noticed(subject: Subject) -> None:
    before = edit.copy_plain(subject.graph)
    (node,) = nodes(subject.graph, "exp")
    with edit.inheriting(subject.graph, node) as call:
        new = call(torch.exp2, node.args[0])
    p = type("Maker", (Pass,), {})()
    done = Rewritten(before, subject, PassRow("maker", "model", "exact"), Report())
    new.meta["moefx_passes"] = ("maker",)
    origin_is_kept(p, done)
    for key in ("moefx_passes", "stack_trace"):
        kept = new.meta.pop(key)
        with pytest.raises((AssertionError, KeyError)):
            origin_is_kept(p, done)
        new.meta[key] = kept
    origin_is_kept(p, done)
    node.meta["moefx_passes"] = ("maker",)  # claims what it did not do
    with pytest.raises(AssertionError):
        origin_is_kept(p, done)


def test_a_pass_that_counts_without_changing_is_noticed(subject: Subject) -> None:
    @dataclass(frozen=True)
    class Boaster(Pass):
        def run(self, graph: fx.Graph, ctx: Context) -> None:
            ctx.matched(nodes(graph, "exp")[0])

    with pytest.raises(AssertionError):
        rewrite(Boaster(), subject)
