"""One optimized module with symbolic sizes: one graph serves many shapes, and another is made where it does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import moefx

from . import reference as ref

Tensor = torch.Tensor


@pytest.fixture(scope="module")
def dynamic() -> moefx.OptimizedModule:
    return ref.optimize(ref.tiny(), dynamic=ref.DYNAMIC)


def test_one_variant_serves_many_sizes(dynamic: moefx.OptimizedModule) -> None:
    opt = copy.deepcopy(dynamic)
    for B, S in [(2, 8), (3, 8), (2, 16), (5, 7), (4, 4), (2, 8)]:
        ref.check(opt, ref.batch(B, S))
    assert ref.count(opt) == 1
    assert ref.programs(opt)[0].saved_bytes is None


def test_sizes_outside_what_was_assumed_compile_another_variant(dynamic: moefx.OptimizedModule) -> None:
    opt = copy.deepcopy(dynamic)
    for B, S, variants in [(1, 8, 2), (1, 12, 2), (3, 9, 2)]:  # one sequence is a broadcast, not a batch
        ref.check(opt, ref.batch(B, S))
        assert ref.count(opt) == variants


@pytest.mark.nightly
def test_other_signatures_of_a_dynamic_module(dynamic: moefx.OptimizedModule) -> None:
    opt = copy.deepcopy(dynamic)
    for B in (3, 4):
        ref.check(opt, {"input_ids": ref.batch(B)["input_ids"]}, lambda out: out.logits.square().mean())
    assert ref.count(opt) == 2
    opt.eval()
    with torch.no_grad():
        for B in (2, 3):
            assert ref.error(opt(**ref.batch(B)).loss, opt.original(**ref.batch(B)).loss) <= 1e-5
    assert ref.count(opt) == 3


def test_a_dynamic_module_takes_inputs_of_any_layout(dynamic: moefx.OptimizedModule) -> None:
    opt = copy.deepcopy(dynamic)
    ref.check(opt, {k: v.mT.contiguous().mT for k, v in ref.batch(3, 5).items()})


def test_constants_beside_dynamic_inputs() -> None:
    """A number that happens to equal a size is not that size."""

    class Scales(ref.Block):
        def forward(self, x: Tensor, by: int = 1, name: Any = None) -> Any:
            return self.moe(x * by).square().mean() if name is None else self.moe(x).sum()

    opt = ref.optimize(Scales(), {"x": ref.hidden(), "by": 8, "name": None}, dynamic={"x": (0, 1)})
    for S, by, name, variants in [(8, 8, None, 1), (5, 8, None, 1), (5, 5, None, 2), (6, 5, None, 2), (6, 8, "n", 3)]:
        x = torch.randn(2, S, ref.HIDDEN, generator=torch.Generator().manual_seed(S))
        ref.check(opt, {"x": x, "by": by, "name": name})
        assert ref.count(opt) == variants


def test_partly_dynamic_inputs() -> None:
    opt = ref.optimize(ref.Block(), {"x": ref.hidden()}, dynamic={"x": (1,)})
    for B, S, variants in [(2, 8, 1), (2, 5, 1), (3, 5, 2), (3, 7, 2)]:
        ref.check(opt, {"x": torch.randn(B, S, ref.HIDDEN, generator=torch.Generator().manual_seed(S))})
        assert ref.count(opt) == variants


def test_dynamic_sizes_with_inductor() -> None:
    opt = ref.optimize(ref.Two(), {"x": ref.hidden()}, dynamic={"x": (0, 1)}, codegen="inductor")
    for B, S in [(2, 8), (3, 5), (7, 2)]:
        x = {"x": torch.randn(B, S, ref.HIDDEN, generator=torch.Generator().manual_seed(S))}
        ref.check(opt, x, lambda out: out[0] + out[1])
        ref.check(opt, x, lambda out: out[0])
    assert ref.count(opt) == 1
