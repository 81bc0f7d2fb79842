"""Activations become ATen nodes for a code generator to fuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moefx.manager import Context
from moefx.passes import DropNoops, FoldCombine, InlinePointwise
from moefx.report import PassRow
from tests.passes.subject import (
    H,
    Made,
    Subject,
    T,
    bank,
    count,
    nodes,
    rand,
    rewrite,
    training_graph,
    weights,
)

Tensor = torch.Tensor


def training(kind: str, dtype: torch.dtype = torch.float32, weighted: bool = False) -> Subject:
    """Training graph of experts with an activation of the given kind."""
    given = {k: v.to(dtype) for k, v in weights(gated=not kind.startswith("plain")).items()}
    return training_graph(
        Made(bank(kind), **given), rand(T, H, dtype=dtype), passes=(FoldCombine(),) if weighted else ()
    )


@pytest.mark.parametrize(
    ("kind", "weighted"),
    [("silu", True), ("gelu_tanh", False), ("interleaved gelu", True), ("plain relu2", False), ("clamp(1,1.5)", True)],
)
def test_forward_and_backward_are_inlined(kind: str, weighted: bool) -> None:
    done = rewrite(InlinePointwise(), training(kind, weighted=weighted))
    assert done.row.matched == 2
    assert count(done.graph, "glu") + count(done.graph, "glu_backward") == 0
    assert done.new()
    aten = {n.target.namespace for n in done.new() if isinstance(n.target, torch._ops.OpOverload)}
    assert aten <= {"aten", "prims"}
    # Row weights have a gradient of their own, the second result of the backward.
    assert (count(done.graph, "scatter_weights") == 1) == weighted


@pytest.fixture(scope="module")
def silu() -> Subject:
    """Without row weights."""
    return training("silu")


def test_every_new_node_has_a_reader(silu: Subject) -> None:
    """Without row weights the backward's second result is empty and unread; nothing is left of it."""
    done = rewrite(InlinePointwise(), silu)
    assert [n.name for n in done.new() if not n.users] == []


def test_backward_nodes_are_tagged_for_the_partitioner(silu: Subject) -> None:
    done = rewrite(InlinePointwise(), silu)
    glu, backward = nodes(done.before, "glu")[0], nodes(done.before, "glu_backward")[0]
    tags = [n.meta.get("partitioner_tag") for n in done.new()]
    assert set(tags) == {glu.meta.get("partitioner_tag"), backward.meta.get("partitioner_tag")}
    assert tags.count("is_backward") > 3


def test_bf16_is_computed_in_fp32_and_rounded_once() -> None:
    done = rewrite(InlinePointwise(), training("silu", torch.bfloat16))
    wide = [n for n in done.new() if getattr(n.meta["val"], "dtype", None) is torch.float32]
    assert len(wide) > 5
    returned: Any = done.graph.output_node().args[0]
    assert returned[0].meta["val"].dtype is torch.bfloat16


@pytest.mark.parametrize(("dtype", "matched"), [(torch.bfloat16, 0), (torch.float64, 2)], ids=str)
def test_on_a_gpu_what_has_a_kernel_stays(silu: Subject, dtype: torch.dtype, matched: int) -> None:
    subject = silu.copy()
    row = PassRow("inline_pointwise", "training", "rounding")
    with subject.fake_mode:
        for n in subject.graph.nodes:
            if isinstance(v := n.meta.get("val"), Tensor):
                n.meta["val"] = torch.empty_strided(
                    v.shape, v.stride(), dtype=dtype if v.is_floating_point() else v.dtype, device="cuda"
                )
    InlinePointwise().run(subject.graph, Context(row, "training"))
    assert row.matched == matched
    assert count(subject.graph, "glu_backward") == (not matched)


def test_nothing_to_inline() -> None:
    assert not rewrite(InlinePointwise(), training_graph(Made(lambda m, x: x * m.p, p=rand(H)), rand(T, H))).changed


def test_real_model(qwen_training: Subject) -> None:
    done = rewrite(InlinePointwise(), rewrite(DropNoops(), qwen_training).subject)
    assert done.row.matched == 4
    assert count(done.graph, "glu") == 0
