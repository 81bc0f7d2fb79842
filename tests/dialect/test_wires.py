"""`dispatch` and `combine`: on one process the identity, in memory of its own, each the other's adjoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from moefx.kernels import registry

from . import oracles
from .calls import calls
from .oracles import Tensor, equal, ops, randn

WIRES = ("dispatch", "combine")
ADJOINT = {"dispatch": "combine", "combine": "dispatch"}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.uint8)
each_wire = pytest.mark.parametrize("wire", WIRES)


def every_byte(dtype: torch.dtype) -> Tensor:
    """A tensor [16, 16] of one-byte numbers that holds each code once, NaN among them."""
    return torch.arange(256, dtype=torch.uint8).view(16, 16).view(dtype)


def is_a_copy(f: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """`f(x)` holds what `x` held, dense, in other memory, and writing to it leaves `x` alone."""
    before = x.clone()
    y = f(x)
    if not (equal(y, before) and y.is_contiguous()):
        return False
    apart = y.numel() == 0 or y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    oracles.bits(y).fill_(1)
    return apart and equal(x, before)


@each_wire
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_identity_of_numbers(dtype: torch.dtype, wire: str) -> None:
    x = randn(5, 7, dtype=dtype)
    for t in (x, *oracles.layouts(x).values(), x[:0], x[:, :0], x[:1]):
        assert is_a_copy(getattr(ops, wire), t)


@each_wire
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_identity_of_codes_and_scales(dtype: torch.dtype, wire: str) -> None:
    x = every_byte(dtype)
    for t in (x, x.t(), x[::3, 1::2], x[:0]):
        assert is_a_copy(getattr(ops, wire), t)


def test_what_is_no_copy_is_caught() -> None:
    # The control: an alias, another value and other strides are each seen.
    x = randn(4, 4)
    assert is_a_copy(torch.clone, x)
    for wrong in (
        lambda t: t,
        lambda t: t.view(4, 4),
        lambda t: t + 1,
        lambda t: t.t().contiguous().t(),
        torch.Tensor.double,
    ):
        assert not is_a_copy(wrong, x.clone())


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_identity_of_any_shape(shape: list[int], seed: int) -> None:
    for wire in WIRES:
        assert is_a_copy(getattr(ops, wire), randn(*shape, seed=seed))
        assert getattr(ops, wire)(torch.empty(shape, device="meta")).shape == tuple(shape)


@each_wire
def test_gradients(wire: str) -> None:
    x = randn(4, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(getattr(ops, wire), x)
    assert torch.autograd.gradgradcheck(getattr(ops, wire), x)


@each_wire
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_gradient_arrives_as_it_was_sent(dtype: torch.dtype, wire: str) -> None:
    x, dy = randn(4, 3, dtype=dtype).requires_grad_(), randn(4, 3, dtype=dtype, seed=1)
    (dx,) = torch.autograd.grad(getattr(ops, wire)(x), x, dy)
    assert equal(dx, dy)


def wire_calls() -> Counter[str]:
    return Counter({w: sum(registry.used().get(w, {}).values()) for w in WIRES})


@each_wire
def test_the_backward_of_one_is_the_other(wire: str) -> None:
    x = randn(4, 3).requires_grad_()
    y = getattr(ops, wire)(x)
    before = wire_calls()
    y.sum().backward()
    assert wire_calls() - before == Counter([ADJOINT[wire]])


@each_wire
def test_nothing_is_kept_for_the_backward(wire: str) -> None:
    kept = list[Tensor]()

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        getattr(ops, wire)(randn(4, 3).requires_grad_())
    assert not kept


@pytest.mark.parametrize("name", ["experts", "experts_gptoss"])
def test_the_experts_are_between_two_wires(name: str) -> None:
    """Forward: tokens are dispatched, results combined; backward: the gradient is dispatched, that of x combined."""
    call = calls(oracles.CASES["dropped"])[name]
    x, idx, w, weights, spec = call.args

    def step(x: Tensor, idx: Tensor, w: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (x, w, *weights)]
            y = ops.experts(inputs[0], idx, inputs[1], inputs[2:], spec)
            return y.detach(), *torch.autograd.grad(y.square().sum(), inputs)

    module = make_fx(step)(x, idx, w, *weights)
    graph = module.graph
    found = [n for n in graph.nodes if n.op == "call_function" and str(n.target).startswith("moefx.")]
    names = [str(n.target).split(".")[1] for n in found]
    assert [n for n in names if n in WIRES] == ["dispatch", "combine", "dispatch", "combine"]
    assert names[names.index("dispatch") + 1] == "permute"
    assert names[names.index("combine") - 1] == "unpermute"

    # What stays wide on a wire is what it was: taking them out changes no bit.
    for node in found:
        if str(node.target).split(".")[1] in WIRES:
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
    module.recompile()
    assert not any(wire in module.code for wire in WIRES)
    assert all(map(torch.equal, module(x, idx, w, *weights), step(x, idx, w, *weights)))
