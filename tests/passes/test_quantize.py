"""What a recipe cannot be applied to: the error names module, numbers and remedy, and the model is as before."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import moefx
from moefx.precision.recipe import get_recipe
from tests import reference as ref

Tensor = torch.Tensor
ROW = "e4m3 1x128 po2/rceil"


def layer(H: int, I: int) -> nn.Module:
    """A block whose experts have the given widths."""
    block = ref.Block(hidden_size=H, moe_intermediate_size=I)
    if I % 4:  # a width that the library's grouped products do not take
        block.config._experts_implementation = "eager"
    return block


STORED = get_recipe("fp8_rowwise")  # whose products read whole rows of any width
COL = "e4m3 128x1 po2/rceil"
FOUR = "e2m1 column e8m0/rceil"
CASES: dict[str, tuple[dict[str, int], Any, type[Exception], list[str]]] = {
    "a contraction that blocks do not divide": (
        {"H": 192, "I": 128},
        "fp8_flow",
        moefx.RecipeError,
        ["X has 192 columns, which blocks of 128 do not divide", "moe", "hold 64", "keep the module wide by a rule"],
    ),
    "gate and up in one block": (
        {"H": 128, "I": 192},
        get_recipe("fp8_flow").replace(
            "a",
            specs={k: s.replace("128", "64") for k, s in get_recipe("fp8_flow").specs.items() if "wire" not in k}
            | {"up.grad.dgrad": ROW},
        ),
        moefx.RecipeError,
        ["halves of 192 columns", "one scale would cover columns of both halves", "multiple of 128"],
    ),
    "stored pre-activations that blocks do not divide": (
        {"H": 128, "I": 96},
        STORED.replace("a", specs={"hidden.stored": ROW}),
        moefx.RecipeError,
        ["H has 192 columns, which blocks of 128 do not divide", "moe", "multiple of 128"],
    ),
    "stored gate and up in one block": (
        {"H": 128, "I": 64},
        STORED.replace("a", specs={"hidden.stored": ROW}),
        moefx.RecipeError,
        ["H holds gate and up in halves of 64 columns", "moe", "one scale would cover columns of both halves"],
    ),
    "stored rows that blocks do not divide": (
        {"H": 96, "I": 96},
        STORED.replace("a", specs={"input.stored": ROW, "input.wgrad": COL}),
        moefx.RecipeError,
        ["Xp has 96 columns, which blocks of 128 do not divide", "moe"],
    ),
    "two codes in a byte of an odd width": (
        {"H": 32, "I": 17},
        moefx.Recipe("a", specs={"input.wgrad": FOUR, "grad.wgrad": FOUR}),
        moefx.RecipeError,
        ["A has 17 columns, an odd number", "moe", "two in a byte", "make the width even"],
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_refused(name: str) -> None:
    pytest.importorskip("transformers")
    widths, recipe, kind, texts = CASES[name]
    model, x = layer(**widths), torch.randn(2, 8, widths["H"], generator=torch.Generator().manual_seed(0))
    x.requires_grad_()  # so that there is a dgrad of the up product
    before = {n: p.clone() for n, p in model.named_parameters()}
    want = ref.step(model, (x,))
    with pytest.raises(kind) as caught:
        moefx.optimize(model, (x,), recipe=recipe, codegen="eager")
    for text in texts:
        assert text in str(caught.value)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    ref.assert_same(ref.step(model, (x,)), want)
    moefx.optimize(model, (x,), recipe="bf16", codegen="eager")  # the control: the model is fine


def test_scales_that_are_no_powers_of_two_keep_their_second_cast_and_say_why() -> None:
    """Codes from the wire cannot be turned with exact scales (R13): the casts stay, with the reason, not silently."""
    pytest.importorskip("transformers")
    specs = {k: s.split(" po2")[0] + " f32/exact" for k, s in get_recipe("fp8_naive").specs.items()}
    exact = moefx.Recipe("exact", specs={k: s for k, s in specs.items() if k != "hidden.stored"})
    model, x = layer(128, 128), torch.randn(2, 8, 128)
    opt = moefx.optimize(model, (x,), recipe=exact, codegen="eager")
    c = opt.report.casts
    assert (c["before"], c["after"], c["transposes"]) == (12, 6, 0)
    reasons = {r["tensor"]: r["kept_because"] for r in c["rows"] if r["fate"] == "kept" and r["role"] != "weight"}
    assert "R13" in reasons["Xp"]
    assert "R13" in reasons["dO"]
    row = next(p for p in opt.report.passes if p.name == "transpose_scales")
    assert len(row.rejected) == 2
    assert not row.notes
    allowed = exact.replace("allowed", allow_double_quant=True)
    opt = moefx.optimize(model, (x,), recipe=allowed, codegen="eager")
    row = next(p for p in opt.report.passes if p.name == "transpose_scales")
    assert not row.rejected
    assert len(row.notes) == 2
    measured = [float(e) for e in re.findall(r"\d\.\d{4}", row.notes[0])]
    assert "quantized twice" in row.notes[0]
    assert 1.3 < measured[0] / measured[1] < 1.45
