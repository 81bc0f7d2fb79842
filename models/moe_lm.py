"""The ways in which people write MoE layers in plain PyTorch, as one small causal language model.

`IDIOMS` names them after the structure of the code; all but G compute the same function of the same weights
(`copy_weights`). Tests, docs and benchmarks of recognition use them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .idioms_base import MoELayer, copy_weights
from .idioms_dense import DenseBmm, DenseGather, DenseStack, ExpertChoice, GatherWeights, OneHotEinsum, PaddedBuffer
from .idioms_loop import LoopCapacity, LoopCounts, LoopHit, LoopMask, LoopWhere, RepeatMask, RepeatMaskIf
from .idioms_sorted import Dispatcher, SortGrouped, SortSlice, SortSplit

__all__ = ["IDIOMS", "MoELM", "copy_weights"]

IDIOMS: dict[str, type[MoELayer]] = {
    "A1": LoopWhere,
    "A2": LoopMask,
    "A3": LoopHit,
    "A4": LoopCounts,
    "A5": LoopCapacity,
    "A6": RepeatMaskIf,
    "A6p": RepeatMask,
    "B": OneHotEinsum,
    "C": GatherWeights,
    "D1": SortSplit,
    "D2": SortSlice,
    "D3": SortGrouped,
    "E1": DenseStack,
    "E2": DenseBmm,
    "E3": DenseGather,
    "F": PaddedBuffer,
    "G": ExpertChoice,
    "H": Dispatcher,
}


def rotated(x_BNTD: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary positions 0..T-1 on heads of even size D, the two halves as the pairs' components."""
    T, D = x_BNTD.shape[-2:]
    frequency = base ** (-torch.arange(0, D, 2, device=x_BNTD.device, dtype=torch.float32) / D)
    angle_TD = torch.outer(torch.arange(T, device=x_BNTD.device, dtype=torch.float32), frequency).repeat(1, 2)
    first, second = x_BNTD.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BNTD * angle_TD.cos().to(x_BNTD.dtype) + turned * angle_TD.sin().to(x_BNTD.dtype)


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(hidden, 3 * hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x_BTH: Tensor) -> Tensor:
        B, T, H = x_BTH.shape
        q, k, v = self.qkv_proj(x_BTH).view(B, T, 3, self.heads, H // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        z_BNTD = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        out: Tensor = self.o_proj(z_BNTD.transpose(1, 2).reshape(B, T, H))
        return out


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, moe: MoELayer) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.attention = Attention(hidden, heads)
        self.moe_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.moe = moe

    def forward(self, x_BTH: Tensor) -> Tensor:
        x_BTH = x_BTH + self.attention(self.attention_norm(x_BTH))
        out: Tensor = x_BTH + self.moe(self.moe_norm(x_BTH))
        return out


class MoELM(nn.Module):
    """A causal language model whose layers are RMSNorm, attention with rotary positions, RMSNorm, MoE of one idiom.

    `options` go to the layer (act, gated, bias, renormalize, capacity). Weights are normal with std 0.02 and follow
    from `seed` alone: models of two idioms with the same options and seed are the same function. The global random
    state is left as it was. Raises ValueError for an unknown idiom and for sizes that do not fit.
    """

    def __init__(
        self,
        vocab: int,
        hidden: int,
        width: int,
        layers: int,
        heads: int,
        experts: int,
        k: int,
        idiom: str,
        *,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        if idiom not in IDIOMS:
            raise ValueError(f"MoELM: unknown idiom {idiom!r}; use one of {', '.join(IDIOMS)}")
        if hidden % (2 * heads):
            raise ValueError(f"MoELM: hidden must be a multiple of 2 * heads; got {hidden=} {heads=}")
        self.vocab, self.idiom = vocab, idiom
        with torch.random.fork_rng():
            self.embed = nn.Embedding(vocab, hidden)
            self.layers = nn.ModuleList(
                Block(hidden, heads, IDIOMS[idiom](hidden, width, experts, k, **options)) for _ in range(layers)
            )
            self.norm = nn.RMSNorm(hidden, eps=1e-6)
            self.head = nn.Linear(hidden, vocab, bias=False)
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """All weights anew from the seed; norms are one."""
        generator = torch.Generator(self.embed.weight.device).manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.RMSNorm):
                module.reset_parameters()
            elif isinstance(module, MoELayer):
                module.reset_parameters(generator, std=0.02)
            elif isinstance(module, Attention):
                for linear in (module.qkv_proj, module.o_proj):
                    linear.weight.normal_(0.0, 0.02, generator=generator)
        for weight in (self.embed.weight, self.head.weight):
            weight.normal_(0.0, 0.02, generator=generator)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """{"logits": [B, T, V]}, and "loss" if labels [B, T] are given: the mean cross-entropy of the next token.

        Labels are the input ids, shifted here; -100 leaves a position out.
        """
        x_BTH = self.embed(input_ids)
        for layer in self.layers:
            x_BTH = layer(x_BTH)
        logits: Tensor = self.head(self.norm(x_BTH))
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, self.vocab).float(), labels[:, 1:].reshape(-1))
        return {"loss": loss, "logits": logits}
