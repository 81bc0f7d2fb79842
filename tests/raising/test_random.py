"""Random MoE layers: the generator against its reference, and raising against the layers as they are."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis.errors import InvalidArgument

from moefx.passes import raise_experts
from moefx.passes.raise_experts import Block
from moefx.raising.find import within

from .harness import changed, differences, snapshot, step
from .random_layer import build, example
from .random_moe import KNOWN, MODULES, Config, configs, describe, one_change, reference

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


@given(config=configs())
@settings(max_examples=50, **QUIET)
def test_the_idioms_are_one_function(config: Config) -> None:
    """Outputs and gradients, in the layer's own dtype: two spellings are as close as the comparison asks of raising."""
    if config.place == "input":
        return  # not every idiom can say it
    loops = config.layout in MODULES
    first = "A1" if loops else "D3"
    second = ("A6p" if loops else "C") if config.idiom == first else first
    model, _ = build(config)
    other, _ = build(dataclasses.replace(config, idiom=second))
    for x in (example(config), example(config, 1, 1), example(config, skewed=True)):
        assert differences(step(other, (x,)), step(model, (x,))) == []


MATTERS: list[dict[str, Any]] = [
    *({"act": a} for a in (*KNOWN[1:], "tanh", "mish")),
    *({"bias": b} for b in ("all", "inner", "down")),
    *({"shared": s} for s in ("plain", "gated")),
    *({"capacity": 5, "priority": p} for p in ("token", "choice")),
    {"score": "sigmoid"},
    {"correction": "buffer"},
    {"place": "input"},
    {"router_bias": True},
    {"residual": True},
    {"gated": False},
    {"renormalize": False},
    {"scale": 2.5},
    {"k": 1},
]


@pytest.mark.parametrize("change", MATTERS, ids=str)
def test_an_option_that_matters_is_seen(change: dict[str, Any]) -> None:
    """The layer with the option is not the reference without it: neither of the two ignores it."""
    plain = Config(dtype="float64", training=False)
    layer, _ = build(dataclasses.replace(plain, **change))
    x = example(plain)
    assert not torch.allclose(layer(x), reference(plain, x), rtol=1e-3, atol=1e-3)


def test_the_priorities_drop_other_tokens() -> None:
    config = Config(dtype="float64", training=False, capacity=5)
    x = example(config)
    first, second = (reference(dataclasses.replace(config, priority=p), x) for p in ("token", "choice"))
    assert not torch.allclose(first, second, rtol=1e-3, atol=1e-3)


def check_raising(config: Config) -> list[Block]:
    """Raises the layer or finds a reason; in both cases nothing may differ. The rows about the layer."""
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
    with raise_experts.raised(model, (inputs[0],), {}) as blocks:
        # Also the modules around the layer: what cannot be told inside may be told one module further out.
        rows = [b for b in blocks if within(b.path, path) or within(path, b.path)]
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
    with contextlib.suppress(InvalidArgument):  # outside of a property test
        event(f"raised: {was_raised}")
    return rows


def is_raised(config: Config) -> bool:
    """`check_raising`; whether the layer was raised."""
    return any(b.raised for b in check_raising(config))


@given(config=configs())
@settings(max_examples=25, **QUIET)
def test_raised_or_refused_but_never_different(config: Config) -> None:
    """500 more are in benchmarks/results/random_layers.csv."""
    check_raising(config)


# The weight inside f is no form of the dialect's experts. Everything else that is one option away must be raised.
REFUSED = {"place=input", "act=tanh", "act=mish"}


@pytest.mark.parametrize("config", one_change(), ids=describe)
def test_layers_one_option_away_are_raised(config: Config) -> None:
    assert is_raised(config) or describe(config) in REFUSED


# --- the check checks


def stub(fault: str) -> Any:
    """A raising that swaps the layer's idiom, with a fault."""

    @contextlib.contextmanager
    def raised(model: torch.nn.Module, args: Any, kwargs: Any) -> Iterator[list[Block]]:
        layer: Any = next(m for m in model.modules() if type(m).__name__ == "Layer")
        path = next(n for n, m in model.named_modules() if m is layer)
        config = layer.config
        if fault in ("refused", "no reason"):
            yield [Block(path, "Layer", False, reason="" if fault == "no reason" else "a stub raises nothing")]
            return
        if fault == "no row":
            yield []
            return
        original = layer.forward
        layer.config = dataclasses.replace(config, idiom="D2")
        one = torch.tensor(1.001)
        if fault == "outputs":
            layer.forward = lambda x: original(x) * one
        elif fault == "gradients":
            layer.forward = lambda x: original(x.detach())
        elif fault == "one token":
            layer.forward = lambda x: original(x) * (one if x.numel() == config.hidden else 1)
        elif fault == "evaluation":
            layer.forward = lambda x: original(x) * (1 if layer.training else one)
        elif fault == "skew":
            layer.forward = lambda x: (
                original(x) * (one if x[0].std(0, correction=0).max() < 0.1 < len(x[0]) - 1 else 1)
            )
        yield [Block(path, "Layer", True)]
        vars(layer).pop("forward", None)
        layer.config = config
        if fault == "left":
            layer.raised_by = "stub"
        elif fault == "weight":
            with torch.no_grad():
                next(layer.parameters()).add_(1e-6)
        elif fault == "random state":
            torch.rand(())

    return raised


FAULTS = ("no reason", "no row", "outputs", "gradients", "one token", "evaluation", "skew", "left", "weight")


@pytest.mark.parametrize("fault", [*FAULTS, "random state"])
def test_the_check_sees_a_faulty_raising(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(raise_experts, "raised", stub(fault))
    with pytest.raises(AssertionError):
        check_raising(Config())


@given(config=configs())
@settings(max_examples=20, **QUIET)
def test_the_check_accepts_a_raising_without_fault(config: Config) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raise_experts, "raised", stub("refused"))
        assert not is_raised(config)
        if config.act in KNOWN and config.place != "input":
            patch.setattr(raise_experts, "raised", stub(""))
            assert is_raised(config)
