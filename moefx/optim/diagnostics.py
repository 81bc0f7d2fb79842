"""What LITE does to the matrices of a Muon optimizer, as numbers to log."""

from __future__ import annotations

import torch

from .base import Group, State, usable
from .distributed import Place
from .lite import LiteConfig, LiteValues, controlled_projector
from .muon_update import DTYPES, combine, directions, lr_scale, nested, nesterov, polar_steps
from .polar import matrices, polar
from .rounding import working_dtype

Tensor = torch.Tensor
Metrics = dict[str, Tensor]


def diagnose(
    raw_grad: Tensor, state: State, group: Group, values: LiteValues | None, flip: bool, before: Tensor | None
) -> tuple[Metrics, Tensor | None]:
    """Metrics [E] of one parameter after a step (`Muon.diagnostics`), and the rows R [E, r, n] of its projector R^T R.

    Everything is computed again from the momentum and the gradient of that step.
    """
    dtype = working_dtype(raw_grad)

    def oriented(x: Tensor) -> Tensor:
        x = matrices(x).to(dtype)
        return x.mT if flip else x

    momentum, grad = oriented(state["momentum_buffer"]), oriented(raw_grad)
    active, _ = usable(grad, Place(raw_grad.shape))
    grad = grad.nan_to_num(0.0, 0.0, 0.0) * active.to(dtype)[:, None, None]
    mixed = nesterov(momentum, grad, group)
    a, b = raw_grad.shape[-2:]
    scale = lr_scale(group["scale"], *((a, b) if group["layout"] == "out_in" else (b, a)))
    lite: LiteConfig | None = group["lite"]
    steps, kind, low = polar_steps(group), group["polar"], DTYPES[group["polar_dtype"]]
    o, zero = polar(mixed, steps, kind, low), torch.zeros_like(mixed)
    if lite is None or values is None or (lite.mode == "fast" and values.uniform):
        sharp = o if lite is None or values is None else directions(o, mixed, grad, group, values)[0]
        return {"update_rms": _rms(sharp * scale, sharp[0].numel())}, None

    h = polar(grad, steps, kind, low)
    rank, (m, n) = lite.rank(*mixed.shape[-2:]), mixed.shape[-2:]
    if lite.mode == "fast":
        rows = state["basis"][..., :rank].mT
        pair = directions(o.clone(), mixed, grad, group, values)  # to be written into
        update = -combine(zero, *pair, state["basis"][..., :rank], values.chi, 1.0, 0.0, scale)
    else:
        found = controlled_projector(mixed, o, state["ratio"], rank, steps, low)
        rows, hold = found.s, found.inverted[:, None, None] if lite.guard else None
        update = -nested(zero, o, h, rows, values, 1.0, 0.0, scale, hold)
    trace = rows.square().sum((-2, -1))
    energy = mixed.square().sum((-2, -1))
    captured = (mixed @ rows.mT).square().sum((-2, -1)) / torch.where(energy > 0, energy, 1)
    along = (update @ rows.mT) @ rows
    metrics = {
        "update_rms": _rms(update, m * n),
        "update_rms_sharp": _rms(along, m * trace),
        "update_rms_flat": _rms(update - along, m * (n - trace)),
        "effective_rank": trace,
        "rank": torch.full_like(trace, rank),
        "captured": captured,
        "inverted": (captured * min(m, n) < 0.5 * trace) & (energy > 0),
        "cosine": torch.cosine_similarity(o.flatten(1), h.flatten(1)),
    }
    if "inversions" in state:
        metrics["inversions"] = state["inversions"].clone()
    if before is not None:
        both = (before @ rows.mT).square().sum((-2, -1))
        sizes = (_norm_of_projector(before) * _norm_of_projector(rows)).clamp_min(torch.finfo(dtype).tiny)
        metrics["overlap"] = both / sizes
    return metrics, rows.clone()


def _rms(x: Tensor, entries: Tensor | int) -> Tensor:
    count = torch.as_tensor(entries, device=x.device).clamp_min(1e-12)
    found: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1)) / count.sqrt()
    return found


def _norm_of_projector(rows: Tensor) -> Tensor:
    """||R^T R||_F."""
    found: Tensor = torch.linalg.vector_norm(rows @ rows.mT, dim=(-2, -1))
    return found
