"""Precision metrics against numbers computed by hand from the eager model, and what measuring must leave alone."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import moefx
from moefx.errors import InputError
from moefx.precision.recipe import get_recipe
from tests.passes.test_casts import COL, ROW, Layer, make_inputs, optimized

pytest.importorskip("transformers")
Tensor = torch.Tensor
Row = dict[str, Any]
MEASURES = ("underflow", "saturation", "sqnr_db", "scale_spread")


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return make_inputs(64)


@pytest.fixture(scope="module")
def flow(layer: Layer, inputs: dict[str, Tensor]) -> moefx.OptimizedModule:
    return optimized(layer, inputs, "fp8_flow")


@pytest.fixture(scope="module")
def rows(flow: moefx.OptimizedModule, inputs: dict[str, Tensor]) -> list[Row]:
    return flow.precision_metrics(**inputs)


def pick(rows: list[Row], tensor: str, direction: str = "fwd", spec: str | None = None) -> Row:
    (row,) = [r for r in rows if (r["tensor"], r["direction"]) == (tensor, direction) and spec in (None, r["spec"])]
    return row


# -- by hand ---------------------------------------------------------------------------------------------------------


def by_hand(x: Tensor, br: int, bc: int) -> tuple[Tensor, Row]:
    """What E4M3 with power-of-two scales makes of [M, N], which blocks must divide, and what it loses; in float64."""
    x = x.detach().double()
    M, N = x.shape
    tiles = x.view(M // br, br, N // bc, bc)
    amax = tiles.abs().amax((1, 3), keepdim=True)
    exponent = (amax.clamp_min(1e-10) / 448).log2().ceil()
    codes = (tiles / exponent.exp2()).to(torch.float8_e4m3fn).double()
    y = (codes * exponent.exp2()).view(M, N)
    nonzero = x != 0
    used = (codes != 0).any(3).any(1)
    binades = torch.where(used, exponent[:, 0, :, 0], math.nan)
    columns = [b[~b.isnan()] for part in binades.split(128) for b in part.T]
    return y, {
        "underflow": ((y == 0) & nonzero).sum().item() / nonzero.sum().item(),
        "saturation": (tiles.abs() > 448 * exponent.exp2()).double().mean().item(),
        "sqnr_db": 10 * math.log10((x.square().sum() / (y - x).square().sum()).item()),
        "scale_spread": max((c.max() - c.min()).item() for c in columns if len(c)) if br == 1 else 0.0,
    }


def test_x_and_a_weight_by_hand(layer: Layer, inputs: dict[str, Tensor], rows: list[Row]) -> None:
    x = pick(rows, "X")
    _, want = by_hand(inputs["x"] * 1.5, 1, 128)
    assert {k: x[k] for k in MEASURES} == pytest.approx(want, rel=1e-12)
    assert (x["layer"], x["role"], x["spec"]) == ("experts", "input", ROW)
    assert x["scale_spread"] > 0
    for name, p in (("W1", layer.experts.gate_up_proj), ("W2", layer.experts.down_proj)):
        w = pick(rows, name)
        _, want = by_hand(p.flatten(0, 1), 128, 128)
        assert {k: w[k] for k in MEASURES} == pytest.approx(want, rel=1e-12)
        assert (w["role"], w["underflow"] > 0) == ("weight", True)


def test_what_activations_encode_by_hand(layer: Layer, inputs: dict[str, Tensor], rows: list[Row]) -> None:
    """Pre-activations are products of codes; the order of routed rows does not matter for blocks within a row."""
    x, _ = by_hand(inputs["x"] * 1.5, 1, 128)
    w1 = layer.experts.gate_up_proj
    w, _ = by_hand(w1.flatten(0, 1), 128, 128)
    idx = inputs["idx"]
    h = torch.einsum("tn,tkhn->tkh", x, w.view(w1.shape)[idx]).flatten(0, 1)
    row, (_, want) = pick(rows, "H"), by_hand(h, 1, 128)
    assert row["sqnr_db"] == pytest.approx(want["sqnr_db"], abs=0.01)
    assert (row["role"], row["direction"], row["spec"]) == ("hidden", "fwd", ROW)
    assert row["underflow"] == pytest.approx(want["underflow"], abs=1e-4)


def test_a_cast_written_by_an_activation_measures_as_one_of_its_own(layer: Layer, inputs: dict[str, Tensor]) -> None:
    """The same recipe with casts as nodes and with casts in the activations, forward and backward."""
    wide_h = get_recipe("fp8_flow").replace("wide_h", specs={"hidden.stored": None})
    fused, apart = (optimized(layer, inputs, r) for r in (wide_h, wide_h.replace("apart", fuse=False)))
    assert (fused.report.casts["fused"], apart.report.casts["fused"]) == (2, 0)
    a, b = (o.precision_metrics(**inputs) for o in (fused, apart))
    for tensor, direction, spec in (("A", "fwd", ROW), ("A", "fwd", COL), ("dH", "bwd", COL)):
        x, y = pick(a, tensor, direction, spec), pick(b, tensor, direction, spec)
        assert {k: x[k] for k in MEASURES} == {k: y[k] for k in MEASURES}
        assert 25 < x["sqnr_db"] < 40


def test_naive_and_flow_cast_x_alike(layer: Layer, inputs: dict[str, Tensor], rows: list[Row]) -> None:
    naive = optimized(layer, inputs, "fp8_naive").precision_metrics(**inputs)
    assert pick(naive, "X") == pick(rows, "X")
    assert pick(naive, "Xp")["sqnr_db"] == math.inf  # its input comes from the same codes
    assert len(naive) > len(rows)


def test_tiny_rows_of_a_gradient_underflow(layer: Layer, inputs: dict[str, Tensor]) -> None:
    """Blocks of 128 rows hold all rows of an expert: a row far below the others of its expert vanishes."""
    gen = torch.Generator().manual_seed(1)
    T, H = inputs["g"].shape
    g = (torch.rand(T, H, generator=gen) + 1) * torch.randint(0, 2, (T, H), generator=gen).mul(2).sub(1)
    tiny = torch.arange(T) % 4 == 1
    planted = {**inputs, "g": torch.where(tiny[:, None], g * 2.0**-24, g)}
    idx = inputs["idx"]
    lively = torch.isin(idx, idx[~tiny])  # routed to an expert that has a row of ordinary size
    want = (lively & tiny[:, None]).sum().item() / idx.numel()
    assert want > 0.1
    for recipe in ("fp8_naive", "fp8_flow"):  # cast again from dequantized codes, turned on codes
        opt = optimized(layer, inputs, recipe)
        assert pick(opt.precision_metrics(**{**inputs, "g": g}), "dO", "bwd", COL)["underflow"] == 0
        got = opt.precision_metrics(**planted)
        assert pick(got, "dO", "bwd", COL)["underflow"] == want
        assert pick(got, "dO", "bwd", COL)["role"] == "grad"
        row = pick(got, "dY", "bwd")  # the control: each row has scales of its own
        assert (row["underflow"], row["scale_spread"] >= 24) == (0, True)


# -- what the backward starts from -----------------------------------------------------------------------------------


class Outputs(Layer):
    """Several outputs: the loss of `Layer`, a large scalar beside it, and what the experts return."""

    def forward(self, x: Tensor, idx: Tensor, w: Tensor, g: Tensor) -> Any:
        y = self.experts(x * 1.5, idx, w)
        return {"aux": (y * g.flip(0)).square().sum(), "loss": (y * g).sum(), "y": y, "idx": idx + 1}


def test_the_output_called_loss_alone_is_differentiated(inputs: dict[str, Tensor], rows: list[Row]) -> None:
    opt = optimized(Outputs(), inputs, "fp8_flow")
    assert opt.precision_metrics(**inputs) == rows
    one = torch.ones(())
    assert opt.precision_metrics(**inputs, tangents=[None, one, None, None]) == rows
    assert opt.precision_metrics(**inputs, tangents={"aux": None, "loss": None, "y": inputs["g"], "idx": None}) == rows
    both = opt.precision_metrics(**inputs, tangents=[one, one, None, None])
    assert pick(both, "dY", "bwd") != pick(rows, "dY", "bwd")
    assert pick(both, "X") == pick(rows, "X")
    for tangents, message in (
        ([one], "1 tangents were given for 4 outputs"),
        ([None, None, None, one], "output 3 has no gradient"),
        ([None, torch.ones(2), None, None], "does not fit"),
        ([None, 1.0, None, None], "does not fit"),
        ([None] * 4, "every tangent is None"),
    ):
        with pytest.raises(InputError, match=message):
            opt.precision_metrics(**inputs, tangents=tangents)


class NoLoss(Layer):
    def forward(self, x: Tensor, idx: Tensor, w: Tensor, g: Tensor) -> Any:
        return self.experts(x * 1.5, idx, w)


def test_a_model_without_a_loss_needs_tangents(inputs: dict[str, Tensor], rows: list[Row]) -> None:
    opt = optimized(NoLoss(), inputs, "fp8_flow")
    with pytest.raises(InputError, match=r"no scalar(.|\n)*tangents="):
        opt.precision_metrics(**inputs)
    assert opt.precision_metrics(**inputs, tangents=inputs["g"]) == rows


class Twice(Layer):
    def forward(self, x: Tensor, idx: Tensor, w: Tensor, g: Tensor) -> Any:
        y = self.experts(x * 1.5, idx, w)
        return {"y": y, "again": y}


def test_tangents_of_one_tensor_under_two_names_add_up(inputs: dict[str, Tensor], rows: list[Row]) -> None:
    opt, g = optimized(Twice(), inputs, "fp8_flow"), inputs["g"]
    for tangents in ([g, None], [None, g], [g / 4, g * 0.75]):
        assert opt.precision_metrics(**inputs, tangents=tangents) == rows


# -- what must not change --------------------------------------------------------------------------------------------


class Noisy(Layer):
    """A buffer that counts calls, and dropout in front of the experts."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, idx: Tensor, w: Tensor, g: Tensor) -> Tensor:
        self.seen.add_(1)
        return super().forward(self.dropout(x), idx, w, g) * self.seen


