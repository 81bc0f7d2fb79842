"""Routers become one op where there is a kernel for it, and the definition's nodes elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from moefx import compat
from moefx.dialect.route import RouteSpec
from moefx.dialect.topk_route import _topk_route
from moefx.graph.edit import set_value
from moefx.kernels import registry
from moefx.manager import Context
from moefx.passes import ExpandRouters, RaiseRouters
from moefx.report import PassRow
from tests.passes.subject import nodes, rand, rewrite, run, same_results
from tests.passes.test_raise_routers import (
    BF16,
    F32,
    biased,
    deepseek_v2,
    deepseek_v3,
    deepseek_v3_remote,
    gathered_in_groups,
    gemma,
    gpt_oss,
    mixtral,
    qwen,
    sigmoid_of_top_logits,
    sqrt_softplus,
    subject,
)

ops = torch.ops.moefx


@pytest.fixture
def _kernel_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = registry._TABLE["topk_route"]
    kernel = registry.Provider("kernel", _topk_route, lambda logits, *_: logits.device.type == "cpu")
    monkeypatch.setattr(entry, "providers", [kernel, *entry.providers])


@pytest.mark.usefixtures("_kernel_on_cpu")
@pytest.mark.parametrize(
    "router",
    [
        mixtral,
        biased,
        gpt_oss,
        sigmoid_of_top_logits,
        sqrt_softplus,
        deepseek_v2,
        deepseek_v3,
        deepseek_v3_remote,
        gathered_in_groups,
    ],
    ids=lambda f: f.__name__,
)
def test_one_op_where_there_is_a_kernel(router: Any) -> None:
    s = subject(router, F32)
    expanded = rewrite(ExpandRouters(), rewrite(RaiseRouters(), s).subject, "rounding")
    assert expanded.row.numerics == "rounding"
    assert len(nodes(expanded.graph, "topk_route")) == 1
    assert nodes(expanded.graph, "route") == []
    same_results(run(s), run(expanded.subject), "rounding")
    if router in (deepseek_v2, deepseek_v3, deepseek_v3_remote, gathered_in_groups):
        (op,) = nodes(expanded.graph, "topk_route")
        assert op.args[9] == 4
        for name in ("unflatten", "topk", "scatter", "masked_fill", "gather"):
            assert nodes(expanded.graph, name) == []
        op.args = (*op.args[:11], "top2sum" if op.args[11] == "max" else "max", *op.args[12:])  # other groups are kept
        expanded.graph.owning_module.recompile()
        with pytest.raises(AssertionError):
            same_results(run(s), run(expanded.subject), "rounding")


@pytest.mark.usefixtures("_kernel_on_cpu")
def test_a_scale_per_expert_stays_behind_the_op_with_its_gradient() -> None:
    s = subject(gemma, F32, scale=1 + rand(8) / 8)
    expanded = rewrite(ExpandRouters(), rewrite(RaiseRouters(), s).subject, "rounding")
    assert len(nodes(expanded.graph, "topk_route")) == len(nodes(expanded.graph, "mul")) == 1
    assert nodes(expanded.graph, "topk") == nodes(expanded.graph, "softmax") == []
    same_results(run(s), run(expanded.subject), "rounding")


@pytest.mark.usefixtures("_kernel_on_cpu")
@pytest.mark.parametrize(("router", "dtype"), [(qwen, BF16)])
def test_what_the_op_does_not_say_is_written_out(router: Any, dtype: torch.dtype) -> None:
    s = subject(router, dtype)
    expanded = rewrite(ExpandRouters(), rewrite(RaiseRouters(), s).subject)
    assert nodes(expanded.graph, "topk_route") == nodes(expanded.graph, "route") == []
    same_results(run(s), run(expanded.subject), "exact")


V3 = "sigmoid f32 | bias | groups 8 keep 4 by top2sum fill -inf | top8 unsorted | sum + 1e-20 | x 2.5"
V2 = "softmax f32 | groups 8 keep 3 by max fill 0 masked | top6 unsorted | x 16.0"
PLAIN = "softmax f32 | top8 | sum | to bf16"


def expanded_on(device: str, spec: str, experts: int) -> tuple[fx.Graph, str]:
    """The graph of a router alone, of tensors without data, and the numerics of the run."""
    graph, s = fx.Graph(), RouteSpec.parse(spec)
    with compat.FakeTensorMode():
        given: list[Any] = [graph.placeholder("logits")]
        set_value(given[0], torch.empty(5, experts, dtype=BF16, device=device), "model")
        for name, wanted in (("bias", s.bias), ("scale", s.per_expert)):
            given.append(graph.placeholder(name) if wanted else None)
            if wanted:
                set_value(given[-1], torch.empty(experts, device=device), "model")
    route = graph.call_function(ops.route, (*given, spec))
    graph.output(tuple(graph.call_function(compat.getitem, (route, i)) for i in (1, 2)))
    row = PassRow("expand_routers", "model", "exact")
    ExpandRouters().run(graph, Context(row, "model"))
    return graph, row.numerics


@pytest.mark.parametrize(
    ("spec", "experts", "rest"),
    [
        (PLAIN, 128, (8, "softmax", "scores", "sum", 0.0, 1.0, BF16)),
        (PLAIN, 1024, None),
        (V3, 256, (8, "sigmoid", "scores", "sum", 1e-20, 2.5, None, 8, 4, "top2sum", -torch.inf, False)),
        (V2, 160, (6, "softmax", "scores", "none", 0.0, 16.0, None, 8, 3, "max", 0.0, True)),
        (V2.replace("softmax", "identity"), 160, None),  # a fill of 0 may be above scores
        (V3, 1024, None),
        ("softmax f32 | top8 | sum | per-expert | to bf16", 128, (8, "softmax", "scores", "sum", 0.0, 1.0, None)),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_device_and_the_size_decide(device: str, spec: str, experts: int, rest: tuple[Any, ...] | None) -> None:
    pytest.importorskip("triton")
    graph, numerics = expanded_on(device, spec, experts)
    made = nodes(graph, "topk_route")
    fused = device == "cuda" and rest is not None
    assert len(made) == fused
    assert numerics == ("rounding" if fused else "exact")
    calls = [n for n in graph.nodes if n.op.startswith("call")]
    if fused:
        assert made[0].args[2:] == rest
        # Indices and weights are read; a scale is gathered, multiplied and cast.
        assert len(calls) == 3 + 3 * ("per-expert" in spec)
    elif spec == V3:
        assert len(calls) == 21
