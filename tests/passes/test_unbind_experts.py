"""One unbind in the place of E indices: exact, and no zeros as large as all experts in the backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import moefx
from moefx.capture import capture
from moefx.graph.edit import value
from moefx.passes import UnbindExperts, get_pass
from tests.passes.subject import E, H, I, Made, Subject, as_subject, count, rand, rewrite, trained, weights


def dense(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Every expert on every token, one after the other."""
    gates = torch.softmax(F.linear(x, m.router), -1)
    y = torch.zeros_like(x)
    for e in range(E):
        gate, up = F.linear(x, m.up[e]).chunk(2, -1)
        y = y + gates[:, e, None] * F.linear(F.silu(gate) * up, m.down.select(0, e))
    return y


def model(**options: bool) -> Made:
    return Made(dense, **weights(**options))


def subject(module: nn.Module, *args: torch.Tensor) -> Subject:
    return as_subject(capture(module, args, {}))


def full_size(graph: torch.fx.Graph) -> int:
    """Backward nodes that make or add up a tensor of the size of all experts out of one expert's part."""
    sizes = {(E, 2 * I, H), (E, H, I)}
    found = [n for n in graph.nodes if "select_backward" in str(n.target)]
    return sum(tuple(value(n).shape) in sizes for n in found)


def test_gradients_are_bitwise_equal() -> None:
    done = rewrite(UnbindExperts(), subject(model(), rand(7, H)))  # compares bitwise
    assert done.row.matched == 2
    assert count(done.graph, "unbind") == 2
    assert count(done.graph, "select") == 0


def test_no_full_size_zeros_per_expert() -> None:
    found = {}
    for passes in ((), (UnbindExperts(),)):
        module = model()
        found[len(passes)] = full_size(trained(module, capture(module, (rand(7, H),), {}), passes).graph)
    assert found == {0: 2 * E, 1: 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_by_expert(dtype: torch.dtype) -> None:
    def rows(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        w, idx = torch.softmax(F.linear(x, m.router), -1).topk(2)
        y = torch.zeros_like(x)
        for e in range(E):
            token, nth = torch.where(idx == e)
            gate, up = F.linear(x[token], m.up[e], m.up_bias[e]).chunk(2, -1)
            y = y.index_add(0, token, F.linear(F.silu(gate) * up, m.down[-e]) * w[token, nth, None])
        return y

    module = Made(rows, **weights(bias=True)).to(dtype)
    done = rewrite(UnbindExperts(), subject(module, rand(9, H, dtype=dtype)))
    assert done.row.matched == 3


def test_alone_in_optimize() -> None:
    module, x = model(), rand(7, H)
    opt = moefx.optimize(module, (x,), passes=["unbind_experts"], codegen="eager")
    assert opt.report.to_dict()["passes"][0]["matched"] == 2
    assert torch.equal(opt(x), module(x))
    opt(x).sum().backward()
    found = {n: p.grad for n, p in module.named_parameters()}
    module.zero_grad()
    module(x).sum().backward()
    assert all(torch.allclose(found[n], p.grad, rtol=1e-6) for n, p in module.named_parameters())
    assert get_pass("unbind_experts") == UnbindExperts()


def test_some_experts_only() -> None:
    def some(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, m.up[0]) + F.linear(x, m.up[2])

    done = rewrite(UnbindExperts(), subject(Made(some, **weights()), rand(7, H)))
    assert not done.changed
    assert "2 of 4" in done.reasons[0]


def test_written_in_place() -> None:
    def written(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        w = m.up * 1.0
        first = F.linear(x, w[0])
        w[1].mul_(2.0)
        return first + sum(F.linear(x, w[e]) for e in range(E))

    done = rewrite(UnbindExperts(), subject(Made(written, **weights()), rand(7, H)))
    assert not done.changed
    assert "in place" in done.reasons[0]


def test_rows_by_tensor_and_slices_are_left_alone() -> None:
    def other(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return (m.up[torch.arange(E)] * 2)[:, :1].sum() + m.up[1:].sum() + x.sum()

    done = rewrite(UnbindExperts(), subject(Made(other, **weights()), rand(7, H)))
    assert not done.changed
    assert not done.reasons
