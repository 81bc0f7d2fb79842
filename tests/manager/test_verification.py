"""`verify=True`: what a pass changes is measured against what it declares."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional as F

import moefx
from moefx import Pass, PassError, PassManager
from moefx.manager import Context
from moefx.passes import pipeline
from moefx.report import Report
from moefx.verify import Verifier
from tests import reference
from tests.family import zoo
from tests.passes.subject import H, Made, Subject, T, count, failure, model_graph, nodes, rand, training_graph
from tests.profile import nightly, often

from .edited import Edit, after, first

Tensor = torch.Tensor


def scaled(by: float) -> Callable[[fx.Graph, Context], None]:
    """A rewrite that is off by a factor."""

    def edit(graph: fx.Graph, ctx: Context) -> None:
        node = first(graph, "mul")
        if node.args[1] == 2:
            node.args = (node.args[0], 2.0 * by)

    return edit


def detached(graph: fx.Graph, ctx: Context) -> None:
    """Equal outputs, no gradient."""
    if not any(n.target is torch.Tensor.detach for n in graph.nodes):
        after(graph, first(graph, "linear"), torch.Tensor.detach)


def fails_when_run(graph: fx.Graph, ctx: Context) -> None:
    """Right types, but an index that does not exist."""
    if count(graph, "index_select") == 0:
        node = first(graph, "linear")
        with graph.inserting_after(node):
            index = graph.call_function(torch.full, ((T,), 10**6))
        with graph.inserting_after(index):
            new = graph.call_function(torch.index_select, (node, 0, index))
        first(graph, "dropout").replace_input_with(node, new)


def wrong_update(graph: fx.Graph, ctx: Context) -> None:
    """The buffer is still written, but with another number."""
    node = first(graph, "add_")
    node.args = (node.args[0], 2.0)


@pytest.mark.parametrize(
    ("edit", "klass", "what"),
    [
        (scaled(1 + 1e-6), "exact", "changed output 1 by 9"),
        (scaled(1 + 1e-3), "exact", "changed output 1 by 1.0e-03"),
        (scaled(1 + 1e-3), "rounding", "changed output 1 by 1.0e-03"),
        (scaled(float("inf")), "changes", f"left output 1 no longer finite: {T * H} of {T * H} elements"),
        (scaled(float("nan")), "rounding", f"left output 1 no longer finite: {T * H} of {T * H} elements"),
        (detached, "exact", "lost gradient of inner.weight"),
        (fails_when_run, "exact", "left a graph that fails on the example inputs"),
        (wrong_update, "exact", "changed what is written into seen by 1.0e+00"),
    ],
)
def test_lies_about_numerics_are_measured(graph: Subject, edit: Any, klass: str, what: str) -> None:
    s = graph.copy()
    with pytest.raises(PassError) as e:
        PassManager((Edit(edit, klass),)).run("model", s.gm, Report(), s.fake_mode, Verifier(s.values, grad=True))
    assert f"pass edit {what}" in e.value.what
    assert e.value.todo
    assert "node " in str(e.value.where)
    if " output " in what:
        assert f"its numerics class is '{klass}'" in str(e.value.why)
    # Control: without verification nothing of this is seen.
    s = graph.copy()
    PassManager((Edit(edit, klass),)).run("model", s.gm, Report(), s.fake_mode)


@pytest.mark.parametrize(("by", "klass"), [(1.0, "exact"), (1 + 1e-6, "rounding"), (1.5, "changes")])
def test_honest_classes_pass(graph: Subject, by: float, klass: str) -> None:
    s, report = graph.copy(), Report()
    PassManager((Edit(scaled(by), klass),)).run("model", s.gm, report, s.fake_mode, Verifier(s.values, grad=True))
    assert report.passes[0].error == pytest.approx(by - 1, rel=0.2, abs=1e-9)


@pytest.mark.parametrize("low", [False, True])
def test_outputs_may_differ_by_the_rounding_of_what_they_are_made_of(low: bool) -> None:
    """As under autocast: a float32 output of a bfloat16 product. A float32 graph is held to float32."""

    def fn(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return F.linear(x, m.p).float() * 2

    subject = model_graph(Made(fn, p=rand(H, H)), rand(T, H))

    def run(by: float) -> None:
        s = subject.copy()
        verifier = Verifier(s.values, grad=True)
        PassManager((Edit(scaled(by), "rounding"),)).run("model", s.gm, Report(), s.fake_mode, verifier)

    with contextlib.nullcontext() if low else pytest.raises(PassError, match=r"changed output 0 by 1\.0e-03"):
        run(1 + 1e-3)
    with pytest.raises(PassError, match=r"changed output 0 by 5\.0e-01"):
        run(1.5)


def test_infinities_are_compared_as_they_are() -> None:
    """A pass that keeps them where they were is exact, one that moves them is not; both figures are JSON."""

    def fn(m: Any, x: Tensor) -> Tensor:
        return torch.exp(x / m.p) * 2

    subject = model_graph(Made(fn, grad=False, p=torch.tensor([1.0] * (H - 2) + [1e-3, float("nan")])), rand(T, H))

    def run(edit: Any, klass: str) -> Any:
        s, report = subject.copy(), Report()
        PassManager((Edit(edit, klass),)).run("model", s.gm, report, s.fake_mode, Verifier(s.values, grad=False))
        return report.passes[0].error

    def add(graph: fx.Graph, ctx: Context) -> None:
        if count(graph, "clamp") == 0:
            after(graph, first(graph, "exp"), torch.clamp, -1e30, 1e30)

    assert run(scaled(1.5), "changes") == pytest.approx(0.5)
    with pytest.raises(PassError, match="changed output 0 by inf"):
        run(add, "rounding")
    assert json.loads(json.dumps(run(add, "changes"), allow_nan=False)) > 1e300


def test_each_pass_is_compared_with_the_one_before(graph: Subject) -> None:
    """Three honest roundings add up to more than one may do; the culprit among them is named."""

    def step(name: str, by: float) -> Pass:
        def edit(graph: fx.Graph, ctx: Context) -> None:
            node = first(graph, "mul")
            if name not in node.meta:
                node.meta[name] = True
                node.args = (node.args[0], float(node.args[1]) * by)  # type: ignore[arg-type]

        made: Pass = type(name, (Pass,), {"numerics": "rounding", "run": lambda self, g, c: edit(g, c)})()
        return made

    def run(*passes: Pass) -> Report:
        s, report = graph.copy(), Report()
        PassManager(passes).run("model", s.gm, report, s.fake_mode, Verifier(s.values, grad=True))
        return report

    report = run(step("One", 1 + 1.5e-5), step("Two", 1 + 1.5e-5), step("Three", 1 + 1.5e-5))
    assert [p.error is not None and 1e-5 < p.error < 2e-5 for p in report.passes] == [True] * 3
    with pytest.raises(PassError, match="pass two changed output 1"):
        run(step("One", 1 + 1.5e-5), step("Two", 1 + 5e-5), step("Three", 1 + 1.5e-5))


def test_gradients_that_are_zero_by_symmetry_do_not_count() -> None:
    """The gradient of a shift before a softmax is rounding noise; a rewrite that rounds otherwise changes all of it."""

    def fn(m: Any, x: Tensor) -> Tensor:
        return torch.softmax(x @ m.p + m.shift, -1)

    subject = model_graph(Made(fn, p=rand(H, H) * 0.3, shift=torch.ones(1)), rand(T, H))

    def twice(graph: fx.Graph, ctx: Context) -> None:
        node = first(graph, "softmax")
        if "seen" not in node.meta:
            node.meta["seen"] = True
            a, x = after(graph, first(graph, "add"), torch.div, 3.0), first(graph, "add")
            assert a.args[0] is x
            after(graph, a, torch.mul, 3.0)

    s, report = subject.copy(), Report()
    PassManager((Edit(twice, "rounding"),)).run("model", s.gm, report, s.fake_mode, Verifier(s.values, grad=True))
    assert report.passes[0].error is not None
    assert report.passes[0].error < 1e-5


def test_training_graphs_are_verified_by_their_outputs() -> None:
    subject = training_graph(Made(lambda m, x: torch.exp(x * m.p), p=rand(H)), rand(T, H))

    def edit(graph: fx.Graph, ctx: Context) -> None:
        node = nodes(graph, "sum")[-1]  # of the parameter's gradient
        if "seen" not in node.meta:
            node.meta["seen"] = True
            new = after(graph, node, torch.ops.aten.mul.Tensor, 1.01)
            new.meta = dict(node.meta)

    @dataclass(frozen=True)
    class Off(Edit):
        level = "training"

    e = failure(Off(edit), subject, verify=True)
    assert "changed output 1 by 1.0e-02" in e.what


@pytest.mark.parametrize("name", often(["qwen3_moe", "deepseek_v3", "gpt_oss"], ["deepseek_v3"]))
def test_all_default_passes_are_what_they_say(name: str) -> None:
    """Every pass of the longest pipeline, measured on a real model, stays in its class; the step is the original's."""
    pytest.importorskip("transformers")
    entry = zoo.get(name)
    model, batch = zoo.build(entry), zoo.batch(entry)
    want, grads = zoo.reference_step(model, batch)
    opt = moefx.optimize(model, batch, passes=pipeline(codegen="inductor"), codegen="eager", verify=True)
    rows = {p.name: p for p in opt.report.passes}
    assert list(rows) == pipeline(codegen="inductor").names
    changed = {n for n, p in rows.items() if p.error is not None}
    assert {"expand_experts", "drop_noops", "inline_pointwise"} <= changed
    assert all(p.error == 0.0 for p in rows.values() if p.numerics == "exact" and p.error is not None)
    assert all(p.error < 1e-5 for p in rows.values() if p.error is not None)

    found, mine = zoo.reference_step(opt, batch)
    assert reference.error(found, want) < 1e-5
    assert mine.keys() == grads.keys()
    assert max(reference.error(mine[k], g) for k, g in grads.items()) < 1e-4

    # Snapshots: of the passes that changed something and of no other, each the graph as it was then.
    stages = ["captured", "joint", "forward", "backward"]
    assert sorted(opt.graphs) == sorted([*stages, *changed])
    for p in opt.report.passes:
        if p.name in changed:
            assert len(opt.graphs[p.name].graph.nodes) == p.nodes_after
        else:
            assert p.nodes_before == p.nodes_after
        assert p.seconds > 0
    for level in ("model", "training"):
        level_rows = [p for p in opt.report.passes if p.level == level]
        assert all(a.nodes_after == b.nodes_before for a, b in itertools.pairwise(level_rows))
    everywhere = [n for p in changed for n in opt.graphs[p].graph.nodes if n.meta.get("moefx_passes")]
    assert {n.meta["moefx_passes"][-1] for n in everywhere} == changed - {"dead_code", "dead_code_training"}


@pytest.mark.parametrize("codegen", ["eager", nightly("inductor")])
def test_a_training_pass_of_ones_own_trains(codegen: str) -> None:
    """Its node, made without any meta, gets through either partitioner; the gradients are the original's."""
    pytest.importorskip("transformers")
    model = reference.tiny()

    @dataclass(frozen=True)
    class Copies(Pass):
        level = "training"

        def run(self, graph: fx.Graph, ctx: Context) -> None:
            for node in ctx.at(nodes(graph, "glu")):
                if not any(u.target is torch.ops.aten.clone.default for u in node.users):
                    ctx.matched(after(graph, node, torch.ops.aten.clone.default))

    passes = pipeline(codegen="eager").insert(Copies())
    opt = reference.optimize(model, passes=passes, codegen=codegen, verify=True)
    assert {p.name: p.matched for p in opt.report.passes}["copies"] == 1
    assert any("copies" in n.meta.get("moefx_passes", ()) for n in opt.graphs["forward"].graph.nodes)
    reference.assert_same(reference.step(opt, reference.batch()), reference.step(model, reference.batch()))
