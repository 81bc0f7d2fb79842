"""Routers are raised for what they compute, written in any way, and come back bit for bit; others are left alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch.nn import functional as F

from moefx.dialect import RouteSpec
from moefx.graph.edit import find
from moefx.graph.effects import is_effect
from moefx.manager import Context, Pass
from moefx.passes import DeadCode, ExpandRouters, MergeRouters, RaiseRouters
from tests.passes.subject import H, I, Made, Rewritten, Subject, model_graph, nodes, rand, rewrite, run, same_results

Tensor = torch.Tensor
Router = Callable[[Any, Tensor], tuple[Any, ...]]
ops = torch.ops.moefx
E, K, T = 8, 2, 24
BF16, F32 = torch.bfloat16, torch.float32


def subject(router: Router, dtype: torch.dtype = F32, *, x: Tensor | None = None, **kwargs: Any) -> Subject:
    """A layer whose `router(module, logits)` gives weights, indices, and what else the layer returns."""
    dynamic = kwargs.pop("dynamic", None)
    grad = {k: t for k, t in kwargs.items() if isinstance(t, Tensor)}
    m: Any = Made(
        lambda m, x: _layer(router, m, x),
        gate=rand(E, H, seed=1, dtype=dtype),
        up=rand(E, 2 * I, H, seed=2, dtype=dtype),
        down=rand(E, H, I, seed=3, dtype=dtype),
        **grad,
    )
    m.register_buffer("bias", rand(E, seed=4) / 4)
    return model_graph(m, rand(T, H, dtype=dtype) if x is None else x, dynamic=dynamic)


def _layer(router: Router, m: Any, x: Tensor) -> Any:
    w, idx, *rest = router(m, F.linear(x, m.gate))
    flat = x.view(-1, H)
    return ops.experts(flat, idx.view(-1, K), w.view(-1, K), [m.up, m.down], "silu | nk"), *rest


def raised(router: Router, dtype: torch.dtype = F32, **kwargs: Any) -> tuple[str, Rewritten]:
    """The spec, after checks that the expanded router gives the numbers of the original, and leaves nothing behind."""
    s = subject(router, dtype, **kwargs)
    done = rewrite(RaiseRouters(), s)
    assert done.reasons == []
    (node,) = nodes(done.graph, "route")
    expanded = rewrite(ExpandRouters(), done.subject)
    assert nodes(expanded.graph, "route") == []
    same_results(run(s), run(expanded.subject), "exact")
    assert not rewrite(RaiseRouters(), done.subject).changed
    spec = str(node.args[3])
    assert str(RouteSpec.parse(spec)) == spec
    return spec, done


def refused(router: Router, dtype: torch.dtype = F32, **kwargs: Any) -> str:
    """The reason why a router is left alone."""
    done = rewrite(RaiseRouters(), subject(router, dtype, **kwargs))
    assert not done.changed
    (why,) = done.reasons
    assert why.startswith("router left as it is: ")
    return why.removeprefix("router left as it is: ")


# -- routers as people write them ------------------------------------------------------------------------------------


def mixtral(m: Any, logits: Tensor) -> tuple[Any, ...]:
    p = F.softmax(logits.float(), dim=-1)
    w, idx = torch.topk(p, K, dim=-1)
    w /= w.sum(dim=-1, keepdim=True)
    return w.to(logits.dtype), idx


def qwen(m: Any, logits: Tensor) -> tuple[Any, ...]:
    w, idx = logits.softmax(-1).topk(K)
    return w, idx


def gpt_oss(m: Any, logits: Tensor) -> tuple[Any, ...]:
    top, idx = torch.topk(logits, K, dim=-1)
    return F.softmax(top, dim=1, dtype=top.dtype), idx


def sigmoid_of_top_logits(m: Any, logits: Tensor) -> tuple[Any, ...]:
    top, idx = torch.topk(logits, K, dim=-1)
    return top.sigmoid(), idx


def softmax_at_top_logits(m: Any, logits: Tensor) -> tuple[Any, ...]:
    idx = logits.topk(K, sorted=False).indices
    return torch.gather(logits.softmax(-1), 1, idx), idx


def biased(m: Any, logits: Tensor) -> tuple[Any, ...]:
    s = logits.sigmoid()
    idx = torch.topk(s + m.bias, K)[1]
    w = torch.take_along_dim(s, idx, -1)
    return w / (w.sum(-1, keepdim=True) + 1e-6) * 2.5, idx


def frozen(m: Any, logits: Tensor) -> tuple[Any, ...]:
    p = F.softmax(logits, -1, dtype=torch.float32)
    with torch.no_grad():
        idx = (p + m.correction.squeeze()).topk(K).indices
    w = p.gather(-1, idx)
    return w.div_(w.sum(-1, keepdim=True).clamp(min=1e-3)).type_as(logits), idx


def grouped(m: Any, choice: Tensor, fill: float, top2: bool, keep: int = 2) -> Tensor:
    g = choice.view(-1, 4, E // 4)
    best = g.topk(2, dim=-1)[0].sum(-1) if top2 else g.max(-1).values
    mask = torch.zeros_like(best)
    mask.scatter_(1, torch.topk(best, keep, sorted=False)[1], 1)
    return choice.masked_fill(~mask.unsqueeze(-1).expand_as(g).reshape(-1, E).bool(), fill)


def deepseek_v2(m: Any, logits: Tensor) -> tuple[Any, ...]:
    w, idx = torch.topk(grouped(m, logits.softmax(-1), 0.0, False), k=K, sorted=False)
    return w * 16.0, idx


def deepseek_v3(m: Any, logits: Tensor) -> tuple[Any, ...]:
    s = logits.float().sigmoid()
    idx = torch.topk(grouped(m, s + m.bias, float("-inf"), True), k=K, sorted=False)[1]
    w = s.gather(1, idx)
    w /= w.sum(-1, keepdim=True) + 1e-20
    return w * 2.5, idx


def deepseek_v3_remote(m: Any, logits: Tensor) -> tuple[Any, ...]:
    s = logits.sigmoid()
    choice = s + m.bias.unsqueeze(0)
    best = choice.view(-1, 4, 2).topk(2, dim=-1)[0].sum(dim=-1)
    mask = torch.zeros_like(best).scatter(1, best.topk(1)[1], 1.0).repeat_interleave(2, -1)
    idx = torch.topk(choice.masked_fill(mask == 0, 0.0), K)[1]
    return s.gather(1, idx), idx


def gathered_in_groups(m: Any, logits: Tensor) -> tuple[Any, ...]:
    s = logits.softmax(-1)
    idx = torch.topk(grouped(m, s, 0.0, False, keep=1), K)[1]
    return s.gather(1, idx), idx


def gemma(m: Any, logits: Tensor) -> tuple[Any, ...]:
    w, idx = torch.softmax(logits, -1).topk(K)
    w = w / w.sum(-1, keepdim=True)
    return w * m.scale[idx], idx


def sqrt_softplus(m: Any, logits: Tensor) -> tuple[Any, ...]:
    s = F.softplus(logits).sqrt()
    idx = (s + m.bias).topk(K)[1]
    w = s.gather(-1, idx)
    return w / w.sum(-1, keepdim=True), idx


def noisy(m: Any, logits: Tensor) -> tuple[Any, ...]:
    return mixtral(m, logits + torch.randn_like(logits) * 0.1)


def capped(m: Any, logits: Tensor) -> tuple[Any, ...]:
    return qwen(m, 30.0 * torch.tanh(logits / 30.0))


ORDINARY: dict[str, tuple[Router, torch.dtype, str]] = {
    "mixtral": (mixtral, F32, "softmax f32 | top2 | sum"),
    "mixtral in bf16": (mixtral, BF16, "softmax f32 | top2 | sum | to bf16"),
    "qwen": (qwen, F32, "softmax f32 | top2"),
    "qwen in bf16": (qwen, BF16, "softmax bf16 | top2"),
    "gpt_oss": (gpt_oss, F32, "identity f32 | top2 | softmax"),
    "gpt_oss in bf16": (gpt_oss, BF16, "identity bf16 | top2 | softmax"),
    "sigmoid of top logits": (sigmoid_of_top_logits, F32, "sigmoid f32 | top2 of logits"),
    "softmax at top logits": (softmax_at_top_logits, F32, "softmax f32 | top2 of logits unsorted"),
    "biased": (biased, F32, "sigmoid f32 | bias | top2 | sum + 1e-06 | x 2.5"),
    "biased in bf16": (biased, BF16, "sigmoid bf16 | bias | top2 | sum + 1e-06 | x 2.5"),
    "frozen": (frozen, BF16, "softmax f32 | bias | top2 | sum >= 0.001 | to bf16"),
    "deepseek_v2": (deepseek_v2, F32, "softmax f32 | groups 4 keep 2 by max fill 0 masked | top2 unsorted | x 16.0"),
    "deepseek_v3": (
        deepseek_v3,
        BF16,
        "sigmoid f32 | bias | groups 4 keep 2 by top2sum fill -inf | top2 unsorted | sum + 1e-20 | x 2.5",
    ),
    "deepseek_v3 remote": (
        deepseek_v3_remote,
        F32,
        "sigmoid f32 | bias | groups 4 keep 1 by top2sum fill 0 | top2",
    ),
    "gathered in groups": (gathered_in_groups, F32, "softmax f32 | groups 4 keep 1 by max fill 0 | top2"),
    "gemma": (gemma, F32, "softmax f32 | top2 | sum | per-expert"),
    "sqrt softplus": (sqrt_softplus, F32, "sqrtsoftplus f32 | bias | top2 | sum"),
    "noisy": (noisy, F32, "noise | softmax f32 | top2 | sum"),
    "capped": (capped, F32, "softmax f32 | top2"),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_routers(name: str) -> None:
    router, dtype, want = ORDINARY[name]
    spec, done = raised(router, dtype, scale=1 + rand(E) / 8, correction=rand(1, E) / 16)
    assert spec == want
    assert done.row.matched == 1
    kept = [n for n in done.new() if is_effect(n)]
    assert kept == []


def test_in_place_spellings_leave_nothing_behind() -> None:
    """What wrote in place is gone with the values it wrote into; dead code would have had to keep it."""
    spec, done = raised(deepseek_v3)
    names = {n.name for n in done.before.nodes} - {n.name for n in done.graph.nodes}
    assert {"scatter_", "w_1"} & names
    assert not rewrite(DeadCode(), done.subject).changed
    assert "bias" in spec


def test_the_marker_reads_the_op_alone() -> None:
    _, done = raised(mixtral)
    (experts,) = nodes(done.graph, "experts")
    (route,) = nodes(done.graph, "route")
    assert [n.target.__name__ for n in route.users] == ["getitem", "getitem"]
    assert set(route.users) <= {a for n in experts.all_input_nodes for a in (n, *n.all_input_nodes)}
    (product,) = [n for n in nodes(done.graph, "linear") if n.name in str(route.args[0])]
    assert route.args[:3] == (product, None, None)


# -- readers, shapes, modes -----------------------------------------------------------------------------------------


def test_a_loss_on_the_full_scores_reads_them_from_the_op() -> None:
    def router(m: Any, logits: Tensor) -> tuple[Any, ...]:
        p = logits.softmax(-1)
        w, idx = p.topk(K)
        return w, idx, (p.mean(0) * E).square().sum(), logits.logsumexp(-1).square().mean()

    spec, done = raised(router)
    assert spec == "softmax f32 | top2"
    (route,) = nodes(done.graph, "route")
    assert sorted(n.args[1] for n in route.users) == [0, 1, 2]
    assert nodes(done.graph, "softmax") == []
    assert {n.name for n in nodes(done.graph, "logsumexp")} <= {n.name for n in route.args[0].users}  # type: ignore[union-attr]


def test_the_aux_loss_of_transformers_is_merged_as_before() -> None:
    def router(m: Any, logits: Tensor) -> tuple[Any, ...]:
        w, idx = F.softmax(logits, dtype=torch.float, dim=-1).topk(K, dim=-1)
        second = F.softmax(logits.to("cpu"), dim=-1)
        return w, idx, second.mean(0), torch.topk(second, K, dim=-1)[1]

    _, done = raised(router)
    expanded = rewrite(ExpandRouters(), done.subject)
    merged = rewrite(MergeRouters(), expanded.subject)
    assert len(nodes(merged.graph, "softmax")) == len(nodes(merged.graph, "topk")) == 1


def test_weights_and_indices_with_other_readers() -> None:
    def router(m: Any, logits: Tensor) -> tuple[Any, ...]:
        w, idx = mixtral(m, logits)
        return w, idx, w.sum(0), F.one_hot(idx, E).sum(0)

    assert raised(router)[0] == "softmax f32 | top2 | sum"


def test_batches_of_sequences() -> None:
    spec, done = raised(qwen, x=rand(2, 12, H))
    assert spec == "softmax f32 | top2"
    (route,) = nodes(done.graph, "route")
    assert [tuple(v.shape) for v in route.meta["val"]] == [(2, 12, E), (2, 12, K), (2, 12, K)]


@pytest.mark.parametrize("rows", [1, 3])
def test_few_tokens(rows: int) -> None:
    want = "sigmoid f32 | bias | groups 4 keep 2 by top2sum fill -inf | top2 unsorted | sum + 1e-20 | x 2.5"
    assert raised(deepseek_v3, x=rand(rows, H))[0] == want


@pytest.mark.parametrize("router", [mixtral, deepseek_v3, gemma])
def test_symbolic_sizes(router: Router) -> None:
    raised(router, scale=1 + rand(E) / 8, dynamic={"x": (0,)})


def test_two_layers_share_a_spec_and_not_their_bias() -> None:
    def router(m: Any, logits: Tensor) -> tuple[Any, ...]:
        w, idx, x = *biased(m, logits), logits @ m.gate
        y = ops.experts(x, idx, w, [m.up, m.down], "silu | nk")
        s = F.linear(y, m.gate).sigmoid()
        jdx = torch.topk(s + m.other, K)[1]
        v = s.gather(-1, jdx)
        return v / (v.sum(-1, keepdim=True) + 1e-6) * 2.5, jdx

    s = subject(router, other=rand(E, seed=9))
    done = rewrite(RaiseRouters(), s)
    a, b = nodes(done.graph, "route")
    assert a.args[3] == b.args[3]
    assert a.args[1] is not b.args[1]
    same_results(run(s), run(rewrite(ExpandRouters(), done.subject).subject), "exact")


def test_global_random_state_is_left_alone() -> None:
    s = subject(mixtral)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    rewrite(RaiseRouters(), s)
    assert torch.equal(torch.get_rng_state(), before)


@dataclass(frozen=True)
class Renormalise(Pass):
    """A user's pass between the two: all weights are divided by their sum."""

    requires: ClassVar[set[str]] = {"routers_raised"}
    numerics: ClassVar[str] = "changes"

    def run(self, graph: torch.fx.Graph, ctx: Context) -> None:
        for node in find(graph, ops.route):
            spec = replace(RouteSpec.parse(str(node.args[3])), norm="sum")
            if str(spec) != node.args[3]:
                node.args = (*node.args[:3], str(spec))
                ctx.matched(node)


