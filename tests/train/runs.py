"""Short runs of the toy model, and what they leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from moefx.train.config import TrainConfig
from moefx.train.loop import TrainResult, train
from moefx.train.metrics import read_metrics

from .toy import ToyLM, quiet, toy_data


def run(cfg: TrainConfig, model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, TrainResult]:
    model = ToyLM() if model is None else model
    options.setdefault("console", quiet())
    return model, train(model, toy_data(), cfg, **options)


def interrupt_at(step: int) -> Any:
    def on_step(done: int, loss: float) -> None:
        if done == step:
            raise KeyboardInterrupt

    return on_step


def figures(out: Path) -> list[tuple[str, int, float]]:
    return [(r["kind"], r["step"], r["loss"]) for r in read_metrics(out)]
