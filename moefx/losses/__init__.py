"""Losses and measurements of routing, written into the training graph by `passes/add_losses.py`.

    moefx.optimize(model, inputs, losses=["sp", moefx.losses.Coupling(weight=2e-3), "lb", "metrics"])

Short names: sp, cp, lb, z, orth, var, erc (losses), metrics (statistics in `opt.routing`), bias (aux-loss-free
balance). docs/losses.md has the formula and source of each.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from moefx.errors import InputError, nearest

from .balance import LoadBalance, Variance, ZLoss
from .base import Item, Loss
from .bias import BiasUpdate, sign_update
from .experts import ERC, Orthogonality
from .metrics import RoutingMetrics
from .pairs import Coupling, Specialization
from .taps import Taps

_KINDS: tuple[type[Any], ...] = (
    Specialization, Coupling, LoadBalance, ZLoss, Orthogonality, Variance, ERC, RoutingMetrics, BiasUpdate,
)  # fmt: skip
TOTAL = "total"  # what `opt.losses` calls the weighted sum
NAMES: dict[str, type[Any]] = {kind.name: kind for kind in _KINDS}


def parse(text: str) -> tuple[Item, ...]:
    """Losses by short name, separated by commas: "sp,cp,lb". A number changes the weight (or rate): "sp=1e-3,lb".

    Raises `InputError` for an unknown name, with the nearest known one.
    """
    return as_losses([part.strip() for part in text.split(",") if part.strip()])


def _weighted(name: Any, number: Any) -> Item:
    if not isinstance(name, str) or "=" in name or not isinstance(number, numbers.Real) or isinstance(number, bool):
        raise InputError(
            f"losses maps {name!r} to {number!r}",
            todo='map short names to weights, {"sp": 1e-3}, or give a list of losses',
        )
    return _named(f"{name}={float(number)}")


def _named(text: str) -> Item:
    name, given, number = (part.strip() for part in text.partition("="))
    if name not in NAMES:
        raise InputError(f"no loss is called {name!r}", where="losses", todo=nearest(name, NAMES))
    if not given:
        made: Item = NAMES[name]()
        return made
    option = "rate" if name == "bias" else "weight"
    if option not in (field.name for field in fields(NAMES[name])):
        todo = f"give {name!r} alone, in a list or a string"
        raise InputError(f"{name} has no weight", why=f"it was given as {text!r}", todo=todo)
    try:
        return NAMES[name](**{option: float(number)})  # type: ignore[no-any-return]
    except (ValueError, TypeError) as e:
        raise InputError(f"unreadable loss {text!r}", why=str(e), todo=f"write {name}, or {name}=0.001") from e


def as_losses(items: str | Iterable[Any]) -> tuple[Item, ...]:
    """What `losses=` of `optimize` means: objects, short names, one string of names, or a mapping of names to weights.

    Raises `InputError` for anything else, for two losses of one name, and for a loss without a name or called `total`.
    """
    if isinstance(items, str):
        return parse(items)
    if isinstance(items, Mapping):
        return as_losses([_weighted(name, number) for name, number in items.items()])
    if isinstance(items, Item) or not isinstance(items, Iterable):
        raise InputError(f"losses is {items!r}", todo="give a list of losses or of their names: ['sp', 'cp', 'lb']")
    found = tuple(_named(i) if isinstance(i, str) else i for i in items)
    for item in found:
        if not isinstance(item, Item):
            what = f"the class {item.__name__}, not an instance" if isinstance(item, type) else repr(item)
            raise InputError(f"losses holds {what}", todo=nearest(str(getattr(item, "name", item)), NAMES))
        name = getattr(item, "name", None)
        if not isinstance(name, str) or not name:
            raise InputError(
                f"the loss {type(item).__name__} has no name",
                why="its value is in opt.losses under its name",
                todo='give the class one: name: ClassVar[str] = "..."',
            )
        if name == TOTAL:
            raise InputError(
                f"the loss {type(item).__name__} is called {TOTAL!r}",
                why="opt.losses has the weighted sum of all losses under this name",
                todo="give its class another name",
            )
    names = [item.name for item in found]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise InputError(f"losses holds {twice!r} twice", todo="give each loss once, with the weight that you mean")
    return found


__all__ = [
    "ERC", "NAMES", "BiasUpdate", "Coupling", "Item", "LoadBalance", "Loss", "Orthogonality", "RoutingMetrics",
    "Specialization", "Taps", "Variance", "ZLoss", "as_losses", "parse", "sign_update",
]  # fmt: skip
