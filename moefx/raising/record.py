"""What a block does, step by step: every torch function it calls on real tensors, with the values it made.

Unlike a tracer the recorder runs the block for good, so Python may loop over experts that are hit, test counts and call
numpy. What it saw then holds for these inputs alone; `replay` and `certify` find out what holds for others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

Tensor = torch.Tensor
_LARGEST = 1 << 22  # elements of a value that is kept; larger ones (gathered weights) are no rows of tokens


@dataclass(eq=False)
class Obj:
    """One tensor object. `source` says where it came from: a step, an input, a parameter or buffer, or elsewhere."""

    tensor: Tensor
    source: str  # step | input | state | constant
    step: int = -1
    leaf: int = 0  # which output of the step, or which input
    name: str = ""  # dotted name of a parameter or buffer

    @property
    def storage(self) -> int:
        """Identity of the memory, which views share."""
        found: int = self.tensor.untyped_storage()._cdata
        return found


@dataclass(eq=False)
class Snap:
    """The value of an object after step `time` (-1: as it was given)."""

    obj: Obj
    time: int
    value: Tensor
    grad: bool


@dataclass(eq=False)
class Call:
    """A submodule's forward: the steps from `start` to `end` ran in it."""

    path: str
    start: int
    args: Any
    kwargs: Any
    grad: bool
    end: int = -1
    out: Any = None


@dataclass(eq=False)
class Step:
    """One torch function call; `args` and `out` hold `Obj`s in the place of tensors."""

    index: int
    func: Any
    args: Any
    kwargs: Any
    out: Any
    writes: list[Obj]
    calls: tuple[Call, ...]
    grad: bool
    autocast: bool  # whether inside an autocast region that the block itself entered

    @property
    def name(self) -> str:
        """The function's name, `view` or `topk` or `__setitem__`."""
        return function_name(self.func)


@dataclass
class Record:
    """All steps of one run, and the values that they left."""

    steps: list[Step] = field(default_factory=list)
    snaps: list[Snap] = field(default_factory=list)
    inputs: list[Obj] = field(default_factory=list)
    out: Any = None
    out_type: type | None = None  # of a dict with attributes, such as transformers' outputs
    hooked: frozenset[str] = frozenset()  # paths of submodules with hooks


