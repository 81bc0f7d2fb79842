"""Every idiom of models/moe_lm.py through `optimize`: raised, proven, and the same model before and after."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moefx
from moefx.models.moe_lm import IDIOMS, MoELM
from moefx.passes.raise_experts import raised

from ..profile import often
from .harness import changed, differences, snapshot, step

VOCAB = 40
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "A5": [{"capacity": 5}],
    "B": [{"capacity": 5}],
    "F": [{"capacity": 5}],
}
CASES = [(n, o) for n in IDIOMS for o in [{}, {"act": "gelu", "bias": True}, {"gated": False}, *OPTIONS.get(n, [])]]
WORDS = {
    **dict.fromkeys(("A1", "A2", "A3", "A4", "A5", "A6", "A6p"), "loop over experts"),
    "B": "one-hot dispatch",
    "C": "gathered weights",
    **dict.fromkeys(("D1", "D2", "D3", "H"), "sorted rows"),
    **dict.fromkeys(("E1", "E2", "E3"), "every expert on every token"),
    "F": "padded buffer",
    "G": "expert choice",
}


def layer(name: str, **options: Any) -> nn.Module:
    extra = {"renormalize": False} if name == "G" else {}
    return IDIOMS[name](16, 8, 4, 2, **extra, **options)


def model(name: str, dtype: torch.dtype = torch.float32, layers: int = 2) -> nn.Module:
    extra = {"renormalize": False} if name == "G" else {}
    made = MoELM(VOCAB, 32, 16, layers, 2, 4, 2, name, **extra)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(10 if p.dim() > 1 else 1)  # 0.02 would make the experts as good as linear
    return made.to(dtype)


def batch(rows: int = 2, tokens: int = 16, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def gradients(m: nn.Module, b: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    m.zero_grad()
    loss = m(**b)["loss"]
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda v: str(v))
def test_a_layer_is_raised_with_a_certificate(name: str, options: dict[str, Any]) -> None:
    made, x = layer(name, **options), torch.randn(3, 11, 16)
    before = snapshot(made)
    want = step(copy.deepcopy(made), (x,))
    with raised(made, (x,), {}) as (block,):
        assert block.raised, block.reason
        assert str(block.idiom).startswith(WORDS[name])
        proof = block.certificate
        assert proof is not None
        assert proof["cases"] + len(proof["skipped"]) >= 10
        assert 0 < proof["errors"]["float32"]["output"] < 1e-5
        assert proof["errors"]["float32"]["gradient"] < 1e-4
        assert proof["errors"]["bfloat16"]["output"] < 3e-2
        print(name, options, block.idiom, proof["errors"])
        assert differences(step(made, (x,)), want) == []
    assert changed(before, snapshot(made)) == []


@pytest.mark.parametrize("name", often(IDIOMS, ("A1", "A3", "A5", "A6", "C", "D2", "D3", "E1", "F", "H")))
def test_a_model_trains_alike_in_float32(name: str) -> None:
    m = model(name)
    keys = list(m.state_dict())
    loss, grads = gradients(m, batch())
    opt = moefx.optimize(m, batch(), codegen="eager", strict=True)
    rows = opt.report.to_dict()["blocks"]
    assert [(r["path"], r["raised"]) for r in rows] == [("layers.0.moe", True), ("layers.1.moe", True)]
    got, mine = gradients(opt, batch())
    assert abs(got - loss) < 1e-5
    assert mine.keys() == grads.keys()
    for n, g in grads.items():
        assert (mine[n] - g).norm() <= 1e-4 * g.norm(), n
    assert list(opt.state_dict()) == keys


@pytest.mark.parametrize("name", often(IDIOMS, ("A2", "A4", "B", "D1", "E2", "G")))
def test_a_model_trains_alike_in_bfloat16(name: str) -> None:
    """Against float64 the raised model is no worse than the original, where both choose the same experts."""
    m = model(name, torch.bfloat16, layers=1)
    truth, _ = gradients(copy.deepcopy(m).double(), batch())
    loss, grads = gradients(m, batch())
    opt = moefx.optimize(m, batch(), codegen="eager", strict=True)
    got, mine = gradients(opt, batch())
    assert abs(got - truth) <= 2 * abs(loss - truth) + 4e-2
    largest = max(g.float().norm() for g in grads.values())
    for n, g in grads.items():
        assert (mine[n].float() - g.float()).norm() <= 6e-2 * g.float().norm() + 1e-2 * largest, n


def test_graphs_do_not_grow_with_the_number_of_experts() -> None:
    counts = set()
    for experts in (4, 8, 16):
        m = MoELM(VOCAB, 16, 8, 1, 2, experts, 2, "A2")
        opt = moefx.optimize(m, batch(), codegen="eager")
        counts.add(len(opt.graphs["joint"].graph.nodes))
    assert len(counts) == 1


@pytest.mark.parametrize("recipe", ["fp8_flow", "mxfp8"])
@pytest.mark.parametrize("name", ["A3", "B", "G"])
def test_precision_recipes_reach_hand_written_experts(name: str, recipe: str) -> None:
    m = MoELM(VOCAB, 128, 128, 1, 2, 4, 2, name, **({"renormalize": False} if name == "G" else {}))
    loss, _ = gradients(m, batch(2, 24))
    opt = moefx.optimize(m, batch(2, 24), recipe=recipe, codegen="eager")
    assert opt.report.casts["before"] > opt.report.casts["after"] > 0
    got, _ = gradients(opt, batch(2, 24))
    assert abs(got - loss) < 2e-2


def test_routers_of_hand_written_layers_come_into_normal_form() -> None:
    opt = moefx.optimize(model("A2"), batch(), codegen="eager", passes=["raise_routers"])
    routes = [n for n in opt.graphs["raise_routers"].graph.nodes if "route" in str(n.target)]
    assert [str(n.args[-1]) for n in routes] == ["softmax f32 | top2 | sum"] * 2


def test_other_sizes_and_modes_are_variants_of_their_own() -> None:
    m = model("A3")
    opt = moefx.optimize(m, batch(), codegen="eager")
    for b in (batch(1, 5, 1), batch(3, 16, 2)):
        loss, grads = gradients(m, b)
        got, mine = gradients(opt, b)
        assert abs(got - loss) < 1e-5
        assert all((mine[n] - g).norm() <= 1e-4 * g.norm() for n, g in grads.items())
    with torch.no_grad():
        assert (opt.eval()(**batch())["logits"] - m(**batch())["logits"]).abs().max() < 1e-5


def test_a_symbolic_batch() -> None:
    m = model("A4")
    opt = moefx.optimize(m, batch(4, 16), codegen="eager", dynamic={"input_ids": (0,), "labels": (0,)})
    for rows in (4, 7):
        loss, _ = gradients(m, batch(rows, 16, rows))
        assert abs(gradients(opt, batch(rows, 16, rows))[0] - loss) < 1e-5
    assert len(opt.report.signatures) == 1


class Almost(nn.Module):
    """One block that is a MoE, and one whose second expert is another function."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.odd = layer("A1"), layer("A1")
        self.odd.experts[1].act = "relu"

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(self.good(x))


def test_strict_refuses_what_is_otherwise_left_alone() -> None:
    m, x = Almost(), torch.randn(2, 9, 16)
    with pytest.raises(moefx.CaptureError, match=r"odd \(LoopWhere\)(.|\n)*expert 1"):
        moefx.optimize(m, (x,), codegen="eager", strict=True)
    want = step(m, (x,))
    with raised(m, (x,), {}) as blocks:
        assert [(b.path, b.raised) for b in blocks] == [("good", True), ("odd", False)]
        assert differences(step(m, (x,)), want) == []


def test_the_report_shows_the_proof() -> None:
    opt = moefx.optimize(model("A2"), batch(), codegen="eager")
    (line,) = [text for text in str(opt.report).splitlines() if "layers.0.moe" in text]
    assert "loop over experts: silu | nk" in line
    assert "proven: float32" in line
    assert "bfloat16" in line
