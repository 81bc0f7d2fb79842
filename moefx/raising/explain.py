"""Where the coefficients of a routed sum come from: recorded weights, gate matrices, and which choices were dropped.

A capacity drops choices: an expert keeps its first C rows in some order of priority. The order is found by trying, C by
looking at the last row kept and the first one dropped; how C depends on the number of tokens is found by comparing runs
of different sizes (`capacity`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .choices import by_expert, per_choice
from .fit import Fit, NoFit
from .record import Record, Snap

Tensor = torch.Tensor
ORDERS = ("token", "choice", "row", "row choice")


@dataclass(frozen=True)
class Capacity:
    """Expert e keeps rows of rank < `rows`; ranks count in `order`, in each of `groups` equal parts of the tokens anew.

    Orders: `token` (t, j), `choice` (j, t); with `row` in front, per batch row.
    """

    order: str
    groups: int
    rows: int


@dataclass
class Weights:
    """The factors of the experts' outputs: `source` is [.., k], a gate matrix [.., E], or None where they are one."""

    source: Snap | None
    gates: bool = False
    factor: float = 1.0
    capacity: Capacity | None = None


def explain(record: Record, fit: Fit) -> list[Weights]:
    """Ways to compute the coefficients of a fit from recorded values, the likeliest first; `NoFit` if there is none."""
    if fit.choice is not None:
        return [Weights(fit.choice)]
    tokens, k = fit.c.shape
    # Of choices that contribute nothing no weight is known; of an expert named twice the sum of both is.
    named = fit.chosen.clamp_max(fit.experts) if fit.rest else fit.chosen
    repeated = k > 1 and not bool((named.sort(-1).values.diff(dim=-1) > 0).all())

    def seen(values: Tensor) -> Tensor:
        values = values.masked_fill(named == fit.experts, 0) if fit.rest == "null" else values
        return by_expert(values, named, fit.experts + 1) if repeated else values

    fit = replace(fit, c=seen(fit.c))
    kept = fit.c.abs() > 1e-4 * fit.c.abs().max()
    exact: list[Weights] = []
    masked: list[tuple[Snap, bool]] = []
    scaled: list[Weights] = []
    for s in _usable(record, fit):
        for gates in (False, True):
            each = per_choice(s.value, fit.chosen, fit.experts, gates=gates)
            if each is None:
                continue
            values = seen(each)
            if _close(values, fit.c):
                exact.append(Weights(s, gates))
            elif _close(values * kept, fit.c):
                masked.append((s, gates))
            elif bool(kept.all()) and (ratio := _ratio(fit.c, values)) is not None:
                scaled.append(Weights(s, gates, ratio))
    if exact:
        return sorted(exact, key=_likely)
    if fit.rest or repeated:
        raise NoFit("the weights of the experts are no values that the block computes")
    even = float(f"{float(fit.c[kept].median()):.6g}")
    ones = _close(kept * even, fit.c)  # weights that are all the same number
    if bool(kept.all()):
        if ones:
            return [Weights(None, False, even)]
        if scaled:
            return sorted(scaled, key=_likely)
    if masked or ones:
        found = capacities(fit, kept)
        plain = [Weights(s, gates, 1.0, c) for c in found for s, gates in masked]
        options = sorted(plain, key=_likely) + [Weights(None, False, even, c) for c in found if ones]
        if options:
            return options
        raise NoFit("choices are dropped by a rule that is no capacity in order of tokens")
    raise NoFit("the weights of the experts are no values that the block computes")


def _usable(record: Record, fit: Fit) -> list[Snap]:
    return [s for s in record.snaps if s.value.is_floating_point() and s.value.numel() and s.time < fit.y.time]


def _likely(w: Weights) -> tuple[bool, bool, int]:
    """Weights with a gradient first, as they are before gate matrices, late ones before early ones."""
    assert w.source is not None
    return (not w.source.grad, w.gates, -w.source.time)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= 1e-3 * b.abs().max()).all())


def _ratio(c: Tensor, values: Tensor) -> float | None:
    """The constant factor between two sets of coefficients, if it is one."""
    if not bool((values != 0).all()):
        return None
    ratio = c / values
    middle = float(ratio.median())
    if not math.isfinite(middle) or not bool(((ratio - middle).abs() <= 1e-3 * abs(middle)).all()):
        return None
    return float(f"{middle:.4g}")


def ranks(chosen: Tensor, experts: int, order: str, groups: int) -> Tensor:
    """Rank of every choice [N, k] among those of its expert, in an order of priority."""
    tokens, k = chosen.shape
    parts = chosen.view(groups, tokens // groups, k)
    if order.endswith("choice"):
        parts = parts.transpose(1, 2)
    flat = parts.reshape(groups, -1)
    onehot = torch.nn.functional.one_hot(flat, experts)
    rank = (onehot.cumsum(1) - 1).gather(2, flat[..., None])[..., 0].view(parts.shape)
    return (rank.transpose(1, 2) if order.endswith("choice") else rank).reshape(tokens, k)


def capacities(fit: Fit, kept: Tensor) -> list[Capacity]:
    """Capacities that drop exactly the choices that were dropped."""
    tokens = fit.c.shape[0]
    found = []
    for order in ORDERS:
        groups = 1
        if order.startswith("row"):
            shape = next((s.value.shape for s in (fit.x, fit.y) if s.value.dim() == 3), None)
            if shape is None or shape[0] == 1:
                continue
            groups = shape[0]
        rank = ranks(fit.chosen, fit.experts, order.removeprefix("row").strip() or "token", groups)
        if tokens and int(rank[kept].max()) + 1 == int(rank[~kept].min()):
            found.append(Capacity(order, groups, int(rank[~kept].min())))
    return found
