"""The routing weights move from the output rows to the activations, where that is legal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moefx.joint import split, trace_joint
from moefx.manager import PassManager
from moefx.passes import ExpandExperts, FoldCombine
from moefx.report import Report
from tests.passes.subject import (
    ANY,
    E,
    H,
    I,
    K,
    Made,
    Rewritten,
    Subject,
    T,
    captured_graph,
    count,
    experts,
    model_graph,
    nodes,
    ops,
    rand,
    rewrite,
    route,
    run,
    values_are_true,
    weights,
)

Tensor = torch.Tensor


def fold(fn: Callable[[Any, Tensor], Any], given: dict[str, Tensor] | None = None, **options: Any) -> Rewritten:
    """Run the pass on a function of a module with a router and a bank."""
    return rewrite(FoldCombine(), model_graph(Made(fn, **(given or weights())), rand(T, H), **options))


def parts(m: Any, x: Tensor, act: Callable[[Tensor], Tensor] = lambda h: ops.glu(h, None, "silu")) -> Any:
    """The ops of a bank up to the output rows: weights, the four maps, rows."""
    _, w, idx = route(m, x)
    maps = ops.plan(idx, E, 1)
    h = ops.grouped_mm(ops.permute(x, maps[0], maps[2]), m.up, maps[3])
    return w, maps, ops.grouped_mm(act(h), m.down, maps[3])


def bank(m: Any, x: Tensor) -> Tensor:
    """Router and bank."""
    _, w, idx = route(m, x)
    return experts(m, x, idx, w)


def test_the_weights_move() -> None:
    done = fold(bank)
    assert done.row.matched == 1
    (unpermute,), (glu,), (gather,) = (nodes(done.graph, n) for n in ("unpermute", "glu", "gather_weights"))
    assert unpermute.args[-1] is None
    assert glu.args[1] is gather
    # The weights are as wide as the activations' rows are many, and the output rows feed the sum alone.
    assert gather.meta["val"].shape == (T * K,)
    assert glu.meta["val"].shape == (T * K, I)
    assert count(done.graph, "grouped_mm") == 2


def test_output_rows_are_not_kept_for_the_backward() -> None:
    """The point of the pass: before it, the products' output is saved; after it, nothing of width H per row is."""

    def saved(passes: tuple[Any, ...]) -> set[tuple[int, ...]]:
        captured = captured_graph(Made(bank, **weights()), rand(T, H))
        PassManager(passes, ANY).run("model", captured.gm, Report(), captured.gm.meta["fake_mode"])
        joint = trace_joint(captured, grad=True, codegen="eager")
        fw, _ = split(joint, codegen="eager")
        outs: Any = fw.graph.output_node().args[0]
        rows = [n for n in outs[joint.fwd_outputs :] if n.op != "placeholder" and isinstance(n.meta["val"], Tensor)]
        return {(n.meta["val"].dim(), int(n.meta["val"].shape[-1])) for n in rows if n.target is ops.grouped_mm.default}

    assert saved(()) == {(2, 2 * I), (2, H)}
    assert saved((FoldCombine(),)) == {(2, 2 * I)}


def test_two_banks() -> None:
    assert fold(lambda m, x: bank(m, x + bank(m, x))).row.matched == 2


def test_result_with_several_users() -> None:
    def fn(m: Any, x: Tensor) -> Any:
        y = bank(m, x)
        return y * 2, y.sum(0)

    assert fold(fn).row.matched == 1


def test_symbolic_number_of_tokens() -> None:
    assert fold(bank, dynamic={"x": (0,)}).row.matched == 1


def test_dropped_pairs() -> None:
    """Indices beyond the last expert mark pairs of other ranks: they weigh nothing."""

    def fn(m: Any, x: Tensor) -> Tensor:
        _, w, idx = route(m, x)
        return experts(m, x, torch.where(torch.arange(T)[:, None] % 3 == 0, E, idx), w)

    assert fold(fn).row.matched == 1


def test_bf16_rows_and_fp32_weights() -> None:
    def fn(m: Any, x: Tensor) -> Tensor:
        _, w, idx = route(m, x)
        token, order, slot, offsets = ops.plan(idx, E, 1)
        h = ops.grouped_mm(ops.permute(x.bfloat16(), token, slot), m.up.bfloat16(), offsets)
        y = ops.grouped_mm(ops.glu(h, None, "silu"), m.down.bfloat16(), offsets)
        return ops.unpermute(y, token, order, slot, w).double()

    s = model_graph(Made(fn, **weights()), rand(T, H)).copy()
    before = run(s)
    PassManager((FoldCombine(),), ANY).run("model", s.gm, Report(), s.fake_mode)
    values_are_true(s)
    after = run(s)
    for key, x in before.items():
        error = float((after[key].double() - x.double()).norm() / x.double().norm().clamp_min(1e-12))
        assert error < 2e-2, key
    assert nodes(s.graph, "gather_weights")[0].meta["val"].dtype is torch.float32


