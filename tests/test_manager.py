"""The pass manager: order, and what it does to a pass that breaks its contract."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.nn import functional as F

import moefx
from moefx import Pass, PassError, PassManager
from moefx.graph.effects import is_effect, name_of
from moefx.manager import Context, refresh
from moefx.passes import DeadCode, ExpandExperts, get_pass, pass_names, pipeline, register_pass
from moefx.report import Report
from moefx.verify import Verifier
from tests import reference
from tests.family import zoo
from tests.passes.subject import (
    H,
    Made,
    Subject,
    T,
    count,
    failure,
    model_graph,
    nodes,
    put,
    rand,
    rewrite,
    training_graph,
)
from tests.profile import nightly

Tensor = torch.Tensor


# -- order -----------------------------------------------------------------------------------------------------------


def tagged(name: str, requires: Any = (), provides: Any = (), level: str = "model", conflicts: Any = ()) -> Pass:
    """A pass that does nothing, called `name`."""
    body = {"requires": set(requires), "provides": set(provides), "conflicts": set(conflicts), "level": level}
    made: Pass = type(name, (Pass,), {**body, "run": lambda self, graph, ctx: None})()
    return made


@st.composite
def tag_graphs(draw: st.DrawFn) -> tuple[int, set[tuple[int, int]], list[str], list[int]]:
    """Number of passes, who provides what whom requires, levels, and the order of listing."""
    n = draw(st.integers(1, 7))
    edges = draw(
        st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda e: e[0] != e[1]), max_size=9)
    )
    if draw(st.booleans()):  # half of the time without a cycle
        edges = {(min(e), max(e)) for e in edges}
    levels = draw(st.lists(st.sampled_from(["model", "training"]), min_size=n, max_size=n))
    return n, edges, levels, draw(st.permutations(range(n)))


@settings(max_examples=200, deadline=None)
@given(tag_graphs())
def test_order_is_the_first_valid_one_in_listing_order(
    case: tuple[int, set[tuple[int, int]], list[str], list[int]],
) -> None:
    """As networkx orders: level first, then listing, as far as requirements allow; an error where nothing is valid."""
    n, edges, levels, listing = case
    passes = [
        tagged(f"P{i}", {f"t{a}" for a, b in edges if b == i}, {f"t{i}"}, levels[i])
        for i in range(n)
    ]  # fmt: skip
    manager = PassManager(tuple(passes[i] for i in listing))
    graph = nx.DiGraph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from(edges)
    upwards = any(levels[a] == "training" and levels[b] == "model" for a, b in edges)
    if upwards or not nx.is_directed_acyclic_graph(graph):
        with pytest.raises(PassError, match="cannot be satisfied"):
            manager.ordered()
        return
    found = [int(p.name[1:]) for p in manager.ordered()]
    want = nx.lexicographical_topological_sort(graph, key=lambda i: (levels[i] == "training", listing.index(i)))
    assert found == list(want)
    assert all(found.index(a) < found.index(b) for a, b in edges)
    assert manager.names == [f"p{i}" for i in listing]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=5), st.randoms())
def test_a_tag_of_several_providers_waits_for_all(kinds: list[tuple[bool, bool]], random: Any) -> None:
    """Against brute force over all permutations: who requires the tag runs behind all who provide it."""
    passes = [tagged(f"P{i}", {"t"} if r else (), {"t"} if p and not r else ()) for i, (r, p) in enumerate(kinds)]
    random.shuffle(passes)
    manager = PassManager(tuple(passes), frozenset({"t"}))
    valid = [
        order
        for order in itertools.permutations(passes)
        if all(order.index(p) < order.index(r) for p in passes for r in passes if p.provides and r.requires)
    ]
    found = tuple(manager.ordered())
    assert found in valid
    # Of all valid orders it is the first, with passes compared by their place in the list.
    assert found == min(valid, key=lambda order: [passes.index(p) for p in order])


def test_default_pipelines_are_in_listing_order() -> None:
    for codegen in ("eager", "inductor"):
        manager = pipeline("bf16", codegen=codegen)
        assert [p.name for p in manager.ordered()] == manager.names
    assert "inline_pointwise" in pipeline(codegen="inductor").names
    assert "inline_pointwise" not in pipeline(codegen="eager").names


def test_unsatisfiable_requirement_names_the_nearest_tag() -> None:
    with pytest.raises(PassError) as e:
        PassManager((tagged("A", provides={"casts_folded"}), tagged("B", {"cast_folded"}))).ordered()
    assert "pass b requires 'cast_folded'" in e.value.what
    assert "did you mean 'casts_folded'?" in str(e.value.todo)


def test_requirement_that_only_the_pass_itself_provides() -> None:
    with pytest.raises(PassError, match="requires 't', which nothing"):
        PassManager((tagged("A", {"t"}, {"t"}),)).ordered()


def test_requirement_that_capture_gives() -> None:
    assert len(PassManager((tagged("A", {"captured", "moe_raised"}),)).ordered()) == 1


def test_cycle_names_who_waits_for_whom() -> None:
    with pytest.raises(PassError) as e:
        PassManager((tagged("A", {"b"}, {"a"}), tagged("B", {"a"}, {"b"}), tagged("C"))).ordered()
    assert "a, b are stuck" in e.value.what
    assert "waiting for b" in str(e.value.why)


def test_model_pass_behind_a_training_pass() -> None:
    with pytest.raises(PassError) as e:
        PassManager((tagged("Late", {"t"}), tagged("Early", (), {"t"}, "training"))).ordered()
    assert e.value.where == "late"
    assert "model level" in str(e.value.why)


def test_conflict_names_both() -> None:
    with pytest.raises(PassError, match="pass a conflicts with b, which provides 't'"):
        PassManager((tagged("A", conflicts={"t"}), tagged("B", provides={"t"}))).ordered()
    assert PassManager((tagged("A", conflicts={"t"}, provides={"t"}),)).names == ["a"]
    PassManager((tagged("A", conflicts={"t"}, provides={"t"}),)).ordered()


def test_optimize_checks_the_order_before_it_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    model = reference.tiny()
    monkeypatch.setattr(model, "forward", None)  # never reached
    with pytest.raises(PassError, match="requires 'nowhere'"):
        reference.optimize(model, passes=pipeline(codegen="eager").insert(tagged("A", {"nowhere"})))


# -- editing a pipeline ----------------------------------------------------------------------------------------------


def test_insert_and_remove_leave_the_original_alone() -> None:
    base = PassManager((tagged("A"), tagged("B")))
    c = tagged("C")
    assert base.insert(c).names == ["a", "b", "c"]
    assert base.insert(c, before="a").names == ["c", "a", "b"]
    assert base.insert(c, after="a").names == ["a", "c", "b"]
    assert base.insert(c, after="b").names == ["a", "b", "c"]
    assert base.remove("a").names == ["b"]
    assert base.names == ["a", "b"]
    assert base.remove("a").remove("b").ordered() == []


@pytest.mark.parametrize(
    "edit", [lambda m: m.remove("fold_combin"), lambda m: m.insert(tagged("A"), after="fold_combin")]
)
def test_unknown_name_gives_the_nearest(edit: Callable[[PassManager], PassManager]) -> None:
    with pytest.raises(PassError) as e:
        edit(pipeline())
    assert "no pass named 'fold_combin'" in e.value.what
    assert "did you mean 'fold_combine'?" in str(e.value.todo)


class Bare(Pass):
    """A pass without a run."""


@dataclass(frozen=True)
class Nothing(Pass):
    """Does nothing."""

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        """Leave it."""


def with_attribute(name: str, value: object) -> Pass:
    """A pass with one attribute of the contract set to something."""
    made: Pass = type("Odd", (Nothing,), {name: value})()
    return made


@pytest.mark.parametrize(
    ("p", "complaint"),
    [
        (Nothing, "is the class, not an instance"),
        ("dead_code", "is not a moefx.Pass"),
        (with_attribute("level", "joint"), "pass odd has level 'joint'"),
        (with_attribute("numerics", "close"), "pass odd has numerics 'close'"),
        (with_attribute("requires", "captured"), "pass odd has requires 'captured'"),
        (with_attribute("provides", ["x"]), "pass odd has provides"),
    ],
)
def test_outward_form_is_checked(p: Any, complaint: str) -> None:
    with pytest.raises(PassError, match=complaint) as e:
        pipeline().insert(p)
    assert e.value.todo
    with pytest.raises(PassError, match=complaint):
        PassManager((p,)).ordered()


def test_pass_without_run_is_named(graph: Subject) -> None:
    e = failure(Bare(), graph)
    assert "pass bare" in e.what
    assert "has no run()" in str(e.why)


def test_registry() -> None:
    assert pass_names()[:4] == ["raise_routers", "route_by_token", "expand_routers", "merge_routers"]
    assert isinstance(get_pass("expand_experts"), ExpandExperts)
    assert get_pass("dead_code_training") == DeadCode(level="training")
    with pytest.raises(PassError) as e:
        get_pass("expand_expert")
    assert "did you mean 'expand_experts'?" in str(e.value.todo)
    with pytest.raises(PassError, match="registered already"):
        register_pass(type("DeadCode", (Nothing,), {}))
    with pytest.raises(PassError, match="registered already"):
        register_pass(lambda: ExpandExperts())
    assert register_pass(ExpandExperts) is ExpandExperts  # the same one again


def test_passes_argument() -> None:
    pytest.importorskip("transformers")
    opt = reference.optimize(reference.tiny(), passes=["expand_experts", DeadCode()])
    assert [p.name for p in opt.report.passes] == ["expand_experts", "dead_code"]
    with pytest.raises(PassError, match="passes is 'expand_experts'"):
        reference.optimize(reference.tiny(), passes="expand_experts")
    with pytest.raises(PassError, match="no pass named 'nope'"):
        reference.optimize(reference.tiny(), passes=["nope"])


# -- passes that break their contract --------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """A product, a dropout, a buffer that counts, a softmax; `y` has two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(H, H, bias=False)
        with torch.no_grad():
            self.inner.weight.copy_(rand(H, H))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        """Two outputs."""
        self.seen.add_(1.0)  # type: ignore[operator]
        y = F.dropout(self.inner(x), 0.5, True)
        return torch.softmax(y, -1), y * 2


