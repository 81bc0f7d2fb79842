"""Shapes without data: the meta device, fake tensors, symbolic sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ..profile import often
from . import oracles
from .calls import calls, each_call, each_differentiable
from .oracles import DTYPES, Tensor, equal, ops, randn, tensors

CASES = ("balanced", "padded_and_dropped", "no_tokens", "k1")


def map_tensors(f: Callable[[Tensor], Tensor], a: Any) -> Any:
    if isinstance(a, (list, tuple)):
        return type(a)(map_tensors(f, t) for t in a)
    return f(a) if isinstance(a, Tensor) else a


def described(outputs: Any) -> list[tuple[Any, ...]]:
    return [(tuple(t.shape), t.dtype, t.stride(), t.storage_offset()) for t in tensors(outputs)]


@each_call
@pytest.mark.parametrize("dtype", often([*DTYPES, torch.float64], [torch.float32, torch.bfloat16]), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_meta_device(case: str, dtype: torch.dtype, name: str) -> None:
    call = calls(oracles.CASES[case], dtype)[name]
    got = call(*map_tensors(lambda t: t.to("meta"), call.args))
    assert all(t.device.type == "meta" for t in tensors(got))
    assert described(got) == described(call())


@each_call
@pytest.mark.parametrize("case", CASES)
def test_fake_tensors(case: str, name: str) -> None:
    call = calls(oracles.CASES[case])[name]
    with FakeTensorMode() as mode:
        got = call(*map_tensors(mode.from_tensor, call.args))
    assert all(isinstance(t, FakeTensor) for t in tensors(got))
    assert described(got) == described(call())


@each_call
@pytest.mark.parametrize("how", ["transposed", "stepped", "sliced"])
def test_fake_strides_are_the_real_ones(how: str, name: str) -> None:
    # Compiled code indexes an output by what the fake promised.
    call = calls(oracles.CASES["padded_and_dropped"])[name]
    args = map_tensors(lambda t: oracles.layouts(t).get(how, t), call.args)
    with FakeTensorMode() as mode:
        fake = call(*map_tensors(mode.from_tensor, args))
    assert described(fake) == described(call(*args))


@each_differentiable
def test_backward_of_fake_tensors(name: str) -> None:
    call = calls(oracles.CASES["dropped"])[name]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        args = map_tensors(mode.from_tensor, call.differentiable())
        outputs = [t for t in tensors(call(*args)) if t.requires_grad]
        wrt = [t for t in tensors(args) if t.requires_grad]
        grads = torch.autograd.grad(outputs, wrt, [torch.ones_like(t) for t in outputs])
    assert [g.shape for g in grads] == [t.shape for t in wrt]
    assert [g.dtype for g in grads] == [t.dtype for t in wrt]


def test_token_counts_stay_symbolic() -> None:
    # One symbol for the tokens goes in; the rows come out as arithmetic on it, with no guard that fixes it.
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x, idx, w = (
        mode.from_tensor(t, symbolic_context=context)
        for t in (randn(20, 6), torch.zeros(20, 2, dtype=torch.int64), randn(20, 2))
    )
    up, down = mode.from_tensor(randn(5, 14, 6)), mode.from_tensor(randn(5, 6, 7))
    with mode:
        torch._check(x.shape[0] == idx.shape[0])
        torch._check(x.shape[0] == w.shape[0])
        for align in (1, 8):
            rows, token, order, slot, offsets = ops.plan_permute(x, idx, 5, align)
            T = idx.shape[0]
            assert str(rows.shape[0]) == str((2 * T + 5 * (align - 1)) // align * align)
            assert isinstance(rows.shape[0], torch.SymInt)
            h = ops.grouped_mm(rows, up, offsets)
            a = ops.glu(h, ops.gather_weights(w, order), "silu")
            y = ops.unpermute(ops.grouped_mm(a, down, offsets), token, order, slot, None)
            assert (str(y.shape[0]), y.shape[1]) == (str(T), 6)
            assert offsets.shape == (6,)
            dw = ops.scatter_weights(ops.gather_weights(w, order), order, T, 2)
            assert str(dw.shape[0]) == str(T)
        experts = ops.experts(x, idx, w, [up, down], "silu | nk")
        assert str(experts.shape[0]) == str(x.shape[0])
    symbols = {s for t in (x, idx, w) for s in t.shape[0].node.expr.free_symbols}
    assert all(env.replacements.get(s) is None or env.replacements[s].free_symbols for s in symbols)


@each_call
def test_a_graph_traced_with_symbols_runs_on_other_sizes(name: str) -> None:
    first, second = (calls(oracles.CASES[c])[name] for c in ("dropped", "padded_and_dropped"))
    # Sizes that mean the same must agree between cases: both have E = 5, so only tokens, choices and rows change.
    assert oracles.CASES["dropped"].E == oracles.CASES["padded_and_dropped"].E

    def f(args: Any) -> Any:
        return first(*args)

    if name in ("plan", "plan_permute", "scatter_weights"):  # their integers are attributes of the graph, not sizes
        second = type(second)(second.op, (*second.args[:2], *first.args[2:]), second.grads)
        if name == "scatter_weights":
            second = first
    if name == "choice_plan":  # tokens and alignment likewise
        second = type(second)(second.op, (second.args[0], *first.args[1:]), second.grads)
    graph = make_fx(f, tracing_mode="symbolic")(first.args)
    got, want = tensors(graph(second.args)), tensors(second())
    assert all(map(equal, got, want))


def test_no_op_asks_a_fake_for_its_values() -> None:
    # Data-dependent output sizes would show as unbacked symbols; a read of values raises under a fake mode.
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    for call in calls(oracles.CASES["padded_and_dropped"]).values():
        with mode:
            call(*map_tensors(mode.from_tensor, call.args))
    assert not env.pending_fresh_unbacked_symbols
    with mode, pytest.raises(Exception, match=r"(?i)data.dependent|item|nonzero"):
        bool(mode.from_tensor(torch.ones(2)).sum() > 0)  # the control: this is what reading would do
