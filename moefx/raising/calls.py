"""How the blocks of a model are called, which raising them has to know."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..capture import warm_up
from ..errors import InputError
from .draw import alone
from .probe import Seen, observed


def calls_of(
    modules: dict[str, nn.Module], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Seen]:
    """How these modules of a model are called, by a forward of the unchanged model.

    A model may leave out a mask that hides nothing, which it cannot do while it is traced; so where the example has no
    padding, a forward with one hidden position shows how blocks are called then.
    """
    with observed(modules) as calls:
        warm_up(model, args, kwargs)
    padded = pytree.tree_map(_with_padding, (args, kwargs))
    if modules and any(a is not b for a, b in zip(*map(pytree.tree_leaves, ((args, kwargs), padded)), strict=True)):
        with contextlib.suppress(InputError), observed(modules) as again:
            warm_up(model, *padded)
            for seen in again.values():
                seen.hidden = True
            return again
    return calls


def _with_padding(v: Any) -> Any:
    """A mask of ones (or zeros) with its last position the other way round; anything else as it is."""
    if not isinstance(v, torch.Tensor) or v.is_complex() or v.dim() < 2 or v.numel() < 2:
        return v
    flat = v.detach().clone().reshape(-1)
    if not alone(flat) or flat[0] not in (0, 1):
        return v
    flat[-1] = 1 - flat[-1].long()
    return flat.view(v.shape)
