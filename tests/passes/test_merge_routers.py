"""The second softmax and top-k of an auxiliary loss are merged with the router's, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moefx.passes import MergeRouters
from tests.family import zoo
from tests.passes.conftest import build
from tests.passes.subject import (
    E,
    H,
    K,
    Made,
    Rewritten,
    Subject,
    T,
    count,
    model_graph,
    nodes,
    rand,
    rewrite,
    symbolic,
)

Tensor = torch.Tensor
Second = Callable[[Tensor, Tensor], Any]


def merge(second: Second, first: Second | None = None, dtype: torch.dtype = torch.float32) -> Rewritten:
    """Run the pass on a router followed by `second(logits, router's probabilities)`."""

    def fn(m: Any, x: Tensor) -> Any:
        logits = F.linear(x, m.router)
        p = F.softmax(logits, -1) if first is None else first(logits, logits)
        w, idx = torch.topk(p, K, dim=-1)
        return w * 2, idx, second(logits, p)

    return rewrite(MergeRouters(), model_graph(Made(fn, router=rand(E, H, dtype=dtype)), rand(T, H, dtype=dtype)))


def loss(p: Tensor, idx: Tensor) -> Tensor:
    """Something that reads both, differentiable in p."""
    return (p * torch.zeros_like(p).scatter(1, idx, 1.0)).sum(0).square()


def aux(p: Tensor) -> Tensor:
    """A top-k of its own, as the auxiliary loss has it."""
    return loss(p, torch.topk(p, K, dim=-1)[1])


def test_both_are_merged() -> None:
    done = merge(lambda logits, p: aux(F.softmax(logits, dim=-1)))
    assert (count(done.graph, "softmax"), count(done.graph, "topk")) == (1, 1)
    assert done.row.matched == 2
    assert done.reasons == []
    (softmax,) = nodes(done.graph, "softmax")
    assert {n.op for n in softmax.users} == {"call_function"}
    assert done.new() == []


@pytest.mark.parametrize(
    "second",
    [
        lambda logits, p: logits.softmax(-1),
        lambda logits, p: logits.softmax(dim=1),
        lambda logits, p: torch.softmax(logits, 1),
        lambda logits, p: F.softmax(input=logits, dim=-1, dtype=torch.float32),
        lambda logits, p: F.softmax(logits.float(), -1),
        lambda logits, p: F.softmax(logits.to("cpu").contiguous(), -1),
        lambda logits, p: torch.softmax(logits.to(torch.float32), dim=-1, dtype=torch.float32),
    ],
)
def test_spellings_and_casts_that_change_nothing(second: Second) -> None:
    done = merge(lambda logits, p: aux(second(logits, p)))
    assert (count(done.graph, "softmax"), count(done.graph, "topk")) == (1, 1)


@pytest.mark.parametrize(
    "second",
    [
        lambda p: torch.topk(p, K),
        lambda p: torch.topk(input=p, k=K, dim=-1, largest=True, sorted=True),
        lambda p: p.topk(K),
        lambda p: p.topk(k=K, dim=-1),
    ],
)
def test_spellings_of_topk(second: Callable[[Tensor], Any]) -> None:
    done = merge(lambda logits, p: loss(p, second(p)[1]))
    assert count(done.graph, "topk") == 1


def test_values_and_indices_with_several_users_in_three_copies() -> None:
    def second(logits: Tensor, p: Tensor) -> Any:
        q, r = F.softmax(logits, -1), F.softmax(logits, -1)
        v, i = torch.topk(q, K)
        u, j = torch.topk(r, K)
        return v.sum(1) + u[:, 0], i + j, (q * r).sum(), i * 2, v.exp()

    done = merge(second)
    assert (count(done.graph, "softmax"), count(done.graph, "topk")) == (1, 1)
    assert done.row.matched == 4


def test_values_that_only_the_second_reads() -> None:
    def fn(m: Any, x: Tensor) -> Any:
        p = F.softmax(F.linear(x, m.router), -1)
        idx = torch.topk(p, K)[1]
        v, j = torch.topk(p, K)
        return idx, v * 3, j + 1

    done = rewrite(MergeRouters(), model_graph(Made(fn, router=rand(E, H)), rand(T, H)))
    assert count(done.graph, "topk") == 1


def test_weights_normalised_in_place_keep_their_indices_shared() -> None:
    """The router of Qwen2-MoE writes into its top-k values; the loss reads indices alone."""

    def first(m: Any, x: Tensor) -> Any:
        logits = F.linear(x, m.router)
        w, idx = torch.topk(F.softmax(logits, -1), K)
        w /= w.sum(-1, keepdim=True)
        return w * 1, idx, aux(F.softmax(logits, -1))

    done = rewrite(MergeRouters(), model_graph(Made(first, router=rand(E, H)), rand(T, H)))
    assert (count(done.graph, "softmax"), count(done.graph, "topk")) == (1, 1)


def halve(t: Tensor) -> None:
    """Write in place by an operator."""
    t *= 0.5


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.mul_(0.5),
        lambda p: p.view(-1).mul_(0.5),
        lambda p: p[1:].zero_(),
        lambda p: p.t()[0].add_(1.0),
        lambda p: p.unsqueeze(0).squeeze(0).chunk(2, -1)[0].mul_(0.5),
        lambda p: F.relu(p.to(torch.float32), inplace=True).mul_(0.5),
        lambda p: F.dropout(p, 0.5, True, True),
        halve,
    ],
)
def test_softmax_written_in_place_is_left_alone(write: Callable[[Tensor], Any]) -> None:
    def fn(m: Any, x: Tensor) -> Any:
        logits = F.linear(x, m.router)
        p = torch.softmax(logits, -1)
        with torch.no_grad():
            write(p)
        return p * 1, aux(F.softmax(logits, -1))

    done = rewrite(MergeRouters(), model_graph(Made(fn, grad=False, router=rand(E, H)), rand(T, H)))
    assert count(done.graph, "softmax") == 2
    assert "written in place" in done.reasons[0]


def test_logits_written_in_between_are_left_alone() -> None:
    def second(logits: Tensor, p: Tensor) -> Any:
        logits.detach().view(-1)[::3] += 1.0
        return F.softmax(logits, -1)

    def fn(m: Any, x: Tensor) -> Any:
        logits = F.linear(x, m.router)
        return F.softmax(logits, -1), second(logits, logits)

    done = rewrite(MergeRouters(), model_graph(Made(fn, grad=False, router=rand(E, H)), rand(T, H)))
    assert count(done.graph, "softmax") == 2
    assert "written in place" in done.reasons[0]


def test_logits_written_before_both_do_not_matter() -> None:
    def fn(m: Any, x: Tensor) -> Any:
        logits = F.linear(x, m.router)
        logits += 1.0
        return F.softmax(logits, -1), F.softmax(logits, -1) * 2

    done = rewrite(MergeRouters(), model_graph(Made(fn, grad=False, router=rand(E, H)), rand(T, H)))
    assert count(done.graph, "softmax") == 1


def test_iterated_topk_is_left_alone() -> None:
    """Top-1, mask it out in place, top-1 again: the same call on the same node, but not the same value."""

    def fn(m: Any, x: Tensor) -> Any:
        p = F.softmax(F.linear(x, m.router), -1)
        i = torch.topk(p, 1)[1]
        p.scatter_(1, i, -1.0)
        return i, torch.topk(p, 1)[1]

    done = rewrite(MergeRouters(), model_graph(Made(fn, grad=False, router=rand(E, H)), rand(T, H)))
    assert count(done.graph, "topk") == 2
    assert "written in place" in done.reasons[0]


@pytest.mark.parametrize("mine", [True, False])
def test_topk_values_written_in_place_are_left_alone(mine: bool) -> None:
    def fn(m: Any, x: Tensor) -> Any:
        p = F.softmax(F.linear(x, m.router), -1)
        v, i = torch.topk(p, K)
        u, j = torch.topk(p, K)
        (u if mine else v).mul_(2.0)
        return v * 1, i, u * 1, j

    done = rewrite(MergeRouters(), model_graph(Made(fn, grad=False, router=rand(E, H)), rand(T, H)))
    assert count(done.graph, "topk") == 2
    assert "written in place" in done.reasons[0]


@pytest.mark.parametrize(
    "second",
    [
        lambda logits, p: aux(F.softmax(logits, 0)),
        lambda logits, p: aux(F.softmax(logits * 1.0, -1)),
        lambda logits, p: aux(F.log_softmax(logits, -1)),
        lambda logits, p: aux(F.softmax(logits.detach(), -1) + logits * 0),
        lambda logits, p: aux(F.softmax(logits.t().contiguous().t(), -1)),
        lambda logits, p: aux(F.softmax(logits.double(), -1).float()),
    ],
)
def test_other_softmaxes_are_left_alone(second: Second) -> None:
    done = merge(second)
    assert not done.changed


@pytest.mark.parametrize(
    "second",
    [
        lambda p: torch.topk(p, K + 1)[1],
        lambda p: torch.topk(p, K, largest=False)[1],
        lambda p: torch.topk(p, K, dim=0)[1],
        lambda p: torch.topk(p, K, sorted=False)[1],
        lambda p: torch.topk(p * 1.0, K)[1],
    ],
)
def test_other_topks_are_left_alone(second: Callable[[Tensor], Tensor]) -> None:
    assert not merge(lambda logits, p: second(p) + 0).changed


def test_another_dtype_is_rejected_with_both_named() -> None:
    def second(logits: Tensor, p: Tensor) -> Tensor:
        return aux(F.softmax(logits, -1))

    done = merge(second, lambda logits, _: F.softmax(logits, -1, dtype=torch.float32), torch.bfloat16)
    assert not done.changed
    assert done.reasons == ["computed in torch.bfloat16, the router's in torch.float32: the values differ"]


def test_under_no_grad_is_another_value_to_autograd() -> None:
    """Merged with the first, which has no gradient, the second would have none either."""

    def fn(m: Any, x: Tensor) -> Any:
        logits = F.linear(x, m.router)
        with torch.no_grad():
            idx = torch.topk(F.softmax(logits, -1), K)[1]
        return idx, aux(F.softmax(logits, -1))

    done = rewrite(MergeRouters(), model_graph(Made(fn, router=rand(E, H)), rand(T, H)))
    assert count(done.graph, "softmax") == 2
    assert count(done.graph, "topk") == 2


def test_two_layers_are_not_mixed_up() -> None:
    def fn(m: Any, x: Tensor) -> Any:
        a, b = F.linear(x, m.router), F.linear(x, m.other)
        one, two = F.softmax(a, -1), F.softmax(b, -1)
        return aux(one) + aux(two), aux(F.softmax(a, -1)), aux(F.softmax(b, -1))

    done = rewrite(MergeRouters(), model_graph(Made(fn, router=rand(E, H), other=rand(E, H, seed=5)), rand(T, H)))
    assert (count(done.graph, "softmax"), count(done.graph, "topk")) == (2, 2)


def test_symbolic_sizes() -> None:
    def fn(m: Any, x: Tensor) -> Any:
        logits = F.linear(x, m.router)
        w, _ = torch.topk(F.softmax(logits, -1), K)
        return w, aux(F.softmax(logits, -1))

    done = rewrite(MergeRouters(), model_graph(Made(fn, router=rand(E, H)), rand(T, H), dynamic={"x": (0,)}))
    assert count(done.graph, "softmax") == 1
    assert symbolic(done.graph, "softmax")


def test_real_model(qwen: Subject) -> None:
    """Two layers, each with a softmax and a top-k in the loss."""
    before = count(qwen.graph, "softmax"), count(qwen.graph, "topk")
    done = rewrite(MergeRouters(), qwen)
    assert before == (4, 4)
    assert (count(done.graph, "softmax"), count(done.graph, "topk")) == (2, 2)
    assert done.row.matched == 4
    assert done.reasons == []


def test_real_model_in_bf16() -> None:
    """The router works in fp32, the loss in bf16: the reason is reported once per layer."""
    pytest.importorskip("transformers")
    assert zoo.get("qwen3_moe").router_logits
    done = rewrite(MergeRouters(), build("qwen3_moe", dtype=torch.bfloat16, num_hidden_layers=2, mlp_only_layers=[]))
    assert not done.changed
    assert len(done.row.rejected) == 2
    assert all("bfloat16" in why and "float32" in why for why in done.reasons)


def test_real_model_without_a_second_softmax(gpt_oss: Subject) -> None:
    """gpt-oss takes its top-k of the logits: there is nothing to merge in its router."""
    assert rewrite(MergeRouters(), gpt_oss).row.matched == 0
