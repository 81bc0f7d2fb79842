"""What an optimized model measures of its routing, for the training loop and for `moefx inspect --routing`.

Models are asked by what they have, `losses` and `routing`: the loop trains any module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..grouter.affinity import affinity
from ..grouter.traffic import max_over_mean, remote, slot_hits, token_hits, uniform_traffic
from ..losses import RoutingMetrics
from ..optimize import optimize
from ..view.routing_numbers import RoutingSum
from .data import TokenDataset
from .models import vocab_size_of
from .parts import device_of


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


def in_short(found: Mapping[str, Any]) -> str:
    """Of `numbers` what is said beside a validation loss: `, MaxVio 0.31, 0.0 dead experts`."""
    mean = found.get("mean", {})
    return f", MaxVio {mean['max_violation']:.2f}, dead experts {mean['dead_experts']:.1f}" if mean else ""


def _tensors(model: nn.Module, name: str) -> Mapping[str, Tensor]:
    found = getattr(model, name, None)
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        return {}  # something of the model's own
    return found


# --- moefx inspect --routing


def example_batches(model: nn.Module, data: TokenDataset | None, count: int, batch: int, seq: int) -> list[Tensor]:
    """int64 [batch, seq] token ids: of the validation split of `data`, or random ones for None."""
    vocab = vocab_size_of(model)
    if data is not None:
        data.check(seq=seq, model_vocab=vocab)
        return list(islice(data.batches("val", batch, seq, 0), count))
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab or 256, (batch, seq), generator=generator) for _ in range(count)]


def observe(model: nn.Module, batches: Iterable[Tensor], **options: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Routing metrics of a model over batches int64 [batch, seq], in eval mode, and the paths of its layers.

    `choices` are those of all batches, one behind the other. `options` are for `optimize`.
    """
    given = [ids.to(device_of(model)) for ids in batches]
    if not given:
        raise InputError("there are no batches to look at", todo="ask for at least one")
    mode, seen = model.training, RoutingSum()
    try:
        with torch.no_grad():
            opt = optimize(model.eval(), {"input_ids": given[0]}, losses=[RoutingMetrics(choices=True)], **options)
            for ids in given:
                opt(input_ids=ids)
                seen.add(opt.routing)
    finally:
        model.train(mode)
    names = [b["path"] for b in opt.report.blocks if b["raised"]]
    found = seen.result()
    return found, names if len(names) == len(found["load"]) else []


def together(routing: Mapping[str, Tensor]) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Per layer [E, E]: tokens that chose both experts. Empty without `choices`."""
    return [affinity(idx, E).pairs for idx, E in _by_layer(routing)]


def traffic(routing: Mapping[str, Tensor], batches: int, places: int) -> list[dict[str, float]]:
    """What expert parallelism over `places` would send, were the experts of each layer laid out in order.

    A batch lies on one place, batches in turn; a token is sent once to every other place that holds one of its experts
    (`moefx.grouter.traffic`).

    Returns:
        Per layer: `remote`, sends per token; `uniform`, the same were all sets of k experts equally likely;
        `max_over_mean`, of the rows that places compute.
    """
    rows = []
    for layer, (idx_Tk, E) in enumerate(_by_layer(routing)):
        if places < 1 or E % places:
            raise InputError(f"{E} experts cannot be laid out on {places} places", todo="choose a divisor of it")
        idx, place = idx_Tk.unflatten(0, (batches, -1)).numpy(), np.arange(E) // (E // places)
        home = np.arange(batches) % places
        sent = remote(token_hits(idx, place, places), home) / len(idx_Tk)
        rows.append({
            "layer": layer, "remote": sent, "uniform": uniform_traffic(E, idx_Tk.shape[1], places),
            "max_over_mean": max_over_mean(slot_hits(idx, place, places).sum(0)),
        })  # fmt: skip
    return rows


def _by_layer(routing: Mapping[str, Tensor]) -> list[tuple[Tensor, int]]:
    """Choices [T, k] and number of experts of every layer, without the columns that a smaller k does not fill."""
    choices, experts = routing.get("choices", ()), routing["experts"].tolist()
    return [(idx[:, (idx >= 0).any(0)], round(E)) for idx, E in zip(choices, experts, strict=False)]
