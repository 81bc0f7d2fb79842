"""Graphs as text: golden files, differences, and what every line says.

After a wanted change of the text, write the golden files anew with MOEFX_UPDATE_GOLDEN=1 and read their diff.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import moefx
from moefx.passes.raise_experts import Block
from tests.family import zoo

GOLDEN = Path(__file__).parent / "golden"


class TinyBlock(nn.Module):
    """A router and four experts of width 6 over tokens of width 8, written with the dialect's marker."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4, bias=False)
        self.up = nn.Parameter(torch.randn(4, 12, 8) * 0.3)
        self.down = nn.Parameter(torch.randn(4, 8, 6) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, index = self.router(x).softmax(-1).topk(2, -1)
        return torch.ops.moefx.experts(x, index, weights, [self.up, self.down], "silu | nk")


@pytest.fixture(scope="module")
def tiny() -> moefx.OptimizedModule:
    # The marker is written by hand here, so raising has nothing to find; the block is announced instead.
    patch = pytest.MonkeyPatch()
    by_hand = Block("", "TinyBlock", False, reason="by hand")
    patch.setattr("moefx.passes.raise_experts.find_blocks", lambda model: [by_hand])
    torch.manual_seed(0)
    try:
        return moefx.optimize(TinyBlock(), (torch.randn(5, 8),), codegen="eager", verify=True)
    finally:
        patch.undo()


@pytest.mark.parametrize("stage", ["captured", "expand_experts", "dead_code", "drop_noops", "backward"])
def test_golden(stage: str, tiny: moefx.OptimizedModule) -> None:
    name = stage if stage in tiny.graphs else {"dead_code": "fuse_plan_permute", "drop_noops": "joint"}[stage]
    # The backward of top-k starts from zeros, which torch 2.11 and 2.13 spell differently.
    text = re.sub(r"aten\.(new_)?zeros\(.*?\)  #", "zeros  #", moefx.render(tiny.graphs[name], lines=False))
    text = text.replace("%new_zeros", "%zeros")
    file = GOLDEN / f"tiny_block.{stage}.txt"
    if os.environ.get("MOEFX_UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text(), f"the text of stage {name} changed (MOEFX_UPDATE_GOLDEN=1 writes it anew)"


def test_golden_would_notice_a_changed_operand(tiny: moefx.OptimizedModule) -> None:
    gm = tiny.graphs["expand_experts"]
    product = next(n for n in gm.graph.nodes if "grouped_mm" in str(n.target))
    before = moefx.render(gm, lines=False)
    product.args = (product.args[0], product.args[1], product.args[0])
    assert moefx.render(gm, lines=False) != before


def test_diff_shows_exactly_what_changed(tiny: moefx.OptimizedModule) -> None:
    a, b = tiny.graphs["captured"], tiny.graphs["expand_experts"]
    lines = moefx.diff(a, b).splitlines()[2:]
    removed = [line[1:] for line in lines if line.startswith("-")]
    added = [line[1:] for line in lines if line.startswith("+")]
    before, after = (moefx.render(g, lines=False).splitlines() for g in (a, b))
    assert sorted(set(before) - set(after)) == sorted(removed)
    assert sorted(set(after) - set(before)) == sorted(added)
    assert any("moefx.experts" in line for line in removed)
    assert moefx.diff(a, a) == ""


def test_lines_of_a_real_training_graph_say_shape_and_origin() -> None:
    entry = zoo.get("qwen3_moe")
    opt = moefx.optimize(zoo.build(entry), zoo.batch(entry), codegen="eager")
    gm = opt.graphs["joint"]
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    text = moefx.render(gm).splitlines()
    by_name = {line.split(":")[0].split(" =")[0].lstrip("%"): line for line in text}
    shaped = [n for n in calls if ": " in by_name[n.name].split(" = ")[0]]
    placed = [
        n for n in calls if "  # " in by_name[n.name] and (".py:" in by_name[n.name] or "model" in by_name[n.name])
    ]
    assert len(shaped) == len(calls)
    assert len(placed) >= 0.95 * len(calls), f"{len(placed)} of {len(calls)}"
    assert any("backward" in line for line in text)
    assert any("input model.layers.0.mlp.experts.gate_up_proj" in line for line in text)


def test_graphs_are_runnable_modules(tiny: moefx.OptimizedModule) -> None:
    gm = tiny.graphs["joint"]
    assert isinstance(gm, fx.GraphModule)
    x = torch.randn(5, 8)
    model = tiny.original
    values = {
        "router.weight": model.router.weight,
        "up": model.up,
        "down": model.down,
        "0": x,
        "gradient of output 0": torch.ones(5, 8),
    }  # type: ignore[union-attr]
    names = [n.meta["moefx_name"] for n in gm.graph.find_nodes(op="placeholder")]
    outs = gm(*[values[n] for n in names])
    with torch.no_grad():
        torch.testing.assert_close(outs[0], model(x))
