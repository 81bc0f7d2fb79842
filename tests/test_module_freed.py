"""What a process keeps of a model after its optimized module is gone: nothing."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import moefx
from moefx.manager import Context
from tests import reference as ref
from tests.profile import nightly

Tensor = torch.Tensor
Ends = list["weakref.ref[Any]"]


class Experts(nn.Module):
    """A block without transformers: every expert computes every token."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(ref.HIDDEN, 4, bias=False)
        self.up = nn.Parameter(torch.randn(4, ref.HIDDEN, 16) * 0.1)
        self.down = nn.Parameter(torch.randn(4, 16, ref.HIDDEN) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape, x.flatten(0, -2)
        w, idx = self.gate(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for e in range(4):
            y = y + (w * (idx == e)).sum(-1, keepdim=True) * (F.silu(x @ self.up[e]) @ self.down[e])
        return y.view(shape)


class ByHand(nn.Module):
    """A model around it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).square().mean()  # type: ignore[no-any-return]


class Branching(ref.Block):
    """Captured in part, then refused."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.moe(x)
        return y.mean() if bool((y > 0).any()) else y.sum()


class Fails(moefx.Pass):
    """Fails when everything is captured."""

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        raise RuntimeError("out of ideas")


def ends(model: nn.Module) -> Ends:
    return [weakref.ref(model), *(weakref.ref(p) for p in model.parameters())]


def alive(found: Ends) -> list[Any]:
    gc.collect()
    return [type(end()).__name__ for end in found if end() is not None]


def train(module: Any, inputs: Any) -> None:
    ref.step(module, inputs)
    with torch.no_grad():
        module(**inputs) if isinstance(inputs, dict) else module(*inputs)


def generate(module: Any, inputs: Any) -> None:
    train(module, inputs)
    module.eval().generate(inputs["input_ids"][:, :3], max_new_tokens=2, do_sample=False)


def trained(make: Callable[[], Any], inputs: Any, work: Any, optimize: Any, options: dict[str, Any]) -> Ends:
    model = make()
    work(optimize(model, inputs, **options), inputs)
    return ends(model)


X, TOKENS = (ref.hidden(),), ref.batch()
CASES = {
    "block": (ref.Block, X, train, {}),
    "by hand": (ByHand, X, train, {}),
    "dynamic": (ref.Block, {"x": ref.hidden()}, train, {"dynamic": {"x": (0, 1)}}),
    "verified": (ref.Block, X, train, {"verify": True}),
    "generate": (ref.tiny, TOKENS, generate, {}),
    "losses": (ref.tiny, TOKENS, train, {"losses": ["sp", "metrics"]}),
}


@pytest.mark.parametrize("codegen", ["eager", nightly("inductor")])
@pytest.mark.parametrize("case", CASES)
def test_nothing_of_a_model_outlives_its_optimized_module(case: str, codegen: str) -> None:
    make, inputs, work, options = CASES[case]
    assert alive(trained(make, inputs, work, lambda model, *_, **__: model, {})) == []  # control
    assert alive(trained(make, inputs, work, moefx.optimize, {"codegen": codegen, **options})) == []


def test_globals_of_the_models_source_are_as_they_were() -> None:
    before = dict(globals())
    ref.check(ref.optimize(ByHand(), X), X)
    assert globals() == before


def failed(make: Callable[[], nn.Module], **options: Any) -> Ends:
    model = make()
    with pytest.raises(moefx.MoefxError):
        ref.optimize(model, X, **options)
    return ends(model)


@pytest.mark.parametrize("cls", [Branching, ref.Block])
def test_nothing_of_a_model_outlives_a_failure(cls: Any) -> None:
    passes = moefx.pipeline(codegen="eager").insert(Fails())
    assert alive(failed(cls, passes=passes)) == []


def test_a_copy_keeps_nothing_of_the_original() -> None:
    def copied() -> tuple[moefx.OptimizedModule, Ends]:
        opt = ref.optimize(ref.Block(), X)
        ref.step(opt, X)
        return copy.deepcopy(opt), ends(opt.original)

    copy_of_it, found = copied()
    assert alive(found) == []
    ref.check(copy_of_it, X)
    assert len(copy_of_it.report.signatures) == 1  # with the graphs of the original
