"""Validation of a model whose router sees the future, with the routing that is there when a token is predicted.

A router that reads later tokens tells the model about what it is to predict, so that the loss over whole windows is too
good. Here each token is routed by a call that saw the window up to it and nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..routing import TOLERANCE, Routing
from .config import TrainConfig
from .data import TokenDataset
from .modes import modes_kept
from .parts import autocast, device_of, evaluate, val_batches

LOGITS = "routing_logits"


class _Given(nn.Module):
    """A router whose logits [B, S, E] come with the call."""

    extra_inputs = (LOGITS,)

    def __init__(self, bias: Any) -> None:
        super().__init__()
        if isinstance(bias, Tensor):
            self.register_buffer("selection_bias", bias.detach().clone())

    def forward(self, routing_logits: Tensor) -> Tensor:
        return routing_logits


class PrefixLoss:
    """`evaluate` of an optimized model under prefix-only routing, on the same windows.

    The router is frozen and the windows are always the same: their logits, one call of the router for every token of a
    window, are computed once.

    Args:
        model: routed by `moefx.Routing(router, causal=False)`.
        logits: of every validation batch, [batch, seq, E].
    """

    def __init__(self, model: Any, logits: list[Tensor]) -> None:
        from ..optimize import reoptimize  # not at the top: data and checkpoints work without the compiler

        options, routing = model.options, model.options.routing
        given = _Given(getattr(routing.router, "selection_bias", None))
        self._model, self._logits = model, logits
        self._alone = reoptimize(model.original, replace(options, routing=replace(routing, router=given)))

    @classmethod
    def of(cls, model: Any, data: TokenDataset, cfg: TrainConfig) -> PrefixLoss | None:
        """For a model whose router was accepted although it sees later tokens; None for every other one."""
        routing = getattr(getattr(model, "options", None), "routing", None)
        if not isinstance(routing, Routing) or routing.causal or routing.extra:
            return None
        found = []
        for whole, alone in _logits(model, routing, data, cfg):
            found.append(alone.cpu())
            # Told by the first batch: a causal router needs no calls for the others.
            if len(found) == 1 and float((whole - alone).abs().max()) <= TOLERANCE * float(whole.abs().max()):
                return None
        return cls(model, found) if found else None

    def __call__(self, data: TokenDataset, cfg: TrainConfig) -> float:
        """Mean loss in nats per token, with the weights that the model has now."""
        self._alone.load_precision_state(self._model.precision_state())
        device = device_of(self._alone)
        return evaluate(self._alone, data, cfg, given=({LOGITS: part.to(device)} for part in self._logits))


@torch.no_grad()
def _logits(model: Any, routing: Routing, data: TokenDataset, cfg: TrainConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Per validation batch the router's logits [batch, seq, E]: of whole windows, and each of the prefix up to it."""
    router = routing.router
    for ids in val_batches(data, cfg):
        ids = ids.to(device_of(model))
        inputs = routing.inputs({"input_ids": ids, "labels": ids})
        with modes_kept(router), autocast(model, cfg):
            router.eval()
            cuts = ({name: v[:, :n] for name, v in inputs.items()} for n in range(1, ids.shape[1] + 1))
            yield router(**inputs), torch.stack([router(**cut)[:, -1] for cut in cuts], 1)
