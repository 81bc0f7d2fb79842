"""AdamW, and its diagonal LITE: elements with large second moments are sharp, the rest is amplified."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .base import Algorithm, Group, GroupedOptimizer, Item, State
from .distributed import agreed
from .lite import LiteConfig
from .rounding import store, working_dtype

Tensor = torch.Tensor
_EDGE = 1e-5  # closer to 0 or 1 than this, a sharp share means none or all


def _check(p: Tensor, where: str, group: Group) -> None:
    """Any shape will do."""


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


# Tensors of one batch of foreach operations: many small ones in few calls, without temporaries of all large ones.
BATCH_BYTES = 16 << 20


def _update(items: list[Item], group: Group, step: int) -> None:
    lite: LiteConfig | None = group["lite"]
    chi = 1.0 if lite is None else lite.diagonal(step)
    bad = agreed([_not_finite(x.grad) for x in items], [x.place for x in items])
    finite = [count == 0 for count in bad]
    batches = _batches(items)
    for batch in batches:
        _average(items[batch], finite[batch], group)
    flats: list[Tensor] | None = None
    if lite is not None:
        flats = flat_shares(items, lite.rank_fraction, finite)
    for batch in batches:
        _move(items[batch], finite[batch], flats[batch] if flats and chi != 1 else None, group, chi)


def _not_finite(grad: Tensor) -> Tensor:
    """int64 []: 1 if any entry is NaN or infinite; without a temporary of its size."""
    if grad.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=grad.device)
    low, high = grad.aminmax()
    return (~(torch.isfinite(low) & torch.isfinite(high))).long()


def _batches(items: list[Item]) -> list[slice]:
    """Runs of parameters of one dtype and device."""
    found, start, size = [], 0, 0
    for i, x in enumerate(items):
        bytes_here = x.weights.numel() * working_dtype(x.weights).itemsize
        first = items[start].weights
        other = (x.weights.dtype, x.weights.device) != (first.dtype, first.device)
        if i > start and (other or size + bytes_here > BATCH_BYTES):
            found.append(slice(start, i))
            start, size = i, 0
        size += bytes_here
    return [*found, slice(start, len(items))] if items else []


def _average(items: list[Item], finite: list[Tensor], group: Group) -> None:
    """Both moments follow the gradients, but for those that are not finite: their factors are 0.

    A square may overflow. The second moment, computed as torch does, is infinite from there on and the element stays,
    where the difference of an interpolation would be infinity minus infinity.
    """
    (b1, b2), dtype = group["betas"], working_dtype(items[0].weights)
    on = torch.stack(finite).to(dtype)
    keep = (1 - torch.stack(finite).double() * (1 - b2)).to(dtype)  # b2, or 1 where nothing may change
    grads = [x.grad.to(dtype).nan_to_num(0.0, 0.0, 0.0) for x in items]
    torch._foreach_mul_(grads, list(on.unbind()))
    torch._foreach_lerp_([x.state["exp_avg"] for x in items], grads, list((on * (1 - b1)).unbind()))
    squares = [x.state["exp_avg_sq"] for x in items]
    torch._foreach_mul_(squares, list(keep.unbind()))
    torch._foreach_addcmul_(squares, grads, grads, value=1 - b2)
    torch._foreach_add_([x.state["updates"] for x in items], finite)
    torch._foreach_add_([x.state["skipped"] for x in items], [~ok for ok in finite])


def _move(items: list[Item], finite: list[Tensor], flats: list[Tensor] | None, group: Group, chi: float) -> None:
    """The update of the weights; `flats` say how flat each of their elements is."""
    lr, decay, (b1, b2) = float(group["lr"]), float(group["weight_decay"]), group["betas"]
    dtype = working_dtype(items[0].weights)
    on = torch.stack(finite).double()
    # In float64: 1 - 0.999 ** 1 has lost digits in float32. max: a skipped first step must not divide by zero.
    count = torch.stack([x.state["updates"] for x in items]).clamp_min(1).double()
    steps, roots = (on * -lr / (1 - b1**count)).to(dtype), (1 - b2**count).sqrt().to(dtype)
    below = torch._foreach_sqrt([x.state["exp_avg_sq"] for x in items])
    torch._foreach_div_(below, list(roots.unbind()))
    torch._foreach_add_(below, list((group["eps"] + 1 - on).to(dtype).unbind()))
    moves = torch._foreach_div([x.state["exp_avg"] for x in items], below)
    torch._foreach_mul_(moves, list(steps.unbind()))
    weights = [x.weights.to(dtype) for x in items]  # themselves, unless they are rounded
    shrink = list((1 - on * (lr * decay)).to(dtype).unbind())
    if flats is not None:
        more = torch._foreach_mul(weights, list((on * (-lr * decay)).to(dtype).unbind()))
        torch._foreach_add_(more, moves)
        torch._foreach_mul_(more, flats)
        torch._foreach_add_(moves, more, alpha=chi - 1)
    torch._foreach_mul_(weights, shrink)
    torch._foreach_add_(weights, moves)
    for x, new in zip(items, weights, strict=True):
        if new is not x.weights:
            store(x.weights, new, x.noise)


def flat_shares(items: list[Item], share: float, move: list[Tensor]) -> list[Tensor]:
    """1 - mask of every parameter: how flat each element is. The thresholds in its state move on.

    An element is sharp from `high` times the mean second moment on and flat below `low` times it, linear between. The
    thresholds chase the share of elements above them: `share`, and a tenth more for the soft band. They move only with
    a finite gradient (`move`). Means and shares are of whole parameters, wherever their parts are.
    """
    if share < _EDGE:
        return [torch.ones((), dtype=x.state["exp_avg"].dtype, device=x.weights.device) for x in items]
    states, places = [x.state for x in items], [x.place for x in items]
    # Without what overflowed: an infinite second moment is sharp beside any mean, but would make a mean of no use.
    sums = agreed([state["exp_avg_sq"].nan_to_num(posinf=0.0).sum() for state in states], places)
    sums = [total.clamp(max=torch.finfo(total.dtype).max) for total in sums]
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
    flats: list[Tensor] = []
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

    The released code divides by the uncorrected sqrt(v) + eps; here, as in torch, eps joins the corrected one. As in
    torch, an element whose squared gradient overflowed once (8e19 with these betas in float32) stays for good: clip.

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
