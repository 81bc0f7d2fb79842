"""AdamW, and its diagonal LITE: elements with large second moments are sharp, the rest is amplified."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..errors import InputError
from .base import Algorithm, Group, GroupedOptimizer, Item, State
from .distributed import agreed
from .lite import LiteConfig
from .rounding import store, working_dtype

Tensor = torch.Tensor
_EDGE = 1e-5  # closer to 0 or 1 than this, a sharp share means none or all


def _check(p: Tensor, where: str, group: Group) -> None:
    b1, b2 = group["betas"]
    if not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise InputError(f"betas={group['betas']} are no averages", where=where, todo="give 0 to below 1")


def _state(p: Tensor, group: Group) -> State:
    dtype = working_dtype(p)
    state: State = {
        "exp_avg": torch.zeros_like(p, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(p, dtype=dtype),
        # Of this parameter, which may have been without gradients; on its device, so that skipping needs no sync.
        "updates": torch.zeros((), dtype=torch.int64, device=p.device),
    }
    if group["lite"] is not None:
        state["high"] = torch.ones((), dtype=dtype, device=p.device)
        state["low"] = torch.full((), 0.5, dtype=dtype, device=p.device)
    return state


def _update(items: list[Item], group: Group, step: int) -> None:
    lite: LiteConfig | None = group["lite"]
    chi = 1.0 if lite is None else lite.diagonal(step)
    bad = agreed([(~torch.isfinite(x.grad)).sum() for x in items], [x.place for x in items])
    finite = [count == 0 for count in bad]
    for x, ok in zip(items, finite, strict=True):
        _average(x, group, ok)
    flats: list[Tensor | float] = [0.0] * len(items)
    if lite is not None:
        flats = flat_shares(items, lite.rank_fraction, finite)
    for x, flat, ok in zip(items, flats, finite, strict=True):
        _move(x, group, flat, chi, ok)


def _average(x: Item, group: Group, finite: Tensor) -> None:
    """Both moments follow the gradient, unless it is not finite."""
    b1, b2 = group["betas"]
    grad = torch.where(finite, x.grad.to(working_dtype(x.weights)), 0)
    first, second = x.state["exp_avg"], x.state["exp_avg_sq"]
    first.copy_(torch.where(finite, first.lerp(grad, 1 - b1), first))
    second.copy_(torch.where(finite, second.lerp(grad.square(), 1 - b2), second))
    x.state["updates"] += finite
    x.state["skipped"] += ~finite


def _move(x: Item, group: Group, flat: Tensor | float, chi: float, finite: Tensor) -> None:
    """The update of the weights; `flat` is how flat each of their elements is."""
    lr, decay, (b1, b2) = float(group["lr"]), float(group["weight_decay"]), group["betas"]
    dtype, state = working_dtype(x.weights), x.state
    w = x.weights.to(dtype)
    # In float64: 1 - 0.999 ** 1 has lost digits in float32. max: a skipped first step must not divide by zero.
    count = state["updates"].clamp_min(1).double()
    mean = state["exp_avg"] / (1 - b1**count).to(dtype)
    direction = mean / ((state["exp_avg_sq"] / (1 - b2**count).to(dtype)).sqrt_() + group["eps"])
    new = (w * (1 - lr * decay)).add_(direction, alpha=-lr)
    if chi != 1 and group["lite"] is not None:
        new = new.sub_(flat * (direction + decay * w), alpha=lr * (chi - 1))
    store(x.weights, torch.where(finite, new, w), x.noise)


def flat_shares(items: list[Item], share: float, move: list[Tensor]) -> list[Tensor | float]:
    """1 - mask of every parameter: how flat each element is. The thresholds in its state move on.

    An element is sharp from `high` times the mean second moment on and flat below `low` times it, linear between. The
    thresholds chase the share of elements above them: `share`, and a tenth more for the soft band. They move only with
    a finite gradient (`move`). Means and shares are of whole parameters, wherever their parts are.
    """
    if share < _EDGE:
        return [1.0] * len(items)
    states, places = [x.state for x in items], [x.place for x in items]
    sums = agreed([state["exp_avg_sq"].sum() for state in states], places)
    means = [total / max(place.shape.numel(), 1) for total, place in zip(sums, places, strict=True)]
    scaled = [s["exp_avg_sq"] / torch.where(mean > 0, mean, 1) for s, mean in zip(states, means, strict=True)]
    above = agreed(
        [
            torch.stack([(x >= state["high"]).sum(), (x >= state["low"]).sum()])
            for x, state in zip(scaled, states, strict=True)
        ],
        places,
    )
    soft = share + min(1 - share, 0.1)
    flats: list[Tensor | float] = []
    for x, state, place, mean, count, moves in zip(scaled, states, places, means, above, move, strict=True):
        high, low = state["high"], state["low"]
        flats.append(1 - ((x - low) / (high - low)).clamp(0, 1))
        sharp, softer = count / max(place.shape.numel(), 1)
        up = torch.where(sharp > share, 1.05 * high, 0.95 * high)
        down = torch.minimum(torch.where(softer > soft, 1.05 * low, 0.95 * low), 0.95 * up)
        moves = moves & (mean > 0)
        high.copy_(torch.where(moves, up, high))
        low.copy_(torch.where(moves, down, low))
    return flats


ADAMW = Algorithm(_check, _state, _update)


class AdamW(GroupedOptimizer):
    """AdamW (torch's formula) for any shape, with diagonal LITE where `lite` is given.

    The released code divides by the uncorrected sqrt(v) + eps; here, as in torch, eps joins the corrected one.

    Args:
        params: parameters or groups; a group of role router, head, bias or other stays plain unless it says
            `lite=True`.
        lite: `chi_diagonal` (or `chi`) and `rank_fraction` are used; there is no damping.
        rounding: of half-precision parameters; see `Muon`.
        nonfinite: "skip" (and count, per parameter) or "raise".
    """

    own: ClassVar[str] = "adamw"
    algorithms: ClassVar[dict[str, Algorithm]] = {"adamw": ADAMW}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        lite: LiteConfig | None = None,
        *,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        rounding: str = "nearest",
        nonfinite: str = "skip",
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "layout": "out_in",
            "rounding": rounding,
        }
        super().__init__(params, defaults, lite, nonfinite)
