"""Losses of what one token sees: specialisation within a layer, coupling between layers.

Source of both: Hu, Cao, Kong, Sun, Yuan, "Synergistic Intra- and Cross-Layer Regularization Losses for MoE Expert
Specialization", arXiv 2602.14159, eq. 4 and 7. Where the paper's text leaves a choice, docs/losses.md says which.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from moefx.errors import InputError

from .base import LEAST_EPS, Loss, finite, one_of, over_layers, takes_all
from .taps import Taps


@dataclass(frozen=True)
class Specialization(Loss):
    """R_sp: the experts of one token should have orthogonal activations z = act(W_gate x) * (W_up x).

        R_sp = mean over tokens of  sum over layers  sum over e != v in A_i  cos(z_e, z_v)^2

    Ordered pairs, so each pair counts twice. It reads no score, so that it also trains beside routers that are not
    known. Gradients reach gate and up weights and the block's input; not the down weights, nor this layer's router.

    Attributes:
        pair_reduction: "sum" as in the paper, or "mean" over the k (k - 1) ordered pairs.
        layer_reduction: "sum" as in the paper, or "mean".
        eps: lengths below it count as it; at least 1e-18. Small, because z may come scaled by the routing weight.
    """

    weight: float = 2e-3
    pair_reduction: str = "sum"
    layer_reduction: str = "sum"
    eps: float = 1e-12

    name: ClassVar[str] = "sp"
    needs_router: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        finite(self, "eps", least=LEAST_EPS)

    def refuses(self, tap: Taps) -> str | None:
        """Top-1 routing has no pairs."""
        return "one expert per token makes no pair; the loss is zero for every weight" if tap.k < 2 else None

    def local(self, tap: Taps) -> Any:
        """Token mean of the pair sum."""
        value = tap.mean(tap.overlap(self.eps))
        return value / (tap.k * (tap.k - 1)) if self.pair_reduction == "mean" else value


@dataclass(frozen=True)
class Coupling(Loss):
    """R_cp: a token that is routed decisively in one layer should be so in the next one.

        R_cp = - mean over tokens of  sum over adjacent layers  sum over e in A_i(l), v in A_i(l+1)  s_e(l) s_v(l+1)

    The pairs are a full product, so that the double sum is m(l) m(l+1) with m the probability of the chosen experts
    together: one number per token and layer. s is the softmax over all experts; routing weights that were normalised
    over the k chosen ones have m = 1 and no gradient, and are never used.

    Attributes:
        layer_reduction: "sum" over the L - 1 adjacent pairs as in the paper, or "mean".
        detach: "none"; "next" holds m(l+1) constant, so that a layer follows the one behind it; "prev" holds m(l).
    """

    weight: float = 1e-3
    layer_reduction: str = "sum"
    detach: str = "none"

    name: ClassVar[str] = "cp"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "detach", ("none", "next", "prev"))

    def refuses(self, tap: Taps) -> str | None:
        """The chosen experts must be some of them: of all experts the mass is 1 whatever the logits are."""
        return takes_all(tap, "their probabilities sum to 1") or super().refuses(tap)

    def local(self, tap: Taps) -> Any:
        """[T] mass of the chosen experts."""
        return tap.mass

    def combine(self, parts: Sequence[Any], taps: Sequence[Taps]) -> Any:
        """Products of neighbours."""
        terms = []
        for m, after, tap, behind in zip(parts, parts[1:], taps, taps[1:], strict=False):
            if tap.chain != behind.chain:
                continue
            here = m.detach() if self.detach == "prev" else m
            there = after.detach() if self.detach == "next" else after
            terms.append(-tap.mean(here * there))
        return over_layers(terms, self.layer_reduction)

    def check(self, taps: Sequence[Taps]) -> None:
        """Two layers in one chain are needed."""
        super().check(taps)
        if not any(a.chain == b.chain for a, b in itertools.pairwise(taps)):
            raise InputError(
                "loss 'cp' couples adjacent MoE layers, and there are no two that see the same tokens",
                where=", ".join(t.path for t in taps),
                todo="leave it out for models with one MoE layer",
            )
