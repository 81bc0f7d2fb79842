"""Look-alikes: the modules do what they say, none of them is raised, and the report says what differs."""

from __future__ import annotations

import copy
import functools
import re
from dataclasses import dataclass

import pytest
from torch import nn

from moefx.passes.raise_experts import Block, raised

from . import almost, lookalikes  # noqa: F401  (they add their cases)
from .harness import Step, changed, differences, snapshot, step
from .ordinary import CASES, CONTROLS, Ordinary, Trigger

ALL = CASES | CONTROLS
STRICT = [name for name, c in CASES.items() if not c.in_form]
DEGENERATE = [name for name, c in CASES.items() if c.in_form]
ALMOST = [name for name, c in CASES.items() if c.trigger]


def at(model: nn.Module, trigger: Trigger) -> Step:
    model = copy.deepcopy(model).to(trigger.dtype).train(trigger.training)
    for _ in range(trigger.calls):
        last = step(model, (trigger.inputs().to(trigger.dtype),))
    return last


def twin(model: nn.Module) -> nn.Module:
    """The ordinary layer of the same weights."""
    ordinary = Ordinary()
    ordinary.load_state_dict(model.state_dict(), strict=True)
    return ordinary


# --- the modules themselves


@pytest.mark.parametrize("name", ALL)
def test_a_look_alike_runs_and_has_gradients(name: str) -> None:
    look = ALL[name]
    model, args = look.model().train(), look.args()
    got = step(model, args)
    assert all(o.isfinite().all() for o in got.outputs)
    assert got.grads["input 0"].abs().sum() > 0
    missing = [n for n, p in model.named_parameters() if p.requires_grad and got.grads[n] is None]
    assert missing == []


@pytest.mark.parametrize("name", ALMOST)
def test_an_almost_ordinary_layer_differs_at_its_trigger_only(name: str) -> None:
    look = CASES[name]
    model, where = look.model(), look.trigger
    ordinary = twin(model)
    usual = differences(at(model, Trigger()), at(ordinary, Trigger()))
    there = differences(at(model, where), at(ordinary, where))
    if where.gradients:
        assert usual == there  # the inputs are the same: only the gradients say it
        assert [d for d in there if not d.startswith("gradient")] == []
    else:
        assert usual == []
    assert there != []


@pytest.mark.parametrize("name", sorted(set(STRICT) - set(ALMOST)))
def test_a_look_alike_is_not_the_ordinary_layer(name: str) -> None:
    """Where the weights fit, the ordinary layer computes something else."""
    look = CASES[name]
    model = look.model()
    if model.state_dict().keys() != Ordinary().state_dict().keys():
        pytest.skip("other parameters")
    try:
        ordinary = twin(model)
    except RuntimeError:
        pytest.skip("other shapes")
    second = Trigger(calls=2)  # what has a state may begin like an ordinary layer
    assert differences(at(model, second), at(ordinary, second)) != []


# --- raising


@dataclass
class Outcome:
    rows: list[Block]
    found: list[str]  # what differs inside the context, in either mode
    left: list[str]  # what is not as before


@functools.cache
def outcome(name: str) -> Outcome:
    look = ALL[name]
    model, args, found = look.model().train(), look.args(), []
    before = snapshot(model)
    with raised(model, args, {}) as blocks:
        was_raised = any(b.raised for b in blocks)
        for training in (True, False):
            want = step(look.model().train(training), args)
            # What was not raised may have a state: it runs as a copy. A raised one has it in buffers.
            model.load_state_dict(look.model().state_dict())
            inside = model if was_raised else copy.deepcopy(model)
            inside.load_state_dict(look.model().state_dict())
            found += differences(step(inside.train(training), args), want)
        model.train(True)
    return Outcome(list(blocks), found, [] if was_raised and name in CASES else changed(before, snapshot(model)))


@pytest.mark.parametrize("name", STRICT)
def test_a_look_alike_is_never_raised(name: str) -> None:
    got = outcome(name)
    assert [b for b in got.rows if b.raised] == []
    assert got.found == []
    assert got.left == []


@pytest.mark.parametrize("name", DEGENERATE)
def test_a_degenerate_layer_is_refused_or_raised_rightly(name: str) -> None:
    got = outcome(name)
    assert got.found == [], "raised, and wrongly"
    assert got.left == []


@pytest.mark.parametrize("name", CONTROLS)
def test_an_ordinary_layer_in_the_same_harness_is_raised(name: str) -> None:
    got = outcome(name)
    assert any(b.raised for b in got.rows), got.rows
    assert got.found == []
    assert got.left == []


@pytest.mark.parametrize("name", CASES)
def test_a_look_alike_has_a_reason(name: str) -> None:
    rows = outcome(name).rows
    assert rows, "nothing about it in the report"
    assert all(b.raised or (b.reason and len(b.reason.split()) > 2) for b in rows), rows


@pytest.mark.parametrize("name", CASES)
def test_the_reason_names_what_differs(name: str) -> None:
    reasons = " / ".join(b.reason or "" for b in outcome(name).rows)
    if CASES[name].in_form and any(b.raised for b in outcome(name).rows):
        pytest.skip("raised, and rightly")
    assert re.search(CASES[name].differs, reasons, re.IGNORECASE), reasons


def test_a_state_in_a_buffer_goes_on_alike() -> None:
    """Five calls, of which each changes what the next one chooses."""
    look = CASES["EmaLoads"]
    model, wanted = look.model().train(), look.model().train()
    with raised(model, look.args(), {}) as blocks:
        assert any(b.raised for b in blocks)
        for seed in range(5):
            assert differences(step(model, look.args(), seed), step(wanted, look.args(), seed)) == []
    for now, want in zip(model.buffers(), wanted.buffers(), strict=True):
        assert (now - want).abs().max() < 1e-5
