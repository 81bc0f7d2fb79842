"""Inputs like those that a block was seen with, in other sizes; and the block's copy, with random weights.

The copy is what is run: the model's own parameters, gradients, buffers and random state are never touched. Its weights
are drawn anew (`draw`) because those of a fresh model may be zeros, or the same for all experts, and prove nothing.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .draw import alone, redraw, varied
from .record import leaves, mapped

Tensor = torch.Tensor


@dataclass
class Seen:
    """How a module was called: arguments, with tensors as they were.

    `later` are its other calls, of each of which the shapes of tensors are kept. `hidden`: whether a
    mask among the model's inputs was made to hide a position for this call. `symbolic`: whether other sizes will be run
    without another proof.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    later: list[Seen] = field(default_factory=list)
    hidden: bool = False
    symbolic: bool = False

    @property
    def call(self) -> tuple[Any, ...]:
        """Positional arguments and keywords, as `unlike` compares them."""
        return self.args, self.kwargs

    def difference(self) -> str | None:
        """What is another constant, keyword or kind of tensor in a later call; None if all calls are alike."""
        for other in self.later:
            if (what := unlike(self.call, other.call)) is not None:
                return what
        return None


def unlike(a: Any, b: Any) -> str | None:
    """How two calls, (args, kwargs), differ in more than sizes and values of tensors; None if they do not."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        # A raised block is proven in all floating dtypes.
        first, other = ((t.dim(), "floating" if t.is_floating_point() else str(t.dtype)) for t in (a, b))
        return (
            None if first == other else f"a {first[1]} tensor of {first[0]} axes, then a {other[1]} one of {other[0]}"
        )
    if isinstance(a, tuple | list) and type(a) is type(b) and len(a) == len(b):
        return next((what for pair in zip(a, b, strict=True) if (what := unlike(*pair)) is not None), None)
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"the keywords {', '.join(map(str, a))}, then {', '.join(map(str, b))}"
        return next((what for k in a if (what := unlike(a[k], b[k])) is not None), None)
    return None if _equal(a, b) else f"{_shown(a)}, then {_shown(b)}"


def _equal(a: Any, b: Any) -> bool:
    """Whether arguments that are no tensors are the same for a block; objects (a cache) by their plain attributes."""
    if a is b or type(a) is not type(b):
        return a is b
    by_identity: Any = type(a).__eq__
    if by_identity is object.__eq__ and hasattr(a, "__dict__"):
        mine, other = ({k: v for k, v in vars(o).items() if type(v) in _PLAIN} for o in (a, b))
        return mine == other
    try:
        return bool(a == b)
    except Exception:  # what does not say is not known to be the same
        return False


def _shown(v: Any) -> str:
    if isinstance(v, Tensor):
        return "a tensor"
    return repr(v) if type(v) in _PLAIN else f"a {type(v).__name__}"


_PLAIN = (bool, int, float, str, type(None))


@contextmanager
def observed(modules: dict[str, nn.Module]) -> Iterator[dict[str, Seen]]:
    """While active, the calls of each module are noted.

    Tensors of the first are copied, for the model may write into them; of later ones the shapes are enough.
    """
    calls: dict[str, Seen] = {}
    kept = [(m, m.__dict__.get("forward")) for m in modules.values()]

    def wrap(path: str, module: nn.Module) -> None:
        forward = module.forward

        @functools.wraps(forward)  # its signature is asked for where a call does not fit
        def run(*args: Any, **kwargs: Any) -> Any:
            if path not in calls:
                calls[path] = Seen(*mapped((args, kwargs), _copied))
            else:
                calls[path].later.append(Seen(*mapped((args, kwargs), _shaped)))
            return forward(*args, **kwargs)

        module.__dict__["forward"] = run

    try:
        for path, module in modules.items():
            wrap(path, module)
        yield calls
    finally:
        for module, forward in kept:
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


@contextmanager
def undisturbed(model: nn.Module | None = None) -> Iterator[None]:
    """Random states of torch, Python and numpy, and the model's buffers and plain attributes, are as before at the end.

    Plain attributes are numbers, strings and None, and the contents of lists and dicts.
    """
    numpy: Any = sys.modules.get("numpy")
    others = (random.getstate(), numpy.random.get_state() if numpy else None)
    modules = list(model.modules()) if model is not None else []
    devices = {t.device for m in modules for t in m._parameters.values() if t is not None and t.device.type == "cuda"}
    buffers = [(b, b.detach().clone()) for m in modules for b in m._buffers.values() if b is not None]
    plain = [(m, k, v, copy.copy(v)) for m in modules for k, v in m.__dict__.items() if _is_plain(k, v)]
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(others[0])
        if numpy:
            numpy.random.set_state(others[1])
        with torch.no_grad():
            for b, kept in buffers:
                b.copy_(kept)
        for m, k, v, kept in plain:
            if m.__dict__.get(k) is not v:
                m.__dict__[k] = v
            if isinstance(v, list):
                v[:] = kept
            elif isinstance(v, dict) and v != kept:
                v.clear()
                v.update(kept)


def _is_plain(key: str, v: Any) -> bool:
    if key.startswith("_") and isinstance(v, dict):
        return False  # registries of torch.nn.Module
    return v is None or type(v) in (bool, int, float, str, list, dict)


def _copied(v: Any) -> Any:
    return v.detach().clone() if isinstance(v, Tensor) else v


def _shaped(v: Any) -> Any:
    return torch.empty_like(v, device="meta") if isinstance(v, Tensor) else v


class Inputs:
    """Makes arguments for a block, of any number of rows, like a call that was seen.

    The first tensor tells what the sizes mean: its leading axes (all but the features; all of an integer tensor) may be
    of any size, and axes of other tensors that have the same size follow them.

    Sizes may be the same by accident: as many rows as tokens in a row, or as experts. What a tensor of one axis follows
    is then a matter of `reading`: `first`, the first axis of its size; `last`, the last; `none`.
    """

    def __init__(self, seen: Seen, reading: str = "first") -> None:
        self.seen, self.reading = seen, reading
        tensors = [v for v in leaves((seen.args, seen.kwargs)) if isinstance(v, Tensor)]
        self.tensors = tensors
        first = next((t for t in tensors if t.is_floating_point() and t.dim() > 1), tensors[0] if tensors else None)
        lead = 0 if first is None else first.dim() - (1 if first.is_floating_point() else 0)
        self.first = first
        self.lead = tuple(first.shape[:lead]) if first is not None else ()

    def sizes(self, rows: int, inner: int) -> tuple[int, ...]:
        """Leading sizes of about rows * inner tokens: the last axis has `inner`, the one before `rows`."""
        if len(self.lead) == 1:
            return (rows * inner,)
        return (1,) * (len(self.lead) - 2) + (rows, inner)

    def shapes(self, sizes: Sequence[int]) -> list[tuple[int, ...]]:
        """Shapes of all tensors among the arguments of the given leading sizes, in order."""
        return [self._shape(t, sizes) for t in self.tensors]

    def make(
        self, sizes: Sequence[int], seed: int, *, dtype: torch.dtype = torch.float32, kind: str = "random"
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the given leading sizes.

        Kinds: `random` (rows with a part in common, so that some experts are favoured), `alike` (nearly equal rows, all
        of which want the same experts), `ties` (zero rows, for which all experts are equal), `large` (of norm 200),
        `seen` (those of the call itself, whatever the sizes).
        """
        gen = torch.Generator().manual_seed(seed)

        def one(v: Any) -> Any:
            if not isinstance(v, Tensor):
                return v
            if kind == "seen":
                return v.detach().clone().to(dtype if v.is_floating_point() else v.dtype)
            shape = self._shape(v, sizes)
            if v is not self.first and alone(v):
                drawn = varied(v, shape, gen, kind)
                return drawn.to(dtype) if v.is_floating_point() and v.dim() > 1 else drawn
            if not v.is_floating_point() or v.dim() < 2 or (v is not self.first and _is_mask(v)):
                count = int(torch.Size(shape).numel())
                flat = v.detach().reshape(-1)
                at = torch.randint(max(1, flat.numel()), (count,), generator=gen)
                drawn = (flat[at.to(flat.device)] if flat.numel() else v.new_zeros(count)).view(shape)
                return drawn.to(dtype) if v.is_floating_point() and v.dim() > 1 else drawn
            noise = torch.randn(shape, generator=gen)
            common = torch.randn(shape[-1:], generator=gen)
            # Some rows have the opposite in common: of two experts both are chosen.
            side = torch.where(torch.rand(*shape[:-1], 1, generator=gen) < 0.25, -1.0, 1.0)
            value = {
                "random": noise + common * side,
                "alike": 0.05 * noise + common,
                "ties": noise * (torch.arange(max(1, noise.shape[-2]))[: noise.shape[-2], None] % 2),
                "large": noise * (200 / max(1, shape[-1]) ** 0.5) + 3 * common,
            }[kind]
            return value.to(v.device, dtype).requires_grad_()

        made = mapped((self.seen.args, self.seen.kwargs), one)
        return tuple(made[0]), dict(made[1])

    @property
    def readings(self) -> tuple[str, ...]:
        """The readings that make a difference, the likeliest first."""
        single = [t.shape[0] for t in self.tensors if t is not self.first and t.dim() == 1 and t.shape[0] > 1]
        if not any(n in self.lead for n in single):
            return ("first",)
        return ("first", "last", "none") if any(self.lead.count(n) > 1 for n in single) else ("first", "none")

    def _shape(self, v: Tensor, sizes: Sequence[int]) -> tuple[int, ...]:
        shape = list(v.shape)
        if v.dim() == 1 and v is not self.first and self.reading != "first":
            last = [size for size, seen in zip(sizes, self.lead, strict=True) if seen == shape[0] > 1][-1:]
            return tuple(last or shape) if self.reading == "last" else tuple(shape)
        features = v.is_floating_point() and (v is self.first or not _is_mask(v))
        for axis, size in enumerate(shape):
            if axis < len(self.lead) and size == self.lead[axis]:
                shape[axis] = sizes[axis]
            elif size > 1 and size in self.lead and not (features and axis == len(shape) - 1):
                shape[axis] = sizes[self.lead.index(size)]
        return tuple(shape)


def _is_mask(v: Tensor) -> bool:
    """Whether a floating tensor has a few values alone, as additive masks have: others would mean nothing."""
    return v.numel() > 8 and v.detach().unique().numel() <= 4


def copy_of(block: nn.Module, seed: int = 0) -> nn.Module:
    """A copy with random weights and buffers in float32. Frozen weights stay frozen.

    Raises whatever `copy.deepcopy` raises for modules that cannot be copied.
    """
    # What the block shares with other modules beyond parameters (a dict, a config) is copied with it.
    new = copy.deepcopy(block)
    redraw(new, block, seed)
    return new
