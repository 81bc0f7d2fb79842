"""Options of a group, checked when it is added: a wrong one would be ignored, or fail in the middle of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from ..errors import InputError, nearest

_CHOICES = {"nonfinite": ("skip", "raise"), "layout": ("out_in", "in_out")}
# Options of torch's optimizers that would change the result and are not there; others, as `foreach`, do no harm.
_ABSENT = {
    "maximize": "minimize the negative of the loss",
    "amsgrad": "leave it out",
    "differentiable": "leave it out: steps are not recorded by autograd",
}


def check_options(group: dict[str, Any], where: str) -> None:
    """The options that groups of every algorithm have.

    Raises:
        InputError: one is out of range, misspelt, or asks for what no algorithm here does.
    """
    for key in ("lr", "weight_decay", "eps"):
        check_number(key, group[key], where)
    for key in ("betas", "adamw_betas"):
        betas = group.get(key, (0, 0))
        pair = isinstance(betas, (tuple, list)) and len(betas) == 2
        if not (pair and all(_within(real(b), 1) for b in betas)):
            raise InputError(f"{key}={betas!r} are no averages", where, todo="give two numbers from 0 to below 1")
    for key, known in _CHOICES.items():
        check_choice(key, group[key], known, where)
    for key, todo in _ABSENT.items():
        if group.get(key):
            raise InputError(f"{key}={group[key]!r} is not supported", where, todo=todo)


def check_number(what: str, value: Any, where: str, below: float = math.inf) -> None:
    """Raise unless 0 <= value < below; a tensor of one element is a number too."""
    found = real(value)
    if found is None:
        raise InputError(f"{what}={value!r} is no number", where, todo="give 0 or more")
    if not _within(found, below):
        wrong = "is no average" if below == 1 else "is negative, infinite or no number"
        todo = "give 0 or more" if below == math.inf else f"give 0 to below {below:g}"
        raise InputError(f"{what}={found} {wrong}", where, todo=todo)


def check_count(what: str, value: Any, where: str | None = None, todo: str = "give 1 or more", least: int = 1) -> None:
    """Raise unless `value` is an integer of at least `least`."""
    if not isinstance(value, Integral) or int(value) < least:
        raise InputError(f"{what}={value!r} is no count", where, todo=todo)


def check_choice(what: str, value: Any, known: Sequence[str], where: str) -> None:
    """Raise unless `value` is one of the names."""
    if value not in known:
        raise InputError(f"there is no {what} {value!r}", where, todo=nearest(str(value), known))


def real(value: Any) -> float | None:
    """As a float; None for what is no real number, text that reads as one included."""
    if isinstance(value, (str, bytes)):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _within(value: float | None, below: float) -> bool:
    return value is not None and 0 <= value < below
