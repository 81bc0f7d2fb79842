"""The pass manager: in which order passes run, and how a pipeline is edited."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx import Pass, PassError, PassManager
from moefx.passes import DeadCode, ExpandExperts, get_pass, pass_names, pipeline, register_pass
from tests import reference
from tests.passes.subject import Subject, failure

from .edited import Nothing

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
    with pytest.raises(PassError, match="pass c is to stand before b and after a"):
        base.insert(c, before="b", after="a")


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


@dataclass(frozen=True)
class Asking(Nothing):
    """A pass that is not made without arguments."""

    option: int


@pytest.mark.parametrize(
    ("given", "what", "todo"),
    [
        (DeadCode(), "the pass dead_code is an instance", "give the class"),
        (None, "None makes no pass", "give the class"),
        ("dead_code", "'dead_code' makes no pass", "give the class"),
        (Asking, "'Asking' makes no pass when it is called without arguments", "give every option a default"),
        (dict, "not a moefx.Pass", "frozen dataclasses"),
    ],
)
def test_what_makes_no_pass_is_not_registered(given: Any, what: str, todo: str) -> None:
    with pytest.raises(PassError) as e:
        register_pass(given)
    assert what in e.value.what
    assert todo in str(e.value.todo)


def test_passes_argument() -> None:
    pytest.importorskip("transformers")
    opt = reference.optimize(reference.tiny(), passes=["expand_experts", DeadCode()])
    assert [p.name for p in opt.report.passes] == ["expand_experts", "dead_code"]
    with pytest.raises(PassError, match="passes is 'expand_experts'"):
        reference.optimize(reference.tiny(), passes="expand_experts")
    with pytest.raises(PassError, match="no pass named 'nope'"):
        reference.optimize(reference.tiny(), passes=["nope"])
