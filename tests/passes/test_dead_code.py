"""What nobody reads goes, unless it does something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moefx.passes import DeadCode, MergeRouters
from tests.passes.subject import (
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
    run,
    training_graph,
    weights,
)

Tensor = torch.Tensor


def clean(fn: Callable[[Any, Tensor], Any], **options: Any) -> Rewritten:
    """Run the pass on the model graph of a function."""
    return rewrite(DeadCode(), model_graph(Made(fn, **{"p": rand(H), **options}), rand(T, H)))


def test_chains_go_and_live_code_stays() -> None:
    def fn(m: Any, x: Tensor) -> Tensor:
        unread = torch.softmax(x * m.p, -1)
        torch.topk(unread, 2)
        return x * m.p + 1

    done = clean(fn)
    assert done.row.matched == 3  # topk, which is not even unpacked, then softmax, then its input
    assert [n.name for n in done.graph.nodes if n.op not in ("placeholder", "output")] == ["mul_1", "add"]


def test_inputs_stay() -> None:
    """An unread parameter is still an input: the calling convention does not change."""
    done = clean(lambda m, x: (m.q.exp(), x * m.p)[1], q=rand(3))
    assert done.row.matched == 1
    assert len(done.graph.find_nodes(op="placeholder")) == 3


def test_nothing_to_do() -> None:
    assert not clean(lambda m, x: x * m.p).changed


def buffer(write: Callable[[Tensor, Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    """A forward that updates a buffer whose new value nobody reads."""

    def fn(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            write(m.p, x.detach().mean(0))
        return x * 2

    return fn


def assign(b: Tensor, v: Tensor) -> None:
    """Write by an index."""
    b[1:3] = v[1:3]


def add(b: Tensor, v: Tensor) -> None:
    """Write by an operator."""
    b += v


@pytest.mark.parametrize(
    "write",
    [
        lambda b, v: b.add_(v),
        lambda b, v: b.copy_(b * 0.9 + v),
        lambda b, v: b.view(2, -1)[1].mul_(3.0),
        lambda b, v: torch.add(b, v, out=b),
        lambda b, v: F.relu(b, inplace=True),
        lambda b, v: F.leaky_relu(b, 0.1, True),
        lambda b, v: F.dropout(b, 0.5, True, True),
        assign,
        add,
    ],
)
def test_buffer_updates_stay(write: Callable[[Tensor, Tensor], Any]) -> None:
    """`rewrite` compares the buffers after a run; here something else is dead, so that the pass does work."""

    def fn(m: Any, x: Tensor) -> Tensor:
        x.exp()
        return buffer(write)(m, x)

    subject = model_graph(Made(fn, grad=False, p=rand(H)), rand(T, H))
    after = run(subject)
    assert any(not torch.equal(after[f"input {i}"], v) for i, v in enumerate(subject.values))
    assert count(rewrite(DeadCode(), subject).graph, "exp") == 0


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("dropout", lambda x: F.dropout(x, 0.5, True)),
        ("rand_like", torch.rand_like),
        ("bernoulli", lambda x: x.sigmoid().bernoulli()),
        ("gumbel_softmax", F.gumbel_softmax),
        ("exponential_", lambda x: torch.empty_like(x).exponential_()),
        (
            "scaled_dot_product_attention",
            lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.2),
        ),
        ("multinomial", lambda x: torch.multinomial(x.sigmoid(), 1)),
    ],
)
def test_random_draws_stay(name: str, draw: Callable[[Tensor], Tensor]) -> None:
    """Nobody reads the first draw, but without it the second one would give other numbers."""

    def fn(m: Any, x: Tensor) -> Tensor:
        draw(x)
        torch.cos(x)
        return F.dropout(x * m.p, 0.5, True)

    done = clean(fn)
    assert count(done.graph, name) == (2 if name == "dropout" else 1)
    assert count(done.graph, "cos") == 0
    training = training_graph(Made(fn, p=rand(H)), rand(T, H))
    cleaned = rewrite(DeadCode(level="training"), training)
    random = [n for n in cleaned.graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())]
    assert len(random) >= 2


def test_draws_that_draw_nothing_go() -> None:
    def fn(m: Any, x: Tensor) -> Tensor:
        F.dropout(x, 0.5, False)
        F.scaled_dot_product_attention(x[None], x[None], x[None])
        return x * m.p

    done = clean(fn)
    assert count(done.graph, "dropout") + count(done.graph, "scaled_dot_product_attention") == 0


def test_switches_stay_in_pairs() -> None:
    def fn(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            x.exp()
        return x * m.p

    done = clean(fn)
    assert count(done.graph, "exp") == 0
    assert count(done.graph, "_set_grad_enabled") == 2
    assert (count(done.graph, "_enter_autocast"), count(done.graph, "_exit_autocast")) == (1, 1)


def test_training_level() -> None:
    """Dead nodes of a training graph go; forward, backward and assertions stay."""

    def fn(m: Any, x: Tensor) -> Tensor:
        _, w, idx = route(m, x)
        return experts(m, x, idx, w)

    subject = training_graph(Made(fn, **weights()), rand(T, H)).copy()
    graph = subject.graph
    (mm,) = nodes(graph, "mm")[:1]
    with graph.inserting_after(mm):
        dead = graph.call_function(torch.ops.aten.exp.default, (mm,))
        dead.meta = dict(mm.meta)
    with graph.inserting_after(dead):
        deader = graph.call_function(torch.ops.aten.neg.default, (dead,))
        deader.meta = dict(mm.meta)
    done = rewrite(DeadCode(level="training"), subject)
    assert done.row.matched == 2
    assert done.row.level == "training"
    assert count(done.graph, "neg") + count(done.graph, "exp") == 0


def test_assertions_stay() -> None:
    done = rewrite(
        DeadCode(level="training"),
        training_graph(Made(lambda m, x: F.one_hot(x.argmax(-1), H) * m.p, p=rand(H)), rand(T, H)),
    )
    kept = count(done.graph, "_assert_async")
    assert kept == count(done.before, "_assert_async")
    assert kept > 0 or torch.__version__ < "2.13"


def test_names_tell_the_levels_apart() -> None:
    assert (DeadCode().name, DeadCode(level="training").name) == ("dead_code", "dead_code_training")


def test_real_model(qwen: Subject) -> None:
    merged = rewrite(MergeRouters(), qwen)
    done = rewrite(DeadCode(), merged.subject)
    assert done.row.matched > 0
    assert all(n.users for n in done.graph.nodes if n.op == "call_function" and n.target is ops.experts)


def test_real_training_graph(qwen_training: Subject) -> None:
    """What Autograd traced has no dead nodes except those that stay: a second look finds nothing."""
    done = rewrite(DeadCode(level="training"), qwen_training)
    assert all(n.users or "assert" in str(n.target) for n in done.graph.nodes if n.op == "call_function")
