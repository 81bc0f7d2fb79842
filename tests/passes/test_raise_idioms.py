"""Experts in model graphs become `moefx.experts`, proved; what only looks like them stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moefx
from moefx.capture import capture
from moefx.errors import CaptureError
from moefx.models.moe_lm import IDIOMS, MoELM
from moefx.passes import ExpandExperts, RaiseIdioms, SharePlans
from moefx.raising import refine
from tests.passes.subject import E, H, I, Made, Rewritten, Subject, as_subject, count, rand, rewrite, trained, weights
from tests.profile import often
from tests.raising import almost, lookalikes  # noqa: F401  (they add their cases)
from tests.raising.ordinary import CASES

CAPTURABLE = ["A1", "A2", "A6p", "B", "C", "D1", "D3", "E1", "E2", "E3", "F", "G", "H"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "ungated": {"gated": False, "act": "gelu"},
    "ungated bias": {"gated": False, "act": "relu", "bias": True},
}


def subject(module: nn.Module, *args: Tensor, **kwargs: Any) -> Subject:
    return as_subject(capture(module, args, {}, **kwargs))


def raised(done: Rewritten, times: int = 1, op: str = "experts") -> None:
    """So many routed sums are in the dialect, and nothing was left alone."""
    assert done.reasons == []
    assert done.row.matched == times
    assert count(done.graph, op) == times


@pytest.mark.parametrize("dtype", often([torch.float32, torch.bfloat16], [torch.float32]), ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("idiom", CAPTURABLE)
def test_idioms(idiom: str, options: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = IDIOMS[idiom](H, I, E, 2, **OPTIONS[options]).to(dtype)
    done = rewrite(RaiseIdioms(), subject(layer, rand(2, 17, H, dtype=dtype)))
    raised(done, op="expert_choice" if idiom == "G" else "experts")
    kept = (
        "linear",
        "where",
        "item",
        "_assert_scalar",
        "index_add_",
        "setitem",
        "bmm",
        "einsum",
        "sort",
        "scatter_add",
    )
    assert sum(count(done.graph, name) for name in kept) == 1, "more is left than the router's product"


@pytest.mark.parametrize("idiom", CAPTURABLE)
def test_any_number_of_rows(idiom: str) -> None:
    layer = IDIOMS[idiom](H, I, E, 2)
    raised(
        rewrite(RaiseIdioms(), subject(layer, rand(3, 17, H), dynamic={"x": [0]})),
        op="expert_choice" if idiom == "G" else "experts",
    )


def test_grouped_products_of_bfloat16() -> None:
    layer = IDIOMS["D3"](16, 24, E, 2).bfloat16()
    raised(rewrite(RaiseIdioms(), subject(layer, rand(2, 16, 16, dtype=torch.bfloat16))))


@pytest.mark.parametrize("capacity", [3, 7, 12])
@pytest.mark.parametrize("idiom", ["B", "F"])
def test_capacity(idiom: str, capacity: int) -> None:
    """Also one that random rows do not fill: it shows when all rows want the same experts."""
    layer = IDIOMS[idiom](H, I, E, 2, capacity=capacity)
    done = rewrite(RaiseIdioms(), subject(layer, rand(1, 14, H)))
    raised(done)
    assert count(done.graph, "cumsum") == 1


def test_capacity_with_a_symbolic_number_of_rows_is_left_alone() -> None:
    layer = IDIOMS["F"](H, I, E, 2, capacity=4)
    done = rewrite(RaiseIdioms(), subject(layer, rand(3, 17, H), dynamic={"x": [0]}))
    assert not done.changed
    assert "capacity" in done.reasons[0]


@pytest.mark.parametrize("idiom", ["A2", "D1", "E1", "G"])
def test_models_of_several_layers(idiom: str) -> None:
    model = MoELM(64, 16, 12, 3, 2, 8, 2, idiom)
    ids = torch.arange(48).reshape(2, 24) % 64
    done = rewrite(RaiseIdioms(), as_subject(capture(model, (), {"input_ids": ids, "labels": ids.clone()})))
    raised(done, 3, "expert_choice" if idiom == "G" else "experts")


@pytest.mark.parametrize("idiom", ["A1", "D1", "H"])
def test_training_graph(idiom: str) -> None:
    """No size that depends on data is left when the graph is differentiated."""
    layer = IDIOMS[idiom](H, I, E, 2)
    captured = capture(layer, (rand(2, 9, H),), {})
    training = trained(layer, captured, (RaiseIdioms(), ExpandExperts(), SharePlans()))
    assert count(training.graph, "grouped_mm") == 3  # x needs no gradient
    assert count(training.graph, "nonzero") + count(training.graph, "_local_scalar_dense") == 0


class Inlined(nn.Module):
    """No module for experts, no names that say anything: a top-level forward with parameters of any name."""

    def __init__(self, *, order: tuple[int, ...] = tuple(range(6)), dense: bool = False, odd: int = -1) -> None:
        super().__init__()
        words = ("alpha", "zeta", "q", "foo", "bar", "moo")
        self.order, self.dense, self.odd, self.names = order, dense, odd, list[tuple[str, ...]]()
        for i in range(6):
            self.names.append(tuple(f"{words[(2 * i + j) % 6]}{'ywzuvx'[i]}{j}" for j in range(3)))
            for j, shape in enumerate(((12, 8), (12, 8), (8, 12))):
                self.register_parameter(self.names[i][j], nn.Parameter(0.3 * rand(*shape, seed=3 * i + j)))
        self.router, self.out = nn.Parameter(rand(6, 8, seed=50)), nn.Parameter(rand(5, 8, seed=51))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        w, idx = (h @ self.router.t()).softmax(-1).topk(2)
        y = torch.zeros_like(h)
        for n, e in enumerate(self.order):
            a, b, c = (self.get_parameter(name) for name in self.names[n])
            act: Callable[..., Tensor] = F.gelu if n == self.odd else F.silu
            if self.dense:
                y = y + (w * (idx == e)).sum(-1, keepdim=True) * ((act(h @ a.t()) * (h @ b.t())) @ c.t())
            else:
                token, nth = torch.where(idx == e)
                rows = h[token]
                y = y.index_add(0, token, (act(rows @ a.t()) * (rows @ b.t())) @ c.t() * w[token, nth, None])
        return (h + y) @ self.out.t()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (3, 1, 0, 5, 4, 2)])
def test_experts_without_a_module(dense: bool, order: tuple[int, ...]) -> None:
    raised(rewrite(RaiseIdioms(), subject(Inlined(order=order, dense=dense), rand(20, 8))))


@pytest.mark.parametrize("dense", [False, True])
def test_one_expert_differs(dense: bool) -> None:
    done = rewrite(RaiseIdioms(), subject(Inlined(odd=4, dense=dense), rand(20, 8)))
    assert not done.changed
    assert len(done.reasons) == 1


def test_alone_in_optimize() -> None:
    model, x = Inlined(), rand(20, 8)
    passes = ["raise_idioms", "expand_experts", "share_plans", "dead_code"]
    opt = moefx.optimize(model, (x,), passes=passes, codegen="eager", verify=True)
    assert torch.allclose(opt(x), model(x), atol=1e-5)
    opt(x).square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        assert torch.allclose(found[name], p.grad, rtol=1e-4, atol=1e-4), name


def with_capacities(m: nn.Module, x: Tensor) -> Tensor:
    """Every expert has a capacity of its own."""
    w, idx = torch.softmax(F.linear(x, m.router), -1).topk(2)
    rank = (F.one_hot(idx.flatten(), E).cumsum(0) - 1).gather(1, idx.flatten()[:, None]).view_as(idx)
    w = torch.where(rank < idx + 2, w, torch.zeros_like(w)) * 1.0
    rows = torch.stack([F.linear(torch.relu(F.linear(x, m.up[e])), m.down[e]) for e in range(E)], 1)
    return (rows.gather(1, idx[..., None].expand(-1, -1, H)) * w[..., None]).sum(1)


def test_weights_of_dropped_choices_are_zero() -> None:
    """Capacities that are no rule are no matter where the weights carry them."""
    raised(rewrite(RaiseIdioms(), subject(Made(with_capacities, **weights(gated=False)), rand(14, H))))


def drops_late(m: nn.Module, x: Tensor) -> Tensor:
    """The rows of expert e that are kept are its first e + 2, by a slice."""
    w, idx = torch.softmax(F.linear(x, m.router), -1).topk(2)
    y = torch.zeros_like(x)
    for e in range(E):
        token, nth = torch.where(idx == e)
        token, nth = token[: e + 2], nth[: e + 2]
        rows = F.linear(torch.relu(F.linear(x[token], m.up[e])), m.down[e])
        y = y.index_add(0, token, rows * w[token, nth, None])
    return y


def noisy(m: nn.Module, x: Tensor) -> Tensor:
    """Dropout in the experts."""
    w, idx = torch.softmax(F.linear(x, m.router), -1).topk(2)
    gates = torch.zeros(len(x), E).scatter(1, idx, w)
    rows = [F.linear(F.dropout(torch.relu(F.linear(x, m.up[e])), 0.5), m.down[e]) for e in range(E)]
    return (torch.stack(rows, 1) * gates[..., None]).sum(1)


def peeked(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """One expert's inner activation is an output."""
    w, idx = torch.softmax(F.linear(x, m.router), -1).topk(2)
    gates = torch.zeros(len(x), E).scatter(1, idx, w)
    inner = [torch.relu(F.linear(x, m.up[e])) for e in range(E)]
    return (torch.stack([F.linear(h, m.down[e]) for e, h in enumerate(inner)], 1) * gates[..., None]).sum(1), inner[2]


