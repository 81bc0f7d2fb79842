"""What is remembered of a module tree between calls hides no change. The oracle is a `Structure` without memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moefx import compat
from moefx.signature import Structure


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3))
    made.register_parameter("none", None)
    return made


def tie(m: nn.Module) -> None:
    m[1].weight = m[0].weight


def replace(m: nn.Module) -> None:
    m[0].weight = nn.Parameter(m[0].weight.detach().clone())


def freeze(m: nn.Module) -> None:
    m[0].weight.requires_grad_(not m[0].weight.requires_grad)


def cast(m: nn.Module) -> None:
    # `.data` keeps the object, as `module.to` does.
    m[0].weight.data = m[0].weight.data.to(torch.float64 if m[0].weight.dtype == torch.float32 else torch.float32)


def turn(m: nn.Module) -> None:
    m[1].weight.data = m[1].weight.data.t()


def cut(m: nn.Module) -> None:
    m[1].weight.data = m[1].weight.data[:2]


def remove_bias(m: nn.Module) -> None:
    m[0].bias = None


def evaluate(m: nn.Module) -> None:
    m[2].train(not m[2].training)


def hook(m: nn.Module) -> None:
    m[0].register_forward_hook(lambda *_: None)


def number(m: nn.Module) -> None:
    m[2].momentum = 0.3 if m[2].momentum == 0.1 else 0.1


def nothing(m: nn.Module) -> None:
    pass


Edit = Callable[[nn.Module], None]
Around = Callable[[], contextlib.AbstractContextManager[object]]
EDITS: tuple[Edit, ...] = (tie, replace, freeze, cast, turn, cut, remove_bias, evaluate, hook, number, nothing)
AROUND: tuple[Around, ...] = (
    contextlib.nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(EDITS), st.sampled_from(AROUND)), max_size=8))
def test_a_remembered_key_is_the_key_of_what_is_there(steps: list[tuple[Edit, Around]]) -> None:
    changed = model()
    remembering = Structure(changed)
    before = remembering.mode()
    for edit, around in steps:
        edit(changed)
        with around():
            now, fresh = remembering.mode(), Structure(changed).mode()
        assert now == fresh
        assert hash(now) == hash(fresh)
        if edit is nothing:
            assert now == before
        elif edit in (freeze, cast, evaluate, hook, number):
            assert now != before
        before = now


def test_an_unchanged_model_is_not_described_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Structure(model())
    key = kept.mode()
    monkeypatch.setattr(compat, "layouts_unchanged", None)  # would be called
    assert kept.mode()[0] is key[0]


def test_a_model_without_tensors() -> None:
    kept = Structure(nn.Sequential(nn.ReLU()))
    assert kept.mode() == kept.mode() == Structure(nn.Sequential(nn.ReLU())).mode()


def test_one_true_and_a_float_are_three_values() -> None:
    m = model()
    kept, keys = Structure(m), []
    for value in (1, True, 1.0, 1):
        m[2].eps = value
        keys.append(kept.mode())
    assert [keys.index(k) for k in keys] == [0, 1, 2, 0]


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m[0].register_parameter("more", nn.Parameter(torch.zeros(2))),
        lambda m: m[0].register_buffer("more", torch.zeros(2)),
        lambda m: m[0].__dict__.update(forward=lambda x: x),
        lambda m: m.append(nn.ReLU()),
    ],
)
def test_what_is_added_makes_another_tree(edit: Edit) -> None:
    m = model()
    kept = Structure(m)
    assert kept.holds()
    edit(m)
    assert not kept.holds()
    assert Structure(m).holds()