@pytest.fixture(scope="module")
def graph() -> Subject:
    """Its model graph."""
    return model_graph(Block(), rand(T, H))


def first(graph: fx.Graph, name: str) -> fx.Node:
    """The first node of this name."""
    return next(n for n in graph.nodes if n.op.startswith("call") and name_of(n) == name)


@dataclass(frozen=True)
class Edit(Pass):
    """A pass made of a function."""

    edit: Callable[[fx.Graph, Context], Any]
    klass: str = "exact"

    @property
    def numerics(self) -> str:  # type: ignore[override]
        """As given."""
        return self.klass

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        """Apply the function."""
        self.edit(graph, ctx)


def after(graph: fx.Graph, node: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Put `target(node, *args)` behind a node for all its readers."""
    readers = list(node.users)
    with graph.inserting_after(node):
        new = graph.call_function(target, (node, *args))
    for reader in readers:
        reader.replace_input_with(node, new)
    return new


def raises(graph: fx.Graph, ctx: Context) -> None:
    for node in ctx.at(list(graph.nodes)):
        if node.op == "call_function" and name_of(node) == "linear":
            raise ValueError("no such pattern")


def malformed(graph: fx.Graph, ctx: Context) -> None:
    first(graph, "linear").args = (first(graph, "softmax"), first(graph, "linear").args[1])


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


# -- verification ----------------------------------------------------------------------------------------------------


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
        (scaled(float("inf")), "changes", "changed output 1"),
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
    if "changed output" in what:
        assert f"its numerics class is '{klass}'" in str(e.value.why)
    # Control: without verification nothing of this is seen.
    s = graph.copy()
    PassManager((Edit(edit, klass),)).run("model", s.gm, Report(), s.fake_mode)


@pytest.mark.parametrize(("by", "klass"), [(1.0, "exact"), (1 + 1e-6, "rounding"), (1.5, "changes")])
def test_honest_classes_pass(graph: Subject, by: float, klass: str) -> None:
    s, report = graph.copy(), Report()
    PassManager((Edit(scaled(by), klass),)).run("model", s.gm, report, s.fake_mode, Verifier(s.values, grad=True))
    assert report.passes[0].error == pytest.approx(by - 1, rel=0.2, abs=1e-9)


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


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
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


# -- values ----------------------------------------------------------------------------------------------------------


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
