"""Losses and measurements of routing, written into the training graph by `passes/add_losses.py`.

    moefx.optimize(model, inputs, losses=["sp", moefx.losses.Coupling(weight=2e-3), "lb", "metrics"])

Short names: sp, cp, lb, z, orth, var, erc (losses), metrics (statistics in `opt.routing`), bias (aux-loss-free
balance). docs/losses.md has the formula and source of each.
"""

from __future__ import annotations

from collections.abc import Iterable
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
NAMES: dict[str, type[Any]] = {kind.name: kind for kind in _KINDS}


def parse(text: str) -> tuple[Item, ...]:
    """Losses by short name, separated by commas: "sp,cp,lb". A number changes the weight (or rate): "sp=1e-3,lb".

    Raises `InputError` for an unknown name, with the nearest known one.
    """
    return as_losses([part.strip() for part in text.split(",") if part.strip()])


def _named(text: str) -> Item:
    name, given, number = (part.strip() for part in text.partition("="))
    if name not in NAMES:
        raise InputError(f"no loss is called {name!r}", where="losses", todo=nearest(name, NAMES))
    if not given:
        made: Item = NAMES[name]()
        return made
    option = "rate" if name == "bias" else "weight"
    try:
        return NAMES[name](**{option: float(number)})  # type: ignore[no-any-return]
    except (ValueError, TypeError) as e:
        raise InputError(f"unreadable loss {text!r}", why=str(e), todo=f"write {name}, or {name}=0.001") from e


def as_losses(items: str | Iterable[Any]) -> tuple[Item, ...]:
    """What `losses=` of `optimize` means: objects, short names, or one string of names.

    Raises `InputError` for anything else, and for two losses of one name.
    """
    if isinstance(items, str):
        return parse(items)
    if isinstance(items, Item) or not isinstance(items, Iterable):
        raise InputError(f"losses is {items!r}", todo="give a list of losses or of their names: ['sp', 'cp', 'lb']")
    found = tuple(_named(i) if isinstance(i, str) else i for i in items)
    for item in found:
        if not isinstance(item, Item):
            what = f"the class {item.__name__}, not an instance" if isinstance(item, type) else repr(item)
            raise InputError(f"losses holds {what}", todo=nearest(str(getattr(item, "name", item)), NAMES))
    names = [item.name for item in found]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise InputError(f"losses holds {twice!r} twice", todo="give each loss once, with the weight that you mean")
    return found


__all__ = [
    "ERC", "NAMES", "BiasUpdate", "Coupling", "Item", "LoadBalance", "Loss", "Orthogonality", "RoutingMetrics",
    "Specialization", "Taps", "Variance", "ZLoss", "as_losses", "parse", "sign_update",
]  # fmt: skip