def test_a_pass_between_the_two_changes_every_router_alike() -> None:
    def written_so(m: Any, logits: Tensor) -> tuple[Any, ...]:
        w, idx = qwen(m, logits)
        return w / w.sum(-1, keepdim=True), idx

    done = rewrite(Renormalise(), raised(qwen)[1].subject, numerics="changes")
    assert done.row.matched == 1
    expanded = rewrite(ExpandRouters(), done.subject)
    same_results(run(subject(written_so)), run(expanded.subject), "exact")


# -- negative controls ----------------------------------------------------------------------------------------------


def halved(m: Any, logits: Tensor) -> tuple[Any, ...]:
    w, idx = qwen(m, logits)
    return w * (w > 0.05), idx


def biased_weights(m: Any, logits: Tensor) -> tuple[Any, ...]:
    return torch.topk(logits.sigmoid() + m.bias, K)


def by_sort(m: Any, logits: Tensor) -> tuple[Any, ...]:
    w, idx = torch.sort(logits.softmax(-1), descending=True, stable=True)
    return w[:, :K], idx[:, :K]


def second_is_random(m: Any, logits: Tensor) -> tuple[Any, ...]:
    p = logits.softmax(-1)
    idx = torch.topk(p + torch.rand_like(p), K)[1]
    return p.gather(1, idx), idx


