"""What an optimized model measures of its routing, for the training loop.

Models are asked by what they have, `losses`, `routing` and `options`: the loop trains any module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..losses import BiasUpdate


def loss_values(model: nn.Module) -> dict[str, float]:
    """`model.losses` of the last call as {"loss_sp": .., "loss_total": ..}; empty for other models."""
    return {f"loss_{name}": float(v) for name, v in _tensors(model, "losses").items()}


def routing_of(model: nn.Module) -> Mapping[str, Tensor]:
    """`model.routing` of the last call; empty for other models."""
    return _tensors(model, "routing")


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
