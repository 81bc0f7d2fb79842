"""Which normal form a router has, found by its values: from what it made of given logits to the specs that make the
same of them, bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from moefx.errors import InputError

from .route import (
    NAMES,
    NORMS,
    REDUCERS,
    SCORES,
    Groups,
    RouteSpec,
    eager,
    write_choice,
    write_scores,
    write_start,
    write_weights,
)

Tensor = torch.Tensor
# Rows of each trial on which forms are told apart; all rows of those that are left are compared by the caller.
ROWS = 40


@dataclass(frozen=True)
class Trial:
    """Logits [T, E], bias and scale [E] that a router was given, and the idx and w [T, k] that it gave."""

    logits: Tensor
    bias: Tensor | None
    scale: Tensor | None
    idx: Tensor
    w: Tensor


@dataclass(frozen=True)
class Hints:
    """Numbers that the router's code holds: the only ones that are tried.

    `dtypes`: what scores may be computed in; `counts`, `kept`: of groups; `constants`: factors, eps and clamps;
    `sorted`: flags of its top-k.
    """

    dtypes: tuple[torch.dtype, ...]
    counts: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    constants: tuple[float, ...] = ()
    sorted: tuple[bool, ...] = (True, False)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every value; NaN is equal to NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def fit(trials: Sequence[Trial], hints: Hints) -> tuple[Iterator[RouteSpec], Callable[[], str]]:
    """The specs that agree with all trials, simplest first, and after the last one the reason why there are no more.

    All tensors are without gradients; the logits are two-dimensional.
    """
    few = [replace(t, logits=t.logits[:ROWS], idx=t.idx[:ROWS], w=t.w[:ROWS]) for t in trials]
    told: list[str] = []

    def found() -> Iterator[RouteSpec]:
        chosen = False
        for choice in _choices(few, hints):
            chosen = True
            yield from _weights(choice, few, hints)
        told.append(_nearest_weights(few) if chosen else _nearest_choice(few, hints))

    return found(), lambda: told[-1]


def _choices(trials: Sequence[Trial], hints: Hints) -> Iterator[RouteSpec]:
    """Specs without a normaliser whose idx are those of the trials: first without groups, and with, if none."""
    k, E = trials[0].idx.shape[-1], trials[0].logits.shape[-1]
    bias, per_expert = trials[0].bias is not None, trials[0].scale is not None
    plain = False
    for groups, masked in ((None, False), *_groups(E, bias, hints)):
        if plain and groups is not None:
            return
        orders = ("scores", "logits")
        for order, flag, score, dtype in itertools.product(orders, hints.sorted, SCORES, hints.dtypes):
            # What is no spec: identity scores of an order of their own, masked weights of logits.
            if order == "logits" and (score == "identity" or masked):
                continue
            s = RouteSpec(score, k, NAMES[dtype], order, bias, groups, masked, per_expert=per_expert, sorted=flag)
            if all(torch.equal(_choice(s, t)[1], t.idx) for t in trials):
                plain = plain or groups is None
                yield s


def _groups(E: int, bias: bool, hints: Hints) -> Iterator[tuple[Groups, bool]]:
    for count, kept, reducer, fill in itertools.product(hints.counts, hints.kept, REDUCERS, (-torch.inf, 0.0)):
        if 1 <= kept < count and E % count == 0 and (reducer == "max" or E // count > 1):
            for masked in (False,) if bias else (True, False):
                yield Groups(count, kept, reducer, fill), masked


def _scores(s: RouteSpec, t: Trial) -> Tensor:
    scores: Tensor = write_scores(eager, s, t.logits, t.logits.dtype)
    return scores


def _choice(s: RouteSpec, t: Trial) -> tuple[Tensor, Tensor, Tensor]:
    """What the weights start from, idx, scores."""
    scores = _scores(s, t)
    values, idx = write_choice(eager, s, t.logits, scores, t.bias, t.logits.shape[-1])
    return write_start(eager, s, scores, values, idx, t.logits.dtype), idx, scores


def _weights(choice: RouteSpec, trials: Sequence[Trial], hints: Hints) -> Iterator[RouteSpec]:
    """The choice with each normaliser, factor and cast that give the weights of the trials."""
    starts = [_choice(choice, t)[0] for t in trials]
    out = trials[0].w.dtype
    casts = (None, NAMES[out]) if out in NAMES else (None,)
    norms = [(n, 0.0) for n in NORMS if n != "clamp"]
    norms += [(n, c) for c in hints.constants if c > 0 for n in ("sum", "clamp")]
    factors = (1.0, *(c for c in hints.constants if c not in (0.0, 1.0)))
    for (norm, eps), factor, cast in itertools.product(norms, factors, casts):
        try:
            s = replace(choice, norm=norm, eps=eps, factor=factor, out=cast)
        except InputError:
            continue
        if all(same(write_weights(eager, s, w, t.idx, t.scale), t.w) for w, t in zip(starts, trials, strict=True)):
            yield s
            return


def _nearest_choice(trials: Sequence[Trial], hints: Hints) -> str:
    """How far the nearest plain choice is from the router's."""
    k, bias = trials[0].idx.shape[-1], trials[0].bias is not None
    best, name = 2.0, ""
    for score, dtype in itertools.product(SCORES, hints.dtypes):
        s = RouteSpec(score, k, NAMES[dtype], bias=bias, sorted=hints.sorted[0])
        off = torch.cat([(_choice(s, t)[1] != t.idx).any(-1) for t in trials]).double().mean().item()
        if off < best:
            best, name = off, score
    what = f"top-{k} of {name} scores{' and a bias' if bias else ''}"
    return f"the choice is not that of the normal form; the nearest, {what}, differs for {best:.0%} of the trial tokens"


def _nearest_weights(trials: Sequence[Trial]) -> str:
    """How far the nearest plain weights are from the router's."""
    best, name = float("inf"), "softmax scores"
    for score, norm in itertools.product(SCORES, ("none", "sum", "softmax")):
        s = RouteSpec(score, trials[0].idx.shape[-1], norm=norm)
        starts = [torch.gather(_scores(s, t).float(), -1, t.idx) for t in trials]
        errors = [write_weights(eager, s, w, t.idx, None) - t.w.float() for w, t in zip(starts, trials, strict=True)]
        worst = torch.cat(errors).nan_to_num(0.0).abs().max().item()
        if worst < best:
            best, name = worst, f"{score} scores" + ("" if norm == "none" else f" normalised by {norm}")
    return f"the choice fits, the weights do not: they are off by {best:.1e} from the nearest, {name}"
