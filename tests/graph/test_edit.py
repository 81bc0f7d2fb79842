"""Editing graphs: nothing that a node carries is lost, and symbolic sizes are never guessed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from moefx import compat
from moefx.graph import edit
from moefx.graph.effects import name_of
from tests.passes.subject import (
    E,
    H,
    I,
    Made,
    T,
    count,
    experts,
    model_graph,
    nodes,
    ops,
    put,
    rand,
    route,
    run,
    training_graph,
    weights,
)

Tensor = torch.Tensor
aten = torch.ops.aten


class Inner(torch.nn.Module):
    """A module inside a module, for paths."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(H, H), torch.nn.Linear(H, H)])
        self.named = torch.nn.ModuleDict({"head": torch.nn.Linear(H, H)})

    def forward(self, x: Tensor) -> Tensor:
        """All layers."""
        for layer in self.layers:
            x = layer(x)
        return self.named["head"](x)  # type: ignore[no-any-return]


def test_module_paths_and_source_lines_at_both_levels() -> None:
    module = Inner()
    want = ["layers.0", "layers.1", "named.head"]
    model, training = model_graph(module, rand(T, H)), training_graph(module, rand(T, H))
    assert [edit.module_path(n) for n in nodes(model.graph, "linear")] == want
    forward = [n for n in nodes(training.graph, "addmm") if not edit.is_backward(n)]
    assert [edit.module_path(n) for n in forward] == want
    backward = [n for n in training.graph.nodes if edit.is_backward(n) and n.op == "call_function"]
    assert {edit.module_path(n) for n in backward} == set(want)
    lines = {edit.source_line(n) for n in model.graph.nodes if n.op == "call_function"}
    assert all(line.rpartition(":")[0].endswith(".py") and line.rpartition(":")[2].isdigit() for line in lines)


def test_path_of_a_node_without_origin_is_empty() -> None:
    node = fx.Graph().placeholder("x")
    assert (edit.module_path(node), edit.source_line(node), edit.value(node)) == ("", "", None)


def test_new_nodes_inherit_where_they_come_from() -> None:
    graph = training_graph(Inner(), rand(T, H)).copy().graph
    node = next(n for n in graph.nodes if edit.is_backward(n) and n.op == "call_function")
    with edit.inheriting(graph, node) as call:
        new = call(aten.neg.default, node.args[0])
    assert new < node
    assert edit.module_path(new) == edit.module_path(node) != ""
    assert edit.source_line(new) == edit.source_line(node) != ""
    assert edit.is_backward(new)
    assert edit.value(new) is None  # its value is not that of the node it stands for


def test_find_knows_both_spellings() -> None:
    def fn(m: Any, x: Tensor) -> Tensor:
        return experts(m, x, *reversed(route(m, x)[1:]))

    model = model_graph(Made(fn, **weights()), rand(T, H))
    training = training_graph(Made(fn, **weights()), rand(T, H))
    for subject, products in ((model, 2), (training, 3)):
        assert len(edit.find(subject.graph, ops.grouped_mm)) == products
        assert edit.find(subject.graph, torch.nn.functional.conv1d) == []
    assert edit.targets(ops.plan) == {ops.plan, ops.plan.default}
    assert edit.targets(torch.softmax) == {torch.softmax}


def test_arguments_are_bound_by_name() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert edit.arguments(graph.call_function(ops.plan, (x, 4))) == {"idx": x, "E": 4, "align": 1}
    assert edit.arguments(graph.call_function(ops.plan.default, (x,), {"E": 4, "align": 8})) == {
        "idx": x,
        "E": 4,
        "align": 8,
    }


def test_outputs_make_one_node_of_each_index() -> None:
    def fn(m: Any, x: Tensor) -> Any:
        found = torch.topk(x * m.p, 2)
        return found[0] + 1, found[0] * 2, found[1] + 0

    subject = model_graph(Made(fn, p=rand(H)), rand(T, H)).copy()
    graph = subject.graph
    (topk,) = nodes(graph, "topk")
    values = next(n for n in graph.nodes if n.target is compat.getitem and n.args[1] == 0)
    with graph.inserting_after(values):
        again = graph.call_function(compat.getitem, (topk, 0))
    next(iter(values.users)).replace_input_with(values, again)
    want = run(subject)
    assert count(graph, "getitem") == 3
    assert edit.outputs(topk) == {0: values, 1: next(n for n in topk.users if n.args[1] == 1)}
    assert count(graph, "getitem") == 2
    assert len(values.users) == 2
    assert all(torch.equal(v, want[k]) for k, v in run(subject).items())
    graph.lint()


