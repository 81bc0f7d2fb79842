"""Codes move through whatever only moves rows, where that moves fewer bytes and shows nobody a rounded value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx

import moefx
from moefx.graph.casts import dequantize_nodes, quantize_nodes
from moefx.graph.edit import arguments
from moefx.precision.recipe import get_recipe

from .test_casts import Layer, make_inputs, optimized

Tensor = torch.Tensor
T = 32
ONLY_ROWS = get_recipe("fp8_flow").replace("only_rows", specs={"input.stored": None, "input.wgrad": None,
                                                               "grad.wgrad": None, "hidden.stored": None})  # fmt: skip
MOVES: dict[str, Any] = {
    "selects": lambda x: x.index_select(0, torch.arange(4 * T) % T),
    "slices": lambda x: torch.cat([x, x])[: T + 8].index_select(0, torch.arange(4 * T) % T),
    "concatenates": lambda x: torch.cat([x, x, x, x]),
    "views": lambda x: x.index_select(0, torch.arange(4 * T) % T).view(2, 2 * T, 256).reshape(4 * T, 256),
}


class Moved(Layer):
    """Tokens are repeated before they reach the experts."""

    def __init__(self, move: Any) -> None:
        super().__init__()
        self.move = move

    def forward(self, x: Tensor, idx: Tensor, w: Tensor, g: Tensor) -> Any:
        """x [T, H], the others of 4 T tokens."""
        return (self.experts(self.move(x.exp()), idx, w) * g).sum()


class Seen(Moved):
    """And something reads the repeated tokens wide."""

    def forward(self, x: Tensor, idx: Tensor, w: Tensor, g: Tensor) -> Any:
        """As above."""
        x = self.move(x.exp())
        return (self.experts(x, idx, w) * g).sum() + x.sin().sum()


def inputs() -> dict[str, Tensor]:
    """Of 4 T tokens, x of T."""
    found = make_inputs(4 * T)
    return {**found, "x": found["x"][:T].contiguous()}


def first_cast(opt: moefx.OptimizedModule, stage: str) -> tuple[int, str]:
    """Rows of the first cast that is no weight's, and the op in front of it."""
    q = next(n for n in quantize_nodes(opt.graphs[stage].graph) if n.meta["moefx_cast"].role == "input")
    x: Any = q.args[0]
    return x.meta["val"].shape[0], str(x.target).split(".")[1]


@pytest.mark.parametrize("kind", list(MOVES))
def test_a_quantize_moves_in_front_of_what_repeats_rows(kind: str) -> None:
    pytest.importorskip("transformers")
    opt = optimized(Moved(MOVES[kind]), inputs(), ONLY_ROWS, verify=True)
    assert first_cast(opt, "quantize")[0] == 4 * T
    assert first_cast(opt, "propagate_scales") == (T, "exp")
    (row,) = [p for p in opt.report.passes if p.name == "propagate_scales"]
    assert row.matched >= 2
    assert row.error == 0.0  # blocks within a row do not see their neighbours


@pytest.mark.parametrize("kind", list(MOVES))
def test_no_wide_reader_is_given_rounded_values(kind: str) -> None:
    pytest.importorskip("transformers")
    model, values = Seen(MOVES[kind]), inputs()
    opt = optimized(model, values, ONLY_ROWS, verify=True)
    assert first_cast(opt, "propagate_scales")[0] == 4 * T
    (row,) = [p for p in opt.report.passes if p.name == "propagate_scales"]
    assert row.error in (None, 0.0)
    # What the second reader adds is exact: of the sum, only the experts' part is rounded.
    experts = optimized(Moved(MOVES[kind]), values, ONLY_ROWS)
    want = experts(**values).item() + float(model.move(values["x"].exp()).sin().sum())
    assert opt(**values).item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    ("stored", "moves"), [("e4m3 128x1 po2/rceil eps=1e-10", True), ("e4m3 64x1 po2/rceil", False)]
)
def test_a_wide_value_is_cast_to_what_does_not_follow_from_its_codes(stored: str, moves: bool) -> None:
    """Columns of 128 lose nothing that rows of 128 kept; columns of 64 would."""
    pytest.importorskip("transformers")
    specs = {"input.wire": None, "grad.wire": None, "input.stored": stored, "input.wgrad": stored,
             "grad.wgrad": "e4m3 128x1 po2/rceil"}  # fmt: skip
    recipe = ONLY_ROWS.replace("stored", specs=specs)
    opt = optimized(Moved(MOVES["selects"]), inputs(), recipe)
    assert first_cast(opt, "quantize")[0] == 4 * 2 * T
    assert first_cast(opt, "fold_casts" if "fold_casts" in opt.graphs else "quantize")[0] == (
        4 * T if moves else 4 * 2 * T
    )  # the wire is wide


