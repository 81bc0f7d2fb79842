"""MoE layers that sort the choices by expert (D1-D3) or split the nonzero gates (H).

Own implementations of spellings found in public code. Every one works on T = 0 tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .idioms_base import ListedExperts, StackedExperts


class SortSplit(StackedExperts):
    """D1, JetMoE and scattermoe-like code: sort, split by a list of counts, `F.linear` per expert, cat, index_add.

    Parameters input_linear [E, 2I, H], gate before up, and output_linear [E, H, I].
    """

    names = ("input_linear", "output_linear")

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, self.hidden)
        w_TK, idx_TK = self.route(x_TH)
        chosen_TE = torch.zeros(x_TH.shape[0], self.num_experts, dtype=torch.long, device=x.device)
        counts = chosen_TE.scatter(1, idx_TK, 1).sum(dim=0).tolist()
        _, order_S = idx_TK.flatten().sort(0)
        token_S = order_S.div(self.k, rounding_mode="trunc")
        h_SI = self.halves(self._per_expert(x_TH[token_S], counts, "input_linear"))
        z_SH = self._per_expert(h_SI, counts, "output_linear") * w_TK.flatten()[order_S][:, None]
        return torch.zeros_like(x_TH).index_add(0, token_S, z_SH).view(x.shape)

    def _per_expert(self, x_SD: Tensor, counts: list[int], name: str) -> Tensor:
        weight = self.get_parameter(name)
        bias = self.get_parameter(f"{name}_bias") if self.bias else None
        chunks = x_SD.split(counts, dim=0)
        return torch.cat(
            [F.linear(chunk, weight[e], None if bias is None else bias[e]) for e, chunk in enumerate(chunks)], dim=0
        )


class SortSlice(ListedExperts):
    """D2, DeepSeek's remote code at inference: argsort, counts to numpy, a slice per expert, outputs scattered back."""

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, self.hidden)
        w_TK, idx_TK = self.route(x_TH)
        flat_S = idx_TK.view(-1)
        order_S = flat_S.argsort()
        ends = flat_S.bincount(minlength=self.num_experts).cpu().numpy().cumsum()
        x_SH = x_TH[order_S // self.k]
        outputs = []
        start = 0
        for e, end in enumerate(ends):
            if start == end:
                continue
            outputs.append(self.experts[e](x_SH[start:end]))
            start = end
        z_SH = torch.cat(outputs, dim=0) if outputs else x_SH.new_empty(x_SH.shape)
        back_SH = torch.empty_like(z_SH)
        back_SH[order_S] = z_SH
        y_TH = (back_SH.view(-1, self.k, self.hidden) * w_TK.unsqueeze(-1)).sum(dim=1)
        return y_TH.view(x.shape)


def grouped_product(x_SD: Tensor, w_EDO: Tensor, offsets_E: Tensor) -> Tensor:
    """Rows [offsets[e-1], offsets[e]) of x times w[e]: [S, O].

    `torch._grouped_mm` takes bfloat16 and sizes that are multiples of 8 (its 16-byte alignment). Everything else is a
    product with every expert of which one is kept per row: E times the work, but no loop and no shape that depends on
    data.
    """
    S, D = x_SD.shape
    if x_SD.dtype == torch.bfloat16 and D % 8 == 0 and w_EDO.shape[-1] % 8 == 0:
        return torch._grouped_mm(x_SD, w_EDO, offs=offsets_E)
    row_S = torch.arange(S, device=x_SD.device)
    expert_S = torch.searchsorted(offsets_E, row_S.to(offsets_E.dtype), right=True)
    return torch.matmul(x_SD, w_EDO)[expert_S, row_S]


class SortGrouped(StackedExperts):
    """D3, torchtitan and transformers' grouped_mm: argsort, histc, cumsum of counts, grouped products, scatter_add.

    Parameters w1 (gate), w3 (up) [E, I, H] and w2 (down) [E, H, I].
    """

    w1: nn.Parameter
    w3: nn.Parameter
    w2: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, self.hidden)
        w_TK, idx_TK = self.route(x_TH)
        flat_S = idx_TK.reshape(-1)
        order_S = torch.argsort(flat_S, stable=True)
        # Float because histc has no integer kernel on CPUs; ids and counts are exact in it up to 2^24.
        counts_E = torch.histc(flat_S.float(), bins=self.num_experts, min=0, max=self.num_experts)
        offsets_E = torch.cumsum(counts_E, dim=0).to(torch.int32)
        token_S, expert_S = order_S // self.k, flat_S[order_S]
        x_SH = x_TH[token_S]
        gate = None
        if self.gated:
            gate = self.biased(grouped_product(x_SH, self.w1.transpose(-2, -1), offsets_E), "w1", expert_S)
        up = self.biased(grouped_product(x_SH, self.w3.transpose(-2, -1), offsets_E), "w3", expert_S)
        h_SI = self.glu(gate, up)
        z_SH = self.biased(grouped_product(h_SI, self.w2.transpose(-2, -1), offsets_E), "w2", expert_S)
        z_SH = z_SH * w_TK.reshape(-1)[order_S].unsqueeze(-1)
        into_SH = token_S.unsqueeze(-1).expand(-1, self.hidden)
        return torch.zeros_like(x_TH).scatter_add(0, into_SH, z_SH).view(x.shape)


class SparseDispatcher:
    """Splits tokens by the nonzero entries of a gate matrix [T, E], and adds the experts' outputs up again."""

    def __init__(self, gates_TE: Tensor) -> None:
        pairs = torch.nonzero(gates_TE)
        expert_S, order_S = pairs[:, 1].sort(stable=True)
        self.token_S = pairs[order_S, 0]
        self.sizes = (gates_TE != 0).sum(dim=0).tolist()
        self.gate_S1 = torch.gather(gates_TE[self.token_S], 1, expert_S.unsqueeze(1))
        self.tokens = gates_TE.shape[0]

    def dispatch(self, x_TH: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x_TH[self.token_S], self.sizes, dim=0)

    def combine(self, outputs: list[Tensor]) -> Tensor:
        z_SH = torch.cat(outputs, dim=0) * self.gate_S1
        return z_SH.new_zeros(self.tokens, z_SH.shape[1]).index_add(0, self.token_S, z_SH)


class Dispatcher(ListedExperts):
    """H, ports of Shazeer's SparseDispatcher: gates scattered into zeros, nonzero, sort, split by sizes, index_add.

    Softmax of the chosen logits. A gate that rounds to zero is no choice any more.
    """

    softmax_after_topk = True

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, self.hidden)
        logits_TE = self.gate(x_TH)
        top_TK, idx_TK = logits_TE.topk(self.k, dim=1)
        gates_TE = torch.zeros_like(logits_TE).scatter(1, idx_TK, F.softmax(top_TK, dim=1))
        dispatcher = SparseDispatcher(gates_TE)
        inputs = dispatcher.dispatch(x_TH)
        outputs = [expert(own) for expert, own in zip(self.experts, inputs, strict=True)]
        return dispatcher.combine(outputs).view(x.shape)
