"""What a raised block would lose without a word: hooks of its experts, and constants of calls other than the first."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moefx
from moefx.passes.raise_experts import raised
from moefx.raising.probe import Seen

from .harness import differences, step

H, I, E, K = 16, 24, 4, 2


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.act, self.w2 = nn.Linear(H, I), nn.SiLU(), nn.Linear(I, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)))


class Layer(nn.Module):
    """A loop over experts; routing weights are tempered by a number that the caller gives."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(H, E, bias=False), nn.ModuleList(FFN() for _ in range(E))

    def forward(self, x: Tensor, step: int = 0) -> Tensor:
        x_TH = x.reshape(-1, H)
        w_Tk, idx_Tk = F.softmax(self.gate(x_TH) / (1 + step), dim=-1).topk(K)
        y_TH = torch.zeros_like(x_TH)
        for e, expert in enumerate(self.experts):
            t, n = torch.where(idx_Tk == e)
            y_TH = y_TH.index_add(0, t, expert(x_TH[t]) * w_Tk[t, n, None])
        return y_TH.view(x.shape)


class Universal(nn.Module):
    """One layer, called several times."""

    def __init__(self, steps: list[int]) -> None:
        super().__init__()
        self.moe, self.steps = Layer(), steps

    def forward(self, x: Tensor) -> Tensor:
        for number in self.steps:
            x = x + self.moe(x, number)
        return x


X = torch.randn(2, 7, H, generator=torch.Generator().manual_seed(0))


# --- hooks

WHERE = {
    "an expert": lambda m: m.experts[0],
    "an activation of an expert": lambda m: m.experts[2].act,
    "the list of experts": lambda m: m.experts,
}
KINDS = {
    "before": lambda m, f: m.register_forward_pre_hook(f),
    "after": lambda m, f: m.register_forward_hook(f),
    "before backward": lambda m, f: m.register_full_backward_pre_hook(f),
    "after backward": lambda m, f: m.register_full_backward_hook(f),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", WHERE)
def test_hooks_among_the_experts_refuse_a_block(where: str, kind: str) -> None:
    layer, seen = Layer(), list[str]()
    KINDS[kind](WHERE[where](layer), lambda *args: seen.append(kind))
    with raised(layer, (X,)) as (block,):
        assert not block.raised
        assert "hooks" in str(block.reason)
        seen.clear()
        layer(X.clone().requires_grad_()).sum().backward()
        called = len(seen)
    assert called == (0 if where == "the list of experts" else 1)


def test_hooks_of_one_layer_leave_the_next_alone() -> None:
    """Layers that are built alike share a program: not where one of them has hooks."""
    model = nn.Sequential(Layer(), Layer())
    model[1].experts[0].register_full_backward_pre_hook(lambda *args: None)
    with raised(model, (X,)) as blocks:
        assert [b.raised for b in blocks] == [True, False]


def test_a_router_may_have_hooks() -> None:
    """A control: it is called as before."""
    layer, seen = Layer(), list[int]()
    layer.gate.register_forward_hook(lambda *args: seen.append(1))
    with raised(layer, (X,)) as (block,):
        assert block.raised, block.reason
        seen.clear()
        layer(X)
    assert seen == [1]


# --- constants


@pytest.mark.parametrize("steps", [[0, 1, 2], [3, 3]], ids=["of_all_calls_differ", "are_the_same"])
def test_a_layer_that_is_called_several_times(steps: list[int]) -> None:
    """With other numbers it is left alone, or else the first number would stand for all."""
    model = Universal(steps)
    want = step(copy.deepcopy(model), (X,))
    with raised(model, (X,)) as (block,):
        assert block.raised == (len(set(steps)) == 1), block.reason
        assert block.raised or "several ways: with 0, then 1" in str(block.reason)
        assert differences(step(model, (X,)), want) == []


def test_keywords_and_axes_count_as_well() -> None:
    calls = {
        "keywords": (lambda m, x: m(x), lambda m, x: m(x, step=0)),
        "axes": (lambda m, x: m(x), lambda m, x: m(x.flatten(0, 1)).view(x.shape)),
    }

    class Twice(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.moe, self.how = Layer(), how

        def forward(self, x: Tensor) -> Tensor:
            return functools.reduce(lambda x, call: call(self.moe, x), calls[self.how], x)

    for how in calls:
        model = Twice(how)
        want = step(copy.deepcopy(model), (X,))
        with raised(model, (X,)) as (block,):
            assert not block.raised
            assert how in str(block.reason)
            assert differences(step(model, (X,)), want) == []


def test_a_later_call_with_another_constant_runs_the_layers_own_code() -> None:
    layer = Layer()
    own = copy.deepcopy(layer)
    with raised(layer, (X, 1)) as (block,):
        assert block.raised, block.reason
        for args in ((X, 1), (X, 2), (X,)):
            assert differences(step(layer, args), step(own, args)) == []


class Hidden(Layer):
    """Takes a mask of positions that count, or none."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x) if mask is None else super().forward(x * 1.0) * mask[..., None]


class Skips(nn.Module):
    """Leaves a mask out that hides nothing, where it can know that: transformers does so."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = Hidden()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        known = not torch.compiler.is_compiling()
        return self.moe(x, None if known and bool(mask.all()) else mask)


@torch.no_grad()
def test_a_mask_that_is_left_out_of_the_example_counts_later() -> None:
    model, mask = Skips(), torch.ones(2, 7, dtype=torch.long)
    padded = mask.clone()
    padded[1, 3:] = 0
    opt = moefx.optimize(model, (X, mask), codegen="eager", strict=True)
    for m in (mask, padded):
        torch.testing.assert_close(opt(X, m), model(X, m), rtol=1e-5, atol=1e-6)
    assert len(opt.variants()) == 1


@torch.no_grad()
def test_an_argument_that_only_a_capture_gives_runs_the_layers_own_code() -> None:
    """What was not there when the layer was seen is not ignored."""
    layer, mask = Hidden(), torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
    own = copy.deepcopy(layer)
    with raised(layer, calls={"": Seen((X, None), {}, hidden=True)}, live=False) as (block,):
        assert block.raised, block.reason
        torch.testing.assert_close(layer(X, mask), own(X, mask))
