"""The one rule that each number of a program follows, by running the block where the rules that are left differ."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .capacity import LONGEST, Dropping
from .certify import Case, agreeing
from .fit import NoFit
from .numbers import Ruled
from .probe import Inputs
from .record import leaves, mapped
from .replay import emit
from .slice import NoSlice, Program

Tensor = torch.Tensor
Call = tuple[tuple[Any, ...], dict[str, Any], nn.Module, type | None]  # what `emit` is given besides a program
_MOST = 60  # runs for telling rules apart
# (rows, tokens in each), fewest tokens first. One row alone would not tell a number per row from one per batch.
_FEW = [(rows, inner) for rows in (2, 3) for inner in range(1, 65)]
PLACES = sorted([*((1, inner) for inner in range(1, LONGEST + 1)), *_FEW], key=lambda p: (p[0] * p[1], p[0]))


@dataclass(frozen=True)
class Candidates:
    """What a number may be: its value at many places by each of several rules [rules, places].

    `limit` [rules, places]: how many tokens there are for the number; values beyond it may all be the same to a block.
    """

    rules: Sequence[Any]
    table: Tensor
    limit: Tensor


def settled(program: Program, inputs: Inputs, call: Call) -> Program:
    """The program with one rule for every number that follows one.

    Raises:
        NoSlice: the block follows none of them, or running it does not tell which.
    """
    numbers = _ruled(program)
    if not numbers:
        return program
    shapes = [inputs.shapes(inputs.sizes(*p)) for p in PLACES]
    counted = dict.fromkeys(c for n in numbers for c, _ in n.options)
    counts = {c: torch.tensor([c.value(s) for s in shapes], device="cpu") for c in counted}
    made: dict[tuple[int, ...], Callable[..., Any]] = {}

    def forward(values: tuple[int, ...]) -> Callable[..., Any]:
        if values not in made:
            put = _put(program, dict(zip(numbers, values, strict=True)))
            made[values] = emit(put, *call).forward(call[2], live=True)
        return made[values]

    def agrees(place: int, values: Sequence[tuple[int, ...]]) -> list[bool] | None:
        case = Case(*PLACES[place], "alike", backward=False)
        return agreeing(call[2], [forward(v) for v in values], inputs, case)

    try:
        found = told_apart([_candidates(n, counts) for n in numbers], agrees)
    except NoFit as e:
        raise NoSlice(str(e)) from e
    return _put(program, {n: replace(n, options=(n.options[i],)) for n, i in zip(numbers, found, strict=True)})


def _candidates(number: Ruled, counts: dict[Any, Tensor]) -> Candidates:
    limit = torch.stack([counts[c] for c, _ in number.options])
    table = torch.stack([r.table(counts[c]) for c, r in number.options])
    return Candidates([r for _, r in number.options], table.minimum(limit) if number.bounded else table, limit)


def _ruled(program: Program) -> list[Ruled]:
    """All different numbers of a program that follow rules."""
    found = leaves([(o.args, o.kwargs) for o in program.ops] + [program.out])
    found = [v.rows if isinstance(v, Dropping) else v for v in found]
    return [*dict.fromkeys(v for v in found if isinstance(v, Ruled))]


def _put(program: Program, numbers: dict[Ruled, Any]) -> Program:
    """The program with other numbers in the place of some."""

    def one(v: Any) -> Any:
        if isinstance(v, Dropping):
            return replace(v, rows=one(v.rows))
        return numbers[v] if isinstance(v, Ruled) else v

    ops = [replace(o, args=mapped(o.args, one), kwargs=mapped(o.kwargs, one)) for o in program.ops]
    return Program(ops, mapped(program.out, one))


def told_apart(
    numbers: Sequence[Candidates], agrees: Callable[[int, Sequence[tuple[int, ...]]], Sequence[bool] | None]
) -> list[int]:
    """For each number the rule that the block follows, by what it does with the fewest tokens for which rules differ.

    Args:
        numbers: candidates for each.
        agrees: whether the block does the same as with each of some values of the numbers, at a place (first
            argument); None where it cannot be run.

    Raises:
        NoFit: no values agree, or several do where the block does not tell.
    """
    left = [torch.arange(len(n.rules), device="cpu") for n in numbers]
    tried = torch.zeros(numbers[0].table.shape[1], dtype=torch.bool, device="cpu")
    for _ in range(_MOST):
        at = (_differ(numbers, left) & ~tried).nonzero()
        if not len(at):
            break
        place = int(at[0])
        tried[place] = True
        values = [n.table[i, place].unique().tolist() for n, i in zip(numbers, left, strict=True)]
        options = list(itertools.product(*values))
        verdicts = agrees(place, options)
        if verdicts is None:
            continue
        good = [v for v, same in zip(options, verdicts, strict=True) if same]
        if not good:
            tokens, rows = int(numbers[0].limit[0, place]), " or ".join(str(v) for v in values[0])
            raise NoFit(f"a number in it follows no known rule: for {tokens} tokens it is not {rows}")
        kept = (torch.tensor(v, device="cpu") for v in zip(*good, strict=True))
        left = [i[torch.isin(n.table[i, place], v)] for n, i, v in zip(numbers, left, kept, strict=True)]
    # Numbers beyond the tokens may do the same, as no rank in an expert is as large; but not unless it was tried.
    untold = _differ(numbers, left) & ~tried | _differ(numbers, left, bounded=True)
    if bool(untold.any()):
        number, several = next(n for n in zip(numbers, left, strict=True) if len(n[1]) > 1)
        shown = " or ".join(dict.fromkeys(str(number.rules[int(i)]) for i in several[:3]))
        raise NoFit(f"a number in it, for T tokens, may be {shown}, which running it does not tell apart")
    return [int(i[0]) for i in left]


def _differ(numbers: Sequence[Candidates], left: Sequence[Tensor], *, bounded: bool = False) -> Tensor:
    """Where the rules that are left differ; `bounded`: not counting values beyond the tokens that there are."""
    pairs = [(n.table[i], n.limit[i]) for n, i in zip(numbers, left, strict=True)]
    tables = [t.minimum(limit) if bounded else t for t, limit in pairs]
    return torch.stack([(t != t[0]).any(0) for t in tables]).any(0)
