"""Shapes, dtypes, strides and reports after a pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx

from moefx import Pass, PassError, PassManager
from moefx.manager import Context, refresh
from moefx.report import Report
from moefx.verify import Verifier
from tests.passes.subject import H, Made, Subject, T, count, failure, model_graph, nodes, put, rand, rewrite

from .edited import Edit, Nothing, after, first

Tensor = torch.Tensor


def test_values_follow_a_change_through_the_graph(graph: Subject) -> None:
    """A wider dtype in the middle arrives at every reader behind it, up to where it is cast back."""

    def widen(graph: fx.Graph, ctx: Context) -> None:
        if not any(n.target is torch.Tensor.bfloat16 for n in graph.nodes):
            node = first(graph, "linear")
            after(graph, node, torch.Tensor.bfloat16)
            for name in ("softmax", "mul"):
                after(graph, first(graph, name), torch.Tensor.float)

    s = graph.copy()
    PassManager((Edit(widen, "changes"),)).run("model", s.gm, Report(), s.fake_mode)
    got = {n.name: n.meta["val"].dtype for n in s.graph.nodes if "val" in n.meta and isinstance(n.meta["val"], Tensor)}
    assert got[first(s.graph, "dropout").name] is torch.bfloat16
    assert got[first(s.graph, "softmax").name] is torch.bfloat16
    assert [got[n.name] for n in s.graph.output_node().all_input_nodes] == [torch.float32, torch.float32]


def test_strides_are_followed_too() -> None:
    """A view that the new layout forbids is an error of the pass, not of a later stage."""

    def fn(m: Any, x: Tensor) -> Tensor:
        return torch.exp(x * m.p).view(-1) * 2

    def edit(graph: fx.Graph, ctx: Context) -> None:
        node = first(graph, "exp")
        if count(graph, "contiguous") == 0:
            turned = after(graph, node, torch.transpose, 0, 1)
            after(graph, after(graph, turned, torch.Tensor.contiguous), torch.transpose, 0, 1)

    e = failure(Edit(edit), model_graph(Made(fn, p=rand(H)), rand(T, H)))
    assert "node view cannot be computed" in e.what
    assert ".py:" in str(e.where)


def test_autocast_regions_are_followed() -> None:
    """A node put into a region gets the dtype that it will have there."""

    def fn(m: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            a = x @ m.p
        return a.float(), x @ m.p

    subject = model_graph(Made(fn, p=rand(H, H)), rand(T, H)).copy()
    products = nodes(subject.graph, "matmul")
    refresh(subject.graph, products, "model", subject.fake_mode)
    assert [n.meta["val"].dtype for n in products] == [torch.bfloat16, torch.float32]
    assert not torch.is_autocast_enabled("cpu")
    first_product, _ = products
    first_product.args = (first_product.args[0], first_product.args[0])
    with pytest.raises(PassError, match="cannot be computed"):
        refresh(subject.graph, products, "model", subject.fake_mode)
    assert not torch.is_autocast_enabled("cpu")


def test_constants_of_the_graph_module_can_be_read(graph: Subject) -> None:
    def edit(graph: fx.Graph, ctx: Context) -> None:
        if not graph.find_nodes(op="get_attr"):
            node = first(graph, "mul")
            with graph.inserting_before(node):
                two = graph.get_attr("two")
            node.args = (node.args[0], two)

    s, report = graph.copy(), Report()
    s.gm.register_buffer("two", torch.tensor(2.0))
    PassManager((Edit(edit),)).run("model", s.gm, report, s.fake_mode, Verifier(s.values, grad=True))
    assert report.passes[0].error == 0.0
    assert [n.meta["val"].shape for n in s.graph.find_nodes(op="get_attr")] == [torch.Size([])]


def test_snapshots_have_unique_names(graph: Subject) -> None:
    """The same pass three times is three rows and three snapshots."""
    s, report = graph.copy(), Report()
    step = iter(range(100))

    @dataclass(frozen=True)
    class Scale(Pass):
        mark: int = 0

        def run(self, graph: fx.Graph, ctx: Context) -> None:
            node = first(graph, "mul")
            if self.mark not in node.meta:
                node.meta[self.mark] = True
                node.args = (node.args[0], 3.0 + next(step))

    PassManager((Scale(1), Scale(2), Nothing(), Scale(3))).run("model", s.gm, report, s.fake_mode)
    assert [p.name for p in report.passes] == ["scale", "scale", "nothing", "scale"]
    assert list(report.graphs) == ["scale", "scale#2", "scale#3"]
    factors = [first(g.graph, "mul").args[1] for g in report.graphs.values()]
    assert factors == [3.0, 4.0, 5.0]
    with pytest.raises(KeyError, match="there are scale, scale#2"):
        report.graphs["nothing"]


def test_only_moving_a_node_is_a_change(graph: Subject) -> None:
    """Order is checked (see `moved` above); a legal move is linted, kept as a snapshot, and changes nothing else."""

    def edit(graph: fx.Graph, ctx: Context) -> None:
        softmax, mul = first(graph, "softmax"), first(graph, "mul")
        if softmax < mul:
            mul.append(softmax)

    done = rewrite(Edit(edit), graph)
    assert done.changed
    assert first(done.graph, "mul") < first(done.graph, "softmax")


def test_reports_of_a_pass(graph: Subject) -> None:
    def edit(graph: fx.Graph, ctx: Context) -> None:
        ctx.rejected(first(graph, "linear"), "too small")
        ctx.rejected(first(graph, "softmax"), "too small")
        ctx.matched(first(graph, "mul"), "a note")

    report = Report()
    s = graph.copy()
    PassManager((Edit(edit),)).run("model", s.gm, report, s.fake_mode)
    (row,) = report.passes
    assert row.matched == 1
    assert row.notes == ["a note"]
    names = [first(graph.graph, n).name for n in ("linear", "softmax")]
    assert row.rejected == [
        {"node": f"inner:{names[0]}", "why": "too small"},
        {"node": names[1], "why": "too small"},
    ]
    assert row.error is None


def test_put_builds_true_values(graph: Subject) -> None:
    """Control of the helper that tests use to build graphs."""
    s = graph.copy()
    new = put(s, first(s.graph, "linear"), torch.t, first(s.graph, "linear"), users=False)
    assert new.meta["val"].shape == (H, T)
