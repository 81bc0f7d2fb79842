"""Which implementation computes a dialect op: an ordered list of providers per op.

A provider declares what it supports by a predicate over the op's own arguments. The first supporting provider in
priority order runs; the op's readable reference is always last, so an op is never without an implementation. What ran
is recorded, so that a report can say it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from moefx.errors import InputError, nearest

WIDE = (torch.float32, torch.bfloat16, torch.float16)  # what Triton kernels read and write besides codes


@dataclass(frozen=True)
class Provider:
    """One implementation of one op. `supports(*args)` gets the op's arguments and must not look at tensor values."""

    name: str
    run: Callable[..., Any]
    supports: Callable[..., bool]


@dataclass
class OpProviders:
    """The providers of one op, best first, and how often each was used, keyed by (provider, device type, dtype)."""

    providers: list[Provider] = field(default_factory=list)
    used: dict[tuple[str, str, torch.dtype], int] = field(default_factory=dict)


_TABLE: dict[str, OpProviders] = {}


def register(op: str, name: str, supports: Callable[..., bool]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: add a provider for `op` behind those that are already registered."""

    def add(run: Callable[..., Any]) -> Callable[..., Any]:
        _TABLE.setdefault(op, OpProviders()).providers.append(Provider(name, run, supports))
        return run

    return add


def register_triton(op: str, place: str, supports: Callable[..., bool]) -> None:
    """Add the provider "triton" for `op`: the launcher `place`, "<module>:<function>" in `kernels/gpu`.

    The module is imported at the first call, so that moefx works without triton. `supports` is asked for calls whose
    first tensor lives on a CUDA or ROCm device, where triton is installed.
    """
    module, name = place.split(":")

    @cache
    def launcher() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(import_module(f"moefx.kernels.gpu.{module}"), name)
        return found

    def here(*args: Any) -> bool:
        return _first_tensor(args).device.type == "cuda" and _triton_found() and supports(*args)

    provider = Provider("triton", lambda *args: launcher()(*args), here)
    _TABLE.setdefault(op, OpProviders()).providers.append(provider)


@cache
def _triton_found() -> bool:
    return find_spec("triton") is not None


def _first_tensor(args: tuple[Any, ...]) -> torch.Tensor:
    return next(t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor))


def wide(*tensors: torch.Tensor | None) -> bool:
    """Whether all tensors that are given are fp32, bf16 or fp16."""
    return all(t is None or t.dtype in WIDE for t in tensors)


def holds(t: torch.Tensor, shared: int) -> bool:
    """Whether tiles of that many bytes of shared memory fit a multiprocessor of the device of `t`.

    Asked on ROCm alone: a workgroup has 64 KiB on gfx942 and 160 KiB on gfx950, and a launch of more is an error. Tiles
    are made for sm_90 and sm_100, which have 227 KiB.
    """
    if torch.version.hip is None or not torch.cuda.is_available():
        return True
    here: int = torch.cuda.get_device_properties(t.device).shared_memory_per_block
    return shared <= here


def choose(op: str, *args: Any) -> Provider:
    """The provider that would compute `op` of `args`, which may be fake tensors of a device that is not here."""
    for provider in _TABLE[op].providers:
        if provider.supports(*args):
            return provider
    raise LookupError(f"no provider of {op} supports these arguments; the reference should have been registered last")


def dispatch(op: str, *args: Any) -> Any:
    """Run `op` through its first supporting provider. Called from inside the op, on real tensors."""
    provider, first, used = choose(op, *args), _first_tensor(args), _TABLE[op].used
    key = (provider.name, first.device.type, first.dtype)
    used[key] = used.get(key, 0) + 1
    return provider.run(*args)


def used() -> dict[str, dict[str, int]]:
    """Calls per op and `provider/device/dtype` since the process started."""
    return {
        op: {
            f"{provider}/{device}/{str(dtype).removeprefix('torch.')}": n
            for (provider, device, dtype), n in entry.used.items()
        }
        for op, entry in sorted(_TABLE.items())
        if entry.used
    }


def names(op: str) -> list[str]:
    """Providers of `op` in priority order."""
    if op not in _TABLE:
        raise InputError(f"no dialect op is called {op!r}", todo=nearest(op, _TABLE))
    return [p.name for p in _TABLE[op].providers]


@contextmanager
def preferring(name: str) -> Iterator[None]:
    """Within, an op runs its provider called `name` where that supports the call, and its reference elsewhere."""
    before = {op: entry.providers for op, entry in _TABLE.items()}
    known = {p.name for providers in before.values() for p in providers}
    if name not in known:
        raise InputError(f"no provider is called {name!r}", todo=nearest(name, known))
    try:
        for entry in _TABLE.values():
            entry.providers = [*(p for p in entry.providers if p.name == name), entry.providers[-1]]
        yield
    finally:
        for op, providers in before.items():
            _TABLE[op].providers = providers
