"""How the rows that an expert keeps follow the number of tokens, to the last bit of the block's own arithmetic.

`int(1.2 * T * 2 / 6)` and `int(1.2 * 2 / 6 * T)` are the same number but for rounding, and at some T one row apart. So
a rule is an expression, every order of products and quotients is a rule of its own, and those that agree on what was
seen are told apart by running the block where they differ (`told_apart`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .fit import NoFit

Tensor = torch.Tensor
Expr = Any  # a number, "T" for the tokens, or (operator, expression, expression)
LONGEST = 4096  # tokens up to which rules are told apart
OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
}


@dataclass(frozen=True)
class CapacityRule:
    """Rows per expert as a function of the tokens in a group: max(least, rounding(expression)), or a fixed number."""

    expr: Expr = 0
    rounding: str = "floor"
    least: int = 0
    fixed: int | None = None

    def __call__(self, tokens: int) -> int:
        """Rows that an expert keeps of a group of so many tokens."""
        if self.fixed is not None:
            return self.fixed
        raw = evaluated(self.expr, tokens)
        return max(self.least, math.ceil(raw) if self.rounding == "ceil" else int(raw))

    def table(self, tokens: Tensor) -> Tensor:
        """Rows for many numbers of tokens, no more than there are; as Python computes them, in float64."""
        if self.fixed is not None:
            return torch.full_like(tokens, self.fixed).minimum(tokens)
        raw: Tensor = evaluated(self.expr, tokens.double())
        return (raw.ceil() if self.rounding == "ceil" else raw.trunc()).long().clamp_min(self.least).minimum(tokens)

    def __str__(self) -> str:
        if self.fixed is not None:
            return str(self.fixed)
        rounded = f"{'ceil' if self.rounding == 'ceil' else 'int'}({_written(self.expr)})"
        return f"max({self.least}, {rounded})" if self.least else rounded


def evaluated(expr: Expr, tokens: Any, call: Callable[[Any, Any, Any], Any] = lambda op, a, b: op(a, b)) -> Any:
    """An expression for a number of tokens; `call` applies an operator."""
    if not isinstance(expr, tuple):
        return tokens if expr == "T" else expr
    return call(OPERATORS[expr[0]], evaluated(expr[1], tokens, call), evaluated(expr[2], tokens, call))


def _written(expr: Expr) -> str:
    if not isinstance(expr, tuple):
        return f"{expr:g}" if isinstance(expr, float) else str(expr)
    a, b = map(_written, expr[1:])
    return f"{a} {expr[0]} {f'({b})' if isinstance(expr[2], tuple) else b}"


def _products(leaves: Sequence[Expr]) -> Iterator[Expr]:
    """All orders in which numbers can be multiplied; a * b and b * a round alike."""
    if len(leaves) == 1:
        yield leaves[0]
    first, rest = leaves[0], leaves[1:]
    for n in range(len(rest)):
        for some in itertools.combinations(rest, n):
            others = tuple(v for v in rest if v not in some)
            yield from (("*", a, b) for a in _products((first, *some)) for b in _products(others))


def _divided(expr: Expr, by: int) -> Iterator[Expr]:
    """All places for a division in a product."""
    yield "/", expr, by
    if isinstance(expr, tuple):
        op, a, b = expr
        yield from ((op, c, b) for c in _divided(a, by))
        yield from ((op, a, c) for c in _divided(b, by))


def expressions(factor: float, times: int, by: int) -> Iterator[Expr]:
    """factor * T * times / by in every order."""
    leaves = [*([factor] if factor != 1 else []), "T", *([times] if times != 1 else [])]
    for product in _products(leaves):
        if by == 1:
            yield product
            continue
        yield from _divided(product, by)
        yield "//", product, by


def capacity_rules(
    seen: Sequence[tuple[int, int]], experts: int, k: int, numbers: Iterable[float]
) -> list[CapacityRule]:
    """Rules behind (tokens, rows) pairs, made of numbers that the module carries; `NoFit` if there is none.

    Several may agree on what was seen: in another order of the arithmetic, with or without a least number of rows,
    rounded up or down. Of those that agree up to `LONGEST` tokens there is one.
    """
    rows = {c for _, c in seen}
    found = [CapacityRule(fixed=c) for c in rows if len(rows) == 1]
    factors = dict.fromkeys([*(float(n) for n in numbers if 0 < n < 1e4), 1.0, 1.25, 1.5, 2.0])
    for factor, (times, by) in itertools.product(factors, dict.fromkeys([(k, experts), (1, experts), (1, 1)])):
        if any(factor * times / by * t > c + 1.5 for t, c in seen):
            continue
        for expr in expressions(factor, times, by):
            for rounding, least in itertools.product(("floor", "ceil"), (1, 0, *range(2, min(rows) + 1))):
                rule = CapacityRule(expr, rounding, least)
                if all(rule(t) == c for t, c in seen):
                    found.append(rule)
    if not found:
        raise NoFit(f"the capacity of an expert is {sorted(seen)} (tokens, rows), which no rule explains")
    tokens = torch.arange(1, LONGEST + 1, device="cpu")
    different = {rule.table(tokens).numpy().tobytes(): rule for rule in reversed(found)}
    return list(reversed(different.values()))


@dataclass(frozen=True)
class Dropping:
    """A capacity for all sizes: groups and tokens as expressions, rows by the first of several rules."""

    order: str
    groups: Any
    tokens: Any
    rules: tuple[CapacityRule, ...]

    @property
    def rule(self) -> CapacityRule:
        """The rule that is taken."""
        return self.rules[0]

    def of(self, *rules: CapacityRule) -> Dropping:
        """The same with other rules."""
        return dataclasses.replace(self, rules=rules)


_MOST = 40  # runs for telling rules apart


def told_apart(rules: Sequence[CapacityRule], agrees: Callable[[int, int], bool | None]) -> CapacityRule:
    """The one rule that the block follows, by what it does with the fewest tokens for which rules differ.

    Args:
        rules: different ones.
        agrees: whether the block keeps so many rows (second) of so many tokens; None where it cannot be run.

    Raises:
        NoFit: none agrees, or several differ where the block does not tell.
    """
    left, tokens = list(rules), torch.arange(1, LONGEST + 1, device="cpu")
    mute = torch.zeros(LONGEST, dtype=torch.bool, device="cpu")  # where the block did not tell
    for _ in range(_MOST):
        tables = torch.stack([r.table(tokens) for r in left])
        differ = (tables != tables[0]).any(0)
        at = (differ & ~mute).nonzero()
        if not len(at):
            if bool(differ.any()):
                break
            return left[0]
        n = int(at[0])
        verdicts = {c: agrees(n + 1, c) for c in tables[:, n].unique().tolist()}
        mute[n] = True
        if all(v is not False for v in verdicts.values()):
            continue
        left = [r for r, c in zip(left, tables[:, n].tolist(), strict=True) if verdicts[c] is not False]
        if not left:
            raise NoFit(f"the capacity of an expert follows no known rule: for {n + 1} tokens it is none of {verdicts}")
    shown = " or ".join(dict.fromkeys(map(str, left[:3])))
    raise NoFit(f"the capacity of an expert, for T tokens, may be {shown}, which running it does not tell apart")
