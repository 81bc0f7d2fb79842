"""One program out of several runs: numbers that follow the sizes of the inputs become expressions of them.

Dtypes that follow the block's own are told from fixed ones by a run in another dtype.

A block that was run on inputs of three sizes gives three programs. They must agree in every operation; where an integer
differs, it has to be the same expression of input sizes in all of them (`2 * size(0) * size(1) + 1`), or the block is
not raised.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from .capacity import Dropping
from .explain import Capacity
from .numbers import InputDtype, Shapes, Size, Solver, shown
from .slice import NoSlice, Op, Program


def align(
    programs: Sequence[Program],
    shapes: Sequence[Shapes],
    dtypes: Sequence[torch.dtype],
    numbers: Sequence[float],
    guarded: bool = False,
) -> Program | None:
    """The program that all of `programs` are cases of.

    Args:
        shapes: for each program the shapes of the block's tensor arguments.
        dtypes: for each program the dtype that the block was run in.
        numbers: what the block's modules carry, of which a capacity or another number may be made.
        guarded: whether divisors that follow sizes are at least one; None where there are no such.

    Raises:
        NoSlice: they differ in more than sizes.
    """
    routed = next(o.kwargs for o in programs[0].ops if o.kind == "experts")
    solve = Solver(shapes, dtypes, routed["experts"], routed["k"], numbers)
    divisors = 0
    for i, ops in enumerate(itertools.zip_longest(*(p.ops for p in programs))):
        if any(o is None for o in ops) or len({(o.kind, o.target if o.kind != "experts" else 0) for o in ops}) > 1:
            at: dict[str, list[str]] = {}
            for o, s in zip(ops, shapes, strict=True):
                at.setdefault(_name(o), []).append(shown(s))
            which = ", but ".join(f"{n} for inputs of shape {' and '.join(s)}" for n, s in at.items())
            raise NoSlice(f"it takes different steps for different numbers of tokens: step {i} is {which}")
    merged = []
    for ops in zip(*(p.ops for p in programs), strict=True):
        first = ops[0]
        if first.kind == "experts":
            merged.append(_experts(ops, solve))
            continue
        if len({o.grad for o in ops}) > 1:
            raise NoSlice("gradients are switched on and off depending on the input")
        args, kwargs = _merge([(o.args, o.kwargs) for o in ops], solve)
        if guarded and _name(first) in _DIVISIONS and isinstance(args[-1], Size):
            args, divisors = (*args[:-1], dataclasses.replace(args[-1], guarded=True)), divisors + 1
        merged.append(Op(first.kind, first.target, args, kwargs, first.grad))
    if guarded and not divisors:
        return None
    return Program(merged, _merge([p.out for p in programs], solve))


_DIVISIONS = ("div", "div_", "__truediv__", "__itruediv__", "true_divide")


def _name(op: Op | None) -> str:
    return "nothing" if op is None else getattr(op.target, "__name__", str(op.target)) if op.kind == "call" else op.kind


def _merge(values: Sequence[Any], solve: Solver) -> Any:
    first = values[0]
    if any(type(v) is not type(first) for v in values):
        raise NoSlice("an argument has different types for different inputs")
    if isinstance(first, tuple | list):
        if len({len(v) for v in values}) > 1:
            raise NoSlice("an argument has different lengths for different inputs")
        return type(first)(_merge(list(v), solve) for v in zip(*values, strict=True))
    if isinstance(first, dict):
        if any(v.keys() != first.keys() for v in values):
            raise NoSlice("different keywords are passed for different inputs")
        return {k: _merge([v[k] for v in values], solve) for k in first}
    if isinstance(first, slice):
        parts = [(v.start, v.stop, v.step) for v in values]
        return slice(*(_merge(list(p), solve) for p in zip(*parts, strict=True)))
    if type(first) is int:
        return solve(list(values))
    if any(v != first for v in values):
        if all(isinstance(v, torch.dtype) for v in values) and list(values) == solve.dtypes:
            return InputDtype()
        raise NoSlice(f"a value in it depends on the input: {', '.join(map(str, values))}")
    return first


def _experts(ops: Sequence[Op], solve: Solver) -> Op:
    if any(o.target != ops[0].target for o in ops):
        raise NoSlice("the experts were read in different ways for different inputs")
    details = [dict(o.kwargs) for o in ops]
    capacities: list[Capacity | None] = [d.pop("capacity") for d in details]
    # Rows of the routed sum are a layout matter: `shape` follows sizes like any other number.
    tokens = [d.pop("tokens") for d in details]
    merged = _merge(details, solve)
    merged["capacity"] = _dropping(capacities, tokens, solve)
    return Op("experts", ops[0].target, (), merged)


def _dropping(seen: Sequence[Capacity | None], tokens: Sequence[int], solve: Solver) -> Dropping | None:
    """A capacity by all rules that explain what was seen."""
    cases = [c for c in seen if c is not None]
    if not cases:
        return None
    if len(cases) < len(seen):
        raise NoSlice("choices are dropped for some inputs and not for others of more tokens")
    if len({c.order for c in cases}) > 1:
        raise NoSlice("choices are dropped in different orders for different inputs")
    per_group = [t // c.groups for t, c in zip(tokens, cases, strict=True)]
    rows = solve.rows(per_group, [c.rows for c in cases])
    return Dropping(cases[0].order, solve([c.groups for c in cases]), rows)
