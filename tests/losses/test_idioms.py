"""The pair losses in every dispatch form: one model written in all idioms has one loss and one set of gradients.

The oracle reads the inputs of each layer by hooks and walks over tokens, choices and pairs.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import moefx
from moefx import losses as L
from moefx.models.moe_lm import IDIOMS, MoELM
from tests.profile import often

from . import loops

Tensor = torch.Tensor
SP, CP = L.Specialization(weight=0.5), L.Coupling(weight=0.5)
# A loop, weights by token, sorted rows in one product, all experts on all tokens, buffers with a capacity.
EVERY = ("A1", "C", "D3", "E3", "F")


def build(idiom: str) -> Any:
    model = MoELM(vocab=17, hidden=16, width=8, layers=2, heads=2, experts=4, k=2, idiom=idiom)
    g = torch.Generator().manual_seed(3)
    for block in model.layers:
        block.moe.reset_parameters(g, std=0.3)
    return model


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(0, 17, (2, 5), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


def grads(model: Any) -> dict[str, list[Tensor]]:
    """Gradients under names that all idioms share; those of experts as matrices [out, in]."""
    found = {n: [p.grad] for n, p in model.named_parameters() if ".moe." not in n}
    for i, block in enumerate(model.layers):
        held = copy.deepcopy(block.moe)
        for p, q in zip(held.parameters(), block.moe.parameters(), strict=True):
            p.data = torch.zeros_like(q) if q.grad is None else q.grad
        found |= {f"layers.{i}.{key}": views for key, views in held.views().items()}
    return found


@cache
def expected() -> tuple[float, float, float, dict[str, list[Tensor]]]:
    """Loss of the model with both, R_sp, R_cp and all gradients, by loops beside the forward of one idiom."""
    model, layers = build("A2"), list[loops.Layer]()

    def read(moe: Any, args: Any) -> None:
        x = args[0].flatten(0, -2)
        logits = F.linear(x, moe.gate.weight)
        idx = logits.topk(2).indices.tolist()
        z = [[F.silu(m.gate_proj(row)) * m.up_proj(row) for m in (moe.experts[e] for e in chosen)]
             for row, chosen in zip(x, idx, strict=True)]  # fmt: skip
        layers.append(loops.Layer(logits, idx, z=z))

    for block in model.layers:
        block.moe.register_forward_pre_hook(read)
    out = model(**inputs())
    sp, cp = loops.specialization(layers), loops.coupling(layers)
    loss = out["loss"] + SP.weight * sp + CP.weight * cp
    loss.backward()
    return loss.item(), sp.item(), cp.item(), grads(model)


@pytest.mark.parametrize("idiom", often([name for name in IDIOMS if name != "G"], EVERY))
def test_pair_losses_of_every_idiom(idiom: str) -> None:
    model = build(idiom)
    opt = moefx.optimize(model, inputs(), codegen="eager", losses=[SP, CP])
    out = opt(**inputs())
    out["loss"].backward()
    loss, sp, cp, want = expected()
    assert out["loss"].item() == pytest.approx(loss, rel=1e-5)
    assert float(opt.losses["sp"]) == pytest.approx(sp, rel=1e-4)
    assert float(opt.losses["cp"]) == pytest.approx(cp, rel=1e-5)
    mine = grads(model)
    assert mine.keys() == want.keys()
    for name, views in want.items():
        for got, right in zip(mine[name], views, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-3 * float(right.abs().max()) + 1e-7, msg=name)


def test_experts_that_choose_their_tokens_are_refused() -> None:
    with pytest.raises(moefx.PassError, match="losses are not defined where experts choose their tokens"):
        moefx.optimize(build("G"), inputs(), codegen="eager", losses="sp")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "identity"])
@pytest.mark.parametrize("name", ["sp", "cp"])
def test_pair_losses_in_bf16(name: str, score: str, masked: bool) -> None:
    """Of rounded logits and activations everything is computed in fp32; gradients are rounded once more."""
    g, T, k, E, I = torch.Generator().manual_seed(0), 12, 3, 6, 40
    mask = torch.arange(T) % 4 != 1 if masked else None
    taps, layers, low, high = list[L.Taps](), list[loops.Layer](), list[Tensor](), list[Tensor]()
    for i in range(3):
        logits, z = (torch.randn(s, generator=g).mul_(3).bfloat16().requires_grad_() for s in ((T, E), (T * k, I)))
        wide = [t.detach().double().requires_grad_() for t in (logits, z)]
        idx = logits.topk(k).indices
        _, order, slot, _ = torch.ops.moefx.plan(idx, E, 1)
        taps.append(L.Taps(f"{i}", k, E, idx, logits, score, z=z[order], slot=slot, order=order, mask=mask))
        rows = [[wide[1][t * k + j] for j in range(k)] for t in range(T)]
        layers.append(loops.Layer(wide[0], idx.tolist(), score, rows, [], [] if mask is None else mask.tolist()))
        low, high = [*low, logits, z], [*high, *wide]
    loss, definition = {"sp": (L.Specialization(), loops.specialization), "cp": (L.Coupling(), loops.coupling)}[name]
    got, want = loss(taps), definition(layers)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    pairs = zip(
        *(torch.autograd.grad(v, ls, materialize_grads=True) for v, ls in ((got, low), (want, high))), strict=True
    )
    moved = 0
    for mine, theirs in pairs:
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.double(), theirs, rtol=2**-7, atol=2**-9 * float(theirs.abs().max()))
        moved += bool(theirs.any())
    assert moved == 3