def clamped_far_out(m: Any, logits: Tensor) -> tuple[Any, ...]:
    top, idx = logits.topk(K)
    return top.clamp(max=1000.0).softmax(-1), idx


def detached(m: Any, logits: Tensor) -> tuple[Any, ...]:
    w, idx = qwen(m, logits)
    return w / w.detach().sum(-1, keepdim=True), idx


def by_reciprocal(m: Any, logits: Tensor) -> tuple[Any, ...]:
    w, idx = qwen(m, logits)
    return w * w.sum(-1, keepdim=True).reciprocal(), idx


def per_token(m: Any, logits: Tensor) -> tuple[Any, ...]:
    w, idx = qwen(m, logits)
    return w * m.token, idx


def learned_bias(m: Any, logits: Tensor) -> tuple[Any, ...]:
    s = logits.sigmoid() + m.scale
    w, idx = s.topk(K)
    return w, idx


def by_table(m: Any, logits: Tensor) -> tuple[Any, ...]:
    idx = m.table.long()
    return logits.sigmoid().gather(1, idx), idx


def third(m: Any, logits: Tensor) -> tuple[Any, ...]:
    w, idx = logits.softmax(-1).topk(K + 1)
    return w[:, 1:], idx[:, 1:]


def temperature(m: Any, logits: Tensor) -> tuple[Any, ...]:
    top, idx = logits.topk(K)
    return (top / 2).softmax(-1), idx


