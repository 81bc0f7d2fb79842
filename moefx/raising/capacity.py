"""How the rows that an expert keeps follow the number of tokens, to the last bit of the block's own arithmetic.

`int(1.2 * T * 2 / 6)` and `int(1.2 * 2 / 6 * T)` are the same number but for rounding, and at some T one row apart. So
a rule is an expression, every order of products and quotients is a rule of its own, and those that agree on what was
seen are told apart by running the block where they differ (`settle`).
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
    """Rows per expert as a function of the tokens in a group: max(least, rounding(expression)), or a fixed number.

    `within`: no more than there are tokens, as where experts choose them.
    """

    expr: Expr = 0
    rounding: str = "floor"
    least: int = 0
    fixed: int | None = None
    within: bool = False

    def __call__(self, tokens: int) -> int:
        """Rows that an expert keeps of a group of so many tokens."""
        if self.fixed is not None:
            return self.fixed
        raw = evaluated(self.expr, tokens)
        rows = max(self.least, math.ceil(raw) if self.rounding == "ceil" else int(raw))
        return min(tokens, rows) if self.within else rows

    def table(self, tokens: Tensor) -> Tensor:
        """Rows for many numbers of tokens; as Python computes them, in float64."""
        if self.fixed is not None:
            return torch.full_like(tokens, self.fixed)
        raw: Tensor = evaluated(self.expr, tokens.double())
        rows = (raw.ceil() if self.rounding == "ceil" else raw.trunc()).long().clamp_min(self.least)
        return rows.minimum(tokens) if self.within else rows

    def __str__(self) -> str:
        if self.fixed is not None:
            return str(self.fixed)
        rounded = f"{'ceil' if self.rounding == 'ceil' else 'int'}({_written(self.expr)})"
        rows = f"max({self.least}, {rounded})" if self.least else rounded
        return f"min(T, {rows})" if self.within else rows


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


def _hundredths(seen: Sequence[tuple[int, int]], share: float) -> list[float]:
    """Factors of two decimals that what was seen leaves possible, where it shows how rows grow with tokens."""
    least = min(c for _, c in seen)
    low = max(((c - 1) / (share * t) for t, c in seen if c > least), default=math.inf)
    high = min((c + 1) / (share * t) for t, c in seen)
    return [n / 100 for n in range(max(1, math.ceil(low * 100)), math.floor(high * 100) + 1)] if low < high else []


def _shares(
    seen: Sequence[tuple[int, int]], experts: int, k: int, numbers: Sequence[float]
) -> Iterator[tuple[float, int, int]]:
    """(factor, times, by) of expressions factor * T * times / by."""
    carried = [*(float(n) for n in numbers if 0 < n < 1e4), 1.0, 1.25, 1.5, 2.0]
    # Where experts choose tokens, no k is seen.
    ks = [k] if k else [int(n) for n in dict.fromkeys(numbers) if n == int(n) and 0 < n <= experts]
    for times, by in dict.fromkeys([*((k, experts) for k in ks), (1, experts), (1, 1)]):
        yield from ((f, times, by) for f in dict.fromkeys([*carried, *_hundredths(seen, times / by)]))
    if len({c for _, c in seen}) > 1:
        yield from ((1.0, 1, by) for by in range(2, _LARGEST_PART + 1))


_LARGEST_PART = 64  # of the tokens, as in T // 64


def capacity_rules(
    seen: Sequence[tuple[int, int]], experts: int, k: int, numbers: Iterable[float], *, bounded: bool = True
) -> list[CapacityRule]:
    """Rules behind (tokens, rows) pairs, with factors that the module carries or of two decimals.

    Several may agree on what was seen: in another order of the arithmetic, with or without a least number of rows,
    rounded up or down. Of those that agree up to `LONGEST` tokens there is one.

    Args:
        k: choices per token, or 0 where experts choose.
        bounded: whether rows beyond the tokens are the same as all of them.

    Raises:
        NoFit: there is none.
    """
    rows = [c for _, c in seen]
    found = [CapacityRule(fixed=c) for c in set(rows) if len(set(rows)) == 1]
    for factor, times, by in _shares(seen, experts, k, list(numbers)):
        share = factor * times / by
        if any(share * t > c + 1.5 or (share * t < c - 1.5 and c > min(rows)) for t, c in seen):
            continue
        for expr, rounding in itertools.product(expressions(factor, times, by), ("floor", "ceil")):
            rule = CapacityRule(expr, rounding)
            raw = [rule(t) for t, _ in seen]
            for least in (1, 0, *range(2, min(rows) + 1)):
                if all(max(least, r) == c for r, c in zip(raw, rows, strict=True)):
                    found.append(CapacityRule(expr, rounding, least))
    if not found:
        raise NoFit(f"a number in it is {sorted(seen)} (tokens, rows), as no capacity rule has it")
    tokens = torch.arange(1, LONGEST + 1, device="cpu")
    different: dict[bytes, CapacityRule] = {}
    for rule in found:
        table = rule.table(tokens)
        within = table.minimum(tokens)
        if not bounded:  # first, for it may differ without any tokens alone, of which there is no more than none
            different.setdefault(within.numpy().tobytes(), dataclasses.replace(rule, within=True))
        different.setdefault((within if bounded else table).numpy().tobytes(), rule)
    return list(different.values())


@dataclass(frozen=True)
class Dropping:
    """A capacity for all sizes: expert e keeps its first `rows` choices, counted in `order` in each of `groups` anew.

    Both are numbers as `numbers` has them.
    """

    order: str
    groups: Any
    rows: Any
