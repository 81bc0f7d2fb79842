"""What a loss may read of one MoE layer. The values are tensors, or stand for nodes of a graph (`fx.Proxy`).

Shapes: T tokens, k experts per token, E experts, S routed rows in slot order, H and I widths.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from moefx.errors import InputError

ops = torch.ops.moefx
SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "identity")


@dataclass(frozen=True)
class Taps:
    """One MoE layer as losses see it. What is derived is computed once, where it is first read.

    Attributes:
        path: module path of the layer, for reports and errors.
        k, experts: choices per token and number E of routed experts; shared experts take no part.
        idx: [T, k] int64 chosen experts, after bias and group limits. What lies outside of 0..E-1 is no choice: one
            that was dropped (a capacity), or that stands for no routed expert (an identity). It counts nowhere.
        logits: [T, E] router logits; None for a router that is not known.
        score: how the router scores them, one of `SCORES`; "identity" is a softmax over the k chosen logits.
        full: [T, E] the router's own softmax over all E in `dtype`, if it computes that.
        unscored: why there are no logits, for refusals.
        by_token: [T, E] logits of a frozen router of token ids that chose the experts; for measurements alone.
        w: [T, k] routing weights of the chosen experts.
        z: [S, I] inputs of the down products, in slot order. A positive scale per row makes no difference.
        y: [S, H] outputs of the experts, not yet weighted.
        slot: [T, k] row of each choice, -1 where it was dropped.
        order: [S] t * k + j of each row, -1 where the row holds none.
        router, gate: [E, H] and [E, I, H] weights of the router and of the gate (or up) product.
        mask: [T] bool, which tokens count; None for all.
        batch: number B of sequences that the T tokens are made of, or None when that, or their order, is not known.
        layout: "batch" when row b*S+s is token s of sequence b, "sequence" when row s*B+b is; where `batch` is known.
        chain: layers of one chain see the same tokens in the same order.
        bias: dotted name of the correction bias of the router, or "".
        dtype: dtype in which scores and reductions are computed.
    """

    path: str
    k: int
    experts: int
    idx: Any
    logits: Any = None
    score: str = "softmax"
    full: Any = None
    unscored: str = "its router is not in a known normal form, so that its full scores are not known"
    by_token: Any = None
    w: Any = None
    z: Any = None
    y: Any = None
    slot: Any = None
    order: Any = None
    router: Any = None
    gate: Any = None
    mask: Any = None
    batch: Any = None
    layout: str = "batch"
    chain: str = ""
    bias: str = ""
    dtype: torch.dtype = torch.float32
    _overlaps: dict[float, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise InputError(f"scores of kind {self.score!r}", where=self.path, todo=f"use one of {', '.join(SCORES)}")
        for name, t in (("logits", self.logits), ("full", self.full), ("by_token", self.by_token)):
            if isinstance(t, torch.Tensor) and t.shape[-1] != self.experts:
                raise InputError(
                    f"{name} has {t.shape[-1]} columns for {self.experts} experts",
                    where=self.path,
                    why="scores of the chosen experts alone, normalised over them, have a mass of 1 and no gradient",
                    todo="give what the router says of all experts",
                )

    # --- scores

    @cached_property
    def wide_logits(self) -> Any:
        """[T, E] logits in `dtype`."""
        return self.logits.to(self.dtype)

    @cached_property
    def softmax(self) -> Any:
        """[T, E] softmax over all experts, whatever the router's own scores are."""
        return self.full if self.full is not None else torch.softmax(self.wide_logits, -1)

    @cached_property
    def scores(self) -> Any:
        """[T, E] probabilities: the softmax over all experts, or element-wise scores divided by their sum over E.

        Never the routing weights: normalised over the k chosen experts they sum to 1 whatever the logits are. Without
        the correction bias, which takes part in the choice alone.
        """
        if self.score in ("softmax", "identity"):
            return self.softmax
        s = torch.sigmoid(self.wide_logits)
        if self.score == "sqrtsoftplus":
            s = torch.sqrt(torch.nn.functional.softplus(self.wide_logits))
        return s / s.sum(-1, keepdim=True).clamp_min(1e-20)

    @cached_property
    def mass(self) -> Any:
        """[T] probability of the chosen experts together."""
        return torch.where(self.kept, torch.gather(self.scores, -1, self._inside), 0).sum(-1)

    @cached_property
    def worth(self) -> Any:
        """[T, k] what a token's choices are ordered by: scores, or routing weights where scores are not known.

        Choices of no expert come last.
        """
        worth = self.w if self.logits is None else torch.gather(self.scores, -1, self._inside)
        return torch.where(self.kept, worth, float("-inf"))

    @cached_property
    def first(self) -> Any:
        """[T] the best of the chosen experts; -1 for none."""
        return torch.gather(self._or_none, -1, self.worth.argmax(-1, keepdim=True)).squeeze(-1)

    @cached_property
    def ranked(self) -> Any:
        """[T, k] the chosen experts, best first; -1 for none."""
        return torch.gather(self._or_none, -1, torch.topk(self.worth, self.k)[1])

    # --- counts

    @cached_property
    def kept(self) -> Any:
        """[T, k] bool, which choices are one of the E experts."""
        return (self.idx >= 0) & (self.idx < self.experts)

    @cached_property
    def _inside(self) -> Any:
        """[T, k] the choices as an index; what is not kept reads expert 0, and is taken out of what is read."""
        return torch.where(self.kept, self.idx, 0)

    @cached_property
    def _or_none(self) -> Any:
        """[T, k] the choices, -1 for none."""
        return torch.where(self.kept, self.idx, -1)

    @cached_property
    def counted(self) -> Any:
        """[T] 1 for every token that counts, else 0."""
        if self.mask is None:
            return torch.ones_like(self.idx.select(-1, 0), dtype=self.dtype)
        return self.mask.to(self.dtype)

    @cached_property
    def ones(self) -> Any:
        """[T, k] 1 for every choice of an expert by a token that counts, else 0."""
        return self.kept.to(self.dtype) * self.counted.unsqueeze(-1)

    @cached_property
    def counts(self) -> Any:
        """[E] how many choices fell on each expert."""
        zeros = self.idx.new_zeros((self.experts,), dtype=self.dtype)
        return zeros.index_add(0, self._inside.flatten(), self.ones.flatten())

    @cached_property
    def chosen(self) -> Any:
        """[T, E] 1 for every choice, else 0."""
        return torch.zeros_like(self.scores).scatter_add(-1, self._inside, self.ones)

    # --- activations

    def overlap(self, eps: float) -> Any:
        """[T] sum over ordered pairs of chosen experts of cos(z_e, z_v)^2 (`moefx.overlap`)."""
        if eps not in self._overlaps:
            self._overlaps[eps] = ops.overlap(self.z, self.slot, eps)
        return self._overlaps[eps]

    def token_major(self, rows: Any) -> Any:
        """[T, k, ..] of values [S, ..] in slot order; zeros for dropped choices. Its backward moves rows, too."""
        return ops.permute(rows, self.slot.flatten(), self.order.unsqueeze(-1)).unflatten(0, (-1, self.k))

    # --- reductions over tokens

    def by_sequence(self, rows: Any) -> Any:
        """[B, S, ..] of [T, ..]."""
        if self.layout == "sequence":
            return rows.unflatten(0, (-1, self.batch)).transpose(0, 1)
        return rows.unflatten(0, (self.batch, -1))

    def mean(self, values_T: Any) -> Any:
        """Mean of one value per token over the tokens that count."""
        if self.mask is None:
            return values_T.mean()
        return torch.where(self.mask, values_T, 0).sum() / self.mask.sum().clamp_min(1)

    def mean_rows(self, values_TE: Any) -> Any:
        """[E] mean over the tokens that count."""
        if self.mask is None:
            return values_TE.mean(0)
        return torch.where(self.mask.unsqueeze(-1), values_TE, 0).sum(0) / self.mask.sum().clamp_min(1)
