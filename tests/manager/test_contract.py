"""What the pass manager does to a pass that breaks its contract, and what a model is afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from moefx import Pass, PassError, PassManager
from moefx.graph.effects import is_effect, name_of
from moefx.manager import Context
from moefx.passes import pipeline
from moefx.report import Report
from tests import reference
from tests.passes.subject import Subject, count, failure, rewrite

from .edited import Edit, after, first


def raises(graph: fx.Graph, ctx: Context) -> None:
    for node in ctx.at(list(graph.nodes)):
        if node.op == "call_function" and name_of(node) == "linear":
            raise ValueError("no such pattern")


def malformed(graph: fx.Graph, ctx: Context) -> None:
    first(graph, "linear").args = (first(graph, "softmax"), first(graph, "linear").args[1])


def circular(graph: fx.Graph, ctx: Context) -> None:
    node = first(graph, "linear")
    node.args = (node, node.args[1])


def output_erased(graph: fx.Graph, ctx: Context) -> None:
    graph.erase_node(graph.output_node())


def output_twice(graph: fx.Graph, ctx: Context) -> None:
    graph.output(graph.output_node().args[0])


def moved(graph: fx.Graph, ctx: Context) -> None:
    first(graph, "softmax").append(first(graph, "linear"))


def erased(graph: fx.Graph, ctx: Context) -> None:
    graph.erase_node(first(graph, "linear"))


def mismatch(graph: fx.Graph, ctx: Context) -> None:
    node = first(graph, "linear")
    (scalar,) = [n for n in graph.find_nodes(op="placeholder") if n.meta["example_value"].dim() == 0]
    node.args = (node.args[0], scalar)


def method(graph: fx.Graph, ctx: Context) -> None:
    node = first(graph, "linear")
    with graph.inserting_after(node):
        new = graph.call_method("no_such_method", (node,))
    first(graph, "dropout").replace_input_with(node, new)


def output_shape(graph: fx.Graph, ctx: Context) -> None:
    if first(graph, "mul").args[1] == 2:
        after(graph, first(graph, "mul"), torch.transpose, 0, 1).args[0].args = (first(graph, "dropout"), 2.0)  # type: ignore[union-attr]


def output_dtype(graph: fx.Graph, ctx: Context) -> None:
    if not any(n.target is torch.Tensor.double for n in graph.nodes):
        after(graph, first(graph, "mul"), torch.Tensor.double)


def output_gone(graph: fx.Graph, ctx: Context) -> None:
    out: Any = graph.output_node()
    out.args = (out.args[0][:1],)


def output_none(graph: fx.Graph, ctx: Context) -> None:
    out: Any = graph.output_node()
    out.args = ((out.args[0][0], None),)


def input_added(graph: fx.Graph, ctx: Context) -> None:
    if len(graph.find_nodes(op="placeholder")) == 3:
        with graph.inserting_before(next(iter(graph.nodes))):
            graph.placeholder("more")


def forever(graph: fx.Graph, ctx: Context) -> None:
    after(graph, first(graph, "linear"), torch.mul, 1.0)


def update_dropped(graph: fx.Graph, ctx: Context) -> None:
    for node in [n for n in graph.nodes if n.op.startswith("call") and name_of(n) == "add_"]:
        graph.erase_node(node)


def draw_dropped(graph: fx.Graph, ctx: Context) -> None:
    for node in [n for n in graph.nodes if n.op.startswith("call") and name_of(n) == "dropout"]:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)


def draw_added(graph: fx.Graph, ctx: Context) -> None:
    if count(graph, "dropout") == 1:
        after(graph, first(graph, "linear"), F.dropout, 0.5, True)


BROKEN = [
    (raises, "its code failed", "ValueError: no such pattern", "linear"),
    (malformed, "the graph is malformed", "used before", "linear"),
    (circular, "the graph is malformed", "used before", "linear"),
    (output_erased, "it erased the output node", "exactly one output", None),
    (output_twice, "it left 2 output nodes", "exactly one output", None),
    (moved, "the graph is malformed", "used before", "dropout"),
    (erased, "its code failed", "erase", None),
    (mismatch, "cannot be computed from its inputs", "torch.float32 (10, 8), ", "linear"),
    (method, "cannot be computed from its inputs", "no_such_method", None),
    (output_shape, "output 1 changed from torch.float32 (10, 8) to torch.float32 (8, 10)", None, None),
    (output_dtype, "output 1 changed from torch.float32 (10, 8) to torch.float64 (10, 8)", None, None),
    (output_gone, "had 2 outputs and now has 1", None, None),
    (output_none, "output 1 changed from torch.float32 (10, 8) to None", None, None),
    (input_added, "the graph's inputs changed", None, None),
    (forever, "a second run changed the graph again", None, None),
    (update_dropped, "the update of seen is lost", None, "add_"),
    (draw_dropped, "random draws changed", None, "dropout"),
    (draw_added, "random draws changed", None, None),
]


@pytest.mark.parametrize(("edit", "what", "why", "node"), BROKEN, ids=[b[0].__name__ for b in BROKEN])
def test_broken_passes_are_caught(graph: Subject, edit: Any, what: str, why: str | None, node: str | None) -> None:
    """Named: the pass, what is wrong, and where it is known the node with module path and source line."""
    e = failure(Edit(edit), graph)
    assert e.what.startswith("pass edit: ")
    assert what in e.what
    assert why is None or why in str(e.why)
    assert "\n" not in str(e.why)  # not the text of the graph
    assert e.todo
    if node is not None:
        name, *rest = str(e.where).split(", ")
        found = {n.name for n in graph.graph.nodes if n.op.startswith("call") and name_of(n) == node}
        assert name.removeprefix("node ") in found
        if node == "linear":
            assert rest[0] == "inner"
        assert ".py:" in rest[-1]
    assert isinstance(e.__cause__, Exception)


def test_the_subject_itself_is_sound(graph: Subject) -> None:
    """Control of the table above: a harmless pass goes through on the same graph. 2 and 2.0 are not the same."""

    def swap(graph: fx.Graph, ctx: Context) -> None:
        node = first(graph, "mul")
        if type(node.args[1]) is int:
            node.args = (node.args[0], 2.0)
            ctx.matched(node)

    done = rewrite(Edit(swap), graph)
    assert done.row.matched == 1
    assert first(done.graph, "mul").meta["moefx_passes"] == ("edit",)


def test_declared_changes_may_drop_draws(graph: Subject) -> None:
    s, report = graph.copy(), Report()
    PassManager((Edit(draw_dropped, "changes"),)).run("model", s.gm, report, s.fake_mode)
    assert count(s.graph, "dropout") == 0
    assert len(report.graphs) == 1


# -- a model after a failure -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnReal(Pass):
    """Breaks the graph of a real model in one of several ways."""

    how: str
    level: str = "model"  # type: ignore[misc]

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        """Break it."""
        node = next(n for n in graph.nodes if n.op == "call_function" and n.users and not is_effect(n))
        if self.how == "raise":
            raise RuntimeError("out of ideas")
        if self.how == "lint":
            node.args = (graph.output_node().all_input_nodes[0], *node.args[1:])
        if self.how == "output":
            out: Any = graph.output_node()
            out.args = (out.args[0][:-1],)


@pytest.mark.parametrize(("how", "level"), [("raise", "model"), ("lint", "model"), ("output", "training")])
def test_the_model_is_as_it_was_after_a_failure(how: str, level: str) -> None:
    pytest.importorskip("transformers")
    model = reference.tiny()
    want, before = reference.step(model, reference.batch()), reference.snapshot(model)
    with pytest.raises(PassError, match="pass on_real: "):
        reference.optimize(model, passes=pipeline(codegen="eager").insert(OnReal(how, level)))
    reference.assert_unchanged(model, before)
    reference.assert_same(reference.step(model, reference.batch()), want, 0.0, 0.0)
    if how == "raise":  # and it can be optimized without the pass
        reference.assert_same(reference.step(reference.optimize(model), reference.batch()), want)


def test_a_compiled_variant_outlives_a_failure_on_another_signature() -> None:
    """A pass that fails on the second signature takes nothing from the first."""
    pytest.importorskip("transformers")
    model = reference.tiny()

    @dataclass(frozen=True)
    class Picky(Pass):
        def run(self, graph: fx.Graph, ctx: Context) -> None:
            shapes = [tuple(n.meta["example_value"].shape) for n in graph.find_nodes(op="placeholder")]
            if (2, 8) not in shapes:
                raise RuntimeError("only 2 x 8")

    opt = reference.optimize(model, passes=pipeline(codegen="eager").insert(Picky()))
    want = reference.step(model, reference.batch())
    with pytest.raises(PassError, match="only 2 x 8"):
        opt(**reference.batch(1, 4))
    reference.assert_same(reference.step(opt, reference.batch()), want)
    assert len(opt.report.signatures) == 1
