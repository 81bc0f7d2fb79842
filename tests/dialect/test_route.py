"""The composite `route` against loops over tokens and experts in float64, and its specs as text."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx.dialect.route import DTYPES, NORMS, REDUCERS, SCORES, Groups, RouteSpec
from moefx.dialect.route_fit import Hints, Trial, fit, same
from moefx.errors import InputError

from .oracles import Tensor, ops, randn

E = 12


def number() -> st.SearchStrategy[float]:
    """Positive finite numbers."""
    return st.floats(min_value=1e-30, max_value=1e30, allow_nan=False)


@st.composite
def specs(draw: st.DrawFn, experts: int | None = None) -> RouteSpec:
    """Any spec; for so many experts, if given."""
    score = draw(st.sampled_from(SCORES))
    bias = draw(st.booleans())
    counts = [c for c in (2, 3, 4, 6) if experts is None or experts % c == 0]
    count = draw(st.sampled_from(counts))
    kept = draw(st.integers(1, count - 1))
    groups = Groups(count, kept, draw(st.sampled_from(REDUCERS)), draw(st.sampled_from((0.0, -math.inf))))
    grouped = draw(st.booleans())
    order = "scores" if score == "identity" else draw(st.sampled_from(("scores", "logits")))
    norm = draw(st.sampled_from(NORMS))
    eps = {"clamp": draw(number()), "sum": draw(st.one_of(st.just(0.0), number()))}.get(norm, 0.0)
    return RouteSpec(
        score=score,
        k=draw(st.integers(1, 64 if experts is None else kept * experts // count)),
        dtype=draw(st.sampled_from(list(DTYPES))),
        order=order,
        bias=bias,
        groups=groups if grouped else None,
        masked=grouped and not bias and order == "scores" and draw(st.booleans()),
        norm=norm,
        eps=eps,
        factor=draw(st.one_of(st.just(1.0), number(), number().map(lambda x: -x))),
        per_expert=draw(st.booleans()),
        sorted=draw(st.booleans()),
        out=draw(st.sampled_from((None, *DTYPES))),
        noise=draw(st.booleans()),
    )


# -- specs -----------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(spec=specs(), other=specs())
def test_specs_print_and_parse(spec: RouteSpec, other: RouteSpec) -> None:
    assert RouteSpec.parse(str(spec)) == spec
    assert (str(spec) == str(other)) == (spec == other)


def test_specs_read_well() -> None:
    v3 = RouteSpec("sigmoid", 8, bias=True, groups=Groups(8, 4, "top2sum"), norm="sum", eps=1e-20, factor=2.5)
    text = "sigmoid f32 | bias | groups 8 keep 4 by top2sum fill -inf | top8 | sum + 1e-20 | x 2.5"
    assert str(v3) == text
    assert (
        str(RouteSpec("softmax", 2, norm="clamp", eps=1e-12, out="bf16"))
        == "softmax f32 | top2 | sum >= 1e-12 | to bf16"
    )
    assert str(RouteSpec("identity", 4, "bf16", norm="softmax")) == "identity bf16 | top4 | softmax"
    assert str(RouteSpec("softmax", 1, order="logits", noise=True)) == "noise | softmax f32 | top1 of logits"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "softmax f32",
        "softmax f32 | top0",
        "softmax f32 | top02",
        "softmax fp32 | top2",
        "relu f32 | top2",
        "identity f32 | top2 of logits",
        "softmax f32 | top2 | x 2.50",
        "softmax f32 | top2 | x 1.0",
        "softmax f32 | top2 | sum + one",
        "softmax f32 | top2 | sum >= 0.0",
        "softmax f32 | top2 | softmax + 1e-06",
        "softmax f32 | groups 4 keep 4 by max fill 0 | top2",
        "softmax f32 | bias | groups 4 keep 2 by max fill 0 masked | top2",
        "softmax f32 | groups 4 keep 2 by mean fill 0 | top2",
        "softmax f32 | top2 | to f8",
        "softmax f32 | top2 ",
        "softmax f32 | top2 | x inf",
    ],
)
def test_what_no_spec_prints_is_not_parsed(text: str) -> None:
    with pytest.raises(InputError):
        RouteSpec.parse(text)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"score": "relu"}, "score 'relu'"),
        ({"k": 0}, "top-k of 0"),
        ({"masked": True}, "masked weights"),
        ({"norm": "clamp"}, "normaliser 'clamp'"),
        ({"norm": "softmax", "eps": 1.0}, "normaliser 'softmax'"),
        ({"factor": 0.0}, "factor 0.0"),
        ({"out": "f8"}, "cast to 'f8'"),
        ({"groups": Groups(4, 0)}, "groups"),
    ],
)
def test_contradictions_are_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        replace(RouteSpec("softmax", 2), **change)  # type: ignore[arg-type]


# -- the definition --------------------------------------------------------------------------------------------------


def score(row: list[float], name: str) -> list[float]:
    """F of one token's logits."""
    if name == "softmax":
        top = max(row)
        e = [math.exp(x - top) for x in row]
        return [x / sum(e) for x in e]
    f = {
        "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
        "sqrtsoftplus": lambda x: math.sqrt(math.log1p(math.exp(x))),
        "identity": lambda x: x,
    }[name]
    return [f(x) for x in row]


