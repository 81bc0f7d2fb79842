"""A copy of a Grouter with another score layer: what folding and expansion have in common."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError

if TYPE_CHECKING:
    from ..models.grouter import Grouter


def with_score(grouter: Grouter, weight: Tensor, bias: Tensor, **changes: Any) -> Grouter:
    """A copy with score layer `weight` [E, hidden] and selection bias `bias`; its config says E experts.

    Dtypes, device, mode and `requires_grad` are those of the original; the state of the random generator is kept.

    Args:
        changes: further fields of the config.
    """
    old = grouter.score.weight
    state = {name: t.detach().clone() for name, t in grouter.state_dict().items()}
    state["score.weight"] = weight.to(old.device, old.dtype, copy=True)
    state["selection_bias"] = bias.to(grouter.selection_bias.device, torch.float32, copy=True)
    with torch.random.fork_rng(devices=[]):  # random weights that the state replaces
        new = type(grouter)(dataclasses.replace(grouter.config, num_experts=len(weight), **changes))
    new.to(old.device).load_state_dict(state, assign=True)
    for parameter, its_old in zip(new.parameters(), grouter.parameters(), strict=True):
        parameter.requires_grad_(its_old.requires_grad)
    return new.train(grouter.training)


def require_unfolded(grouter: Grouter) -> None:
    """Raise InputError for a Grouter that folds by logsumexp: its outputs are not rows of its score layer."""
    if grouter.config.fold_groups:
        raise InputError(
            "this Grouter is folded by logsumexp already",
            why="its outputs are sums of exponentials, not rows of the score layer, which is what would be changed",
            todo="start from the Grouter that it was folded from",
        )
