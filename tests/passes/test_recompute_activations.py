"""Activations that the backward makes again, with their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moefx import compat
from moefx.graph.edit import copy_graph
from moefx.manager import Context
from moefx.passes import DropNoops, FoldCombine, FuseGather, LowerWires, RecomputeActivations
from moefx.report import PassRow
from tests.passes.subject import (
    H,
    Made,
    Rewritten,
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
ANYWHERE = RecomputeActivations(("cpu", "cuda"))


def subject(kind: str = "silu", passes: Any = (), **kw: Any) -> Subject:
    return training_graph(Made(bank(kind), **weights(**kw)), rand(T, H), passes=passes)


def assert_made_once_more(done: Rewritten, times: int = 1) -> None:
    """Each activation is read in the forward alone, and what makes it again is part of the backward."""
    assert done.row.matched == times
    assert count(done.graph, "glu_backward") == 0
    again = nodes(done.graph, "glu_backward_again")
    assert len(again) == times
    assert all(n.meta["partitioner_tag"] == "is_backward" for n in again)
    for act in nodes(done.graph, "glu"):
        assert not any(u.meta.get("partitioner_tag") == "is_backward" for u in act.users)


@pytest.mark.parametrize(
    ("kind", "gated"), [("silu", True), ("clamp(1,1.5)", True), ("interleaved gelu", True), ("plain relu2", False)]
)
def test_one_reading_gives_activation_and_gradients(kind: str, gated: bool) -> None:
    """On a CPU the op is the two that it stands for: results are equal to the last bit."""
    assert_made_once_more(rewrite(ANYWHERE, subject(kind, gated=gated), "exact"))


def test_row_weights() -> None:
    done = rewrite(ANYWHERE, subject(passes=(FoldCombine(),)), "exact")
    assert_made_once_more(done)
    (again,) = nodes(done.graph, "glu_backward_again")
    assert again.args[2] is nodes(done.graph, "gather_weights")[0]
    assert count(done.graph, "scatter_weights") == 1  # the gradient of the weights is still there


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_only_pre_activations_are_saved(recompute: bool) -> None:
    s = subject()
    if recompute:
        s = rewrite(ANYWHERE, s, "exact").subject
    _, bw = compat.partition(copy_graph(s.gm), 1, recompute=False)
    saved = {n.name for n in bw.graph.find_nodes(op="placeholder")}
    (a,) = nodes(s.graph, "glu")
    assert a.all_input_nodes[0].name in saved
    assert (a.name in saved) == (not recompute)


def test_a_gradient_that_waits_for_the_activation_stays_apart() -> None:
    """Whatever reads the activation before `da` is known cannot be moved behind what needs `da`."""
    s = subject()
    (act,), (grad,) = nodes(s.graph, "glu"), nodes(s.graph, "glu_backward")
    da: Any = grad.args[0]
    with s.graph.inserting_after(da):
        scaled = s.graph.call_function(torch.ops.aten.mul.Tensor, (da, act))
    scaled.meta = dict(da.meta)
    grad.replace_input_with(da, scaled)
    done = rewrite(ANYWHERE, s, "exact")
    assert done.row.matched == 1
    assert count(done.graph, "glu_backward_again") == 0
    again = [n for n in nodes(done.graph, "glu") if n.meta.get("partitioner_tag") == "is_backward"]
    assert len(again) == 1
    assert len(nodes(done.graph, "glu")) == 2


def test_experts_whose_first_weight_is_frozen() -> None:
    """No gradient of h, and yet one of the next weight, which reads the activation."""
    module = Made(bank(), **weights())
    module.up.requires_grad_(False)  # type: ignore[union-attr, operator]
    module.router.requires_grad_(False)  # type: ignore[union-attr, operator]
    done = rewrite(ANYWHERE, training_graph(module, rand(T, H)), "exact")
    assert done.row.matched == 1
    assert count(done.graph, "glu") == 2


@pytest.mark.parametrize(
    ("dtype", "device", "matched"),
    [(torch.bfloat16, "cuda", 1), (torch.float64, "cuda", 0), (torch.float32, "cpu", 0)],
    ids=str,
)
def test_where_a_kernel_does_both(dtype: torch.dtype, device: str, matched: int) -> None:
    s = subject()
    (act,) = nodes(s.graph, "glu")
    with s.fake_mode:
        act.meta["val"] = torch.empty(act.meta["val"].shape, dtype=dtype, device=device)
    row = PassRow("recompute_activations", "training", "rounding")
    RecomputeActivations().run(s.graph, Context(row, "training"))
    assert row.matched == matched


def test_gathered_rows_and_real_models(qwen_training: Subject, gpt_oss_training: Subject) -> None:
    for model, fused in ((qwen_training, 2), (gpt_oss_training, 0)):
        lowered = rewrite(LowerWires(), rewrite(DropNoops(), model).subject).subject
        done = rewrite(ANYWHERE, lowered, "exact")
        assert_made_once_more(done, times=2)
        gathered = rewrite(FuseGather(("cpu",), (torch.float32,)), done.subject, "exact")
        assert count(gathered.graph, "permute_grouped_mm_glu") == fused
