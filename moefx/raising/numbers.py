"""Numbers in a program that follow the sizes of the block's inputs.

A number is seen in a few runs. What is linear in a size, or in the product of two, is an expression of it; what is not
may follow one of the rules of capacities (`capacity`), of which `settle` finds the one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from .capacity import CapacityRule, capacity_rules
from .fit import NoFit
from .slice import NoSlice

Shapes = Sequence[tuple[int, ...]]  # of the block's tensor arguments, in order
Var = tuple[int, int]  # (argument, axis)


@dataclass(frozen=True)
class Size:
    """`ratio * product of sizes + offset`.

    `guarded`: at least one in any case, as `max(1, n)` guards a division when there are no tokens.
    """

    factors: tuple[Var, ...]
    ratio: Fraction = Fraction(1)
    offset: int = 0
    guarded: bool = False

    def value(self, shapes: Shapes) -> int:
        """The number for inputs of these shapes."""
        product = 1
        for leaf, axis in self.factors:
            product *= shapes[leaf][axis]
        found = int(self.ratio * product) + self.offset
        return max(1, found) if self.guarded else found


@dataclass(frozen=True, eq=False)
class Ruled:
    """A number that follows a count of tokens by one of several rules: (count, rule) pairs, the likeliest first.

    `bounded`: numbers beyond the count are the same as the count, as an expert has no more rows than there are tokens.
    """

    options: tuple[tuple[Size, CapacityRule], ...]
    bounded: bool = False


@dataclass(frozen=True)
class InputDtype:
    """The dtype that the block is run in."""


class Solver:
    """Expressions behind numbers that were seen in several runs.

    Args:
        shapes: for each run the shapes of the block's tensor arguments.
        dtypes: for each run the dtype that the block was run in.
        experts, k: of the routed sum; k is 0 where experts choose.
        carried: numbers that the block's modules carry, of which a rule may be made.
    """

    def __init__(
        self,
        shapes: Sequence[Shapes],
        dtypes: Sequence[torch.dtype],
        experts: int,
        k: int,
        carried: Sequence[float],
    ) -> None:
        self.shapes, self.dtypes = shapes, list(dtypes)
        self.experts, self.k, self.carried = experts, k, carried
        vectors: dict[tuple[int, ...], Var] = {}
        for leaf, first in enumerate(shapes[0]):
            for axis in range(len(first)):
                seen = tuple(s[leaf][axis] for s in shapes)
                if len(set(seen)) > 1:
                    vectors.setdefault(seen, (leaf, axis))
        variables = list(vectors.values())
        self.products = [*((v,) for v in variables), *itertools.combinations(variables, 2)]
        self.known: dict[tuple[int, ...], Any] = {}

    def __call__(self, values: Sequence[int]) -> Any:
        """The number, a `Size` or a `Ruled`; `NoSlice` if it is none of them."""
        if len(set(values)) == 1:
            return values[0]
        key = tuple(values)
        if key not in self.known:
            self.known[key] = self._linear(values) or self._ruled(values)
        return self.known[key]

    def _linear(self, values: Sequence[int]) -> Size | None:
        for factors in self.products:
            base = [Size(factors).value(s) for s in self.shapes]
            steps = {Fraction(v - values[0], b - base[0]) for v, b in zip(values, base, strict=True) if b != base[0]}
            if len(steps) != 1:
                continue
            ratio = steps.pop()
            offset = values[0] - ratio * base[0]
            size = Size(factors, ratio, int(offset)) if offset.denominator == 1 else None
            if size is not None and [size.value(s) for s in self.shapes] == list(values):
                return size
        return None

    def _ruled(self, values: Sequence[int]) -> Ruled:
        options: list[tuple[Size, CapacityRule]] = []
        for factors in self.products if min(values) >= 0 else ():
            size = Size(factors)
            seen = [(size.value(s), v) for s, v in zip(self.shapes, values, strict=True)]
            try:
                rules = capacity_rules(seen, self.experts, self.k, self.carried, bounded=False)
            except NoFit:
                continue
            options += [(size, r) for r in rules]
        if not options:
            raise NoSlice(
                f"a number in it is {', '.join(map(str, values))} for inputs of {', '.join(map(shown, self.shapes))}"
                ", which is no simple function of their sizes"
            )
        return Ruled(tuple(options))

    def rows(self, tokens: Sequence[int], rows: Sequence[int]) -> Ruled:
        """How many rows an expert keeps of so many tokens; `NoSlice` if no rule explains it."""
        try:
            seen = list(zip(tokens, rows, strict=True))
            rules = capacity_rules(seen, self.experts, self.k, self.carried)
        except NoFit as e:
            raise NoSlice(str(e)) from e
        count = self(tokens)
        if not isinstance(count, Size):
            raise NoSlice(
                f"its capacities are for {', '.join(map(str, tokens))} tokens, which are no size of its input"
            )
        return Ruled(tuple((count, r) for r in rules), bounded=True)


def shown(shapes: Shapes) -> str:
    """The shape of the first argument, for people."""
    return "x".join(map(str, shapes[0])) if shapes else "()"