def biased(m: Any, x: Tensor) -> Tensor:
    w, (token, order, slot, offsets), y = parts(m, x)
    out: Tensor = ops.unpermute(ops.grouped_bias(y, m.down_bias, offsets), token, order, slot, w)
    return out


def rows_read_twice(m: Any, x: Tensor) -> Any:
    w, (token, order, slot, _), y = parts(m, x)
    return ops.unpermute(y, token, order, slot, w), y * 2


def own_activation(m: Any, x: Tensor) -> Any:
    w, (token, order, slot, _), y = parts(m, x, lambda h: torch.tanh(h[:, :I]))
    return ops.unpermute(y, token, order, slot, w)


def activation_read_twice(m: Any, x: Tensor) -> Any:
    kept = []

    def act(h: Tensor) -> Tensor:
        kept.append(ops.glu(h, None, "silu"))
        return kept[0]

    w, (token, order, slot, _), y = parts(m, x, act)
    return ops.unpermute(y, token, order, slot, w), kept[0].sum()


def weighted_activation(m: Any, x: Tensor) -> Any:
    w, (token, order, slot, _), y = parts(m, x, lambda h: ops.glu(h, h[:, 0], "silu"))
    return ops.unpermute(y, token, order, slot, w)


def late_weights(m: Any, x: Tensor) -> Any:
    w, (token, order, slot, _), y = parts(m, x)
    return ops.unpermute(y, token, order, slot, w * x.mean())


def weights_written(m: Any, x: Tensor) -> Any:
    w, idx = route(m, x)[1:]
    w = w * 1
    token, order, slot, offsets = ops.plan(idx, E, 1)
    y = ops.grouped_mm(
        ops.glu(ops.grouped_mm(ops.permute(x, token, slot), m.up, offsets), None, "silu"), m.down, offsets
    )
    w.view(-1).mul_(2.0)
    return ops.unpermute(y, token, order, slot, w)


def not_a_product(m: Any, x: Tensor) -> Any:
    w, (token, order, slot, _), y = parts(m, x)
    return ops.unpermute(y + 1, token, order, slot, w)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (biased, "a bias is added after the down product"),
        (rows_read_twice, "do not come from one product that nobody else reads"),
        (not_a_product, "do not come from one product that nobody else reads"),
        (own_activation, "does not read an unweighted activation of its own"),
        (activation_read_twice, "does not read an unweighted activation of its own"),
        (weighted_activation, "does not read an unweighted activation of its own"),
        (late_weights, "computed after the product"),
        (weights_written, "written in place in between"),
    ],
)
def test_near_misses_are_rejected_with_their_reason(fn: Callable[[Any, Tensor], Any], reason: str) -> None:
    done = fold(fn, weights(bias=fn is biased))
    assert not done.changed
    (why,) = done.reasons
    assert reason in why
    assert done.row.rejected[0]["node"] in {n.name for n in nodes(done.graph, "unpermute")}


def test_unweighted_sum_is_no_candidate() -> None:
    def fn(m: Any, x: Tensor) -> Any:
        w, (token, order, slot, _), y = parts(m, x)
        return ops.unpermute(y, token, order, slot, None), w * 1

    done = fold(fn)
    assert not done.changed
    assert done.reasons == []


def test_real_model(qwen: Subject) -> None:
    done = rewrite(FoldCombine(), rewrite(ExpandExperts(), qwen).subject)
    assert done.row.matched == 2
    assert all(n.args[-1] is None for n in nodes(done.graph, "unpermute"))


def test_real_model_with_biases(gpt_oss: Subject) -> None:
    """gpt-oss: every layer is rejected, and the reason names its module."""
    done = rewrite(FoldCombine(), rewrite(ExpandExperts(), gpt_oss).subject)
    assert not done.changed
    assert [r["why"] for r in done.row.rejected] == [
        "a bias is added after the down product, and it is weighted too"
    ] * 2
    assert [r["node"].split(":")[0] for r in done.row.rejected] == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
