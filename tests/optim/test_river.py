"""What LITE promises, on problems small enough to know the answer: a quadratic with a river, and one linear mode."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import nn

from moefx.optim import CosineCoupled, LiteConfig, Muon, Ramp, Soap, muon_update

from .oracles import ExactLite, river

Tensor = torch.Tensor
SHARP = 0.125  # of 24: the three sharp directions; parity mode has one more than its share
RAMP = Ramp(0.0, 1.0, 30, 165)  # as the released cosine schedule: from the warm-up to mid-run
BOTH = Ramp(-0.25, 1.0, 30, 165)


def product(lite: LiteConfig | None, **options: object) -> Callable[[Tensor], Callable[[Tensor, float], None]]:
    def run(w: Tensor) -> Callable[[Tensor, float], None]:
        p = nn.Parameter(w)
        optimizer = Muon([p], lite=lite, weight_decay=0.0, **options)  # type: ignore[arg-type]

        def update(grad: Tensor, lr: float) -> None:
            p.grad = grad
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()

        return update

    return run


def exact(chi: float, beta1: float, beta2: Callable[[int], float], **options: str) -> Callable[[Tensor], object]:
    def run(w: Tensor) -> Callable[[Tensor, float], None]:
        oracle, step = ExactLite(w, 3, **options), [0]  # type: ignore[arg-type]

        def update(grad: Tensor, lr: float) -> None:
            oracle.step(grad, lr, chi, beta1, beta2(step[0]))
            w.copy_(oracle.w)
            step[0] += 1

        return update

    return run


def zero(_: int) -> float:
    return 0.0


@pytest.fixture(scope="module")
def losses() -> dict[str, float]:
    """At lr 0.1; fast mode as shipped."""
    return {
        "muon": river(product(None), lr=0.1),
        "damped": river(product(LiteConfig(1.0, 0.0, RAMP, rank_fraction=SHARP)), lr=0.1),
        "amplified": river(product(LiteConfig(2.0, 0.0, 0.0, rank_fraction=SHARP)), lr=0.1),
        "lite": river(product(LiteConfig(2.0, -0.25, BOTH, rank_fraction=SHARP)), lr=0.1),
    }


def test_invariant_10_the_order_of_the_parts(losses: dict[str, float]) -> None:
    assert losses["lite"] < losses["amplified"] < losses["damped"] < losses["muon"]
    assert losses["lite"] <= 0.7 * losses["muon"]


def test_the_released_schedule_helps_too_if_less_than_a_constant(losses: dict[str, float]) -> None:
    chi = CosineCoupled(2.0, 30, 300)
    found = river(product(LiteConfig(chi, -0.25, BOTH, rank_fraction=SHARP)), lr=0.1)
    assert (
        losses["lite"]
        < found
        < river(product(LiteConfig(chi, 0.0, 0.0, rank_fraction=SHARP)), lr=0.1)
        < losses["damped"]
    )
    assert found <= 0.7 * losses["muon"]


def test_fast_mode_is_as_good_as_exact_svd(losses: dict[str, float]) -> None:
    assert losses["lite"] == pytest.approx(river(exact(2.0, -0.25, BOTH), lr=0.1), rel=0.02)
    assert losses["muon"] == pytest.approx(river(exact(1.0, 0.0, zero), lr=0.1), rel=0.02)


def test_invariant_10_parity_mode_is_within_15_percent_of_exact(losses: dict[str, float]) -> None:
    found = river(product(LiteConfig(2.0, -0.25, BOTH, mode="parity")), lr=0.1)
    assert found == pytest.approx(losses["lite"], rel=0.15)


def test_invariant_10_amplifying_the_sharp_side_gains_nothing(losses: dict[str, float]) -> None:
    assert river(exact(2.0, 0.0, zero, amplify="sharp"), lr=0.1) == pytest.approx(losses["muon"], rel=0.02)


@pytest.mark.parametrize("lr", [0.1, 0.2])
def test_invariant_10_lite_loses_where_flat_progress_is_not_the_limit(lr: float) -> None:
    # Solvable inside the budget: from Muon's best rate (0.1) on, noise is the limit, and LITE adds to it. With a rate
    # of its own, half of Muon's, LITE still wins here: 0.034 against 0.046.
    lite = LiteConfig(2.0, -0.25, BOTH, rank_fraction=SHARP)
    solvable = [river(product(x), lr=lr, distance=10.0, noise=0.1) for x in (None, lite)]
    assert solvable[1] > 1.05 * solvable[0]
    # Nothing but sharp progress to make: the flat directions hold noise alone.
    sharp = [river(product(x), lr=lr, sharp_error=True, seeds=1) for x in (None, lite)]
    assert sharp[1] > 1.5 * sharp[0]


@pytest.mark.nightly
@pytest.mark.parametrize("lr", [0.05, 0.1, 0.2])
def test_the_order_at_other_learning_rates(lr: float) -> None:
    found = [
        river(product(lite), lr=lr, seeds=4)
        for lite in (
            LiteConfig(2.0, -0.25, BOTH, rank_fraction=SHARP),
            LiteConfig(2.0, 0.0, 0.0, rank_fraction=SHARP),
            LiteConfig(1.0, 0.0, RAMP, rank_fraction=SHARP),
            None,
        )
    ]
    # Near the best rate (0.2) damping changes little: a tie within the noise of the seeds.
    assert all(better < 1.03 * worse for better, worse in itertools.pairwise(found))
    assert found[0] < 0.75 * found[-1]


@pytest.mark.nightly
def test_amplification_helps_soap_below_its_best_rate() -> None:
    def soap(lite: LiteConfig | None) -> Callable[[Tensor], Callable[[Tensor, float], None]]:
        def run(w: Tensor) -> Callable[[Tensor, float], None]:
            p = nn.Parameter(w)
            optimizer = Soap([p], lite=lite, weight_decay=0.0, frequency=1)

            def update(grad: Tensor, lr: float) -> None:
                p.grad = grad
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()

            return update

        return run

    assert river(soap(LiteConfig(2.0, 0.0, 0.0)), lr=0.1) < 0.8 * river(soap(None), lr=0.1)


@pytest.mark.parametrize(("s", "beta"), [(0.1, 0.0), (0.5, 1.0), (1.2, 0.5), (0.05, -0.5)])
def test_invariant_8_one_linear_mode_follows_its_recurrence(s: float, beta: float) -> None:
    """Without whitening (F = I) and with the un-normalized momentum, w obeys a two-term recurrence."""
    theta = 0.95
    w, m, seen = 1.0, 0.0, [1.0]
    for _ in range(40):
        m = theta * m + w
        w = w - s * (m + beta * w)
        seen.append(w)
    for before, here, after in zip(seen, seen[1:], seen[2:], strict=False):
        assert after == pytest.approx(
            (1 + theta - (1 + beta) * s) * here - theta * (1 - beta * s) * before, rel=1e-9, abs=1e-12
        )
    roots = torch.linalg.eigvals(
        torch.tensor([[1 + theta - (1 + beta) * s, -theta * (1 - beta * s)], [1.0, 0.0]], dtype=torch.float64)
    ).abs()
    stable = 0 < s < 2 * (1 + theta) / (1 + beta * (1 + theta)) and (beta >= 0 or abs(beta) * s < (1 - theta) / theta)
    assert bool((roots < 1).all()) == stable
    assert math.isfinite(w)


def test_invariant_8_the_optimizer_without_whitening_follows_the_recurrence() -> None:
    """F = I: polar factors replaced by the identity, and the projector by the first axis."""
    theta, lr, chi, beta1, beta2 = 0.9, 0.02, 2.0, 0.25, 1.0
    curvature = torch.tensor([8.0, 1.0, 0.1], dtype=torch.float64)
    p = nn.Parameter(torch.eye(3, dtype=torch.float64))
    lite = LiteConfig(chi, beta1, beta2, damping="shared", rank_fraction=SHARP)
    # The average is 1 - theta times the momentum sum.
    optimizer = Muon(
        [p], lr=lr / (1 - theta), lite=lite, momentum=theta, nesterov=False, weight_decay=0.0, scale="none"
    )
    axis = torch.eye(3, dtype=torch.float64)[None, :, :1]
    seen = [torch.ones(3, dtype=torch.float64)]
    with (
        mock.patch.object(muon_update, "polar", side_effect=lambda x, *_, **__: x),
        mock.patch.object(muon_update, "improve_basis", return_value=axis),
    ):
        for _ in range(60):
            p.grad = p.detach() * curvature
            optimizer.step()
            seen.append(p.detach().diagonal().clone())
    s = lr * curvature * torch.tensor([1.0, chi, chi])
    beta = torch.tensor([beta1, beta2, beta2], dtype=torch.float64)
    for before, here, after in itertools.islice(zip(seen, seen[1:], seen[2:], strict=False), 60):
        expected = (1 + theta - (1 + beta) * s) * here - theta * (1 - beta * s) * before
        assert torch.allclose(after, expected, atol=1e-14)
    assert not torch.allclose(seen[2], (1 + theta - s) * seen[1] - theta * seen[0], atol=1e-3)  # heavy ball