def partial(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the first two experts is an output."""
    w, idx = torch.softmax(F.linear(x, m.router), -1).topk(2)
    y, first = torch.zeros_like(x), x
    for e in range(E):
        gate = (w * (idx == e)).sum(-1, keepdim=True)
        y = y + gate * F.linear(torch.relu(F.linear(x, m.up[e])), m.down[e])
        first = y if e == 1 else first
    return y, first


@pytest.mark.parametrize("fn", [drops_late, noisy, peeked, partial])
def test_left_alone(fn: Callable[..., Any]) -> None:
    done = rewrite(RaiseIdioms(), subject(Made(fn, **weights(gated=False)), rand(40, H)))
    assert not done.changed
    assert len(done.reasons) == 1


def test_draws_around_the_experts_stay() -> None:
    def dropped(m: nn.Module, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.3)
        w, idx = torch.softmax(F.linear(x, m.router) + torch.rand(len(x), E), -1).topk(2)
        z = torch.stack([F.linear(torch.relu(F.linear(x, m.up[e])), m.down[e]) for e in range(E)], 1)
        y = (z.gather(1, idx[..., None].expand(-1, -1, H)) * w[..., None]).sum(1)
        return x + F.dropout(y, 0.3)

    done = rewrite(RaiseIdioms(), subject(Made(dropped, **weights(gated=False)), rand(14, H)))
    raised(done)
    assert count(done.graph, "dropout") == 2


def test_a_sum_that_is_written_to_afterwards() -> None:
    def more(m: nn.Module, x: Tensor) -> Tensor:
        w, idx = torch.softmax(F.linear(x, m.router), -1).topk(2)
        y = torch.zeros(2, 7, H)
        flat = y.view(-1, H)
        for e in range(E):
            token, nth = torch.where(idx == e)
            flat.index_add_(
                0, token, F.linear(torch.relu(F.linear(x[token], m.up[e])), m.down[e]) * w[token, nth, None]
            )
        y += torch.tanh(x).view(2, 7, H)
        return y * 2

    raised(rewrite(RaiseIdioms(), subject(Made(more, **weights(gated=False)), rand(14, H))))


@pytest.mark.parametrize("name", CASES)
def test_lookalikes(name: str) -> None:
    """On the inputs for which it differs from an ordinary layer, if there are such, whatever is done must be right.

    A state is no obstacle here: its update is in the graph, and stays.
    """
    look = CASES[name]
    model, args = look.model().train(), look.args()
    if look.trigger is not None:
        model, args = model.to(look.trigger.dtype).train(look.trigger.training), (look.trigger.inputs(),)
        args = (args[0].to(look.trigger.dtype),)
    try:
        captured = capture(model, args, {})
    except CaptureError:
        pytest.skip("cannot be captured")
    done = rewrite(RaiseIdioms(), as_subject(captured))  # compares outputs and gradients
    assert look.in_form or look.trigger or "state" in look.differs or not done.changed


def test_graphs_without_candidates_cost_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """No colours are refined where no router is, or no parameters that are not in the dialect."""
    monkeypatch.setattr(refine, "refined", None)

    def mlp(m: nn.Module, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, m.up[0])), m.up[1].t())

    def done_before(m: nn.Module, x: Tensor) -> Tensor:
        w, idx = torch.softmax(F.linear(x, m.router), -1).topk(2)
        return torch.ops.moefx.experts(x, idx, w, [m.up, m.down], "silu | nk")

    for fn in (mlp, done_before):
        done = rewrite(RaiseIdioms(), subject(Made(fn, **weights()), rand(9, H)))
        assert not done.changed
        assert not done.reasons


def test_order_by_the_integer_in_which_experts_differ() -> None:
    s = subject(Inlined(order=(3, 1, 0, 5, 4, 2)), rand(20, 8))
    (site,) = refine.sites(s.graph)
    gates = site.banks[0].matrices[0].names
    first = {name.split("_parameters_")[1].strip("_") for name in gates}
    assert first == {"alphay0", "qw0", "barz0", "alphau0", "qv0", "barx0"}
    assert "alphau0" in gates[5]  # the fourth in the loop takes the rows of expert 5
