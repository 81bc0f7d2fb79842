"""Changes between two calls that a compiled graph must not outlive, and what is said of many compilations."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import moefx
from moefx.signature import ManySignaturesWarning

from . import reference as ref

Tensor = torch.Tensor
pytest.importorskip("transformers")


class Scaled(ref.Block):
    """Attributes of all kinds: a number and a mode that are read, a count that the forward itself keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.by, self.squared, self.calls = 0.5, False, 0
        self.drop = nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        y = self.moe(self.drop(x) * self.by)
        return y.square().mean() if self.squared else y.abs().mean()


@pytest.fixture(scope="module")
def compiled() -> moefx.OptimizedModule:
    with pytest.warns(UserWarning, match="changes Python state"):
        return ref.optimize(Scaled(), {"x": ref.hidden()})


@pytest.mark.filterwarnings("ignore:.*changes Python state")
def test_numbers_and_truth_values_that_modules_hold(compiled: moefx.OptimizedModule) -> None:
    opt = copy.deepcopy(compiled)
    x = {"x": ref.hidden()}
    for _ in range(2):  # the forward's own count changes when the original is called; that compiles nothing
        ref.check(opt, x)
    assert opt.original.calls > 2
    assert ref.count(opt) == 1
    before = ref.step(opt, x)
    for name, value, variants in [("by", 2.0, 2), ("squared", True, 3), ("squared", False, 3), ("by", 0.5, 3)]:
        setattr(opt, name, value)
        assert ref.differ(ref.check(opt, x), before) == (opt.original.by == 2.0)
        assert ref.count(opt) == variants
    opt.original.drop.p = 0.0
    assert ref.differ(ref.check(opt, x), before)
    assert ref.count(opt) == 4


@pytest.mark.filterwarnings("ignore:.*changes Python state")
def test_a_forward_that_was_assigned_to_a_part_and_parameters_that_were_added(compiled: moefx.OptimizedModule) -> None:
    """LoRA as it is written by hand."""
    opt = copy.deepcopy(compiled)
    gate = opt.original.moe.gate
    before, old = ref.step(opt, {"x": ref.hidden()}), gate.forward
    gate.A = nn.Parameter(torch.randn(ref.HIDDEN, ref.HIDDEN, generator=torch.Generator().manual_seed(1)) / 4)
    assert not ref.differ(ref.step(opt, {"x": ref.hidden()}), before)  # not read so far
    gate.forward = lambda x: old(x @ gate.A)
    after = ref.check(opt, {"x": ref.hidden()})
    assert ref.differ(after, before)
    assert after.grads["moe.gate.A"].abs().sum() > 0


def test_many_sizes_are_told_with_what_to_do() -> None:
    opt = ref.optimize(ref.Block(), (ref.hidden(),))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ManySignaturesWarning)
        for S in (3, 3, 4, 5, 4):
            opt(torch.ones(2, S, ref.HIDDEN))
    with pytest.warns(ManySignaturesWarning, match=r"differ in axis 1 of x\. .*dynamic=\{'x': \(1,\)\}"):
        opt(torch.ones(2, 6, ref.HIDDEN))


class Annealed(ref.Block):
    """A number that a training loop changes."""

    def __init__(self) -> None:
        super().__init__()
        self.by = 1.0

    def forward(self, x: Tensor) -> Any:
        return (self.moe(x) * self.by).sum()


def test_many_values_of_an_attribute_are_told() -> None:
    opt = ref.optimize(Annealed(), {"x": ref.hidden()})
    for by in (2.0, 3.0, 4.0):
        opt.by = by
        ref.check(opt, {"x": ref.hidden()})
    opt.by = 5.0
    with pytest.warns(ManySignaturesWarning, match="differ in by.*keep in a buffer"):
        ref.check(opt, {"x": ref.hidden()})


def test_sizes_of_one_symbolic_variant_are_not_many() -> None:
    opt = ref.optimize(ref.Block(), {"x": ref.hidden()}, dynamic={"x": (1,)})
    with warnings.catch_warnings():
        warnings.simplefilter("error", ManySignaturesWarning)
        for S in range(2, 9):
            opt(x=torch.ones(2, S, ref.HIDDEN))
    assert ref.count(opt) == 1
