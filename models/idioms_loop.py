"""MoE layers that loop over experts and let each pick its tokens (A1-A6p). All have a ModuleList of experts.

Own implementations of spellings found in public code. Every one works on T = 0 tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .idioms_base import ListedExperts


class LoopWhere(ListedExperts):
    """A1, Mistral's reference layer: `where(idx == e)`, `y[rows] += w * f(x[rows])`, softmax after top-k."""

    softmax_after_topk = True

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, self.hidden)
        top_TK, idx_TK = torch.topk(self.gate(x_TH), self.k)
        w_TK = F.softmax(top_TK, dim=1)
        y_TH = torch.zeros_like(x_TH)
        for e, expert in enumerate(self.experts):
            token, nth = torch.where(idx_TK == e)
            y_TH[token] += w_TK[token, nth, None] * expert(x_TH[token])
        return y_TH.view(x.shape)


class LoopMask(ListedExperts):
    """A2, Mixtral in transformers 4 and its copies: a one-hot mask permuted to [E, k, T], `index_add_` per expert."""

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, self.hidden)
        w_TK, idx_TK = self.route(x_TH)
        y_TH = torch.zeros_like(x_TH)
        mask_EKT = F.one_hot(idx_TK, num_classes=self.num_experts).permute(2, 1, 0)
        for e in range(self.num_experts):
            expert = self.experts[e]
            nth, token = torch.where(mask_EKT[e])
            own = x_TH[None, token].reshape(-1, self.hidden)
            y_TH.index_add_(0, token, expert(own) * w_TK[token, nth, None])
        return y_TH.view(x.shape)


class LoopHit(ListedExperts):
    """A3, later transformers and their eager experts: the loop runs over `nonzero` of the mask, the experts hit."""

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, self.hidden)
        w_TK, idx_TK = self.route(x_TH)
        y_TH = torch.zeros_like(x_TH)
        with torch.no_grad():
            mask_EKT = F.one_hot(idx_TK, num_classes=self.num_experts).permute(2, 1, 0)
            hit = torch.greater(mask_EKT.sum(dim=(-1, -2)), 0).nonzero()
        for row in hit:
            e = int(row[0])
            nth, token = torch.where(mask_EKT[e])
            out = self.experts[e](x_TH[token]) * w_TK[token, nth, None]
            y_TH.index_add_(0, token, out.to(y_TH.dtype))
        return y_TH.view(x.shape)


class LoopCounts(ListedExperts):
    """A4, DeepSeek-V3's inference model: `bincount(...).tolist()`, and experts with a count of zero are skipped."""

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, self.hidden)
        w_TK, idx_TK = self.route(x_TH)
        y_TH = torch.zeros_like(x_TH)
        counts = torch.bincount(idx_TK.flatten(), minlength=self.num_experts).tolist()
        for e in range(self.num_experts):
            if counts[e] == 0:
                continue
            token, nth = torch.where(idx_TK == e)
            y_TH[token] += self.experts[e](x_TH[token]) * w_TK[token, nth, None]
        return y_TH.view(x.shape)


class LoopCapacity(ListedExperts):
    """A5, makeMoE and tutorials: softmax over -inf-filled logits, `any` mask, nonzero, a slice to the capacity.

    Priority is token-major: an expert keeps its first `capacity` tokens, whichever of their k choices it was.
    """

    has_capacity = True
    softmax_after_topk = True

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, self.hidden)
        logits_TE = self.gate(x_TH)
        top_TK, idx_TK = logits_TE.topk(self.k, dim=-1)
        sparse_TE = torch.full_like(logits_TE, float("-inf")).scatter(-1, idx_TK, top_TK)
        gates_TE = F.softmax(sparse_TE, dim=-1)
        y_TH = torch.zeros_like(x_TH)
        for e, expert in enumerate(self.experts):
            chosen_T = (idx_TK == e).any(dim=-1)
            token = torch.nonzero(chosen_T).squeeze(-1)
            if self.capacity is not None:
                token = token[: self.capacity]
            if token.numel() > 0:
                y_TH.index_add_(0, token, expert(x_TH[token]) * gates_TE[token, e].unsqueeze(1))
        return y_TH.view(x.shape)


class RepeatMaskIf(ListedExperts):
    """A6, DeepSeek-MoE's training branch: every token repeated k times, assignment through a boolean mask, `if any`."""

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, self.hidden)
        w_TK, idx_TK = self.route(x_TH)
        flat_S = idx_TK.view(-1)
        x_SH = x_TH.repeat_interleave(self.k, dim=0)
        z_SH = torch.empty_like(x_SH)
        for e, expert in enumerate(self.experts):
            mask_S = flat_S == e
            if mask_S.any():
                z_SH[mask_S] = expert(x_SH[mask_S])
        y_TH = (z_SH.view(-1, self.k, self.hidden) * w_TK.unsqueeze(-1)).sum(dim=1)
        return y_TH.view(x.shape)


class RepeatMask(ListedExperts):
    """A6p, A6 as it is written for compilers: the same without the test for an empty expert."""

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, self.hidden)
        w_TK, idx_TK = self.route(x_TH)
        flat_S = idx_TK.view(-1)
        x_SH = x_TH.repeat_interleave(self.k, dim=0)
        z_SH = torch.empty_like(x_SH)
        for e, expert in enumerate(self.experts):
            mask_S = flat_S == e
            z_SH[mask_S] = expert(x_SH[mask_S])
        y_TH = (z_SH.view(-1, self.k, self.hidden) * w_TK.unsqueeze(-1)).sum(dim=1)
        return y_TH.view(x.shape)
