"""Losses of the experts' outputs and weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .base import LEAST_EPS, Loss, finite
from .taps import Taps


@dataclass(frozen=True)
class Orthogonality(Loss):
    """The experts of one token should have orthogonal outputs x (Guo et al., arXiv 2505.22323).

        mean over tokens of  sum over j != m in A_i  | <x_j, x_m> / (<x_m, x_m> + eps) x_m |^2

    Unlike R_sp it depends on the length of x. The paper sums over tokens; a mean keeps the weight independent of the
    batch. Keeps the unweighted outputs [T, k, H] in fp32 for the backward.

    Attributes:
        pair_reduction, layer_reduction: "sum" as in the paper, or "mean".
        eps: see above; at least 1e-18.
    """

    weight: float = 1e-4
    pair_reduction: str = "sum"
    layer_reduction: str = "sum"
    eps: float = 1e-6

    name: ClassVar[str] = "orth"
    needs_router: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        finite(self, "eps", least=LEAST_EPS)

    def refuses(self, tap: Taps) -> str | None:
        """Top-1 routing has no pairs."""
        return "one expert per token makes no pair; the loss is zero for every weight" if tap.k < 2 else None

    def local(self, tap: Taps) -> Any:
        """Token mean of the squared projections."""
        x_TkH = tap.token_major(tap.y).to(tap.dtype)
        gram = torch.bmm(x_TkH, x_TkH.transpose(1, 2))
        square = gram.diagonal(dim1=1, dim2=2)
        off = gram - torch.diag_embed(square)
        value = tap.mean((off.square() * (square / (square + self.eps).square()).unsqueeze(1)).sum((1, 2)))
        return value / (tap.k * (tap.k - 1)) if self.pair_reduction == "mean" else value


@dataclass(frozen=True)
class ERC(Loss):
    """Expert-router coupling: expert i should answer router row i most strongly, and be answered by no other row.

        1 / E^2  sum_i sum_{j != i}  max(M_ij - a M_ii, 0) + max(M_ji - a M_ii, 0),   M_ij = | W_gate(j) (R_i d_i) |

    with noise d_i, uniform in 1 +- eps_i, where eps_i = min_j |R_i - R_j| / (2 |R_i|) has no gradient. Cost 2 E^2 I H
    flop, independent of the number of tokens. Lv et al., arXiv 2512.23447; the coefficient is in none of the sources
    that were read, so the default weight is a guess.

    Attributes:
        a: the margin; 1 at 64 experts, 0.5 at 256 in the paper.
        noise: draws from the random stream at every step; without it the paper's gain is smaller.
    """

    weight: float = 1e-2
    a: float = 1.0
    noise: bool = True
    layer_reduction: str = "sum"

    name: ClassVar[str] = "erc"

    def __post_init__(self) -> None:
        super().__post_init__()
        finite(self, "a", least=0)

    def refuses(self, tap: Taps) -> str | None:
        """The router must be one matrix that reads what the experts read, and there must be pairs of experts."""
        if tap.experts < 2:
            return "one expert makes no pair; the loss is zero for every weight"
        if (why := super().refuses(tap)) is None and (tap.router is None or tap.gate is None):
            return "its router is no single linear layer on the experts' input"
        return why

    def local(self, tap: Taps) -> Any:
        """The layer's loss, of its weights alone."""
        E, R_EH = tap.experts, tap.router
        if self.noise:
            fixed = R_EH.detach().to(tap.dtype)
            apart = torch.cdist(fixed, fixed) + torch.diag_embed(fixed.new_full((E,), float("inf")))
            eps = apart.amin(-1) / (2 * torch.linalg.vector_norm(fixed, dim=-1)).clamp_min(1e-12)
            R_EH = R_EH * (1 + eps.unsqueeze(-1) * (2 * torch.rand_like(fixed) - 1)).type_as(R_EH)
        # A batched product takes the gate half as it lies in the fused weight; a folded one would copy it.
        rows = R_EH.type_as(tap.gate).t().unsqueeze(0).expand((E, -1, -1))
        answers = torch.bmm(tap.gate, rows)  # [E (j), I, E (i)]
        M = torch.linalg.vector_norm(answers.to(tap.dtype), dim=1).t()
        own = self.a * M.diagonal().unsqueeze(-1)
        excess = torch.relu(M - own) + torch.relu(M.t() - own)
        return (excess.sum() - excess.diagonal().sum()) / E**2
