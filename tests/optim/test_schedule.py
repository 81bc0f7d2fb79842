"""Schedules: the published table, and the callables that LiteConfig takes."""

from __future__ import annotations

import pytest

from moefx.errors import InputError
from moefx.optim import CosineCoupled, LiteConfig, Ramp, WarmupCosine, WarmupStableDecay
from moefx.optim.lite import LiteValues
from moefx.optim.schedule import damping_ramp, describe


@pytest.mark.parametrize(
    ("p", "chi"), [(0.0, 1.0), (0.1, 1.2), (0.25, 1.5), (0.5, 1.91), (0.75, 1.63), (0.9, 1.20), (1.0, 1.0)]
)
def test_invariant_9_hidden_amplification_under_a_cosine(p: float, chi: float) -> None:
    schedule = CosineCoupled(2.0, 1000, 11000, 0.1)
    assert schedule(1000 + round(p * 10000)) == pytest.approx(chi, abs=0.006)
    assert schedule(0) == schedule(500) == 1.0
    assert schedule(10**6) == pytest.approx(1.0)


@pytest.mark.parametrize(("p", "chi"), [(0.0, 4.0), (0.5, 3.73), (0.75, 2.90), (0.9, 1.60), (1.0, 1.0)])
def test_invariant_9_diagonal_amplification_under_a_cosine(p: float, chi: float) -> None:
    schedule = CosineCoupled(4.0, 1000, 11000, 0.1, ramp=None)
    assert schedule(1000 + round(p * 10000)) == pytest.approx(chi, abs=0.006)
    assert schedule(0) == 4.0


def test_flat_and_sharp_rates_meet_at_the_floor() -> None:
    lr, chi = WarmupCosine(1.0, 10, 110, 0.1), CosineCoupled(2.0, 10, 110, 0.1, ramp=None)
    flat = [lr(t) * chi(t) for t in range(10, 111)]
    assert flat[0] == pytest.approx(2.0)
    assert flat[-1] == pytest.approx(0.1)
    assert flat[50] == pytest.approx(0.1 + 1.9 * 0.5)  # a cosine itself
    assert CosineCoupled(2.0, 0, 10, 0.0, ramp=None)(10) == 2.0


def test_damping_ramps() -> None:
    cosine = damping_ramp(-0.25, 1.0, 1000, 10000, "cosine")
    assert (cosine.begin, cosine.until) == (1000, 5500)
    assert damping_ramp(0.0, 1.0, 1000, 20000, "wsd").until == 2900
    assert [cosine(t) for t in (0, 1000, 3250, 5500, 9999)] == [-0.25, -0.25, 0.375, 1.0, 1.0]


def test_learning_rates() -> None:
    wsd = WarmupStableDecay(2.0, 10, 100, min_lr_fraction=0.1)
    assert [wsd(t) for t in (0, 5, 10, 80)] == [0.0, 1.0, 2.0, 2.0]
    assert wsd(90) == pytest.approx(1.1)
    assert wsd(100) == pytest.approx(0.2)
    assert WarmupCosine(2.0, 10, 110)(5) == 1.0


def test_recipes() -> None:
    dense = LiteConfig.cosine(warmup=1000, total=10000, mode="parity")
    assert dense.values(0) == LiteValues(1.0, -0.25, -0.25)
    assert dense.values(0).uniform
    assert dense.values(5500) == LiteValues(dense.chi(5500), -0.25, 1.0)
    assert dense.diagonal(0) == 4.0
    moe = LiteConfig.wsd(warmup=1000, total=20000)
    assert moe.values(19999) == LiteValues(1.0, 0.0, 1.0)
    assert moe.diagonal(0) == 8.0
    assert moe.acts_on("muon")
    assert LiteConfig(lambda step: 1.0 + step).values(3).chi == 4.0


def test_plain_descriptions() -> None:
    found = LiteConfig(Ramp(1.0, 2.0, 0, 5), lambda step: 0.0).describe()
    assert found["chi"] == {"kind": "Ramp", "start": 1.0, "end": 2.0, "begin": 0, "until": 5}
    assert found["beta1"] == "callable"
    assert describe(2.0) == 2.0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: CosineCoupled(2.0, 10, 10), "warmup < total"),
        (lambda: Ramp(0.0, 1.0, 5, 4), "begin <= until"),
        (lambda: LiteConfig(mode="quick"), "did you mean|known: fast"),
        (lambda: LiteConfig(damping="share"), "did you mean 'shared'"),
        (lambda: LiteConfig(side="both"), "left"),
        (lambda: LiteConfig(rank_fraction=1.5), "0 to 1"),
        (lambda: LiteConfig(chi=-1.0), "flat directions"),
        (lambda: LiteConfig(spare=-1), "spare"),
        (lambda: LiteConfig(damping_steps=0), "damping_steps"),
        (lambda: LiteConfig(mode="parity", damping="shared"), "orthogonal"),
    ],
)
def test_errors(make: object, match: str) -> None:
    with pytest.raises(InputError, match=match):
        make()  # type: ignore[operator]
