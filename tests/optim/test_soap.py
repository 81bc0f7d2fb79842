"""SOAP against a plain loop, and what SOAP-LITE must keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moefx.errors import InputError
from moefx.optim import LiteConfig, Ramp, Soap, SoapLITE

Tensor = torch.Tensor
TOY: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "frequency": 3}
# Two different settings that treat every direction alike, and one that does not.
UNIFORM = LiteConfig(1.0, 0.5, 0.5)
FULL = LiteConfig(2.0, -0.25, 1.0, rank_fraction=0.3)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(steps: int, *shape: int) -> list[Tensor]:
    # Rows and columns of very different size, so that the order of the basis is well defined.
    rows, columns = torch.logspace(0, -1.5, shape[-2]).double(), torch.logspace(0, -1, shape[-1]).double()
    return [random(*shape, seed=20 + t) * rows[:, None] * columns for t in range(steps)]


class SoapLoop:
    """The reference's order of operations for one matrix, with LITE's rule written in weight space."""

    def __init__(self, w: Tensor, lite: tuple[float, float, float] = (1.0, 0.0, 0.0), k: int = 0, kappa: float = 0.05):
        self.w, self.t, self.lite, self.k, self.kappa = w.clone(), 0, lite, k, kappa
        m, n = w.shape
        self.L, self.R = torch.zeros(m, m).double(), torch.zeros(n, n).double()
        self.a, self.v = torch.zeros_like(w), torch.zeros_like(w)
        self.started = False

    def step(self, g: Tensor, lr: float = 0.01, decay: float = 0.1, b: float = 0.95, f: int = 3) -> None:
        if not self.started:
            self.L, self.R = (1 - b) * g @ g.T, (1 - b) * g.T @ g
            self.QL, self.QR = (torch.linalg.eigh(x).eigenvectors.flip(1) for x in (self.L, self.R))
            self.started = True
            return
        turned = self.QL.T @ g @ self.QR
        self.a = b * self.a + (1 - b) * turned
        self.v = b * self.v + (1 - b) * turned**2
        self.t += 1
        chi, b1, b2 = self.lite
        den = self.v.sqrt() + 1e-8
        n = self.a / den * (1 - b**self.t) ** 0.5 / (1 - b**self.t)
        h = self.kappa * turned / den * (1 - b**self.t) ** 0.5
        sharp = self.QR[:, : self.k] @ self.QR[:, : self.k].T
        flat = torch.eye(len(sharp)).double() - sharp
        back = [self.QL @ x @ self.QR.T for x in (n + b1 * h, n + b2 * h)]
        self.w = self.w - lr * (back[0] @ sharp + chi * back[1] @ flat)
        self.w = self.w - lr * decay * (self.w @ sharp + chi * self.w @ flat)
        raw = self.QL @ self.a @ self.QR.T
        self.L, self.R = b * self.L + (1 - b) * g @ g.T, b * self.R + (1 - b) * g.T @ g
        if self.t % f == 0:
            order = (self.QL.T @ self.L @ self.QL).diagonal().argsort(descending=True)
            self.v, self.QL = self.v[order], torch.linalg.qr(self.L @ self.QL[:, order]).Q
            order = (self.QR.T @ self.R @ self.QR).diagonal().argsort(descending=True)
            self.v, self.QR = self.v[:, order], torch.linalg.qr(self.R @ self.QR[:, order]).Q
        self.a = self.QL.T @ raw @ self.QR


def run(start: Tensor, grads: list[Tensor], **options: Any) -> tuple[Tensor, Soap]:
    p = nn.Parameter(start.clone())
    optimizer = Soap([p], **{**TOY, **options})
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach(), optimizer


def test_soap_is_the_reference_loop() -> None:
    # Square: after the first gradient of a wide matrix, R has a null space, and no basis of it is the right one.
    start, grads = random(9, 9), gradients(15, 9, 9)
    oracle = SoapLoop(start)
    for t, g in enumerate(grads):
        oracle.step(g)
        assert torch.allclose(run(start, grads[: t + 1])[0], oracle.w, atol=1e-9), t
    assert not torch.allclose(run(start, grads, frequency=2)[0], oracle.w, atol=1e-5)


@pytest.mark.parametrize("kappa", [None, 1.0])
def test_soap_lite_is_the_rule_in_weight_space(kappa: float | None) -> None:
    start, grads = random(9, 9), gradients(12, 9, 9)
    oracle = SoapLoop(start, (2.0, -0.25, 1.0), k=3, kappa=0.05 if kappa is None else kappa)
    for g in grads:
        oracle.step(g)
    found, _ = run(start, grads, lite=LiteConfig(2.0, -0.25, 1.0, rank_fraction=0.3, kappa=kappa))
    assert torch.allclose(found, oracle.w, atol=1e-9)


def test_invariant_1_neutral_lite_is_soap_bitwise() -> None:
    start, grads = random(7, 10).float(), [g.float() for g in gradients(24, 7, 10)]
    plain, _ = run(start, grads)
    for lite in (
        LiteConfig(1.0, 0.0, 0.0),
        LiteConfig(Ramp(1.0, 2.0, 50, 60), 0.0, 0.0),
        LiteConfig(rank_fraction=0.0),
    ):
        assert torch.equal(run(start, grads, lite=lite)[0], plain)
    assert not torch.equal(run(start, grads, lite=LiteConfig(2.0, 0.0, 0.0))[0], plain)
    first, second = (run(start, grads, lite=LiteConfig(1.0, 0.5, 0.5, rank_fraction=f))[0] for f in (0.1, 0.9))
    assert torch.equal(first, second)


@pytest.mark.parametrize("lite", [None, FULL, UNIFORM])
def test_invariant_7_a_stack_is_its_matrices(lite: LiteConfig | None) -> None:
    start, grads = random(3, 7, 10), gradients(10, 3, 7, 10)
    stack, _ = run(start, grads, lite=lite)
    for e in range(3):
        assert torch.allclose(run(start[e], [g[e] for g in grads], lite=lite)[0], stack[e], atol=1e-9)


@pytest.mark.parametrize("side", ["right", "left", "small"])
def test_invariant_7_transposed_storage(side: str) -> None:
    start, grads = random(7, 10), gradients(10, 7, 10)
    lite = LiteConfig(2.0, -0.25, 1.0, rank_fraction=0.3, side=side)
    found, _ = run(start, grads, lite=lite)
    stored, _ = run(start.T.contiguous(), [g.T for g in grads], lite=lite, layout="in_out")
    assert torch.allclose(stored.T, found, atol=1e-9)


def test_a_large_side_keeps_the_identity() -> None:
    start, grads = random(7, 10), gradients(8, 7, 10)
    found, optimizer = run(start, grads, max_precond_dim=8, lite=FULL)
    (state,) = optimizer.state.values()
    assert "left_basis" in state
    assert "right_basis" not in state
    assert torch.equal(found, run(start, grads, max_precond_dim=8)[0])  # no sharp directions are known there
    other = LiteConfig(2.0, -0.25, 1.0, side="left")
    assert not torch.equal(run(start, grads, max_precond_dim=8, lite=other)[0], found)


@pytest.mark.parametrize("lite", [None, FULL])
def test_experts_without_tokens_and_nan(lite: LiteConfig | None) -> None:
    start, grads = random(3, 7, 10), gradients(8, 3, 7, 10)
    clean, _ = run(start, grads, lite=lite)
    for g in grads[4:]:
        g[1] = 0
    grads[5][0, 2, 2] = torch.nan
    found, optimizer = run(start, grads, lite=lite)
    assert torch.equal(found[1], run(start, grads[:4], lite=lite)[0][1])
    assert torch.isfinite(found).all()
    assert torch.allclose(found[2], clean[2], atol=1e-12)
    assert list(optimizer.skipped().values()) == [1]


@pytest.mark.parametrize("first", [0, 4])  # the gradient that only gives the bases, and one that is a step
@pytest.mark.parametrize("lite", [None, FULL])
def test_a_gradient_whose_square_overflows_counts_as_not_finite(lite: LiteConfig | None, first: int) -> None:
    start = random(3, 7, 10).float()
    runs = []
    for size in (1e20, torch.nan):
        grads = [g.float() for g in gradients(9, 3, 7, 10)]
        grads[first][1, 2, 2] = size
        runs.append(run(start, grads, lite=lite))
    (found, optimizer), (other, _) = runs
    assert torch.equal(found, other)
    assert torch.isfinite(found).all()
    assert list(optimizer.skipped().values()) == [1]


def test_squares_that_overflow_raise_where_asked() -> None:
    p = nn.Parameter(random(3, 7, 10).float())
    optimizer = Soap([("experts", p)], nonfinite="raise")
    for g in gradients(3, 3, 7, 10):
        p.grad = g.float()
        optimizer.step()
    before = p.detach().clone()
    p.grad[1, 2, 2] = 1e20
    with pytest.raises(InputError, match=r"too large(.|\n)*experts(.|\n)*1 of its matrices"):
        optimizer.step()
    assert torch.equal(p, before)


def test_the_largest_squares_that_fit_do_no_harm() -> None:
    start, grads = random(7, 10).float(), [g.float() for g in gradients(9, 7, 10)]
    grads[4] *= 9e18 / grads[4].norm()  # the square is a quarter of the largest number
    found, optimizer = run(start, grads)
    assert torch.isfinite(found).all()
    assert all(torch.isfinite(x).all() for x in next(iter(optimizer.state.values())).values())
    assert optimizer.skipped() == {}


def test_an_expert_may_get_its_first_token_late() -> None:
    start, grads = random(2, 7, 10), gradients(12, 2, 7, 10)
    for g in grads[:5]:
        g[1] = 0
    found, optimizer = run(start, grads)
    assert torch.isfinite(found).all()
    assert not torch.equal(found[1], start[1])
    q = next(iter(optimizer.state.values()))["right_basis"]
    assert torch.allclose(q.mT @ q, torch.eye(10).double().expand(2, 10, 10), atol=1e-9)


def test_groups_run_adamw_with_their_own_betas() -> None:
    w, norm = nn.Parameter(random(7, 10)), nn.Parameter(random(5))
    optimizer = SoapLITE([{"params": [w]}, {"params": [norm], "role": "norm"}], lr=0.1)
    assert [g["betas"] for g in optimizer.param_groups] == [(0.95, 0.95), (0.9, 0.95)]
    with pytest.raises(InputError, match="frequency"):
        Soap([w], frequency=0)
    with pytest.raises(InputError, match="betas"):
        Soap([w], betas=(1.0, 0.9))
    with pytest.raises(InputError, match="no matrix"):
        Soap([norm])
