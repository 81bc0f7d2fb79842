"""Which compiled graph a call runs: the state of the module tree, the arguments, and what surrounds the call."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from . import compat
from .errors import InputError
from .holder import HOOKS
from .losses.ranks import process_group

Tensor = torch.Tensor
# Config entries that no forward depends on: captures run without a cache, and `save_pretrained` notes the other ones.
PLAIN = (bool, int, float, str)
# Attributes that every module has, and sizes that its forward does not read.
_OF_MODULES = frozenset({*nn.Module().__dict__, "in_features", "out_features", "num_embeddings", "embedding_dim"})
# The number of signatures from which on, and at every doubling, it is said what they differ in.
MANY = 5
_NOT_COMPUTED_WITH = frozenset({"use_cache", "dtype", "architectures", "_name_or_path", "transformers_version"})


class State(NamedTuple):
    """What graphs are specialised to of the module tree."""

    tensors: _Key
    training: tuple[bool, ...]
    plain: _Key
    hooks: tuple[Any, ...]
    config: tuple[Any, ...]


class Signature(NamedTuple):
    """Which graph a call runs: the structure and the leaves of its arguments, the module tree, the surroundings."""

    spec: Any
    inputs: tuple[Any, ...]
    state: State
    context: Any


class Structure:
    """What a compiled graph assumed about the module tree, cheap to check at every call.

    Replaced submodules, modes and hooks of single submodules, a forward that was assigned to one, `requires_grad`,
    dtype, device and layout of every parameter and buffer, which of them are tied, the plain values of the configs and
    those that modules hold as attributes (numbers, truth values, strings) are watched. Attributes that a forward
    changes itself are not, nor are other Python objects: after changing one, call `optimize` again.
    """

    def __init__(self, *models: nn.Module) -> None:
        named = [(path, m) for model in models for path, m in model.named_modules()]
        self.modules = [m for _, m in named]
        self.children = [(m._modules, n, c) for m in self.modules for n, c in m._modules.items()]
        self.dicts: list[Any] = [d for m in self.modules for d in (m._modules, m._parameters, m._buffers)]
        self.sizes = [len(d) for d in self.dicts]
        self.own = [m.__dict__ for m in self.modules]
        self.forwards = [d.get("forward") for d in self.own]
        self.tensors = [(d, n) for m in self.modules for d in (m._parameters, m._buffers) for n in d]
        # The root's own hooks run around the compiled forward, at every call.
        self.hooks = [getattr(m, h) for m in self.modules[1:] for h in HOOKS]
        configs = [getattr(m, "config", None) for m in self.modules]
        self.configs = list({id(c): c.__dict__ for c in configs if hasattr(c, "__dict__")}.values())
        self.plain = [(i, n) for i, d in enumerate(self.own) for n, v in d.items() if _watched(n, v)]
        self.paths = [path for path, _ in named]
        self._left_out: set[int] = set()
        self._last: _Tensors | None = None
        self._last_plain: tuple[list[Any], _Key] | None = None

    def holds(self) -> bool:
        """Whether the module tree is still made of the same modules, with as many tensors."""
        return (
            all(d.get(n) is c for d, n, c in self.children)
            and list(map(len, self.dicts)) == self.sizes
            and all(map(operator.is_, [d.get("forward") for d in self.own], self.forwards))
        )

    def mode(self) -> State:
        """Hashable state that graphs are specialised to."""
        tensors = [d.get(n) for d, n in self.tensors]
        last = self._last
        if last is None or not last.same(tensors):
            self._last = last = _Tensors.of(tensors)
        config = tuple(
            (k, v)
            for c in self.configs
            for k, v in c.items()
            if type(v) in (*PLAIN, type(None)) and k not in _NOT_COMPUTED_WITH
        )
        hooks = tuple((i, *d) for i, d in enumerate(self.hooks) if d) if any(self.hooks) else ()
        return State(last.key, tuple([m.training for m in self.modules]), self._plain_key(), hooks, config)

    def plain_values(self) -> list[Any]:
        """Numbers, truth values and strings that modules hold as attributes, in a fixed order."""
        return [self.own[i].get(n) for i, n in self.plain]

    def leave_out_changed(self, before: list[Any]) -> None:
        """No longer watch what has changed since: values that a forward writes, as counters, say nothing of it."""
        changed = {i for i, (v, was) in enumerate(zip(self.plain_values(), before, strict=True)) if not same(v, was)}
        if changed - self._left_out:
            self._left_out |= changed
            self._last_plain = None

    def watch_as(self, other: Structure) -> None:
        """Watch the attributes that a structure of the same form watches, whatever modules were given since."""
        self.plain, self._left_out, self._last_plain = other.plain, set(other._left_out), None

    def name(self, position: int) -> str:
        """Of an attribute, as `layers.0.drop.p`."""
        i, n = self.plain[position]
        return f"{self.paths[i]}.{n}".removeprefix(".")

    def _plain_key(self) -> _Key:
        values, last = self.plain_values(), self._last_plain
        if last is None or not all(map(operator.is_, values, last[0])):
            key = [(type(v), v if type(v) in PLAIN else None) for v in values]
            for i in self._left_out:
                key[i] = (type(None), None)
            self._last_plain = last = values, _Key(tuple(key))
        return last[1]


class _Key:
    """A hashable value with many entries, whose hash is computed once."""

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


def context_key(over_ranks: bool) -> Any:
    """What graphs are specialised to of the surroundings: grad mode, autocast, and what they sum over, if they do."""
    casts = tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))
    return (torch.is_grad_enabled(), casts, process_group() if over_ranks else None)


def _watched(name: str, value: Any) -> bool:
    return type(value) in PLAIN and name not in _OF_MODULES


def same(a: Any, b: Any) -> bool:
    """Whether two plain values are one to a graph: 1, 1.0 and True are not."""
    return a is b or (type(a) is type(b) and a == b)


class ManySignaturesWarning(UserWarning):
    """A model is compiled again and again, for calls that differ in a size or a value."""


def names_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """For each flat argument of a call, the name of the argument that it belongs to."""
    positional = list(inspect.signature(model.forward).parameters)
    names = []
    for path, _ in pytree.tree_flatten_with_path((args, kwargs))[0]:
        key = path[1]  # path[0] tells positional from keyword arguments
        place = key.idx if isinstance(key, pytree.SequenceKey) else getattr(key, "key", str(key))
        names.append(place if isinstance(place, str) else positional[min(place, len(positional) - 1)])
    return names


def _axes(a: Any, b: Any) -> set[int] | None:
    """Axes in which the keys of two tensors of one rank differ; None for constants and other ranks."""
    if len(a) != 4 or len(a[0][0]) != len(b[0][0]):
        return None
    return {i for i, (m, n) in enumerate(zip(a[0][0], b[0][0], strict=True)) if m != n}


def warn_of_many(new: Signature, known: Iterable[Signature], structure: Structure, names: list[str]) -> None:
    """Say what signatures differ in when there are many that are alike otherwise.

    Args:
        new: the one that was just compiled.
        known: all of them.
        names: of the new one's flat arguments.
    """
    alike = [k for k in known if (k.spec, k.context, k.state.training) == (new.spec, new.context, new.state.training)]
    if len(alike) not in {MANY << i for i in range(16)}:
        return
    sizes: dict[str, set[int]] = {}
    attributes: set[str] = set()
    rest: set[str] = set()
    for other in alike:
        for name, a, b in zip(names, new.inputs, other.inputs, strict=True):
            if a == b:
                continue
            if len(a) == len(b) and a[1:] == b[1:] and (axes := _axes(a, b)) is not None:
                sizes.setdefault(name, set()).update(axes)
                rest |= set() if axes else {f"the memory layout of {name}"}
            else:
                rest.add(f"the argument {name}")
        mine, its = new.state.plain.value, other.state.plain.value
        attributes |= {structure.name(i) for i, (a, b) in enumerate(zip(mine, its, strict=True)) if a != b}
    told = [f"axis {', '.join(map(str, sorted(axes)))} of {name}" for name, axes in sizes.items() if axes]
    dynamic = {name: tuple(sorted(axes)) for name, axes in sizes.items() if axes}
    what = ", ".join([*told, *sorted(rest), *sorted(attributes)]) or "parameters, hooks or the config"
    todo = [f"optimize(..., dynamic={dynamic}) makes one graph for all sizes"] if dynamic else []
    todo += ["keep in a buffer what changes from call to call"] if attributes else []
    warnings.warn(
        f"{len(alike)} signatures of one model were compiled and are kept; they differ in {what}. "
        f"Every new one is compiled again: {'; '.join(todo) or 'change it less often'}.",
        ManySignaturesWarning,
        stacklevel=2,
    )
