"""Parts of a training step: the optimizer, the precision context, the loss of a batch, validation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import InputError
from ..optim import LiteConfig, Muon, Soap, param_groups
from .config import TrainConfig
from .data import TokenDataset
from .modes import modes_kept
from .rng import undisturbed_rng


def adamw(model: nn.Module, cfg: TrainConfig) -> Optimizer:
    """AdamW with weight decay on matrices only; norms and biases are left to the loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    # The fused kernel covers all parameters in one call, on CPU too.
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> Optimizer:
    """The optimizer that `cfg.optim` names, over groups by role. Raises InputError for a model that is all frozen."""
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("the model has no parameter that trains", todo="let some parameters require gradients")
    if cfg.optim == "adamw":
        return adamw(model, cfg)
    kind, _, lite = cfg.optim.partition("-")
    groups = param_groups(model, algorithm=kind, weight_decay=cfg.weight_decay, verbose=False)
    # A run may end within its warm-up; LITE's ramps need a step behind theirs.
    config = LiteConfig.wsd(warmup=min(cfg.warmup, cfg.steps - 1), total=cfg.steps) if lite else None
    if kind == "soap":
        return Soap(groups, lr=cfg.lr, lite=config)
    return Muon(groups, lr=cfg.lr, lite=config)


def autocast(model: nn.Module, cfg: TrainConfig) -> torch.autocast:
    """The context that forward passes run in: bf16 autocast on the model's device, or none."""
    return torch.autocast(device_of(model).type, torch.bfloat16, enabled=cfg.dtype == "bf16")


def evaluate(
    model: nn.Module,
    data: TokenDataset,
    cfg: TrainConfig,
    after: Callable[[], object] | None = None,
    given: Iterable[Mapping[str, torch.Tensor]] | None = None,
) -> float:
    """Mean loss over the first `cfg.eval_batches` batches of the validation split, in nats per token.

    Always the same windows. The model is left in the mode it was in, and the random state as it was. `after` is called
    behind every batch; `given` are more arguments of the calls, batch by batch.
    """
    losses = []
    with modes_kept(model), torch.no_grad(), undisturbed_rng(), autocast(model, cfg):
        model.eval()
        more: Iterable[Mapping[str, torch.Tensor]] = itertools.repeat({}) if given is None else given
        for ids, named in zip(val_batches(data, cfg), more, strict=False):
            losses.append(float(loss_of(model, ids.to(device_of(model)), **named)))
            if after is not None:
                after()
    return math.fsum(losses) / len(losses)


def val_batches(data: TokenDataset, cfg: TrainConfig) -> list[torch.Tensor]:
    """The validation batches, int64 [batch, seq] each."""
    return list(itertools.islice(data.batches("val", cfg.batch, cfg.seq, cfg.seed), cfg.eval_batches))


def loss_of(model: nn.Module, ids: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
    """The scalar loss of a batch int64 [batch, seq] as the model returns it. Raises InputError when it returns none."""
    loss: Any = getattr(model(input_ids=ids, labels=ids, **named), "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.dim():
        found = "None" if loss is None else f"{type(loss).__name__} {list(getattr(loss, 'shape', []))}"
        raise InputError(
            "the model returned no scalar loss",
            where=type(model).__qualname__,
            why=f"called with input_ids= and labels=, its .loss is {found}",
            todo="return an object with a scalar .loss, as transformers models do",
        )
    return loss


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter is; the CPU for a model without parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` CPU threads inside; None changes nothing."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
