"""Which modules of a model to try, and what became of each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .bank import find_banks
from .block import FINAL, NotRaised, Raising, certify_like, likeness, raise_block
from .certify import device_of
from .probe import Seen, undisturbed

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_SMALL = 1 << 22  # elements below which threads cost more than they bring


@dataclass
class Outcome:
    """A module that was raised, or the reason why it was not."""

    path: str
    module: nn.Module
    raising: Raising | None
    reason: str = ""


def chains(model: nn.Module, taken: set[str]) -> list[list[str]]:
    """Paths to try, for each bank of experts the module nearest to it and then the ones around it.

    `taken` are paths that are dealt with otherwise; nothing inside or around them is tried.
    """
    modules = dict(model.named_modules())
    blocked = {p for t in taken for p in modules if within(p, t) or within(t, p)}
    able = [p for p, m in modules.items() if p not in blocked and not isinstance(m, _CONTAINERS) and find_banks(m)]
    inner = [p for p in able if not any(q != p and within(q, p) for q in able)]
    found = []
    for start in inner:
        around = [p for p in able if within(start, p) and sum(within(q, p) for q in inner) == 1]
        found.append(sorted(around, key=len, reverse=True))
    return [c for c in found if c]


def within(path: str, outer: str) -> bool:
    """Whether a module path is `outer` or lies in it."""
    return path == outer or outer == "" or path.startswith(f"{outer}.")


def raise_all(model: nn.Module, tries: list[list[str]], calls: dict[str, Seen]) -> list[Outcome]:
    """Try every chain from the inside out. The model is left as it is: nothing is installed."""
    known: dict[Any, Raising | NotRaised] = {}
    found = []
    for chain in tries:
        best: tuple[str, NotRaised] | None = None
        for path in chain:
            module = model.get_submodule(path)
            try:
                if path not in calls:
                    raise NotRaised("it is not called when the model runs, or not as a module")
                found.append(Outcome(path, module, _raise(module, calls[path], known)))
                best = None
                break
            except NotRaised as e:
                if best is None or e.stage > best[1].stage:
                    best = (path, e)
                if e.stage >= FINAL:
                    break
        if best is not None:
            where = "" if best[0] == chain[0] else f"{best[0] or 'the model'}: "
            found.append(Outcome(chain[0], model.get_submodule(chain[0]), None, where + str(best[1])))
    return found


def _raise(module: nn.Module, seen: Seen, known: dict[Any, Raising | NotRaised]) -> Raising:
    key = (likeness(module), str([_like(v) for v in (*seen.args, *seen.kwargs.items())]), seen.difference())
    first = known.get(key)
    if isinstance(first, NotRaised):
        raise first
    device = device_of(module)
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    with _threads(module), undisturbed(), torch.autocast(device, enabled=False):
        try:
            made = raise_block(module, seen, low) if first is None else certify_like(module, seen, first, low)
        except NotRaised as e:
            known.setdefault(key, e)
            raise
        except Exception as e:  # a block that trips the recogniser is left alone like any other that is not understood
            raise NotRaised(f"the recogniser failed on it: {type(e).__name__}: {e}", 5) from e
    known.setdefault(key, made)
    return made


def _like(v: Any) -> Any:
    if isinstance(v, tuple):
        return tuple(map(_like, v))
    return (v.dtype, v.dim()) if isinstance(v, torch.Tensor) else repr(type(v))


@contextlib.contextmanager
def _threads(module: nn.Module) -> Iterator[None]:
    """One thread for small blocks: probes are tiny, and waking threads for each of their steps costs more."""
    before = torch.get_num_threads()
    small = sum(p.numel() for p in module.parameters()) < _SMALL
    try:
        if small:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)
