"""What is kept of a block beside its routed sum: numbers that follow the tokens, and outputs that are no floats."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moefx
from moefx.passes.raise_experts import raised
from moefx.raising.fit import NoFit
from moefx.raising.settle import Candidates, told_apart

from ..profile import often
from .harness import differences, distance, step
from .test_unseen import E, H, K, Layer, Limited, alike


class Telling(Layer):
    """Returns more than its output."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Any:
        x_TH = x.reshape(-1, H)
        w_Tk, idx_Tk = self.route(x_TH)
        y = self.mix(x_TH, w_Tk, idx_Tk).view(x.shape)
        if self.what == "ids":
            return y, idx_Tk
        if self.what == "counts":
            return {"y": y, "counts": torch.bincount(idx_Tk.flatten(), minlength=E)}
        return y, w_Tk > 0.4


@pytest.mark.parametrize("what", ["ids", "counts", "mask"])
def test_outputs_that_are_no_floats_are_given_as_they_are(what: str) -> None:
    layer, x = Telling(what), torch.randn(2, 7, H)
    own = copy.deepcopy(layer)
    with raised(layer, (x,)) as (block,):
        assert block.raised, block.reason
        for args in ((x,), (torch.randn(1, 5, H),)):
            got, want = step(layer, args), step(own, args)
            assert differences(got, want) == []
            assert torch.equal(got.outputs[-1], want.outputs[-1])


# --- numbers that follow the number of tokens


class Masked(Limited):
    """Drops choices beyond a capacity by weights of zero: the capacity is a number in the code that is kept."""

    def __init__(self, formula: Callable[[int], int], order: str = "token") -> None:
        super().__init__(formula, 1.2)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, H)
        w_Tk, idx_Tk = self.route(x_TH)
        by_choice = self.order == "choice"
        hit = F.one_hot((idx_Tk.t() if by_choice else idx_Tk).flatten(), self.experts_in_all)
        keep = ((hit.cumsum(0) - 1) * hit).sum(-1) < self.formula(len(x_TH))
        keep_Tk = keep.view(K, -1).t() if by_choice else keep.view(-1, K)
        return self.mix(x_TH, w_Tk * keep_Tk, idx_Tk).view(x.shape)


MASKS: dict[str, Callable[[int], int]] = {
    "at least 4": lambda T: max(4, min(T, T * 2 // 6)),
    "down": lambda T: int(1.0 * T * 2 / 6),
    "up": lambda T: -(-T * 2 // 6),
    "1.3, at least 1": lambda T: max(1, int(1.3 * T * 2 / 6)),
    "1.1, up": lambda T: math.ceil(1.1 * T * 2 / 6),
    "half of the tokens": lambda T: max(1, int(0.51 * T)),
    "carried, in another order": lambda T: int(1.2 * 2 / 6 * T),
    "a fifth": lambda T: T // 5,
}
OFTEN = ("at least 4", "down", "up", "1.3, at least 1")


@pytest.mark.parametrize("name", often(MASKS, OFTEN))
@torch.no_grad()
def test_a_capacity_that_masks_weights_is_the_blocks_own_for_every_size(name: str) -> None:
    torch.manual_seed(0)
    layer = Masked(MASKS[name], "choice" if name == "down" else "token")
    own = copy.deepcopy(layer)
    with raised(layer, (torch.randn(2, 12, H),)) as (block,):
        assert block.raised, block.reason
        sizes = (*range(1, 20), 40, 55, 80, 300)
        assert [T for T in sizes if distance(layer(alike(T)), own(alike(T))) > 1e-4] == []


@pytest.mark.parametrize("name", often(MASKS, ("at least 4", "up")))
@torch.no_grad()
def test_a_number_in_the_kept_code_is_right_for_sizes_that_stay_symbolic(name: str) -> None:
    torch.manual_seed(0)
    layer = Masked(MASKS[name])
    opt = moefx.optimize(layer, (alike(16),), codegen="eager", dynamic={"x": (1,)}, strict=True)
    assert [T for T in (9, 10, 13, 40, 55) if distance(opt(alike(T)), layer(alike(T))) > 1e-4] == []
    assert len(opt.variants()) == 1


class PerRow(Masked):
    """The capacity follows the tokens of a row; the batch shares it."""

    def forward(self, x: Tensor) -> Tensor:
        formula, self.formula = self.formula, lambda _: self.limit(x.shape[1])
        try:
            return super().forward(x)
        finally:
            self.formula = formula

    def limit(self, tokens: int) -> int:
        return max(2, tokens * 3 // 4)


@torch.no_grad()
def test_a_number_that_follows_one_axis_is_not_taken_for_one_that_follows_all_tokens() -> None:
    torch.manual_seed(0)
    layer = PerRow(lambda T: T)
    own = copy.deepcopy(layer)
    with raised(layer, (torch.randn(2, 12, H),)) as (block,):
        assert block.raised, block.reason
        for rows, tokens in itertools.product((1, 2, 5), (2, 3, 9, 30)):
            x = alike(rows * tokens).view(rows, tokens, H)
            assert distance(layer(x), own(x)) < 1e-4


FAR: dict[str, Callable[[int], int]] = {
    "larger than every proof has tokens": lambda T: max(256, T * 2 // 6),
    "no rule": lambda T: T * 2 // 6 + (T >= 300),
}


@pytest.mark.parametrize("cls", [Masked, Limited])
@pytest.mark.parametrize("name", FAR)
def test_symbolic_sizes_are_refused_where_only_many_tokens_show_a_number(cls: type[Limited], name: str) -> None:
    torch.manual_seed(0)
    layer, x = cls(FAR[name]), torch.randn(2, 12, H)
    with raised(layer, (x,)) as (block,):
        assert block.raised, block.reason
    with raised(layer, (x,), symbolic=True) as (block,):
        assert not block.raised
        assert "for 1021 tokens, alike, float32" in str(block.reason)


def test_a_number_that_running_does_not_tell_is_refused() -> None:
    """Rules agree at the sizes that were seen; the block computes the same with either, or with none of them."""
    tokens = torch.tensor([2, 5, 9])
    table = torch.tensor([[1, 3, 4], [1, 2, 4]])
    number = Candidates(["T / 2, up", "T / 2"], table, tokens.expand_as(table))
    assert told_apart([number], lambda place, values: [v == (3,) for v in values]) == [0]
    for verdict, reason in ((True, "T / 2, up or T / 2"), (None, "T / 2, up or T / 2"), (False, "no known rule")):
        with pytest.raises(NoFit, match=reason):
            told_apart([number], lambda place, values, v=verdict: None if v is None else [v] * len(values))
    beyond = Candidates(["4 at least", "within"], torch.tensor([[4, 5, 9], [2, 5, 9]]), tokens.expand_as(table))
    assert told_apart([beyond], lambda place, values: [True] * len(values)) == [0]
    assert told_apart([beyond], lambda place, values: None) == [0]  # where it cannot be run, it does not matter
    assert told_apart([beyond], lambda place, values: [v == (2,) for v in values]) == [1]


def test_several_numbers_are_told_apart_together() -> None:
    tokens = torch.tensor([2, 5, 9])
    first, second = torch.tensor([[1, 3, 4], [1, 2, 4]]), torch.tensor([[0, 1, 5], [0, 2, 5], [0, 2, 6]])
    numbers = [Candidates([f"rule {i}" for i in range(len(t))], t, tokens.expand_as(t)) for t in (first, second)]
    own = [(1, 0), (2, 2), (4, 5)]
    assert told_apart(numbers, lambda place, values: [v == own[place] for v in values]) == [1, 1]
