"""What nodes do besides returning a value, on graphs that Dynamo captured."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from moefx.graph.effects import is_effect, is_random, modes, mutated, name_of, view_source, writers
from tests.passes.subject import H, Made, T, model_graph, nodes, rand, training_graph

Tensor = torch.Tensor
Fn = Callable[[Tensor], Any]


def captured(fn: Fn) -> fx.Graph:
    """The graph of a function of x [T, H], without parameters."""
    return model_graph(Made(lambda m, x: fn(x), grad=False, unused=torch.zeros(1)), rand(T, H)).graph


def last(graph: fx.Graph) -> fx.Node:
    """The last call."""
    return [n for n in graph.nodes if n.op.startswith("call")][-1]


def set_rows(x: Tensor) -> Tensor:
    """Write by index."""
    y = x * 1
    y[1:3] = 0.0
    return y


def add_to(x: Tensor) -> Tensor:
    """Write by operator."""
    y = x * 1
    y += 1
    return y


WRITES: list[Fn] = [
    lambda x: (x * 1).add_(1),
    lambda x: (x * 1).clamp_(min=0),
    lambda x: torch.relu_(x * 1),
    lambda x: F.relu(x * 1, inplace=True),
    lambda x: F.leaky_relu(x * 1, 0.1, True),
    lambda x: F.dropout(x * 1, 0.5, False, True),
    lambda x: torch.add(x, 1, out=x * 1),
    set_rows,
    add_to,
]


@pytest.mark.parametrize("fn", WRITES)
def test_writes(fn: Fn) -> None:
    graph = captured(fn)
    (target,) = nodes(graph, "mul")
    found = [n for n in graph.nodes if mutated(n)]
    assert len(found) == 1
    assert mutated(found[0]) == [target]
    assert is_effect(found[0])
    assert writers(graph)(target) == found


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.add(1),
        lambda x: F.relu(x),
        lambda x: F.leaky_relu(x, 0.1, False),
        lambda x: F.dropout(x, 0.5, False, False),
        lambda x: x.__getitem__(slice(1, 3)),
        lambda x: torch.softmax(x, -1),
    ],
)
def test_no_writes(fn: Fn) -> None:
    graph = captured(fn)
    assert not any(mutated(n) for n in graph.nodes)
    assert not is_effect(last(graph))
    assert not any(writers(graph)(n) for n in graph.nodes)


def test_ops_of_a_training_graph_write_by_schema() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    aten = torch.ops.aten
    assert mutated(graph.call_function(aten.copy_.default, (x, y))) == [x]
    assert mutated(graph.call_function(aten.add.out, (x, x), {"out": y})) == [y]
    assert mutated(graph.call_function(aten.add.Tensor, (x, y))) == []
    assert mutated(graph.call_function(torch.ops.moefx.permute.default, (x, y, y))) == []


VIEWS: list[Fn] = [
    lambda y: y.view(-1),
    lambda y: y.reshape(-1),
    lambda y: y.t(),
    lambda y: y.T,
    lambda y: torch.transpose(y, 0, 1),
    lambda y: y[2:],
    lambda y: y[None],
    lambda y: y.unsqueeze(0).expand(1, -1, -1),
    lambda y: y.chunk(2, -1)[1],
    lambda y: torch.split(y, 4, -1)[0],
    lambda y: y.unbind(0)[3],
    lambda y: y.float(),
    lambda y: y.to(torch.float32),
    lambda y: y.contiguous(),
    lambda y: y.detach(),
    lambda y: y.flatten(),
    lambda y: F.dropout(y, 0.5, False),
    lambda y: y.narrow(0, 1, 2).squeeze(0),
]


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_seen_through(view: Fn) -> None:
    """A write into a view is a write into what it views; and really is one."""

    def fn(x: Tensor) -> Any:
        y = x * 1
        view(y).mul_(2.0)
        return y

    graph = captured(fn)
    (base,) = nodes(graph, "mul")
    assert [name_of(n) for n in writers(graph)(base)] == ["mul_"]
    x = rand(T, H)
    assert not torch.equal(fn(x), x)


@pytest.mark.parametrize(
    "copy",
    [
        lambda y: y.clone(),
        lambda y: y.double(),
        lambda y: y * 1.0,
        lambda y: torch.cat([y, y]),
        lambda y: torch.topk(y, 2)[0],
        lambda y: torch.softmax(y, -1),
        lambda y: torch.where(y > 0, y, 0.0),
        lambda y: y.sum(0),
    ],
)
def test_copies_are_not(copy: Fn) -> None:
    def fn(x: Tensor) -> Any:
        y = x + 1
        copy(y).mul_(2.0)
        return y

    graph = captured(fn)
    (base,) = nodes(graph, "add")
    x = rand(T, H)
    assert torch.equal(fn(x), x + 1)
    assert writers(graph)(base) == []


def test_results_of_one_op_are_apart() -> None:
    """Values and indices of a top-k are two tensors; pieces of a split are one."""

    def fn(x: Tensor) -> Any:
        v, i = torch.topk(x, 2)
        v.mul_(2)
        a, b = (x * 1).chunk(2, -1)
        a.mul_(3)
        return v, i, a, b

    graph = captured(fn)
    written = writers(graph)
    out: Any = graph.output_node().args[0]
    v, i, a, b = out
    # An in-place op returns what it wrote into, so that outputs may be the ops themselves.
    assert [len(written(n)) for n in (v, i, a, b)] == [1, 0, 1, 1]
    assert view_source(i) is None


@pytest.mark.parametrize(
    ("fn", "random"),
    [
        (lambda x: F.dropout(x, 0.5, True), True),
        (lambda x: F.dropout(x, 0.5), True),
        (lambda x: F.dropout(x, 0.5, False), False),
        (lambda x: F.dropout(x, training=False), False),
        (lambda x: F.alpha_dropout(x, 0.5, True), True),
        (lambda x: F.gumbel_softmax(x), True),
        (lambda x: F.rrelu(x, training=True), True),
        (lambda x: F.rrelu(x), False),
        (lambda x: torch.randn(3), True),
        (lambda x: torch.randint(0, 3, (2,)), True),
        (lambda x: torch.rand_like(x), True),
        (lambda x: x.sigmoid().bernoulli(), True),
        (lambda x: torch.empty_like(x).uniform_(), True),
        (lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], None, 0.1), True),
        (lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.0), False),
        (lambda x: torch.zeros(3), False),
        (lambda x: torch.softmax(x, 0), False),
    ],
)
def test_random_draws(fn: Fn, random: bool) -> None:
    """The classification is compared with what the function does to the random state."""
    graph = captured(fn)
    assert any(is_random(n) for n in graph.nodes) is random
    assert is_effect(last(graph)) is random
    torch.manual_seed(0)
    before = torch.get_rng_state()
    fn(rand(T, H))
    assert torch.equal(before, torch.get_rng_state()) is not random


def test_draws_of_training_graphs_go_by_tag() -> None:
    graph = training_graph(
        Made(lambda m, x: F.dropout(x * m.p, 0.5, True) + torch.rand_like(x), p=rand(H)), rand(T, H)
    ).graph
    assert {name_of(n) for n in graph.nodes if is_random(n)} == {"native_dropout", "rand_like"}


def test_modes() -> None:
    def fn(x: Tensor) -> Any:
        a = x * 1
        with torch.no_grad():
            b = x * 2
            with torch.autocast("cpu", torch.bfloat16):
                c = x * 3
        with torch.autocast("cpu", torch.bfloat16):
            d = x * 4
        return a, b, c, d, x * 5

    graph = captured(fn)
    mode = modes(graph)
    a, b, c, d, e = (mode[n] for n in nodes(graph, "mul"))
    assert a == e
    assert len({a, b, c, d}) == 4
    assert (b[0], len(c), len(d)) == (False, 2, 2)


def test_modes_under_no_grad() -> None:
    """Where the surroundings compute no gradients anyway, a no_grad region is nothing special."""

    def fn(x: Tensor) -> Any:
        with torch.no_grad():
            a = x * 1
        return a, x * 2

    with torch.no_grad():
        graph = captured(fn)
    a, b = (modes(graph)[n] for n in nodes(graph, "mul"))
    assert a == b


def test_regions_stay() -> None:
    """A higher-order node may hide effects in its own graph: here a region that decides itself what it saves."""

    policy = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])

    def fn(x: Tensor) -> Any:
        return checkpoint(lambda y: F.dropout(y, 0.5, True), x, use_reentrant=False, context_fn=policy)

    graph = captured(fn)
    found = [n for n in graph.nodes if isinstance(n.target, torch._ops.HigherOrderOperator)]
    assert found
    assert all(is_effect(n) for n in found)