def cast_too_early(m: Any, logits: Tensor) -> tuple[Any, ...]:
    w, idx = F.softmax(logits.float(), -1).topk(K)
    w = w.to(torch.bfloat16)
    return w / w.sum(-1, keepdim=True), idx


def with_capacity(m: Any, logits: Tensor) -> tuple[Any, ...]:
    w, idx = qwen(m, logits)
    place = F.one_hot(idx, E).view(-1, E).cumsum(0).gather(1, idx.view(-1, 1)).view(-1, K)
    return w * (place <= 2 * T * K // E), idx


def bias_updated_on_the_way(m: Any, logits: Tensor) -> tuple[Any, ...]:
    s = logits.sigmoid()
    with torch.no_grad():
        m.bias.add_(0.01)
    idx = (s + m.bias).topk(K)[1]
    return s.gather(1, idx), idx


def not_differentiable(m: Any, logits: Tensor) -> tuple[Any, ...]:
    p = logits.softmax(-1)
    idx = p.topk(K)[1]
    with torch.no_grad():
        w = p.clone().gather(1, idx)
    return w, idx


CONTROLS: dict[str, tuple[Router, torch.dtype, str]] = {
    "thresholded": (halved, F32, "the weights do not"),
    "bias in the weights": (biased_weights, F32, "the weights do not"),
    "ties broken otherwise": (by_sort, F32, "the choice is not that of the normal form; the nearest, top-2 of"),
    "random choice": (second_is_random, F32, "random numbers (rand_like) are drawn"),
    "clamp that ordinary logits do not reach": (clamped_far_out, F32, "the weights do not"),
    "detached normaliser": (detached, F32, "the gradient of w differs"),
    "another rounding": (by_reciprocal, F32, "the weights do not"),
    "weights per token": (per_token, F32, "depends on a tensor (24, 1) besides the logits"),
    "a bias that is learned": (learned_bias, F32, "the weights do not"),
    "a table": (by_table, F32, "does not descend from the logits"),
    "capacity": (with_capacity, F32, "the weights do not: they are off by"),
    "a bias written in between": (bias_updated_on_the_way, F32, "is written in place on the way to the experts"),
    "weights without a gradient": (not_differentiable, F32, "w has no gradient, unlike that of the normal form"),
    "not the best": (third, F32, "the choice is not"),
    "temperature on the chosen": (temperature, F32, "the weights do not"),
    "cast before the normaliser": (cast_too_early, BF16, "the weights do not"),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_routers_outside_the_normal_form_are_left_alone(name: str) -> None:
    router, dtype, want = CONTROLS[name]
    table = torch.randint(0, E, (T, K), generator=torch.Generator().manual_seed(0))
    why = refused(router, dtype, token=rand(T, 1), scale=rand(E) / 4, table=table.float())
    assert want in why


def test_an_inner_value_with_another_reader_is_named() -> None:
    def router(m: Any, logits: Tensor) -> tuple[Any, ...]:
        w, idx = qwen(m, logits)
        total = w.sum(-1, keepdim=True)
        return w / total, idx, total.mean()

    assert "sum between logits and weights is read elsewhere" in refused(router)


def test_weights_written_behind_the_experts() -> None:
    def fn(m: Any, x: Tensor) -> Any:
        w, idx = qwen(m, F.linear(x, m.gate))
        y = ops.experts(x, idx, w, [m.up, m.down], "silu | nk")
        w.mul_(2.0)
        return y, w

    s = model_graph(Made(fn, grad=False, gate=rand(E, H), up=rand(E, 2 * I, H), down=rand(E, H, I)), rand(T, H))
    done = rewrite(RaiseRouters(), s)
    assert not done.changed
    assert "writes into the router's values behind the experts" in done.reasons[0]


def test_all_under_no_grad() -> None:
    def router(m: Any, logits: Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            return mixtral(m, logits)

    s = subject(router)
    done = rewrite(RaiseRouters(), s)
    (route,) = nodes(done.graph, "route")
    assert route.args[3] == "softmax f32 | top2 | sum"
    same_results(run(s), run(rewrite(ExpandRouters(), done.subject).subject), "exact")


def test_no_experts_no_routers() -> None:
    s = model_graph(Made(lambda m, x: qwen(m, F.linear(x, m.gate)), gate=rand(E, H)), rand(T, H))
    done = rewrite(RaiseRouters(), s)
    assert not done.changed
    assert done.reasons == []
