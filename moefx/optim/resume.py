"""Whether a saved state is that of the optimizer that is to continue with it."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import Repr
from typing import Any

import torch

from ..errors import InputError
from .lite import LiteConfig
from .schedule import describe

Tensor = torch.Tensor
Group = dict[str, Any]

HOST_COUNTERS = ("calls",)  # state that stays on the CPU
# Who computes what is no part of the result, and there may be other ranks now; how weights are rounded may change.
_OF_HERE = ("lite", "replicas", "rounding", "split")
_OF_ROUNDING = {"master"}  # state that one way of rounding keeps
_SHOWN = 3
_SHORT = Repr()
_SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother = _SHOWN, 120, 120


def checked(
    state_dict: Mapping[str, Any], groups: list[Group], state: Mapping[Tensor, Mapping[str, Tensor]]
) -> list[Group]:
    """The saved groups, with what only the optimizer here knows.

    Raises:
        InputError: what was saved belongs to another optimizer.
    """
    for key in ("param_groups", "state"):
        if key not in state_dict:
            raise _other(f"it has no {key!r}")
    saved_groups = [dict(g) for g in state_dict["param_groups"]]
    if len(saved_groups) != len(groups):
        raise _other(f"{len(saved_groups)} groups were saved, {len(groups)} are here")
    for number, (saved, here) in enumerate(zip(saved_groups, groups, strict=True)):
        if len(saved["params"]) != len(here["params"]):
            why = f"{len(saved['params'])} parameters were saved, {len(here['params'])} are here"
            raise _other(why, f"group {number}")
        for key in ("algorithm", "names", "param_names", "layout", "split", "lite"):
            mine = here.get(key)
            mine = describe_lite(mine) if key == "lite" else mine
            if found := _differences(_plain(saved.get(key)), _plain(mine)):
                raise _other(f"{key}: {found}", f"group {number}")
        for index, p in zip(saved["params"], here["params"], strict=True):
            _compare_state(state_dict["state"].get(index), state[p], f"group {number}, parameter {index}")
        saved.update({key: here[key] for key in _OF_HERE if key in here})
    return saved_groups


def describe_lite(lite: LiteConfig | None) -> Any:
    """A group's LITE as it is saved."""
    return None if lite is None else lite.describe()


def _plain(value: Any) -> Any:
    """Lists and tuples compare alike: some formats know only one of them."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else describe(value)


def _differences(saved: Any, here: Any) -> str:
    """The first few of them, and how many more: a group may have thousands of names. Empty if there are none."""
    pairs = [("", saved, here)]
    if isinstance(saved, list) and isinstance(here, list) and len(saved) == len(here):
        pairs = [("", a, b) for a, b in zip(saved, here, strict=True)]
    elif isinstance(saved, Mapping) and isinstance(here, Mapping):
        pairs = [(f"{k}: ", saved.get(k), here.get(k)) for k in {**saved, **here}]
    found = [f"{label}{_SHORT.repr(a)} was saved, {_SHORT.repr(b)} is here" for label, a, b in pairs if a != b]
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def _compare_state(saved: Mapping[str, Tensor] | None, here: Mapping[str, Tensor], where: str) -> None:
    if saved is None or set(saved) - _OF_ROUNDING != set(here) - _OF_ROUNDING:
        raise _other(f"the state holds {sorted(saved or ())}, here it is {sorted(here)}", where)
    for key, value in here.items():
        if key in saved and saved[key].shape != value.shape:
            raise _other(f"{key} {list(saved[key].shape)} was saved, {list(value.shape)} is here", where)


def _other(why: str, where: str | None = None) -> InputError:
    todo = "build the optimizer with the parameters and settings of the run that saved it"
    return InputError("the state belongs to another optimizer", where=where, why=why, todo=todo)
