"""A language model that trains in milliseconds, with what makes resuming hard: dropout, tied weights, a buffer."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from moefx.train.config import TrainConfig
from moefx.train.data import TokenDataset

VOCAB = 16


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class ToyLM(nn.Module):
    """Predicts the next token from the present one. The head is the embedding; `seen` counts training tokens."""

    seen: Tensor

    def __init__(self, seed: int = 0, dropout: float = 0.3, width: int = 8) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(VOCAB, width)
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.autocast_seen: list[bool] = []

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        self.autocast_seen.append(torch.is_autocast_enabled("cpu"))
        if self.training:
            self.seen += input_ids.numel()
        logits = self.head(self.norm(self.dropout(self.embed(input_ids))))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB).float(), labels[:, 1:].reshape(-1))
        return Output(loss, logits)


def toy_data(size: int = 4000, seed: int = 0) -> TokenDataset:
    """Counting upwards with now and then a random token: learnable, but not trivial."""
    rng = np.random.default_rng(seed)
    tokens = (np.arange(size) % VOCAB).astype(np.uint8)
    noise = rng.random(size) < 0.1
    tokens[noise] = rng.integers(0, VOCAB, int(noise.sum()))
    return TokenDataset(tokens[: size // 2], tokens[size // 2 :], VOCAB, "toy")


def toy_config(out: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "steps": 12, "batch": 2, "seq": 8, "lr": 0.05, "warmup": 2, "eval_every": 4, "eval_batches": 2,
        "checkpoint_every": 5, "out": out, "threads": 1,  # two would wait for each other, and for whatever else runs
    }  # fmt: skip
    return TrainConfig(**{**settings, **changes})


def quiet() -> Console:
    """A console that is no terminal and keeps what it is told."""
    return Console(file=io.StringIO(), force_terminal=False, width=120)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