def test_measuring_changes_nothing(inputs: dict[str, Tensor]) -> None:
    opt = optimized(Noisy(), inputs, "fp8_flow")
    opt(**inputs).backward()
    torch.manual_seed(3)
    watched = {**opt.state_dict(), **inputs, **{f"grad of {n}": p.grad for n, p in opt.named_parameters()}}
    before, state = {n: t.clone() for n, t in watched.items()}, torch.get_rng_state()
    got = opt.precision_metrics(**inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(watched[n], t) for n, t in before.items())
    assert all(p.grad is watched[f"grad of {n}"] for n, p in opt.named_parameters())
    # What was measured is what the next step draws.
    _, want = by_hand(nn.functional.dropout(inputs["x"], 0.5) * 1.5, 1, 128)
    assert pick(got, "X")["sqnr_db"] == pytest.approx(want["sqnr_db"], rel=1e-12)
    assert pick(got, "X")["underflow"] == want["underflow"]


def test_copies_and_pickles_measure_their_own_weights(flow: moefx.OptimizedModule, inputs: dict[str, Tensor]) -> None:
    want = flow.precision_metrics(**inputs)
    copied = copy.deepcopy(flow)
    with torch.no_grad():
        copied.experts.down_proj.view(-1)[0] = 1e6
    assert pick(copied.precision_metrics(**inputs), "W2") != pick(want, "W2")
    assert flow.precision_metrics(**inputs) == want
    assert pickle.loads(pickle.dumps(flow)).precision_metrics(**inputs) == want


