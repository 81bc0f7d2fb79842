"""One step of Muon and Muon-LITE for a stack of matrices [B, m, n], as functions of tensors and settings."""

from __future__ import annotations

import math

import torch

from .base import Group
from .lite import (
    COLD_ITERATIONS,
    LiteConfig,
    LiteValues,
    apply_isometry,
    controlled_projector,
    improve_basis,
)
from .polar import polar

Tensor = torch.Tensor
SCALES = ("rms", "spectral", "original", "none")
DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def lr_scale(kind: str, out: int, inp: int) -> float:
    """Factor on the orthogonal update of an (out, in) matrix.

    "rms": 0.2 sqrt(max), which matches AdamW's update size, so that one learning rate serves both (Moonlight);
    "spectral": sqrt(out / in); "original": sqrt(max(1, out / in)) (Jordan et al.); "none": 1.
    """
    if kind == "rms":
        return 0.2 * math.sqrt(max(out, inp))
    if kind == "spectral":
        return math.sqrt(out / inp)
    return math.sqrt(max(1.0, out / inp)) if kind == "original" else 1.0


def polar_steps(group: Group) -> int:
    """As configured, else 8; 6 in parity mode, as the released code."""
    parity = group["lite"] is not None and group["lite"].mode == "parity"
    given: int | None = group["polar_steps"]
    return given if given is not None else 6 if parity else 8


def new_weights(
    w: Tensor,
    mixed: Tensor,
    grad: Tensor,
    group: Group,
    values: LiteValues | None,
    side: dict[str, Tensor],
    scale: float,
    on_B11: Tensor | float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights [B, m, n] after the step and what changed of the projector's state; weights stay where `on_B11` is 0."""
    lr, decay = float(group["lr"]) * on_B11, float(group["weight_decay"])
    steps, kind, low = polar_steps(group), group["polar"], DTYPES[group["polar_dtype"]]
    lite: LiteConfig | None = group["lite"]
    if lite is None or values is None or (values.neutral and lite.mode == "fast"):
        return combine(w, polar(mixed, steps, kind, low), None, None, 1.0, lr, decay, scale), {}

    rank = lite.rank(*mixed.shape[-2:])
    if lite.mode == "fast" and not values.uniform:
        # First, while a cache still holds the momentum.
        basis, iterations = side["basis"], 1 if bool(group["projected"]) else COLD_ITERATIONS
        basis = improve_basis(mixed, basis, iterations, ordered=rank < basis.shape[-1])
    o = polar(mixed, steps, kind, low)
    if lite.mode == "parity":
        # The controller moves in every step, also while the schedules still leave the update as it is.
        found = controlled_projector(mixed, o, side["ratio"], rank, steps, low)
        ratio, state = found.ratio, {}
        s = found.s
        if lite.guard:
            ratio = torch.where(found.inverted, min(w.shape[-2:]) ** -0.5, ratio)
            state["inversions"] = found.inverted
        state["ratio"] = ratio
        if values.neutral:
            return combine(w, o, None, None, 1.0, lr, decay, scale), state
        h = polar(grad, steps, kind, low) if values.beta1 or values.beta2 else None
        hold = found.inverted[:, None, None] if lite.guard else None
        return nested(w, o, h, s, values, lr, decay, scale, hold), state

    sharp, flat = directions(o, mixed, grad, group, values)
    if values.uniform:
        return combine(w, sharp, None, None, 1.0, lr, decay, scale), {}
    return combine(w, sharp, flat, basis[..., :rank], values.chi, lr, decay, scale), {"basis": basis}


def nesterov(averaged: Tensor, grad: Tensor, group: Group) -> Tensor:
    """What is orthogonalized: 1/theta times the usual Nesterov mix, or the average.

    The polar factor has no scale, and the shared damping keeps the paper's.
    """
    theta = group["momentum"]
    if not group["nesterov"]:
        return averaged
    return averaged.add(grad, alpha=(1 - theta) / theta) if theta > 0 else grad


def directions(o: Tensor, mixed: Tensor, grad: Tensor, group: Group, values: LiteValues) -> tuple[Tensor, Tensor]:
    """Fast mode: the damped updates (sharp, flat), neither amplified nor projected; `o` is mixed's polar factor.

    Both are the caller's own, to be written into; the same tensor where they are equal.
    """
    lite: LiteConfig = group["lite"]
    steps, kind, low = polar_steps(group), group["polar"], DTYPES[group["polar_dtype"]]
    _, beta1, beta2 = values
    if lite.damping == "shared":
        shift = 1 - float(group["momentum"])
        sharp = polar(mixed + beta1 * shift * grad, steps, kind, low) if beta1 else o
        if beta1 == beta2:
            return sharp, sharp
        return sharp, polar(mixed + beta2 * shift * grad, steps, kind, low) if beta2 else o
    if not (beta1 or beta2):
        return o, o
    # A noisy gradient needs no more digits than the momentum's factor had in the first Muon.
    h = polar(grad, lite.damping_steps, kind, low, tight=True)
    sharp = torch.add(o, h, alpha=beta1)
    return sharp, h.mul_(beta2 - beta1).add_(sharp)


def combine(
    w: Tensor,
    sharp: Tensor,
    flat: Tensor | None,
    basis_BNK: Tensor | None,
    chi: float,
    lr: Tensor | float,
    decay: float,
    scale: float,
) -> Tensor:
    """w - lr (x P_s + y P_f) with x = scale sharp + decay w, y = chi (scale flat + decay w): one projection in all.

    `basis_BNK` holds orthonormal columns V with P_s = V V^T; without it everything is sharp. `flat` is overwritten:
    on CPUs, a temporary of its size costs as much as three passes over it.
    """
    new = descend(w * (1 - lr * decay), sharp, lr * scale)
    if basis_BNK is None or flat is None:
        return new
    # Their difference, in units of `unit`, which the last descent multiplies with.
    unit = chi * scale if chi else scale
    rest = flat.sub_(sharp, alpha=1 / chi) if chi else flat.copy_(sharp).neg_()
    if decay and chi != 1:
        rest.add_(w, alpha=decay * (chi - 1) / unit)
    return descend(new, rest.baddbmm_(rest @ basis_BNK, basis_BNK.mT, alpha=-1), lr * unit)


def descend(w: Tensor, x: Tensor, lr: Tensor | float) -> Tensor:
    """w - lr x, in place of w."""
    return w.addcmul_(x, lr, value=-1) if isinstance(lr, Tensor) else w.sub_(x, alpha=lr)


def nested(
    w: Tensor,
    o: Tensor,
    h: Tensor | None,
    s: Tensor,
    values: LiteValues,
    lr: Tensor | float,
    decay: float,
    scale: float,
    hold: Tensor | None = None,
) -> Tensor:
    """The released code's update: the smooth flat projector I - S^T S acts twice on the damping. `hold`: all sharp."""

    def flat_part(x: Tensor) -> Tensor:
        part = x - apply_isometry(x, s)
        return part if hold is None else torch.where(hold, 0, part)

    chi, beta1, beta2 = values
    u = o
    if h is not None:
        u = o + beta1 * h
        if beta2 != beta1:
            u = u + (beta2 - beta1) * flat_part(h)
    new = w * (1 - lr * decay)
    if chi != 1:
        u = u + (chi - 1) * flat_part(u)
        if decay:
            new = new - lr * decay * (chi - 1) * flat_part(w)
    return descend(new, u, lr * scale)
