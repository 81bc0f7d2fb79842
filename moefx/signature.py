"""Which compiled graph a call runs: the state of the module tree, the arguments, and what surrounds the call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import compat
from .errors import InputError

Tensor = torch.Tensor
# Config entries that no forward depends on: captures run without a cache, and `save_pretrained` notes the other ones.
_NOT_COMPUTED_WITH = frozenset({"use_cache", "dtype", "architectures", "_name_or_path", "transformers_version"})


class Structure:
    """What a compiled graph assumed about the module tree, cheap to check at every call.

    Replaced submodules, modes and hooks of single submodules, `requires_grad`, dtype, device and layout of every
    parameter and buffer, which of them are tied, and the plain values of the configs are watched. Python attributes of
    modules are not: after changing one, call `optimize` again.
    """

    def __init__(self, *models: nn.Module) -> None:
        self.modules = [m for model in models for m in model.modules()]
        self.children = [(m._modules, n, c) for m in self.modules for n, c in m._modules.items()]
        self.sizes = [(m._modules, len(m._modules)) for m in self.modules]
        self.tensors = [(d, n) for m in self.modules for d in (m._parameters, m._buffers) for n in d]
        # The root's own hooks run around the compiled forward, at every call.
        self.hooks = [getattr(m, h) for m in self.modules[1:] for h in compat.HOOKS]
        configs = [getattr(m, "config", None) for m in self.modules]
        self.configs = list({id(c): c.__dict__ for c in configs if hasattr(c, "__dict__")}.values())
        self._last: _Tensors | None = None

    def holds(self) -> bool:
        """Whether the module tree is still made of the same modules."""
        return all(d.get(n) is c for d, n, c in self.children) and all(len(d) == n for d, n in self.sizes)

    def mode(self) -> Any:
        """Hashable state that graphs are specialised to."""
        tensors = [d.get(n) for d, n in self.tensors]
        last = self._last
        if last is None or not last.same(tensors):
            self._last = last = _Tensors.of(tensors)
        config = tuple(
            (k, v)
            for c in self.configs
            for k, v in c.items()
            if type(v) in (bool, int, float, str, type(None)) and k not in _NOT_COMPUTED_WITH
        )
        hooks = tuple((i, *d) for i, d in enumerate(self.hooks) if d) if any(self.hooks) else ()
        return (last.key, tuple([m.training for m in self.modules]), hooks, config)


class _Key:
    """A hashable value with an entry for every tensor of a model, whose hash is computed once."""

    __slots__ = ("hash", "value")

    def __init__(self, value: Any) -> None:
        self.value, self.hash = value, hash(value)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Key) and self.value == other.value)


@dataclass(frozen=True)
class _Tensors:
    """The tensors of the tree as they were seen last, and the key of what they were like."""

    tensors: Sequence[Tensor | None]
    trained: Sequence[bool]
    unchanged: Callable[[Sequence[Tensor]], bool]
    key: _Key

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None]) -> _Tensors:
        first: dict[int, int] = {}
        key = tuple(
            None if t is None else (first.setdefault(id(t), i), t.requires_grad, t.dtype, t.shape, t.stride(), t.device)
            for i, t in enumerate(tensors)
        )
        there = [t for t in tensors if t is not None]
        return cls(tensors, [t.requires_grad for t in there], compat.layouts_unchanged(there), _Key(key))

    def same(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether these are the same objects, and like they were. `key` says it too, more slowly."""
        if not all(map(operator.is_, tensors, self.tensors)):
            return False
        there = [t for t in tensors if t is not None]
        return [t.requires_grad for t in there] == self.trained and self.unchanged(there)


def leaf_key(v: Any, *, exact: bool) -> Any:
    """What graphs are specialised to of one argument; not `exact` leaves the sizes of tensors out.

    Raises:
        InputError: the argument is neither a tensor nor a plain constant.
    """
    if isinstance(v, Tensor):
        sizes = (v.shape, v.stride()) if exact else v.dim()
        return (sizes, v.dtype, v.device, v.requires_grad)
    if isinstance(v, bool | int | float | str | torch.dtype | torch.device | type(None)):
        return (type(v), v)
    raise InputError(
        f"an argument of type {type(v).__name__} reached an optimized model",
        why="graphs take tensors and plain constants",
        todo="call opt.original(...) for caches and other objects (opt.generate(...) does so by itself)",
    )


def context_key() -> Any:
    """What graphs are specialised to of the surroundings: grad mode and autocast."""
    casts = tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))
    return (torch.is_grad_enabled(), casts)