def test_same_value() -> None:
    a = torch.zeros(2, 3)
    assert edit.same_value(a, torch.ones(2, 3))
    assert not edit.same_value(a, torch.zeros(3, 2))
    assert not edit.same_value(a, a.double())
    assert not edit.same_value(a, a.to("meta"))
    assert not edit.same_value(a, None)
    assert edit.same_value(a, torch.zeros(3, 2).t())
    assert not edit.same_value(a, torch.zeros(3, 2).t(), strides=True)
    assert edit.same_value((a, [a]), [torch.ones(2, 3), (a,)])
    assert not edit.same_value((a, a), (a,))
    assert edit.same_value(1, 2)
    assert not edit.same_value(1, 1.0)


def test_symbolic_sizes_are_compared_without_guards() -> None:
    """Two symbols with the same hint are different, and asking leaves no trace; one symbol equals itself."""
    fn = Made(lambda m, x, y: (x * m.p, y * m.p), p=rand(H))
    subject = model_graph(fn, rand(T, H), rand(T, H, seed=1), dynamic={"x": (0,)})
    (x,) = [n for n in subject.graph.find_nodes(op="placeholder") if n.meta["moefx_name"] == "x"]
    symbol, env = edit.value(x).shape[0], subject.fake_mode.shape_env
    assert isinstance(symbol, torch.SymInt)
    before = len(env.guards)
    assert edit.same_sizes([symbol, H], [symbol, H])
    assert edit.same_sizes([symbol * 2], [symbol + symbol])
    assert not edit.same_sizes([symbol], [T])
    assert not edit.same_sizes([symbol], [symbol, 1])
    assert len(env.guards) == before


def test_copies_are_independent() -> None:
    subject = model_graph(Inner(), rand(T, H))
    text = str(subject.graph)
    for copied in (edit.copy_graph(subject.gm).graph, edit.copy_plain(subject.graph)):
        assert [n.name for n in copied.nodes] == [n.name for n in subject.graph.nodes]
        node = nodes(copied, "linear")[0]
        assert edit.module_path(node) == "layers.0"
        node.meta["mark"] = True
        node.replace_all_uses_with(node.args[0])
        copied.erase_node(node)
        assert str(subject.graph) == text
        assert not any("mark" in n.meta for n in subject.graph.nodes)


def bank() -> Any:
    """Training graph of a bank."""

    def fn(m: Any, x: Tensor) -> Tensor:
        return experts(m, x, *reversed(route(m, x)[1:]))

    return training_graph(Made(fn, **weights()), rand(T, H)).copy()


def test_inline_writes_a_definition_in_place() -> None:
    subject = bank()
    (glu,) = nodes(subject.graph, "glu")
    want, where = run(subject), (edit.module_path(glu), edit.source_line(glu))
    users = [u.name for u in glu.users]
    edit.inline(subject.graph, glu, lambda h, w, kind: (torch.sigmoid(h[:, :I]) * h[:, :I]) * h[:, I:])
    subject.graph.lint()
    made = [n for n in subject.graph.nodes if n.name in users]
    assert [n.name for n in made] == users
    new = nodes(subject.graph, "sigmoid")[0]
    assert (edit.module_path(new), edit.source_line(new)) == where
    got = run(subject)
    torch.testing.assert_close(got["output 0"], want["output 0"])


def test_inline_of_several_results() -> None:
    """Each result goes to its readers; a result without readers leaves no node, and neither does one without any."""
    subject = bank()
    (backward,) = nodes(subject.graph, "glu_backward")
    before = {n.name for n in subject.graph.nodes}
    readers = len(edit.outputs(backward)[0].users)

    def fn(da: Tensor, h: Tensor, w: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
        return h * da.sum(), da.new_empty(0)

    edit.inline(subject.graph, backward, fn)
    subject.graph.lint()
    made = [n for n in subject.graph.nodes if n.name not in before]
    assert [name_of(n) for n in made] == ["sum", "mul"]
    assert len(made[1].users) == readers
    dead = put(subject, made[1], ops.glu_backward.default, made[1], made[1], None, "plain relu", users=False)
    edit.inline(subject.graph, dead, lambda da, h, w, kind: (da + h, da))
    assert count(subject.graph, "add") == sum(name_of(n) == "add" and n.name in before for n in subject.graph.nodes)


@pytest.mark.parametrize("level", ["model", "training"])
def test_values_are_kept_under_the_keys_of_the_level(level: str) -> None:
    node = fx.Graph().placeholder("x")
    edit.set_value(node, torch.zeros(E), level)
    assert edit.value(node).shape == (E,)
    assert ("example_value" in node.meta) is (level == "model")
