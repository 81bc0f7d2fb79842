"""Precision metrics of a training step as the few figures per role that fit into a log."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .config import TrainConfig
from .parts import autocast, device_of
from .rng import undisturbed_rng

ROLES = ("input", "weight", "grad", "hidden")


def check_measurable(model: nn.Module, cfg: TrainConfig) -> None:
    """Raise `InputError` when `cfg` asks for precision metrics of a model that moefx did not compile."""
    if cfg.precision_every and not hasattr(model, "precision_metrics"):
        raise InputError(
            f"precision_every={cfg.precision_every} asks for precision metrics",
            where=type(model).__qualname__,
            why="only a model that moefx.optimize returned has precision casts",
            todo="pass the optimized model, or set precision_every=0",
        )


def precision_figures(model: Any, ids: torch.Tensor, cfg: TrainConfig) -> dict[str, float]:
    """Figures of the casts of a step on int64 [batch, seq]. The run goes on as if nothing had been measured."""
    ids = ids.to(device_of(model))
    with undisturbed_rng(), autocast(model, cfg):
        return summarize(model.precision_metrics(input_ids=ids, labels=ids))


def summarize(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Per role, over all casts: the worst and the mean underflow, saturation and SQNR, and the largest scale spread.

    The mean SQNR is that of the mean share of noise, so that casts which lose nothing count as such; where no cast of
    a role loses anything, there is no SQNR to write.

    Returns:
        {"input.underflow_worst": share, "input.underflow_mean": share, ..., "grad.sqnr_db_worst": dB,
        "grad.scale_spread_max": binades, ...}
    """
    found = list(rows)
    out: dict[str, float] = {}
    for role in ROLES:
        of_role = [r for r in found if r["role"] == role]
        if not of_role:
            continue
        for name in ("underflow", "saturation"):
            values = [r[name] for r in of_role]
            out[f"{role}.{name}_worst"] = max(values)
            out[f"{role}.{name}_mean"] = math.fsum(values) / len(values)
        noise = [10 ** (-r["sqnr_db"] / 10) for r in of_role]
        if any(noise):
            out[f"{role}.sqnr_db_worst"] = min(r["sqnr_db"] for r in of_role)
            out[f"{role}.sqnr_db_mean"] = -10 * math.log10(math.fsum(noise) / len(noise))
        out[f"{role}.scale_spread_max"] = max(r["scale_spread"] for r in of_role)
    return {name: value for name, value in out.items() if math.isfinite(value)}
