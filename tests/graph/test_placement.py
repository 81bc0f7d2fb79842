"""Where casts go: the minimum cut against trying everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx.errors import PassError
from moefx.graph.placement import CODES, FORMS, WIDE, Problem, Reader, solve


def best(problem: Problem) -> int | None:
    """The cheapest legal assignment, by trying all."""
    names = [r.name for r in problem.readers]
    tried = (
        problem.cost(dict(zip(names, forms, strict=True))) for forms in itertools.product(FORMS, repeat=len(names))
    )
    return min((c for c in tried if c is not None), default=None)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """A few values, some made by steps from earlier ones, with readers of all kinds."""
    cost = st.integers(0, 20)
    form = st.one_of(st.none(), cost)
    p = Problem()
    for v in range(draw(st.integers(1, 4))):
        p.casts[v] = (draw(cost), draw(form))
        if v and draw(st.booleans()):
            reads = draw(st.sets(st.integers(0, v - 1), min_size=1))
            p.readers.append(Reader(("step", v), tuple(sorted(reads)), draw(form), draw(form), v))
        else:
            p.made[v] = draw(st.sampled_from(FORMS))
    for i in range(draw(st.integers(0, 5))):
        p.readers.append(Reader(("use", i), (draw(st.sampled_from(sorted(p.casts))),), draw(form), draw(form)))
    return p


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_cut_is_the_best_of_all_assignments(p: Problem) -> None:
    want = best(p)
    if want is None:
        with pytest.raises(PassError, match="no placement of casts is legal"):
            solve(p)
        return
    assert p.cost(solve(p)) == want


def chain(tokens: int, k: int) -> Problem:
    """X [tokens] is gathered into k times as many rows, which a product reads as codes; a wide byte is 2, a code 1."""
    wide, codes = 2 * tokens, tokens
    p = Problem({"X": (wide + codes, wide + codes), "Xp": (k * (wide + codes),) * 2}, {"X": WIDE})
    p.readers = [Reader("gather", ("X",), 2 * k * wide, 2 * k * codes, "Xp"), Reader("product", ("Xp",), None, 0)]
    return p


def test_a_value_is_quantized_before_it_is_copied() -> None:
    forms = solve(chain(100, 8))
    assert forms == {"gather": CODES, "product": CODES}
    assert chain(100, 8).cost(forms) == 300 + 1600
    assert chain(100, 8).cost({"gather": WIDE, "product": CODES}) == 3200 + 2400  # the control: it is not the only way


def test_one_cast_serves_all_readers() -> None:
    p = chain(100, 1)
    p.readers += [Reader(f"more {i}", ("X",), None, 0) for i in range(5)]
    assert p.cost(solve(p)) == 300 + 200


def test_a_wide_reader_behind_a_gather_keeps_it_wide_when_codes_would_have_to_be_decoded() -> None:
    p = chain(100, 1)
    p.readers.append(Reader("norm", ("Xp",), 0, None))
    forms = solve(p)
    assert forms["gather"] == WIDE
    assert p.cost(forms) == best(p) == 400 + 300


def test_a_concatenation_moves_codes_only_if_all_its_parts_can() -> None:
    p = Problem({"X": (4, None), "Y": (4, None), "Z": (3, None)}, {"X": WIDE, "Y": WIDE})
    p.readers = [Reader("cat", ("X", "Y"), 8, 4, "Z"), Reader("product", ("Z",), None, 0)]
    assert solve(p) == {"cat": WIDE, "product": CODES}  # one cast behind it costs less than two in front
    p.casts["X"] = p.casts["Y"] = (0, None)
    assert solve(p)["cat"] == CODES
    p.readers.append(Reader("norm", ("Z",), 0, None))  # which must see what was not rounded
    assert solve(p)["cat"] == WIDE


def test_of_equal_costs_the_one_with_fewer_moves_in_codes() -> None:
    p = Problem(
        {"X": (5, 5), "V": (5, 5)}, {"X": WIDE}, [Reader("view", ("X",), 0, 0, "V"), Reader("use", ("V",), None, 0)]
    )
    assert solve(p) == {"view": WIDE, "use": CODES}


def test_components_share_no_value_and_add_up() -> None:
    p = chain(10, 2)
    other = chain(7, 3)
    p.casts |= {f"{k}'": v for k, v in other.casts.items()}
    p.made["X'"] = WIDE
    p.readers += [
        Reader(f"{r.name}'", tuple(f"{v}'" for v in r.reads), r.wide, r.codes, r.makes and f"{r.makes}'")
        for r in other.readers
    ]
    parts = p.components()
    assert len(parts) == 2
    assert sum(q.cost(solve(q)) or 0 for q in parts) == p.cost(solve(p))
