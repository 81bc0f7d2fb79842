"""Random MoE layers: the generator against its reference, and raising against the layers as they are."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings

from moefx.passes.raise_experts import raised

from .harness import changed, differences, snapshot, step
from .random_layer import build, example
from .random_moe import KNOWN, Config, configs, describe, one_change, reference

QUIET = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def check_reference(config: Config) -> None:
    config = dataclasses.replace(config, dtype="float64", nested=0, training=False)
    layer, _ = build(config)
    tolerance = 1e-6 if config.router_fp32 else 1e-10
    for B, T in ((2, 7), (1, 1)):
        x = example(config, B, T)
        out = layer(x)
        y = out[0] if isinstance(out, tuple) else out
        torch.testing.assert_close(y, reference(config, x), rtol=tolerance, atol=tolerance)


@given(config=configs())
@settings(max_examples=100, **QUIET)
def test_random_layers_are_their_reference(config: Config) -> None:
    check_reference(config)


@pytest.mark.parametrize("config", one_change(), ids=describe)
def test_layers_one_option_away_are_their_reference(config: Config) -> None:
    check_reference(config)


@given(config=configs())
@settings(max_examples=100, **QUIET)
def test_random_layers_run(config: Config) -> None:
    """In their own dtype and place, in both modes; a second run with the same seed changes nothing."""
    model, path = build(config)
    assert model.get_submodule(path).config == config
    before = snapshot(model)
    for training in (True, False):
        model.train(training)
        for x in (example(config), example(config, 1, 1), example(config, skewed=True)):
            first = step(model, (x,))
            assert differences(step(model, (x,)), first) == []
            assert all(torch.isfinite(o).all() for o in first.outputs)
            assert first.grads["input 0"] is not None
    model.train(config.training)
    assert changed(before, snapshot(model)) == []


def check_raising(config: Config) -> bool:
    """Raises the layer or finds a reason; in both cases nothing may differ. True if it was raised."""
    model, path = build(config)
    sizes = [(2, 7), (1, 1), (3, 4), (1, 33)]
    inputs = [example(config, B, T, seed=i) for i, (B, T) in enumerate(sizes)]
    inputs += [example(config, seed=9, skewed=True), example(config, 1, 20, seed=10, skewed=True)]
    wanted = {}
    for training in (config.training, not config.training):
        model.train(training)
        wanted[training] = [step(model, (x,)) for x in inputs]
    model.train(config.training)
    before = snapshot(model)
    with raised(model, (inputs[0],), {}) as blocks:
        rows = [b for b in blocks if b.path == path or b.path.startswith(f"{path}.".lstrip("."))]
        assert rows, f"no row for {path!r} among {[b.path for b in blocks]}"
        assert [b.path for b in blocks if b.raised and b not in rows] == []
        assert list(model.state_dict()) == before["state_dict"]
        for training, steps in wanted.items():
            model.train(training)
            for x, want in zip(inputs, steps, strict=True):
                found = differences(step(model, (x,)), want)
                assert found == [], f"{tuple(x.shape)} training={training}, {rows}: {found}"
        model.train(config.training)
    assert changed(before, snapshot(model)) == []
    was_raised = any(b.raised for b in rows)
    for b in rows:
        assert b.raised or (b.reason and len(b.reason.split()) > 2), f"no reason for {b}"
    if config.act not in KNOWN:
        assert not was_raised, f"{config.act} is no activation of the dialect: {rows}"
    event(f"raised: {was_raised}")
    return was_raised


@given(config=configs())
@settings(max_examples=50, **QUIET)
def test_raised_or_refused_but_never_different(config: Config) -> None:
    check_raising(config)


@pytest.mark.nightly
@given(config=configs())
@settings(max_examples=500, **QUIET)
def test_raised_or_refused_but_never_different_at_length(config: Config) -> None:
    check_raising(config)


# The weight inside f is no form of the dialect's experts. Everything else that is one option away must be raised.
REFUSED = {"place=input", "act=tanh", "act=mish"}


@pytest.mark.parametrize("config", one_change(), ids=describe)
def test_layers_one_option_away_are_raised(config: Config) -> None:
    assert check_raising(config) or describe(config) in REFUSED