def function_name(func: Any) -> str:
    """`T` for the getter of `Tensor.T`, else the function's own name."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    return str(name)


def objects(tree: Any) -> list[Obj]:
    """The tensor objects in an argument or output structure, in order."""
    return [v for v in leaves(tree) if isinstance(v, Obj)]


def leaves(tree: Any) -> list[Any]:
    """What an argument or output structure of tuples, lists, dicts and slices holds, in order."""
    found: list[Any] = []
    mapped(tree, found.append)
    return found


def mapped(tree: Any, to: Callable[[Any], Any]) -> Any:
    """The structure with `to` applied to everything in it."""
    change: Any = to
    return fx.node.map_aggregate(tree, change)


class _Recorder(TorchFunctionMode):
    def __init__(self, named: dict[int, tuple[str, Tensor]]) -> None:
        super().__init__()
        self.record = Record()
        self.known: dict[int, Obj] = {}
        self.seen: dict[int, int] = {}  # tensor id -> version of the value last kept
        self.calls: list[Call] = []
        self.autocast = 0
        for name, t in named.values():
            self._enter(Obj(t, "state", name=name))

    def _enter(self, obj: Obj) -> Obj:
        self.known[id(obj.tensor)] = obj
        self._keep(obj, -1)
        return obj

    def _keep(self, obj: Obj, time: int) -> None:
        t = obj.tensor
        self.seen[id(t)] = t._version
        if t.numel() <= _LARGEST and obj.source != "state":
            self.record.snaps.append(Snap(obj, time, t.detach().clone(), t.requires_grad))

    def obj(self, t: Tensor) -> Obj:
        """The object of a tensor that the block reads; a value that changed through a view is kept anew."""
        found = self.known.get(id(t))
        if found is None:
            return self._enter(Obj(t, "constant"))
        if self.seen[id(t)] != t._version:
            self._keep(found, len(self.record.steps) - 1)
        return found

    def refs(self, tree: Any) -> Any:
        return mapped(tree, lambda v: self.obj(v) if isinstance(v, Tensor) else v)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        if name == "__iter__":
            return iter(self(torch.unbind, args[0]))
        before = self.refs((tuple(args), kwargs))
        versions = [(o, o.tensor._version) for o in dict.fromkeys(objects(before))]
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and id(out) in self.known and all(o.tensor._version == v for o, v in versions):
            # A cast or copy that had nothing to do in this run, and may have in another: its result is another object.
            out = out.view_as(out)
        self.note(func, before, versions, out)
        return out

    def __call__(self, func: Any, *args: Any) -> Any:
        return self.__torch_function__(func, (), args)

    def note(self, func: Any, before: Any, versions: list[tuple[Obj, int]], out: Any) -> None:
        index = len(self.record.steps)
        writes = [o for o, v in versions if o.tensor._version != v]
        made = [v for v in leaves(out) if isinstance(v, Tensor)]
        if not made and not writes:
            return
        args, kwargs = before
        calls, grad = tuple(self.calls), torch.is_grad_enabled()
        step = Step(index, func, args, kwargs, None, writes, calls, grad, self.autocast > 0)
        self.record.steps.append(step)
        for leaf, t in enumerate(made):
            if id(t) not in self.known:  # in-place functions return what they wrote
                self.known[id(t)] = Obj(t, "step", index, leaf)
                self._keep(self.known[id(t)], index)
        for o in writes:
            self._keep(o, index)
        step.out = self.refs(out)


def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Record:
    """Run `block(*args, **kwargs)` and note every step. The block should be a copy: its forwards are wrapped meanwhile.

    Errors of the block come through.
    """
    named = {id(t): (n, t) for n, t in (*block.named_buffers(), *block.named_parameters())}
    mode = _Recorder(named)
    mode.record.hooked = frozenset(p for p, m in block.named_modules() if p and has_hooks(m))
    # Copies of what requires a gradient, for a block may write into its inputs.
    args, kwargs = mapped(
        (tuple(args), dict(kwargs)), lambda v: v.clone() if isinstance(v, Tensor) and v.requires_grad else v
    )
    tensors = [v for v in leaves((args, kwargs)) if isinstance(v, Tensor)]
    mode.record.inputs = [mode._enter(Obj(t, "input", leaf=i)) for i, t in enumerate(tensors)]
    with torch.enable_grad(), _wrapped(block, mode), _watched_autocast(mode), mode:
        out = block.forward(*args, **kwargs)
        mode.record.out = mode.refs(_plain(out))
        mode.record.out_type = type(out) if isinstance(out, dict) and type(out) is not dict else None
    return mode.record


def has_hooks(module: nn.Module) -> bool:
    """Whether something of the user's runs when the module is called, or when its gradient is there."""
    before = module._forward_pre_hooks or module._backward_pre_hooks
    return bool(before or module._forward_hooks or module._backward_hooks)


def _plain(out: Any) -> Any:
    """Outputs in containers that hold references as well as tensors."""
    return dict(out) if isinstance(out, dict) and type(out) is not dict else out


@contextlib.contextmanager
def _wrapped(block: nn.Module, mode: _Recorder) -> Iterator[None]:
    """Let every submodule's forward note where it begins and ends."""
    kept: list[tuple[nn.Module, Any]] = []

    def wrap(path: str, module: nn.Module, forward: Any) -> None:
        def run(*args: Any, **kwargs: Any) -> Any:
            given, named = mode.refs((args, kwargs))
            call = Call(path, len(mode.record.steps), given, named, torch.is_grad_enabled())
            mode.calls.append(call)
            try:
                out = forward(*args, **kwargs)
            finally:
                mode.calls.pop()
            call.end, call.out = len(mode.record.steps), mode.refs(_plain(out))
            return out

        kept.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = run

    try:
        for path, module in block.named_modules():
            if path:
                wrap(path, module, module.forward)
        yield
    finally:
        for module, forward in kept:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


@contextlib.contextmanager
def _watched_autocast(mode: _Recorder) -> Iterator[None]:
    enter: Any = torch.autocast.__enter__
    leave: Any = torch.autocast.__exit__

    def entered(self: Any) -> Any:
        mode.autocast += 1
        return enter(self)

    def left(self: Any, *args: Any) -> Any:
        mode.autocast -= 1
        return leave(self, *args)

    torch.autocast.__enter__, torch.autocast.__exit__ = entered, left  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]