def test_no_tensor_of_the_model_is_kept(flow: moefx.OptimizedModule, inputs: dict[str, Tensor]) -> None:
    copied = copy.deepcopy(flow)  # the original itself may still be held by what traced it
    copied.precision_metrics(**inputs)
    alive = weakref.ref(copied.original.experts.down_proj)
    del copied
    gc.collect()
    assert alive() is None
    (variant,) = flow._variants.values()
    assert [n for n, _ in variant.meter.joint.gm.named_parameters()] == []


def test_a_new_signature_is_compiled(layer: Layer, inputs: dict[str, Tensor]) -> None:
    opt = optimized(layer, inputs, "fp8_flow")
    other = make_inputs(32)
    _, want = by_hand(other["x"] * 1.5, 1, 128)
    assert pick(opt.precision_metrics(**other), "X")["sqnr_db"] == pytest.approx(want["sqnr_db"], rel=1e-12)
    assert len(opt.report.signatures) == 2
    opt(**other)
    assert len(opt.report.signatures) == 2


# -- where there is nothing to measure -------------------------------------------------------------------------------


def test_without_casts_there_are_no_rows(layer: Layer, inputs: dict[str, Tensor]) -> None:
    assert optimized(layer, inputs, "bf16").precision_metrics(**inputs) == []


def test_outside_a_training_step(flow: moefx.OptimizedModule, inputs: dict[str, Tensor]) -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(InputError, match="gradients are switched off"):
            flow.precision_metrics(**inputs)
    flow.eval()
    try:
        with pytest.raises(InputError, match="eval mode"):
            flow.precision_metrics(**inputs)
    finally:
        flow.train()
    assert len(flow.report.signatures) == 1


def test_a_frozen_model(inputs: dict[str, Tensor]) -> None:
    opt = optimized(Layer().requires_grad_(False), inputs, "fp8_flow")
    with pytest.raises(InputError, match="no backward to measure"):
        opt.precision_metrics(**inputs)
