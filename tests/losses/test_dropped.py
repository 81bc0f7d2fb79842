"""Choices that no expert gets: dropped by a capacity, or of an identity expert. They count nowhere."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import moefx
from moefx import losses as L
from moefx.losses.metrics import SCORED, SHAPES
from moefx.view.routing_numbers import RoutingSum

from . import loops

Tensor = torch.Tensor
ops = torch.ops.moefx
F64 = torch.float64
T, K, E = 12, 3, 5


def layer(seed: int, masked: bool, scored: bool = True) -> tuple[L.Taps, loops.Layer, Tensor]:
    """A layer in which some choices are none, as taps and as loops over those that are left, and routing weights.

    The best choice of some tokens is dropped, and all of one.
    """
    g = torch.Generator().manual_seed(seed)
    logits, z, w = (torch.randn(shape, generator=g, dtype=F64) for shape in ((T, E), (T * K, 4), (T, K)))
    idx = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)])
    none = torch.tensor([E, E + 2, -1])[torch.arange(T * K).view(T, K) % 3]
    idx = torch.where((torch.rand(T, K, generator=g) < 0.4) | (torch.arange(T)[:, None] == 4), none, idx)
    mask = (torch.arange(T) % 4 != 1) if masked else None
    _, order, slot, _ = ops.plan(idx, E, 1)
    tap = L.Taps(
        "l", K, E, idx, logits if scored else None, w=w, z=z[order.clamp_min(0)], slot=slot, order=order, mask=mask,
        batch=2, dtype=F64,
    )  # fmt: skip
    chosen = [[e for e in row if 0 <= e < E] for row in idx.tolist()]
    rows = [[z[t * K + j] for j in range(K) if 0 <= int(idx[t, j]) < E] for t in range(T)]
    return tap, loops.Layer(logits, chosen, z=rows, counted=[] if mask is None else mask.tolist()), w


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_a_layer_that_dropped_everything_has_no_imbalance() -> None:
    tap = layer(0, False, True)[0]
    found = L.RoutingMetrics().local(replace(tap, idx=torch.full_like(tap.idx, -1)))
    assert found["load"].tolist() == [0] * E
    assert found["max_violation"].isnan()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scored", [False, True])
@torch.no_grad()  # type: ignore[untyped-decorator]
def test_metrics(masked: bool, scored: bool) -> None:
    made = [layer(seed, masked, scored) for seed in range(2)]
    taps, models = [m[0] for m in made], [m[1] for m in made]
    metrics = L.RoutingMetrics(choices=True)
    found = metrics.combine([metrics.local(t) for t in taps], taps)
    assert found.keys() == SHAPES.keys() - (set() if scored else set(SCORED))
    best: list[list[int]] = []
    for i, (tap, m, w) in enumerate(made):
        counts = Counter(e for t in m.tokens for e in m.idx[t])
        total = sum(counts.values())
        assert 0 < total < K * len(m.tokens)
        assert found["load"][i].tolist() == pytest.approx([counts[e] / total for e in range(E)])
        assert float(found["max_violation"][i]) == pytest.approx(max(counts.values()) / total * E - 1)
        assert int(found["dead_experts"][i]) == E - len(counts)
        cosines = [float(F.cosine_similarity(a, b, 0)) ** 2 for t in m.tokens for a, b in loops.pairs(m.z[t])]
        assert float(found["overlap"][i]) == pytest.approx(sum(cosines) / len(cosines))
        place = [{e: j for j, e in enumerate(row)} for row in tap.idx.tolist()]
        ranked = [
            sorted(row, key=lambda e: -float(m.s(t, e) if scored else w[t, place[t][e]])) for t, row in enumerate(m.idx)
        ]
        best.append([row[0] if row else -1 for row in ranked])
        want = [row + [-1] * (K - len(row)) if t in m.tokens else [-1] * K for t, row in enumerate(ranked)]
        assert found["choices"][i].tolist() == want
        if scored:
            mass = sum(float(m.s(t, e)) for t in m.tokens for e in m.idx[t]) / len(m.tokens)
            assert float(found["mass"][i]) == pytest.approx(mass)
            entropy = sum(loops.entropy([float(m.s(t, e)) for e in range(E)]) for t in m.tokens) / len(m.tokens)
            assert float(found["token_entropy"][i]) == pytest.approx(entropy / math.log(E))
    assert best[0][4] == -1
    steps = torch.zeros(1, E, E, dtype=F64)
    for t in models[0].tokens:
        if min(best[0][t], best[1][t]) >= 0:
            steps[0, best[0][t], best[1][t]] += 1
    assert torch.equal(found["transitions"], steps)


@pytest.mark.parametrize("first", [1, 5, 9])
@torch.no_grad()  # type: ignore[untyped-decorator]
def test_calls_taken_together_are_one_call_with_all_their_tokens(first: int) -> None:
    """Of different numbers of tokens, choices and pairs; the entropy of the mean scores is no mean of entropies."""
    taps, metrics, pooled = [layer(seed, False)[0] for seed in range(2)], L.RoutingMetrics(), RoutingSum()
    whole = metrics.combine([metrics.local(t) for t in taps], taps)
    apart = []
    for mask in (torch.arange(T) < first, torch.arange(T) >= first):
        some = [dataclasses.replace(t, mask=mask) for t in taps]
        apart.append(metrics.combine([metrics.local(t) for t in some], some))
        pooled.add(apart[-1])
    found = pooled.result()
    assert found.keys() == whole.keys()
    for name, want in whole.items():
        torch.testing.assert_close(found[name], want, rtol=1e-9, atol=1e-12, msg=name)
    means = sum(a["marginal_entropy"] for a in apart) / 2
    assert bool((means < whole["marginal_entropy"] - 1e-3).all())


@pytest.mark.parametrize("masked", [False, True])
def test_losses(masked: bool) -> None:
    made = [layer(seed, masked) for seed in range(2)]
    taps, models = [m[0] for m in made], [m[1] for m in made]
    for loss, definition in ((L.Specialization(), loops.specialization), (L.Coupling(), loops.coupling)):
        torch.testing.assert_close(loss(taps), definition(models).to(F64), rtol=1e-9, atol=0)
    tap, m, _ = made[0]
    halves = [[t for t in m.tokens if t // 6 == b] for b in range(2)]
    want = sum(E * m.c(e, run) / (K * len(run)) * m.p(e, run) for run in halves for e in range(E)) / 2
    torch.testing.assert_close(L.LoadBalance(form="sequence")([tap]), want, rtol=1e-9, atol=0)
    want = E * sum(m.c(e) / (K * len(m.tokens)) * m.p(e) for e in range(E))
    for form in ("switch", "global"):
        torch.testing.assert_close(L.LoadBalance(form=form)([tap]), want, rtol=1e-9, atol=0)
    pooled = E * sum(m.c(e) / len(m.tokens) * m.p(e) for e in range(E))
    torch.testing.assert_close(L.LoadBalance(form="transformers")([tap]), pooled, rtol=1e-9, atol=0)


class Capacity(nn.Module):
    """Each expert takes the first four of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4, bias=False)
        self.up = nn.ModuleList(nn.Linear(8, 12, bias=False) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(12, 8, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        w, idx = self.gate(rows).softmax(-1).topk(2)
        y = torch.zeros_like(rows)
        for e in range(4):
            token, choice = torch.where(idx == e)
            token, choice = token[:4], choice[:4]
            out = self.down[e](F.silu(self.up[e](rows[token])))
            y.index_add_(0, token, out * w[token, choice, None])
        return y.view_as(x)


def test_a_layer_with_a_capacity() -> None:
    torch.manual_seed(0)
    model, x = Capacity(), torch.randn(2, 7, 8)
    opt = moefx.optimize(model, (x,), codegen="eager", losses=[L.RoutingMetrics(choices=True)])
    torch.testing.assert_close(opt(x), model(x))
    taken: list[list[int]] = []
    used = Counter[int]()
    for row in model.gate(x.flatten(0, 1)).topk(2).indices.tolist():
        taken.append([e for e in row if used[e] < 4])
        used.update(row)
    sent = Counter(e for row in taken for e in row)
    assert sum(sent.values()) < 2 * len(taken)
    assert opt.routing["load"][0].tolist() == pytest.approx([sent[e] / sum(sent.values()) for e in range(4)])
    assert opt.routing["choices"][0].tolist() == [row + [-1] * (2 - len(row)) for row in taken]
