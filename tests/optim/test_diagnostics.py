"""The diagnostics of Muon-LITE against dense float64 algebra on what the steps did."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from moefx.optim import LiteConfig, Muon, Ramp

from .oracles import spectrum, svd_polar

Tensor = torch.Tensor
NAMES = {
    "update_rms",
    "update_rms_sharp",
    "update_rms_flat",
    "effective_rank",
    "rank",
    "captured",
    "inverted",
    "cosine",
}


def noisy(g: Tensor, t: int, size: float = 0.02) -> Tensor:
    return g + size * torch.randn(g.shape, generator=torch.Generator().manual_seed(t), dtype=torch.float64)


def stepped(g: Tensor, lite: LiteConfig | None, steps: int = 15, **options: Any) -> tuple[Muon, nn.Parameter, Tensor]:
    """The optimizer after some steps, its parameter, and the last step's update per unit of learning rate."""
    p = nn.Parameter(torch.zeros_like(g))
    optimizer = Muon([{"params": [p], "names": ["w"]}], lr=0.1, lite=lite, weight_decay=0.0, **options)
    update = torch.zeros_like(g)
    for t in range(steps):
        p.grad = noisy(g, t)
        before = p.detach().clone()
        optimizer.step()
        update = (before - p.detach()) / 0.1
    return optimizer, p, update


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_fast_mode_against_dense_algebra(shape: tuple[int, int]) -> None:
    g = spectrum(*shape, 50, gap=3)
    optimizer, p, update = stepped(g, LiteConfig(rank_fraction=0.125))
    (found,) = optimizer.diagnostics().values()
    assert set(found) == NAMES
    m, n, k = *shape, 3
    state = optimizer.state[p]
    mixed = state["momentum_buffer"] + 0.05 / 0.95 * p.grad
    P = state["basis"][0, :, :k] @ state["basis"][0, :, :k].T
    exact = torch.linalg.svd(mixed).Vh[:k]
    assert torch.allclose(P, exact.T @ exact, atol=1e-4)
    assert found["effective_rank"].item() == pytest.approx(k)
    assert found["rank"].item() == k
    assert found["captured"].item() == pytest.approx(
        (mixed @ exact.T).square().sum().item() / mixed.square().sum().item()
    )
    assert not found["inverted"].item()
    assert found["update_rms"].item() == pytest.approx(update.square().mean().sqrt().item())
    assert found["update_rms_sharp"].item() == pytest.approx((update @ P).norm().item() / math.sqrt(m * k), rel=1e-6)
    flat = (update - update @ P).norm().item() / math.sqrt(m * (n - k))
    assert found["update_rms_flat"].item() == pytest.approx(flat, rel=1e-6)
    cosine = (svd_polar(mixed) * svd_polar(p.grad)).sum() / min(shape)
    assert found["cosine"].item() == pytest.approx(cosine.item(), abs=0.02)


def test_plain_muon_moves_every_direction_alike_and_lite_the_flat_ones_more() -> None:
    g = spectrum(32, 32, 50, gap=4)
    (plain,) = stepped(g, None)[0].diagnostics().values()
    assert set(plain) == {"update_rms"}
    assert plain["update_rms"].item() == pytest.approx(0.2, rel=0.01)
    (uniform,) = stepped(g, LiteConfig(1.0, Ramp(0.5, 1.0, 90, 99), Ramp(0.5, 1.0, 90, 99)))[0].diagnostics().values()
    assert set(uniform) == {"update_rms"}
    (boosted,) = stepped(g, LiteConfig(2.0, 0.0, 0.0))[0].diagnostics().values()
    assert boosted["update_rms_sharp"].item() == pytest.approx(0.2, rel=0.01)
    assert boosted["update_rms_flat"].item() == pytest.approx(0.4, rel=0.01)


