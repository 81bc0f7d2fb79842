"""What an optimized model measures of its routing, for the training loop.

Models are asked by what they have, `losses`, `routing` and `options`: the loop trains any module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from ..losses import BiasUpdate, Item, RoutingMetrics, as_losses
from ..view.routing_numbers import RoutingSum, mean_of, numbers
from .config import TrainConfig
from .data import TokenDataset
from .parts import evaluate

# Of the metrics of routing, what a closing table shows.
SHOWN = {
    "max_violation": "MaxVio",
    "dead_experts": "dead experts",
    "token_entropy": "token entropy",
    "overlap": "overlap",
}


def loss_values(model: nn.Module) -> dict[str, float]:
    """`model.losses` of the last call as {"loss_sp": .., "loss_total": ..}; empty for other models."""
    return {f"loss_{name}": float(v) for name, v in _tensors(model, "losses").items()}


def routing_of(model: nn.Module) -> Mapping[str, Tensor]:
    """`model.routing` of the last call; empty for other models."""
    return _tensors(model, "routing")


def measured(model: nn.Module, seen: RoutingSum, places: int | None) -> dict[str, Any]:
    """`routing_numbers.numbers` of what was seen, call by call; for `places` with `places` and `traffic`.

    Raises InputError where traffic is asked for and cannot be counted.
    """
    pooled = seen.result()
    found = numbers(pooled, paths_of(model))
    if places is None:
        return found
    if "choices" not in pooled:
        raise InputError(
            f"traffic over {places} places cannot be counted",
            where=type(model).__qualname__,
            why="the model does not return what its tokens chose: it measures no routing, or its layers do not all see "
            "the same tokens",
            todo="compile it with moefx.losses.RoutingMetrics(choices=True), or leave places out",
        )
    from .inspect_routing import traffic  # not at the top: data and checkpoints work without the compiler

    return {**found, "places": places, "traffic": traffic(pooled, seen.calls, places)}


def check_places(model: nn.Module, data: TokenDataset, cfg: TrainConfig) -> None:
    """Raise InputError where `cfg.places` asks for traffic that cannot be counted, by looking at one batch."""
    if cfg.places is not None:
        seen = RoutingSum()
        evaluate(model, data, replace(cfg, eval_batches=1), after=lambda: seen.add(routing_of(model)))
        measured(model, seen, cfg.places)


def with_choices(losses: Any, places: int | None) -> tuple[Item, ...]:
    """The losses that `optimize` is given, with metrics that return choices where traffic is to be counted from them.

    Raises InputError for places without metrics.
    """
    items = as_losses(losses or ())
    if places is None:
        return items
    if not any(isinstance(item, RoutingMetrics) for item in items):
        raise InputError(
            f"places={places} is given without 'metrics' among the losses",
            why="traffic is counted from what metrics measure",
            todo="add metrics to the losses: lb,metrics",
        )
    return tuple(replace(item, choices=True) if isinstance(item, RoutingMetrics) else item for item in items)


def closing_rows(found: Mapping[str, Any]) -> dict[str, str]:
    """What a closing table shows of `measured`, as title: text; empty where nothing was measured."""
    mean = found.get("mean", {})
    rows = {f"{title}, mean over layers": f"{mean[n]:.3f}" for n, title in SHOWN.items() if n in mean}
    if loads := found.get("load"):
        rows["largest share of the load, mean over layers"] = f"{math.fsum(map(max, loads)) / len(loads):.3f}"
    if steps := found.get("steps"):
        hit, chance = (mean_of(steps, n) for n in ("hit_rate_1", "chance_1"))
        rows["path stability: hit rate 1 (its chance)"] = f"{hit:.3f} ({chance:.3f})"
    if rows_of := found.get("traffic"):
        sent, uniform, most = (mean_of(rows_of, n) for n in ("remote", "uniform", "max_over_mean"))
        rows[f"sends per token over {found['places']} places (if uniform)"] = f"{sent:.3f} ({uniform:.3f})"
        rows["largest / mean rows of a place"] = f"{most:.2f}"
    return rows


def paths_of(model: nn.Module) -> list[str]:
    """Module paths of the layers that are measured, in order; empty where the model does not say."""
    rows = getattr(getattr(model, "report", None), "losses", ())
    return next((list(row["layers"]) for row in rows if row["name"] == "metrics"), [])


def move_biases(model: nn.Module) -> None:
    """After an optimizer step: the routers' correction biases follow the load, where "bias" is among the losses."""
    asked = getattr(getattr(model, "options", None), "losses", ())
    if isinstance(asked, tuple) and any(isinstance(item, BiasUpdate) for item in asked):
        update: Any = model.update_router_bias
        update()


def in_short(found: Mapping[str, Any]) -> str:
    """Of `numbers` what is said beside a validation loss: `, MaxVio 0.31, 0.0 dead experts`."""
    mean = found.get("mean", {})
    return f", MaxVio {mean['max_violation']:.2f}, dead experts {mean['dead_experts']:.1f}" if mean else ""


def _tensors(model: nn.Module, name: str) -> Mapping[str, Tensor]:
    found = getattr(model, name, None)
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        return {}  # something of the model's own
    return found