def route(row: list[float], bias: list[float], scale: list[float], s: RouteSpec) -> dict[int, float]:
    """Expert -> weight of one token, step by step."""
    n = len(row)
    scores = score(row, s.score)
    base = scores if s.order == "scores" else row
    choice = [c + b for c, b in zip(base, bias, strict=True)]
    if (g := s.groups) is not None:
        size = n // g.count
        members = [sorted(choice[i * size : (i + 1) * size], reverse=True) for i in range(g.count)]
        value = [m[0] if g.reducer == "max" else m[0] + m[1] for m in members]
        kept = sorted(range(g.count), key=lambda i: -value[i])[: g.kept]
        choice = [c if e // size in kept else g.fill for e, c in enumerate(choice)]
    chosen = sorted(range(n), key=lambda e: -choice[e])[: s.k]
    w = [choice[e] if s.masked else scores[e] for e in chosen]
    if s.norm == "softmax":
        w = score(w, "softmax")
    elif s.norm != "none":
        total = max(sum(w), s.eps) if s.norm == "clamp" else sum(w) + s.eps
        w = [x / total for x in w]
    return {e: x * s.factor * scale[e] for e, x in zip(chosen, w, strict=True)}


@settings(max_examples=150, deadline=None)
@given(spec=specs(experts=E), seed=st.integers(0, 999))
def test_any_spec(spec: RouteSpec, seed: int) -> None:
    # Fills of 0 tie where several experts are outside, so the choice is made of positive numbers here.
    positive = (
        spec.groups is not None and spec.groups.fill == 0 and (spec.score == "identity" or spec.order == "logits")
    )
    s = replace(spec, dtype="f64", out="f64", factor=2.5 if spec.factor != 1 else 1.0, eps=min(spec.eps, 0.25))
    logits = randn(5, E, dtype=torch.float64, seed=seed)
    logits = logits.abs() + 0.1 if positive else logits
    bias, scale = (randn(E, dtype=torch.float64, seed=seed + i).abs() for i in (1, 2))
    scores, idx, w = ops.route(logits, bias if s.bias else None, scale if s.per_expert else None, str(s))
    assert idx.dtype == torch.int64
    for t, row in enumerate(logits.tolist()):
        want = route(row, bias.tolist() if s.bias else [0.0] * E, scale.tolist() if s.per_expert else [1.0] * E, s)
        torch.testing.assert_close(scores[t], torch.tensor(score(row, s.score), dtype=torch.float64))
        assert sorted(idx[t].tolist()) == sorted(want)
        torch.testing.assert_close(w[t], torch.tensor([want[e] for e in idx[t].tolist()], dtype=torch.float64))
        if s.sorted:
            assert idx[t].tolist() == list(want)


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(name: str) -> None:
    logits = randn(3, E, dtype=torch.bfloat16)
    scores, idx, w = ops.route(logits, None, None, f"softmax {name} | top2 | sum")
    assert (scores.dtype, idx.dtype, w.dtype) == (DTYPES[name], torch.int64, DTYPES[name])
    assert ops.route(logits, None, None, f"softmax {name} | top2 | to f16")[2].dtype == torch.float16
    assert ops.route(logits, None, None, f"sigmoid {name} | top2 of logits")[2].dtype == DTYPES[name]


def test_leading_axes_and_no_tokens() -> None:
    x = randn(2, 3, E)
    flat = ops.route(x.reshape(-1, E), None, None, "softmax f32 | top3 | sum")
    deep = ops.route(x, None, None, "softmax f32 | top3 | sum")
    assert all(torch.equal(a, b.reshape(a.shape)) for a, b in zip(flat, deep, strict=True))
    assert [tuple(t.shape) for t in ops.route(x[:0, 0], None, None, "softmax f32 | top3")] == [(0, E), (0, 3), (0, 3)]


def test_the_bias_has_no_gradient_and_the_scale_has() -> None:
    logits, bias, scale = (t.requires_grad_() for t in (randn(4, E), randn(E, seed=1), randn(E, seed=2)))
    w = ops.route(logits, bias, scale, "sigmoid f32 | bias | top2 | sum | per-expert")[2]
    assert torch.autograd.grad(w.sum(), bias, allow_unused=True, retain_graph=True) == (None,)
    assert bool(torch.autograd.grad(w.sum(), scale)[0].any())


def test_tensors_that_do_not_fit_are_named() -> None:
    x, b = randn(4, E), randn(E)
    for args, what in (
        ((x, None, None, "sigmoid f32 | bias | top2"), "bias: none"),
        ((x, b, None, "sigmoid f32 | top2"), r"bias: one of shape \(12,\)"),
        ((x, None, b[:3], "sigmoid f32 | top2 | per-expert"), r"scale: one of shape \(3,\)"),
        ((x, None, None, "sigmoid f32 | top13"), "logits of 12 experts"),
        ((x, None, None, "sigmoid f32 | groups 5 keep 2 by max fill 0 | top2"), "logits of 12 experts"),
    ):
        with pytest.raises(InputError, match=what):
            ops.route(*args)


# -- from values to specs --------------------------------------------------------------------------------------------


def trial(spec: RouteSpec, seed: int) -> Trial:
    """What the definition makes of random logits, bias and scale."""
    bias = randn(E, seed=seed + 1) - seed % 2 if spec.bias else None
    scale = randn(E, seed=seed + 2) if spec.per_expert else None
    logits: Tensor = torch.cat([randn(24, E, seed=seed), randn(16, E, seed=seed) * 40])
    _, idx, w = ops.route(logits, bias, scale, str(spec))
    return Trial(logits, bias, scale, idx, w)


@settings(max_examples=60, deadline=None)
@given(spec=specs(experts=E), seed=st.integers(0, 99))
def test_a_form_that_agrees_is_found(spec: RouteSpec, seed: int) -> None:
    """The form found may be another one that gives the same values; it gives the same on all trials."""
    factor, eps = (2.5 if spec.factor != 1 else 1.0), (0.25 if spec.eps else 0.0)
    spec = replace(spec, dtype="f32", out=None, noise=False, factor=factor, eps=eps)
    trials = [trial(spec, seed), trial(spec, seed + 1)]
    counts = () if spec.groups is None else (spec.groups.count,)
    kept = () if spec.groups is None else (spec.groups.kept,)
    found, _ = fit(trials, Hints((torch.float32,), counts, kept, (2.5, 0.25), (spec.sorted,)))
    first = next(found)
    for t in trials:
        _, idx, w = ops.route(t.logits, t.bias, t.scale, str(first))
        assert torch.equal(idx, t.idx)
        assert same(w, t.w)


def test_what_fits_nothing_says_how_far_off_it_is() -> None:
    good = trial(RouteSpec("softmax", 2), 0)
    found, why = fit([replace(good, w=good.w * 1.01)], Hints((torch.float32,)))
    assert list(found) == []
    assert "they are off by" in why()
    found, why = fit([replace(good, idx=good.idx.flip(-1))], Hints((torch.float32,)))
    assert list(found) == []
    assert "of sigmoid scores, differs for" in why()
