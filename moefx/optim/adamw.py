"""AdamW, and its diagonal LITE: elements with large second moments are sharp, the rest is amplified."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..errors import InputError
from .base import Algorithm, Group, GroupedOptimizer, State, working_dtype
from .lite import LiteConfig

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


def _update(params: list[Tensor], states: list[State], group: Group, step: int) -> None:
    lite: LiteConfig | None = group["lite"]
    chi = 1.0 if lite is None else lite.diagonal(step)
    for p, state in zip(params, states, strict=True):
        assert p.grad is not None
        _update_one(p, p.grad, state, group, None if lite is None else lite.rank_fraction, chi)


def _update_one(p: Tensor, gradient: Tensor, state: State, group: Group, share: float | None, chi: float) -> None:
    lr, decay, (b1, b2) = float(group["lr"]), float(group["weight_decay"]), group["betas"]
    dtype = working_dtype(p)
    grad, w = gradient.to(dtype), p.to(dtype)
    finite = torch.isfinite(grad).all()
    grad = torch.where(finite, grad, 0)
    first = state["exp_avg"].lerp(grad, 1 - b1)
    second = state["exp_avg_sq"].lerp(grad.square(), 1 - b2)
    updates = state["updates"] + finite
    # In float64: 1 - 0.999 ** 1 has lost digits in float32. max: a skipped first step must not divide by zero.
    count = updates.clamp_min(1).double()
    mean = first / (1 - b1**count).to(dtype)
    direction = mean / ((second / (1 - b2**count).to(dtype)).sqrt_() + group["eps"])
    new = (w * (1 - lr * decay)).add_(direction, alpha=-lr)
    if share is not None and p.numel():
        flat, state["high"], state["low"] = flat_share(second, state["high"], state["low"], share, finite)
        if chi != 1:
            new = new.sub_(flat * (direction + decay * w), alpha=lr * (chi - 1))
    p.copy_(torch.where(finite, new, w))
    state["exp_avg"].copy_(torch.where(finite, first, state["exp_avg"]))
    state["exp_avg_sq"].copy_(torch.where(finite, second, state["exp_avg_sq"]))
    state["updates"].copy_(updates)
    state["skipped"] += ~finite


def flat_share(
    second: Tensor, high: Tensor, low: Tensor, share: float, move: Tensor
) -> tuple[Tensor | float, Tensor, Tensor]:
    """(1 - mask, high, low): how flat every element is, and the thresholds of the next step.

    An element is sharp from `high` times the mean second moment on and flat below `low` times it, linear between. The
    thresholds chase the share of elements above them: `share`, and a tenth more for the soft band. They move only with
    a finite gradient (`move`).
    """
    if share < _EDGE:
        return 1.0, high, low
    mean = second.mean()
    scaled = second / torch.where(mean > 0, mean, 1)
    flat = 1 - ((scaled - low) / (high - low)).clamp(0, 1)
    soft = share + min(1 - share, 0.1)
    up = torch.where((scaled >= high).to(second.dtype).mean() > share, 1.05 * high, 0.95 * high)
    down = torch.where((scaled >= low).to(second.dtype).mean() > soft, 1.05 * low, 0.95 * low)
    down = torch.minimum(down, 0.95 * up)
    move = move & (mean > 0)
    return flat, torch.where(move, up, high), torch.where(move, down, low)


ADAMW = Algorithm(_check, _state, _update)


class AdamW(GroupedOptimizer):
    """AdamW (torch's formula) for any shape, with diagonal LITE where `lite` is given.

    The released code divides by the uncorrected sqrt(v) + eps; here, as in torch, eps joins the corrected one.

    Args:
        params: parameters or groups; a group of role router, head, bias or other stays plain unless it says
            `lite=True`.
        lite: `chi_diagonal` (or `chi`) and `rank_fraction` are used; there is no damping.
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
        nonfinite: str = "skip",
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "layout": "out_in"}
        super().__init__(params, defaults, lite, nonfinite)
