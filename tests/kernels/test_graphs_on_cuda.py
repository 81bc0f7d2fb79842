"""What would compute each node of a recipe's training graph on a GPU: no op of the fast recipes is left to a reference.

The graphs are those of a bfloat16 model on a CPU, with passes told that the CPU has a GPU's kernels; each node's
operands are then fake tensors on a CUDA device, which need no device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from moefx.kernels import registry
from moefx.kernels.layout import lies_by_columns
from tests import reference as ref

ops = torch.ops.moefx
# Ops without arithmetic worth a kernel, or of which the reference is a few calls of torch.
PLAIN = {"choice_plan", "grouped_bias", "group_sum", "dispatch", "combine"}
# What each recipe leaves to references; docs/kernels.md says why.
LEFT: dict[str, set[str]] = {
    "bf16": set(),
    "fp8_flow": set(),
    "fp8_naive": set(),
    "fp8_blockwise": set(),
    "mxfp8": set(),
    "deepseek_v3": {"glu_quantize", "glu_backward_quantize"},
    "fp8_rowwise": {"quantize", "glu_backward_quantize", "transpose_scaled"},
    "mxfp4_hopper": {"glu_quantize", "glu_backward_quantize"},
    "nvfp4": {"quantize", "glu_quantize", "glu_backward_quantize", "scaled_grouped_mm", "scaled_grouped_wgrad"},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return ref.tiny(hidden_size=256, moe_intermediate_size=128, initializer_range=0.02).bfloat16()


def training_graph(model: Any, recipe: str, without: str = "") -> fx.Graph:
    """The graph that is left when the passes of a recipe have run, on a CPU as on a GPU."""
    opt = ref.optimize(model, recipe=recipe, passes=ref.as_on_gpu(recipe, without), codegen="eager")
    stages = list(opt.graphs)
    last = min(stages.index(s) for s in ("weights", "forward") if s in stages) - 1  # of the training passes
    return opt.graphs[stages[last]].graph


def chosen(graph: fx.Graph) -> dict[str, set[str]]:
    """Providers by op."""
    found: dict[str, set[str]] = {}
    with FakeTensorMode():

        def on_cuda(v: Any) -> Any:
            v = v.meta["val"] if isinstance(v, fx.Node) else v
            if not isinstance(v, torch.Tensor):
                return v
            return torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda")

        for node in graph.nodes:
            if node.op == "call_function" and getattr(node.target, "namespace", "") == "moefx":
                args = [
                    on_cuda(a) if not isinstance(a, list | tuple) else pytree.tree_map(on_cuda, a) for a in node.args
                ]
                name = node.target._schema.name.split("::")[-1]
                defaults = [a.default_value for a in node.target._schema.arguments[len(args) :]]
                found.setdefault(name, set()).add(registry.choose(name, *args, *defaults).name)
    return found


@pytest.mark.parametrize("recipe", sorted(LEFT))
@pytest.mark.filterwarnings("ignore")
def test_providers(model: Any, recipe: str) -> None:
    found = chosen(training_graph(model, recipe))
    assert {op for op, names in found.items() if "reference" in names} - PLAIN == LEFT[recipe]
    assert any("triton" in names for names in found.values())


def test_what_no_kernel_covers_is_seen(model: Any) -> None:
    graph = training_graph(model, "bf16")
    assert "reference" not in chosen(graph)["glu_backward_again"]
    for node in graph.nodes:
        if isinstance(val := node.meta.get("val"), torch.Tensor) and val.dtype == torch.bfloat16:
            with val.fake_mode:
                node.meta["val"] = val.double()
    assert chosen(graph)["glu_backward_again"] == {"reference"}


def depth_is_contiguous(graph: fx.Graph) -> list[bool]:
    """Of each product of codes, whether both operands have the axis that is summed over contiguous."""
    found = []
    for node in graph.nodes:
        if node.target in (ops.scaled_grouped_mm.default, ops.scaled_grouped_mm_quantize.default):
            x, w = node.args[0].meta["val"], node.args[2].meta["val"]
            found.append(x.stride(-1) == w.stride(-1) == 1)
        elif node.target is ops.scaled_grouped_wgrad.default:
            pair = node.args[0].meta["val"], node.args[2].meta["val"]
            found.append(node.args[-1] == 16 and all(map(lies_by_columns, pair)))
    return found


@pytest.mark.parametrize("recipe", ["fp8_flow", "fp8_naive", "fp8_blockwise", "mxfp8", "deepseek_v3", "fp8_rowwise"])
@pytest.mark.filterwarnings("ignore")
def test_fp8_tensor_cores_multiply_forward_and_backward(model: Any, recipe: str) -> None:
    assert depth_is_contiguous(training_graph(model, recipe)) == [True] * 6


@pytest.mark.filterwarnings("ignore")
def test_codes_are_decoded_in_the_backward_where_nothing_orients_them(model: Any) -> None:
    found = depth_is_contiguous(training_graph(model, "fp8_flow", without="orient_codes"))
    assert sorted(found) == [False] * 4 + [True] * 2
