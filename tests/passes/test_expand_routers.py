"""Routers become one op where there is a kernel for it, and the definition's nodes elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from moefx import compat
from moefx.dialect.topk_route import _topk_route
from moefx.graph.edit import set_value
from moefx.kernels import registry
from moefx.manager import Context
from moefx.passes import ExpandRouters, RaiseRouters
from moefx.report import PassRow
from tests.passes.subject import nodes, rewrite, run, same_results
from tests.passes.test_raise_routers import (
    BF16,
    F32,
    biased,
    deepseek_v3,
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
    [mixtral, biased, gpt_oss, sigmoid_of_top_logits, sqrt_softplus],
    ids=lambda f: f.__name__,
)
def test_one_op_where_there_is_a_kernel(router: Any) -> None:
    s = subject(router, F32)
    expanded = rewrite(ExpandRouters(), rewrite(RaiseRouters(), s).subject, "rounding")
    assert expanded.row.numerics == "rounding"
    assert len(nodes(expanded.graph, "topk_route")) == 1
    assert nodes(expanded.graph, "route") == []
    same_results(run(s), run(expanded.subject), "rounding")


@pytest.mark.usefixtures("_kernel_on_cpu")
@pytest.mark.parametrize(("router", "dtype"), [(deepseek_v3, F32), (qwen, BF16)])
def test_what_the_op_does_not_say_is_written_out(router: Any, dtype: torch.dtype) -> None:
    s = subject(router, dtype)
    expanded = rewrite(ExpandRouters(), rewrite(RaiseRouters(), s).subject)
    assert nodes(expanded.graph, "topk_route") == nodes(expanded.graph, "route") == []
    same_results(run(s), run(expanded.subject), "exact")


@pytest.mark.parametrize(("device", "fused"), [("cpu", False), ("cuda", True)])
@pytest.mark.parametrize("experts", [128, 1024])
def test_the_device_and_the_size_decide(device: str, fused: bool, experts: int) -> None:
    pytest.importorskip("triton")
    graph = fx.Graph()
    x = graph.placeholder("logits")
    with compat.FakeTensorMode():
        set_value(x, torch.empty(5, experts, dtype=BF16, device=device), "model")
    route = graph.call_function(ops.route, (x, None, None, "softmax f32 | top8 | sum | to bf16"))
    graph.output(tuple(graph.call_function(compat.getitem, (route, i)) for i in (1, 2)))
    row = PassRow("expand_routers", "model", "exact")
    ExpandRouters().run(graph, Context(row, "model"))
    fused = fused and experts <= 512
    made = nodes(graph, "topk_route")
    assert len(made) == fused
    assert row.numerics == ("rounding" if fused else "exact")
    if fused:
        assert made[0].args == (x, None, 8, "softmax", "scores", "sum", 0.0, 1.0, BF16)
