"""A copy of a Grouter with another score layer: what folding and expansion have in common."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InputError

if TYPE_CHECKING:
    from ..models.grouter import Grouter


def with_score(grouter: Grouter, weight: Tensor, bias: Tensor, **changes: Any) -> Grouter:
    """A deep copy with score layer `weight` [E, hidden] and selection bias `bias`; its config says E experts.

    Dtype, device and `requires_grad` of the score layer are kept; no random number is drawn.

    Args:
        changes: further fields of the config.
    """
    old = grouter.score.weight
    new = copy.deepcopy(grouter)
    new.config = dataclasses.replace(grouter.config, num_experts=len(weight), **changes)
    new.score = nn.Linear(old.shape[1], len(weight), bias=False, device="meta")
    new.score.weight = nn.Parameter(weight.to(old.device, old.dtype).clone(), requires_grad=old.requires_grad)
    new.score.train(grouter.score.training)
    new.selection_bias = bias.to(grouter.selection_bias.device, torch.float32).clone()
    return new


def require_unfolded(grouter: Grouter) -> None:
    """Raise InputError for a Grouter that folds by logsumexp: its outputs are not rows of its score layer."""
    if grouter.config.fold_groups:
        raise InputError(
            "this Grouter is folded by logsumexp already",
            why="its outputs are sums of exponentials, not rows of the score layer, which is what would be changed",
            todo="start from the Grouter that it was folded from",
        )