@pytest.mark.parametrize("mode", ["fast", "parity"])
def test_overlap_of_successive_projectors(mode: str) -> None:
    lite = LiteConfig(2.0, 0.0, 0.0, rank_fraction=0.1, mode=mode)
    g, other = spectrum(32, 48, 20, gap=4), spectrum(32, 48, 20, seed=9, gap=4)
    optimizer, p, _ = stepped(g, lite, polar_steps=10)
    assert "overlap" not in optimizer.diagnostics()["w"]
    before = projector(optimizer, p, mode)
    p.grad = noisy(g, 99)
    optimizer.step()
    after = projector(optimizer, p, mode)
    found = optimizer.diagnostics()["w"]["overlap"].item()
    assert found == pytest.approx((before * after).sum().item() / (before.norm() * after.norm()).item(), abs=1e-6)
    assert found > 0.85  # parity's rank moves in every step
    for t in range(60):
        p.grad = noisy(other, t)
        optimizer.step()
    assert optimizer.diagnostics()["w"]["overlap"].item() < 0.4  # unrelated directions of 48


def projector(optimizer: Muon, p: nn.Parameter, mode: str) -> Tensor:
    """Dense, from the state; parity's by its definition with exact polar factors."""
    state = optimizer.state[p]
    if mode == "fast":
        V = state["basis"][0, :, :4]
        return V @ V.T
    mixed = state["momentum_buffer"] + 0.05 / 0.95 * p.grad
    o = svd_polar(mixed)
    s = 0.5 * (o + svd_polar(mixed / (mixed.norm() * state["ratio"].item() + 1e-9) - o))
    return s.T @ s


def test_an_inverted_controller_is_reported_and_the_fast_basis_is_not_inverted() -> None:
    U, _, Vh = torch.linalg.svd(spectrum(128, 128, 10))
    g = (U @ torch.diag(torch.arange(1, 129, dtype=torch.float64) ** -2.25) @ Vh).float()
    found = {}
    for name, lite in (
        ("released", LiteConfig(2.0, 0.0, 0.0, mode="parity", guard=False)),
        ("guarded", LiteConfig(2.0, 0.0, 0.0, mode="parity")),
        ("fast", LiteConfig(2.0, 0.0, 0.0)),
    ):
        p = nn.Parameter(torch.zeros(128, 128))
        optimizer = Muon([p], lr=0.01, lite=lite)
        for _ in range(80):
            p.grad = g.clone()
            optimizer.step()
        (found[name],) = optimizer.diagnostics().values()
    assert found["released"]["inverted"].item()
    assert found["released"]["captured"].item() < 0.05
    assert found["guarded"]["inversions"].item() > 0
    assert not found["fast"]["inverted"].item()
    best = torch.linalg.svdvals(g).square()
    assert found["fast"]["captured"].item() == pytest.approx((best[:13].sum() / best.sum()).item(), rel=1e-3)


def test_stacks_give_one_number_per_matrix_and_nothing_changes() -> None:
    stack, norm = nn.Parameter(torch.randn(3, 12, 20)), nn.Parameter(torch.ones(12))
    groups = [{"params": [stack], "names": ["experts"]}, {"params": [norm], "role": "norm"}]
    optimizer = Muon(groups, lr=0.1, lite=LiteConfig())
    stack.grad, norm.grad = torch.randn(3, 12, 20), torch.ones(12)
    stack.grad[1] = 0  # an expert without tokens
    optimizer.step()
    before = [stack.detach().clone(), *(v.clone() for v in optimizer.state[stack].values())]
    found = optimizer.diagnostics()
    assert set(found) == {"experts"}
    assert all(v.shape == (3,) for v in found["experts"].values())
    assert found["experts"]["captured"][1] == 0
    assert not found["experts"]["inverted"].any()
    assert all(torch.isfinite(v.double()).all() for v in found["experts"].values())
    for x, y in zip(before, [stack, *optimizer.state[stack].values()], strict=True):
        assert torch.equal(x, y)
    stack.grad = None
    assert optimizer.diagnostics() == {}


def test_in_out_storage_reports_the_same() -> None:
    g = spectrum(24, 40, 50, gap=3)
    found = []
    for layout, start in (("out_in", g), ("in_out", g.T.contiguous())):
        p = nn.Parameter(torch.zeros_like(start))
        optimizer = Muon([p], lr=0.1, lite=LiteConfig(), layout=layout)
        for t in range(5):
            p.grad = noisy(g, t) if layout == "out_in" else noisy(g, t).T.contiguous()
            optimizer.step()
        found += optimizer.diagnostics().values()
    for name, value in found[0].items():
        assert torch.allclose(value.double(), found[1][name].double(), atol=1e-9), name
