"""What all losses have in common: a name, a weight, reductions that say what they do, and two steps.

`local` computes from one layer what is best computed beside it, `combine` makes one number of all layers. Both are
plain torch calls on tensors or on `fx.Proxy` alike, so that the same lines run in tests and write the graph.
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from moefx.errors import InputError

from .taps import Taps

REDUCTIONS = ("sum", "mean")


class Item:
    """Base of everything that `losses=` takes.

    Class attributes:
        name: the short name, of the string form, of `opt.losses` and of the report.
        needs_router: whether the router must be known (`moefx.route`).
    """

    name: ClassVar[str]
    needs_router: ClassVar[bool] = True

    @property
    def over_ranks(self) -> bool:
        """Whether it sums over the ranks of the process group: a graph is then one of that group alone."""
        return False

    def refuses(self, tap: Taps) -> str | None:
        """Why this layer cannot have the loss; None when it can."""
        if self.needs_router and tap.logits is None:
            return tap.unscored
        return None

    def check(self, taps: Sequence[Taps]) -> None:
        """Raise `InputError` naming the first layer that refuses."""
        for tap in taps:
            if (why := self.refuses(tap)) is not None:
                raise InputError(
                    f"loss {self.name!r} is not defined for {tap.path or 'the layer'}",
                    why=why,
                    todo=f"leave {self.name!r} out of losses for this model",
                )


@dataclass(frozen=True)
class Loss(Item):
    """Base of all losses. `loss(taps)` is the unweighted scalar; a training step adds `weight` times it."""

    weight: float = 0.0

    def __post_init__(self) -> None:
        finite(self, "weight")
        for option in ("pair_reduction", "layer_reduction"):
            one_of(self, option, REDUCTIONS)

    def local(self, tap: Taps) -> Any:
        """What of one layer enters `combine`."""
        raise NotImplementedError

    def combine(self, parts: Sequence[Any], taps: Sequence[Taps]) -> Any:
        """The loss, of one part per layer: their sum or mean, as `layer_reduction` says."""
        return over_layers(parts, getattr(self, "layer_reduction", "sum"))

    def __call__(self, taps: Sequence[Taps]) -> Any:
        """The unweighted loss of all layers in execution order, a scalar. Raises `InputError` where it is undefined."""
        self.check(taps)
        return self.combine([self.local(t) for t in taps], taps)


LEAST_EPS = 1e-18  # rows of zeros, as of dropped choices, are divided by eps: its square must not be 0 in fp32


def finite(item: Any, option: str, *, least: float = -math.inf) -> None:
    """Raise `InputError` when an option is no finite number of at least `least`; NaN is none."""
    given = getattr(item, option)
    if not isinstance(given, numbers.Real) or not math.isfinite(given) or given < least:
        number = "a finite number" if least == -math.inf else f"a finite number of at least {least:g}"
        raise InputError(f"{type(item).__name__} has {option}={given!r}", todo=f"give {number}")


def one_of(loss: Any, option: str, known: Sequence[str]) -> None:
    """Raise `InputError` when an option that the loss has is none of the known values."""
    given = getattr(loss, option, known[0])
    if given not in known:
        raise InputError(f"{type(loss).__name__} has {option}={given!r}", todo=f"use one of {', '.join(known)}")


def takes_all(tap: Taps, so: str) -> str | None:
    """Why a loss of which experts are chosen is undefined where every token takes all of them; None where it does not.

    Such a loss is a constant: it looks as if it trained something, and its gradient is zero. `so` says why.
    """
    if tap.k < tap.experts:
        return None
    return f"every token takes all {tap.experts} experts (top-{tap.k}), so that {so}; the loss trains nothing"


def over_layers(parts: Sequence[Any], reduction: str) -> Any:
    """Sum or mean over layers."""
    total = functools.reduce(operator.add, parts)
    return total / len(parts) if reduction == "mean" else total
