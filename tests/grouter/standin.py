"""A router with the interface of `moefx.models.grouter.Grouter` and next to no network: what the tools may rely on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class GrouterConfig:
    vocab_size: int = 64
    num_experts: int = 8
    hidden_size: int = 32
    fold_groups: tuple[tuple[int, ...], ...] | None = None


class Grouter(nn.Module):
    """Embeddings mixed with a decayed sum of earlier ones of the document: causal, and dependent on window cuts."""

    selection_bias: Tensor

    def __init__(self, config: GrouterConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.score = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        outputs = len(config.fold_groups) if config.fold_groups else config.num_experts
        self.register_buffer("selection_bias", torch.zeros(outputs))

    @classmethod
    def from_config(cls, **kwargs: Any) -> Grouter:
        return cls(GrouterConfig(**kwargs))

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        x_BSH = self.embedding(input_ids)
        t = torch.arange(x_BSH.shape[1])
        weight = torch.where(t[:, None] >= t, 0.7 ** (t[:, None] - t).clamp(min=0), torch.zeros(()))
        if document_ids is not None:
            weight = weight * (document_ids[:, :, None] == document_ids[:, None, :])
        if position_ids is not None:
            x_BSH = x_BSH + 0.3 * torch.sin(position_ids)[..., None]
        return nn.functional.rms_norm(weight.to(x_BSH.dtype) @ x_BSH, (x_BSH.shape[-1],))

    def forward(self, input_ids: Tensor, **masks: Tensor | None) -> Tensor:
        logits = self.score(self.hidden(input_ids, **masks)).float()
        if self.config.fold_groups:
            logits = torch.stack([logits[..., list(g)].logsumexp(-1) for g in self.config.fold_groups], -1)
        return logits

    def route(
        self, input_ids: Tensor, k: int, *, scale: float = 1.0, normalise: str = "softmax", **masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logits = self(input_ids, **masks)
        idx = (logits + self.selection_bias).topk(k, dim=-1).indices
        chosen = logits.gather(-1, idx)
        gates = chosen.softmax(-1) if normalise == "softmax" else chosen.sigmoid()
        return idx, scale * gates / gates.sum(-1, keepdim=True)

    def save_pretrained(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(self, directory / "standin.pt")

    @classmethod
    def from_pretrained(cls, directory: Path) -> Grouter:
        found: Grouter = torch.load(directory / "standin.pt", weights_only=False)
        return found


def small(seed: int = 0, **config: Any) -> Grouter:
    torch.manual_seed(seed)
    return Grouter.from_config(**config).requires_grad_(False)
