"""A record without its experts: the steps that the block's outputs need once the routed sum is given.

Submodules that hold no expert are kept as calls, so that their own code, hooks and contexts stay theirs; only where a
value from inside is needed are their steps taken one by one. In-place functions work as they did: the steps keep their
order, and one that writes memory which is read later is needed as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .explain import Capacity, Weights
from .fit import Fit
from .record import Call, Obj, Record, Snap, Step, mapped, objects

_DRAWING = """rand randn randint randperm rand_like randn_like randint_like bernoulli bernoulli_ multinomial normal
normal_ uniform_ exponential_ log_normal_ cauchy_ geometric_ random_ dropout gumbel_softmax poisson rrelu"""
RANDOM = frozenset(_DRAWING.split())


class NoSlice(Exception):  # noqa: N818  an answer, not a fault
    """The block cannot be run without its own code for the experts; the text says why."""


@dataclass(frozen=True)
class Ref:
    """The output of an operation of a program, or a part of it."""

    op: int
    path: tuple[Any, ...] = ()


@dataclass
class Op:
    """One operation of a program. `kind`: input, state, call, module, experts."""

    kind: str
    target: Any
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    grad: bool = True


@dataclass
class Program:
    """What remains of a block, in order, and its outputs."""

    ops: list[Op]
    out: Any


@dataclass
class Region:
    """The part of a record that one `experts` operation stands for."""

    fit: Fit
    weights: Weights

    @property
    def inputs(self) -> list[Snap]:
        """Values that the operation reads."""
        found = [self.fit.x, *self.fit.idx, self.weights.source, self.fit.scaled]
        return [s for s in found if s is not None]

    @property
    def time(self) -> int:
        """The step after which all of them exist."""
        return max(s.time for s in self.inputs)


class _Slicer:
    def __init__(self, record: Record, region: Region, bank: frozenset[str], paths: dict[str, frozenset[str]]) -> None:
        self.record, self.region, self.y = record, region, region.fit.y
        self.bank, self.paths = bank, paths
        self.inlined: set[Call] = set()
        calls = dict.fromkeys(c for s in record.steps for c in s.calls)
        self.hooked = [c for c in calls if c.path in record.hooked]
        self.writes: dict[int, list[int]] = {}
        for step in record.steps:
            for o in step.writes:
                self.writes.setdefault(o.storage, []).append(step.index)

    def unit(self, index: int) -> Call | Step:
        """What a step is kept as: the outermost call around it that may stay whole, or itself."""
        step = self.record.steps[index]
        for call in step.calls:
            if call not in self.inlined and not (self.paths.get(call.path, frozenset()) & self.bank):
                return call
        return step

    def whole(self, index: int) -> Call | None:
        """The call around a step that runs whole for its hooks although some of its steps are taken once more."""
        return next((c for c in self.record.steps[index].calls if c in self.inlined and c in self.hooked), None)

    def maker(self, obj: Obj) -> Call | Step:
        """What gives an object that a step made."""
        call = self.whole(obj.step)
        return call if call is not None and obj in objects(call.out) else self.unit(obj.step)

    def position(self, unit: Call | Step) -> float:
        """Where a unit stands in the program. Steps taken once more follow their call."""
        if isinstance(unit, Call):
            return unit.end - 0.75
        call = self.whole(unit.index)
        return (
            unit.index if call is None else call.end - 0.7 + 0.1 * (unit.index - call.start) / (call.end - call.start)
        )

    def run(self) -> tuple[list[Call | Step], bool]:
        """The needed units in order, and whether the outputs need the routed sum."""
        while True:
            before = len(self.inlined)
            self.needed: dict[Call | Step, None] = {}
            self.uses_region = False
            self.todo: list[tuple[Obj, int]] = [(o, len(self.record.steps)) for o in objects(self.record.out)]
            kept = {o.storage for o in self.record.inputs}
            for step in self.record.steps:
                if any(o.storage in kept or o.source == "state" for o in step.writes):
                    self._need(self.whole(step.index) or self.unit(step.index))
            for call in self.hooked:
                around = (self.unit(call.start), call)
                self._need(
                    next(u for u in around if isinstance(u, Call) and u.start <= call.start and u.end >= call.end)
                )
            self._drain()
            if len(self.inlined) == before:
                return sorted(self.needed, key=self.position), self.uses_region

    def _drain(self) -> None:
        done: set[tuple[int, int]] = set()
        while self.todo:
            obj, time = self.todo.pop()
            if (id(obj), time) in done:
                continue
            done.add((id(obj), time))
            if self.replaced(obj, time):
                if not self.uses_region:
                    self.uses_region = True
                    self.todo += [(s.obj, s.time + 1) for s in self.region.inputs]
                continue
            if obj.source == "step":
                unit = self.maker(obj)
                if isinstance(unit, Call) and obj not in objects(unit.out):
                    self.inlined.add(unit)
                self._need(self.maker(obj))
            first = self.y.time + 1 if obj.storage == self.y.obj.storage and time > self.y.time else 0
            for m in self.writes.get(obj.storage, ()):
                if first <= m < time and m != obj.step:
                    call = self.whole(m)
                    inside = call is None or (obj.source == "step" and call.start <= obj.step < call.end)
                    given = call is not None and obj in objects(call.out)
                    self._need(self.unit(m) if call is None or (inside and not given) else call)

    def replaced(self, obj: Obj, time: int) -> bool:
        """Whether a reader at `time` sees the routed sum in `obj`, or in memory that it shares."""
        return time > self.y.time and obj.step <= self.y.time and obj.storage == self.y.obj.storage

    def _need(self, unit: Call | Step) -> None:
        if unit in self.needed:
            return
        self.needed[unit] = None
        start = unit.start if isinstance(unit, Call) else unit.index
        self.todo += [(o, start) for o in objects((unit.args, unit.kwargs))]


def cut(record: Record, region: Region, bank: frozenset[str], paths: dict[str, frozenset[str]]) -> Program:
    """The program of a block with one `experts` operation in the place of its routed sum.

    Args:
        bank: names of the experts' parameters.
        paths: path of every submodule -> names of the parameters in it.

    Raises:
        NoSlice: the rest depends on something that the experts' code leaves behind.
    """
    slicer = _Slicer(record, region, bank, paths)
    units, uses = slicer.run()
    if not uses:
        raise NoSlice("the outputs do not come from the routed sum")
    inside = {i for u in units for i in (range(u.start, u.end) if isinstance(u, Call) else (u.index,))}
    for step in record.steps:
        if step.index not in inside and step.name in RANDOM and not _harmless(step):
            raise NoSlice(f"random numbers are drawn among the experts ({step.name})")
    ops: list[Op] = []
    at: dict[Obj, Ref] = {}

    def add(op: Op) -> int:
        ops.append(op)
        return len(ops) - 1

    for o in record.inputs:
        at[o] = Ref(add(Op("input", o.leaf)))

    region_at: list[int] = []

    def read(time: int) -> Any:
        def one(v: Any) -> Any:
            if not isinstance(v, Obj):
                return v
            if slicer.replaced(v, time) and region_at:
                if v.tensor.numel() != slicer.y.value.numel():
                    raise NoSlice("a part of the memory that the routed sum is written to is read on its own")
                if v is slicer.y.obj or v.tensor.shape == slicer.y.value.shape:
                    return Ref(region_at[0])
                return Ref(add(Op("call", "view", (Ref(region_at[0]), tuple(v.tensor.shape)))))
            if v.source == "state" and v not in at:
                if v.name in bank:
                    raise NoSlice(f"the experts' parameter {v.name} is read elsewhere, too")
                at[v] = Ref(add(Op("state", v.name)))
            if v.source == "constant" and v not in at:
                raise NoSlice("it reads a tensor that is neither argument, parameter nor buffer")
            if v not in at:
                raise NoSlice("the rest of the block reads a value from inside the experts")
            return at[v]

        return lambda tree: mapped(tree, one)

    def settle(out: Any, op: int, path: tuple[Any, ...] = ()) -> None:
        if isinstance(out, Obj):
            at.setdefault(out, Ref(op, path))
        elif isinstance(out, dict):
            for key, v in out.items():
                settle(v, op, (*path, key))
        elif isinstance(out, tuple | list):
            for key, v in enumerate(out):
                settle(v, op, (*path, key))

    # A call that was kept whole has given its outputs when it ends, however early they were made in it.
    made = [slicer.position(slicer.maker(s.obj)) for s in region.inputs if s.obj.source == "step"]
    ready = max([region.time + 0.5, *(p + 0.01 for p in made)])
    pending = sorted([*units, region], key=lambda u: ready if isinstance(u, Region) else slicer.position(u))
    for unit in pending:
        if isinstance(unit, Region):
            region_at.append(add(experts_op(unit, at, read(unit.time + 1))))
            continue
        if isinstance(unit, Step) and unit.autocast:
            raise NoSlice("it enters an autocast region outside of a submodule")
        if isinstance(unit, Step) and slicer.whole(unit.index) and (unit.writes or unit.name in RANDOM):
            raise NoSlice(f"{unit.calls[-1].path} has hooks, and cannot be run a second time without them")
        start = unit.start if isinstance(unit, Call) else unit.index
        args, kwargs = read(start)(unit.args), read(start)(unit.kwargs)
        kind, target = ("module", unit.path) if isinstance(unit, Call) else ("call", unit.func)
        settle(unit.out, add(Op(kind, target, args, dict(kwargs), unit.grad)))
    return Program(ops, read(len(record.steps))(record.out))


def drawn_inside(record: Record, bank: frozenset[str]) -> str | None:
    """The name of a function that draws random numbers in a submodule that holds parameters of the bank."""
    for step in record.steps:
        if step.name in RANDOM and not _harmless(step):
            inside = (f"{c.path}." for c in step.calls)
            if any(n.startswith(path) for path in inside for n in bank):
                return step.name
    return None


def _harmless(step: Step) -> bool:
    """Dropout that drops nothing."""
    if step.name != "dropout":
        return False
    (args, kwargs) = (list(step.args), dict(step.kwargs))
    p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    training = args[2] if len(args) > 2 else kwargs.get("training", True)
    return p == 0 or not training


def experts_op(region: Region, at: dict[Obj, Ref], read: Any) -> Op:
    fit, w = region.fit, region.weights

    def ref(s: Snap | None) -> Any:
        return None if s is None else read(s.obj)

    detail = {
        "x": ref(fit.x),
        "idx": tuple(ref(s) for s in fit.idx),
        "w": ref(w.source),
        "scaled": ref(fit.scaled),
        "gates": w.gates,
        "factor": w.factor,
        "k": fit.k if fit.choice is None else 0,
        "experts": fit.experts,
        "capacity": w.capacity,
        "tokens": fit.c.shape[0],
        "shape": tuple(fit.y.value.shape),
        "gate_matrix": fit.idx[0].value.is_floating_point(),
        "mask": fit.rest == "null" and fit.idx[0].value.shape[-1] == fit.experts != fit.k,
        "rest": fit.rest,
        "scaled_gates": fit.scaled is not None and fit.scaled.value.shape[-1] == fit.experts != fit.k,
        "expert_choice": fit.choice is not None,
    }
    return Op("experts", fit.reading, (), detail)


__all__ = ["Capacity", "NoSlice", "Op", "Program", "Ref", "Region", "cut"]
