"""Rows that the products gather."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moefx.manager import Context
from moefx.passes import DropNoops, FoldCombine, FuseGather, FusePlanPermute, LowerWires, OrientWgrad
from moefx.report import PassRow
from tests.passes.subject import (
    E,
    H,
    Made,
    Rewritten,
    Subject,
    T,
    bank,
    count,
    nodes,
    ops,
    rand,
    rewrite,
    route,
    training_graph,
    weights,
)

Tensor = torch.Tensor
ANYWHERE = FuseGather(("cpu", "cuda"), (torch.float32, torch.bfloat16))
COUNTED = ("permute", "plan_permute", "plan", "grouped_mm", "grouped_wgrad", "glu", *(
    "permute_grouped_mm", "permute_grouped_mm_glu", "permute_grouped_wgrad"
))  # fmt: skip


def fuse(fn: Callable[[Any, Tensor], Any], passes: Any = (), layout: str = "nk", **kw: Any) -> Rewritten:
    """Fuse in a training graph; results and gradients are equal to the last bit."""
    return rewrite(ANYWHERE, training_graph(Made(fn, **weights(layout, **kw)), rand(T, H), passes=passes), "exact")


def counts(done: Rewritten) -> dict[str, int]:
    """What is there of the ops of interest."""
    return {name: n for name in COUNTED if (n := count(done.graph, name))}


def test_product_activation_and_gradient() -> None:
    done = fuse(bank())
    # Left: the down product and its gradients. The tokens need no gradient.
    assert counts(done) == {
        "plan": 1, "grouped_mm": 2, "grouped_wgrad": 1, "permute_grouped_mm_glu": 1, "permute_grouped_wgrad": 1,
    }  # fmt: skip
    assert done.row.matched == 2


def test_weighted_activation_and_a_plan_made_with_the_rows() -> None:
    done = fuse(bank(), passes=(FoldCombine(), FusePlanPermute()))
    assert count(done.graph, "plan_permute") == 0
    assert count(done.graph, "plan") == 1
    (fused,) = nodes(done.graph, "permute_grouped_mm_glu")
    assert fused.args[5] is nodes(done.graph, "gather_weights")[0]


def transposed(m: Any, x: Tensor) -> Tensor:
    """Experts whose weights are stored [E, in, out]."""
    _, w, idx = route(m, x)
    token, order, slot, offsets = ops.plan(idx, E, 1)
    h = ops.grouped_mm(ops.permute(x, token, slot), m.up.transpose(1, 2), offsets)
    y = ops.grouped_mm(ops.glu(h, None, "silu"), m.down.transpose(1, 2), offsets)
    return ops.unpermute(y, token, order, slot, w)  # type: ignore[no-any-return]


def test_gradient_in_the_layout_of_the_parameter() -> None:
    subject = training_graph(Made(transposed, **weights("kn")), rand(T, H))
    subject = rewrite(OrientWgrad(), rewrite(DropNoops(), subject).subject).subject
    done = rewrite(ANYWHERE, subject, "exact")
    (wgrad,) = nodes(done.graph, "permute_grouped_wgrad")
    assert wgrad.args[-1] is True
    assert wgrad.meta["val"].shape == weights("kn")["up"].shape


def biased(m: Any, x: Tensor) -> Tensor:
    _, w, idx = route(m, x)
    token, order, slot, offsets = ops.plan(idx, E, 1)
    h = ops.grouped_bias(ops.grouped_mm(ops.permute(x, token, slot), m.up, offsets), m.up_bias, offsets)
    return ops.unpermute(  # type: ignore[no-any-return]
        ops.grouped_mm(ops.glu(h, None, "silu"), m.down, offsets), token, order, slot, w
    )


def test_a_bias_keeps_the_activation_apart() -> None:
    done = fuse(biased, bias=True)
    assert count(done.graph, "permute_grouped_mm") == count(done.graph, "permute_grouped_wgrad") == 1
    assert count(done.graph, "permute_grouped_mm_glu") == 0
    assert count(done.graph, "permute") == 0


@pytest.mark.parametrize(("kind", "gated"), [("plain relu2", False), ("interleaved silu", True)])
def test_activations_without_halves_stay(kind: str, gated: bool) -> None:
    done = fuse(bank(kind), gated=gated)
    assert count(done.graph, "permute_grouped_mm") == 1
    assert count(done.graph, "permute_grouped_mm_glu") == 0


def test_two_banks_on_one_plan() -> None:
    def fn(m: Any, x: Tensor) -> Tensor:
        _, w, idx = route(m, x)
        token, order, slot, offsets = ops.plan(idx, E, 1)
        for _ in range(2):
            a = ops.glu(ops.grouped_mm(ops.permute(x, token, slot), m.up, offsets), None, "gelu_tanh")
            x = x + ops.unpermute(ops.grouped_mm(a, m.down, offsets), token, order, slot, w)
        return x

    done = fuse(fn)
    assert done.row.matched == 4
    assert count(done.graph, "permute") == 0


def test_rows_with_another_reader_are_moved() -> None:
    def fn(m: Any, x: Tensor) -> Any:
        _, w, idx = route(m, x)
        token, order, slot, offsets = ops.plan(idx, E, 1)
        rows = ops.permute(x, token, slot)
        a = ops.glu(ops.grouped_mm(rows, m.up, offsets), None, "silu")
        return ops.unpermute(ops.grouped_mm(a, m.down, offsets) + rows, token, order, slot, w)

    done = fuse(fn)
    assert not done.changed
    (why,) = done.reasons
    assert why.endswith("reads the rows too, and cannot gather them")


def test_pre_activations_that_are_read_before_the_activation() -> None:
    def fn(m: Any, x: Tensor) -> Any:
        _, w, idx = route(m, x)
        token, order, slot, offsets = ops.plan(idx, E, 1)
        h = ops.grouped_mm(ops.permute(x, token, slot), m.up, offsets)
        a = ops.glu(h, h.sum(-1), "silu")
        return ops.unpermute(ops.grouped_mm(a, m.down, offsets), token, order, slot, w)

    done = fuse(fn)
    assert count(done.graph, "permute_grouped_mm") == 1
    assert count(done.graph, "permute_grouped_mm_glu") == 0


@pytest.fixture(scope="module")
def plain() -> Subject:
    """Training graph of one bank."""
    return training_graph(Made(bank(), **weights()), rand(T, H))


def test_on_a_cpu_rows_are_moved(plain: Subject) -> None:
    done = rewrite(FuseGather(), plain)
    assert not done.changed
    assert done.row.notes == ["no kernel gathers rows of float32 on cpu as it multiplies"]
    assert done.reasons == []
    assert not rewrite(FuseGather(("cpu",)), plain).changed


def test_on_a_gpu_rows_of_16_bits_are_gathered(plain: Subject) -> None:
    subject = plain.copy()
    (rows,) = nodes(subject.graph, "permute")
    for dtype, matched in ((torch.float32, 0), (torch.bfloat16, 2)):
        with subject.fake_mode:
            rows.meta["val"] = torch.empty(rows.meta["val"].shape, dtype=dtype, device="cuda")
        row = PassRow("fuse_gather", "training", "rounding")
        FuseGather().run(subject.graph, Context(row, "training"))
        assert row.matched == matched
    assert count(subject.graph, "permute") == 0


def test_real_models(qwen_training: Subject, gpt_oss_training: Subject) -> None:
    lowered = rewrite(LowerWires(), qwen_training).subject
    done = rewrite(ANYWHERE, lowered, "exact")
    assert count(done.graph, "permute") == 0
    assert count(done.graph, "permute_grouped_mm_glu") == 2
    done = rewrite(ANYWHERE, rewrite(LowerWires(), gpt_oss_training).subject, "exact")
    assert count(done.graph, "permute_grouped_mm") == count(done.graph, "permute_grouped_wgrad") == 2
