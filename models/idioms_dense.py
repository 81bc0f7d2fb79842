"""MoE layers without dispatch by token: padded capacity (B, F), gathered weights (C), every expert (E1-E3), and
expert choice (G).

Own implementations of spellings found in public code.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .idioms_base import EACH, ListedExperts, StackedExperts


class OneHotEinsum(StackedExperts):
    """B, GShard, lucidrains, DeepSpeed, nanoMoE: dispatch and combine tensors [T, E, C] from one-hot ranks, einsums.

    Priority is k-major: all first choices in token order, then all second choices. Without a capacity C is T.
    With T = 0 only a stated capacity works: one_hot knows no width of zero. Parameters w_gate,
    w_in [E, H, I] and w_out [E, I, H].
    """

    has_capacity = True
    names = ("w_gate", "w_in", "w_out")
    in_first = True

    w_gate: nn.Parameter
    w_in: nn.Parameter
    w_out: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, self.hidden)
        T, E, K = x_TH.shape[0], self.num_experts, self.k
        C = T if self.capacity is None else self.capacity
        w_TK, idx_TK = self.route(x_TH)
        mask_KTE = F.one_hot(idx_TK, num_classes=E).permute(1, 0, 2)
        rank_KTE = (torch.cumsum(mask_KTE.reshape(K * T, E), dim=0) - 1).view(K, T, E)
        kept_KTE = mask_KTE * torch.lt(rank_KTE, C)
        rank_KT = torch.sum(rank_KTE * kept_KTE, dim=-1)
        kept_KTE = kept_KTE.to(x_TH.dtype)
        slot_KTC = F.one_hot(rank_KT, num_classes=C).to(x_TH.dtype)
        dispatch_TEC = torch.einsum("kte,ktc->tec", kept_KTE, slot_KTC)
        combine_TEC = torch.einsum("tk,kte,ktc->tec", w_TK, kept_KTE, slot_KTC)
        x_ECH = torch.einsum("tec,th->ech", dispatch_TEC, x_TH)
        gate = self.biased(torch.einsum("ech,ehi->eci", x_ECH, self.w_gate), "w_gate", EACH) if self.gated else None
        up = self.biased(torch.einsum("ech,ehi->eci", x_ECH, self.w_in), "w_in", EACH)
        z_ECH = self.biased(torch.einsum("eci,eih->ech", self.glu(gate, up), self.w_out), "w_out", EACH)
        return torch.einsum("tec,ech->th", combine_TEC, z_ECH).view(x.shape)


class GatherWeights(StackedExperts):
    """C, gpt-fast's Mixtral and batched_mm: the weights of the chosen experts gathered per token, then einsum.

    Parameters w1 (gate), w3 (up) [E, I, H] and w2 (down) [E, H, I].
    """

    w1: nn.Parameter
    w3: nn.Parameter
    w2: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, self.hidden)
        w_TK, idx_TK = self.route(x_TH)
        gate = None
        if self.gated:
            gate = self.biased(torch.einsum("th,tkih->tki", x_TH, self.w1[idx_TK]), "w1", idx_TK)
        up = self.biased(torch.einsum("th,tkih->tki", x_TH, self.w3[idx_TK]), "w3", idx_TK)
        z_TKH = self.biased(torch.einsum("tki,tkhi->tkh", self.glu(gate, up), self.w2[idx_TK]), "w2", idx_TK)
        return torch.einsum("tkh,tk->th", z_TKH, w_TK).view(x.shape)


class DenseStack(ListedExperts):
    """E1, small tutorials: every expert on every token, stack, weights scattered into zeros [T, E], weighted sum."""

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, self.hidden)
        w_TK, idx_TK = self.route(x_TH)
        gates_TE = torch.zeros(x_TH.shape[0], self.num_experts, dtype=w_TK.dtype, device=w_TK.device).scatter(
            1, idx_TK, w_TK
        )
        z_TEH = torch.stack([expert(x_TH) for expert in self.experts], dim=1)
        return (z_TEH * gates_TE.unsqueeze(-1)).sum(dim=1).view(x.shape)


class DenseBmm(StackedExperts):
    """E2, Llama 4 and gpt-oss in training: all tokens repeated per expert, bmm, times the transposed gate matrix.

    The weights multiply the outputs, as in gpt-oss (Llama 4 scales the inputs). Parameters gate_up_proj [E, H, 2I] with
    gate and up alternating, as in gpt-oss, and down_proj [E, I, H].
    """

    names = ("gate_up_proj", "down_proj")
    in_first = True
    interleaved = True

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, self.hidden)
        T, E = x_TH.shape[0], self.num_experts
        w_TK, idx_TK = self.route(x_TH)
        gates_TE = torch.zeros(T, E, dtype=w_TK.dtype, device=w_TK.device).scatter(1, idx_TK, w_TK)
        x_ETH = x_TH.repeat(E, 1).view(E, T, self.hidden)
        gate_up = self.biased(torch.bmm(x_ETH, self.gate_up_proj), "gate_up_proj", EACH)
        z_ETH = self.biased(torch.bmm(self.halves(gate_up), self.down_proj), "down_proj", EACH)
        return (z_ETH * gates_TE.t().unsqueeze(-1)).sum(dim=0).view(x.shape)


class DenseGather(ListedExperts):
    """E3, tutorials: every expert on every token, stack, then the k chosen outputs are gathered and weighted."""

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, self.hidden)
        w_TK, idx_TK = self.route(x_TH)
        z_TEH = torch.stack([expert(x_TH) for expert in self.experts], dim=1)
        z_TKH = z_TEH.gather(1, idx_TK.unsqueeze(-1).expand(-1, -1, self.hidden))
        return (z_TKH * w_TK.unsqueeze(-1)).sum(dim=1).view(x.shape)


class PaddedBuffer(StackedExperts):
    """F, Tutel-like layers and MegaBlocks with a capacity: rows copied into a buffer [E * C, H], bmm, gathered back.

    Priority is token-major: the choices in the order (token, choice). Dropped choices go to a spare last row. Without a
    capacity C is T. Parameters w1 (gate), v1 (up) [E, H, I] and w2 (down) [E, I, H].
    """

    has_capacity = True
    names = ("w1", "v1", "w2")
    in_first = True

    w1: nn.Parameter
    v1: nn.Parameter
    w2: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, self.hidden)
        T, E, H = x_TH.shape[0], self.num_experts, self.hidden
        C = T if self.capacity is None else self.capacity
        w_TK, idx_TK = self.route(x_TH)
        flat_S = idx_TK.reshape(-1)
        rank_SE = torch.cumsum(F.one_hot(flat_S, num_classes=E), dim=0) - 1
        rank_S = rank_SE.gather(1, flat_S.unsqueeze(1)).squeeze(1)
        slot_S = torch.where(rank_S < C, flat_S * C + rank_S, E * C)
        rows = x_TH.new_zeros(E * C + 1, H).index_copy(0, slot_S, x_TH.repeat_interleave(self.k, dim=0))
        x_ECH = rows[:-1].view(E, C, H)
        gate = self.biased(torch.bmm(x_ECH, self.w1), "w1", EACH) if self.gated else None
        up = self.biased(torch.bmm(x_ECH, self.v1), "v1", EACH)
        z_ECH = self.biased(torch.bmm(self.glu(gate, up), self.w2), "w2", EACH)
        z = torch.cat([z_ECH.view(E * C, H), z_ECH.new_zeros(1, H)])
        return (z[slot_S].view(T, self.k, H) * w_TK.unsqueeze(-1)).sum(dim=1).view(x.shape)


class ExpertChoice(StackedExperts):
    """G, expert-choice papers: each expert takes its top tokens, `topk` over the transposed scores; not causal.

    Every expert takes min(T, max(1, T * k // E)) tokens; the weights are the softmax over experts as it is. A different
    function from all others. Parameters gate_up [E, H, 2I], gate before up, and down [E, I, H].
    """

    names = ("gate_up", "down")
    in_first = True

    gate_up: nn.Parameter
    down: nn.Parameter

    def __init__(
        self, hidden: int, width: int, experts: int, k: int, *, renormalize: bool = False, **options: Any
    ) -> None:
        if renormalize:
            raise ValueError("ExpertChoice: a token has no fixed number of weights, so renormalize=True is impossible")
        super().__init__(hidden, width, experts, k, renormalize=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, self.hidden)
        T = x_TH.shape[0]
        scores_TE = F.softmax(self.gate(x_TH), dim=-1)
        w_EC, token_EC = scores_TE.t().topk(min(T, max(1, T * self.k // self.num_experts)), dim=1)
        gate_up = self.biased(torch.bmm(x_TH[token_EC], self.gate_up), "gate_up", EACH)
        z_ECH = self.biased(torch.bmm(self.halves(gate_up), self.down), "down", EACH)
        weighted_SH = (z_ECH * w_EC.unsqueeze(-1)).flatten(0, 1)
        return torch.zeros_like(x_TH).index_add(0, token_EC.flatten(), weighted_SH).view(x.shape)
