"""What is kept of a block beside its routed sum: numbers that follow the number of tokens, outputs that are no floats."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from moefx.passes.raise_experts import raised

from .harness import differences, step
from .test_unseen import Layer

H, E = 16, Layer.experts_in_all


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
            assert torch.equal(got.outputs[-1 if what != "counts" else 1], want.outputs[-1 if what != "counts" else 1])