def test_a_move_that_saves_nothing_is_not_made() -> None:
    pytest.importorskip("transformers")
    values = make_inputs(T)
    opt = optimized(Moved(lambda x: x.view(2, T // 2, 256).reshape(T, 256)), values, ONLY_ROWS)
    assert first_cast(opt, "quantize") == first_cast(opt, "propagate_scales")


@pytest.mark.parametrize("rounds", ["", " sr"])
def test_a_stochastic_cast_is_not_shared_by_the_copies_of_a_row(rounds: str) -> None:
    """Each copy has a draw of its own where the recipe casts it; in front of a gather they would share one."""
    pytest.importorskip("transformers")
    row = ONLY_ROWS.specs["input.fprop"] + rounds
    recipe = ONLY_ROWS.replace("drawn", specs={"input.wire": None, "grad.wire": None, "input.fprop": row})
    model = Moved(MOVES["selects"])
    model.experts.requires_grad_(False)  # or the weight gradient would read the rows wide, and nothing move
    values = inputs()
    values["x"].requires_grad_()
    opt = optimized(model, values, recipe, verify=True)
    assert first_cast(opt, "quantize")[0] == 8 * T
    (found,) = [p for p in opt.report.passes if p.name == "propagate_scales"]
    # In front of the experts' gather, and behind the wire, which is wide. The gradients' cast moves either way.
    assert first_cast(opt, "propagate_scales")[0] == (8 * T if rounds else 4 * T)
    assert (found.numerics, found.error) == ("rounding", 0.0)


def test_codes_that_were_drawn_move_but_are_not_drawn_again() -> None:
    """A wire's codes go through the gather behind it; the view in front of the wire stays wide."""
    pytest.importorskip("transformers")
    specs = {k: ONLY_ROWS.specs[k] + " sr" for k in ("input.wire", "input.fprop")}
    recipe = ONLY_ROWS.replace("drawn", specs=specs)
    opt = optimized(Moved(MOVES["selects"]), inputs(), recipe, verify=True)
    assert first_cast(opt, "quantize")[0] == first_cast(opt, "propagate_scales")[0] == 4 * T
    (found,) = [p for p in opt.report.passes if p.name == "propagate_scales"]
    assert found.matched >= 1
    assert found.error == 0.0


def test_wires_of_two_specs_leave_a_value_as_it_is_written() -> None:
    pytest.importorskip("transformers")

    class Two(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.other = Layer()

        def forward(self, x: Tensor, idx: Tensor, w: Tensor, g: Tensor) -> Any:
            y = x.exp()
            return ((self.experts(y, idx, w) + self.other.experts(y, idx, w)) * g).sum()

    other = {"input.wire": "e4m3 1x64 po2/rceil", "input.fprop": "e4m3 1x64 po2/rceil"}
    recipe = ONLY_ROWS.replace("two", rules=[moefx.Rule("other.*", other)])
    opt = optimized(Two(), make_inputs(T), recipe, verify=True)
    specs = [s for n in quantize_nodes(opt.graphs["propagate_scales"].graph) for s in arguments(n)["specs"]]
    assert other["input.wire"] in specs
    assert ONLY_ROWS.specs["input.wire"] in specs


@dataclass(frozen=True)
class Confuse(moefx.Pass):
    """Reads codes under another spec than they were written under."""

    level = "training"
    requires = frozenset({"quantized"})
    numerics = "changes"

    def run(self, graph: fx.Graph, ctx: moefx.Context) -> None:
        """Change the first dequantize."""
        d = dequantize_nodes(graph)[0]
        if "floor" not in arguments(d)["spec"]:
            d.update_arg(3, "e4m3 1x128 po2/floor")
            ctx.matched(d)


def test_two_specs_on_one_edge_are_an_error_that_names_both() -> None:
    pytest.importorskip("transformers")
    passes = moefx.pipeline("fp8_flow", codegen="eager").insert(Confuse(), after="quantize")
    with pytest.raises(moefx.PassError) as caught:
        moefx.optimize(Layer(), make_inputs(T), recipe="fp8_flow", passes=passes, codegen="eager")
    for text in ("reads codes as 'e4m3 1x128 po2/floor'", "written as 'e4m3 1x128 po2/rceil eps=1e-10'", "experts"):
        assert text in str(caught.value)
