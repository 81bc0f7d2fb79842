"""Losses of the router over all tokens: load balance, size of the logits, variance of the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from moefx.errors import InputError

from .base import Loss, one_of, over_layers, takes_all
from .ranks import all_reduce
from .taps import Taps

FORMS = ("switch", "sequence", "global", "transformers")


@dataclass(frozen=True)
class LoadBalance(Loss):
    """Product of how often an expert is chosen (no gradient) and its mean probability (gradient).

    With c_e choices of expert e among T tokens that count and P_e the mean probability over them:

        switch        E sum_e c_e / (k T) P_e           per layer (Switch, arXiv 2101.03961, in Megatron's top-k form)
        sequence      the same for every sequence, mean over those with a token (DeepSeek-V3, arXiv 2412.19437)
        global        switch, with c and T summed over all data-parallel ranks (Qwen, arXiv 2501.11873); P stays local
        transformers  E sum_e c_e / T P_e, c and P pooled over all layers before the product; softmax of the logits also
                      for sigmoid routers. Its minimum is k, that of the others 1.

    Choices that were dropped are in k T and in no c: where a capacity drops half of them the loss is half as large.

    Attributes:
        form: one of the above.
        layer_reduction: "sum" or "mean" over layers; form "transformers" pools and reads it not.
    """

    weight: float = 1e-2
    form: str = "switch"
    layer_reduction: str = "sum"

    name: ClassVar[str] = "lb"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "form", FORMS)

    @property
    def over_ranks(self) -> bool:
        """Choices are those of all ranks in form "global" alone."""
        return self.form == "global"

    def refuses(self, tap: Taps) -> str | None:
        """There must be something to balance, and form "sequence" must know the sequences."""
        if why := takes_all(tap, "their loads are equal"):
            return why
        if self.form == "sequence" and tap.batch is None:
            return "no input says which of its rows are a sequence (form='sequence')"
        return super().refuses(tap)

    def local(self, tap: Taps) -> Any:
        """The layer's loss, or of the transformers form what is pooled: choices, their number, probabilities."""
        if self.form == "transformers":
            return tap.counts, tap.counted.sum(), tap.mean_rows(tap.softmax)
        if self.form == "sequence":
            return self._per_sequence(tap)
        # Of all choices that tokens have, also those that no expert got: k of each, whatever was dropped.
        counts, tokens = tap.counts, tap.counted.sum()
        if self.form == "global":
            both = all_reduce(torch.cat((counts, tokens.unsqueeze(0))))
            counts, tokens = both[: tap.experts], both[tap.experts]
        share = counts / (tap.k * tokens).clamp_min(1)
        return tap.experts * (share * tap.mean_rows(tap.scores)).sum()

    @staticmethod
    def _per_sequence(tap: Taps) -> Any:
        """Sequences of any length: padding counts neither among choices, among tokens nor among sequences."""
        chosen = tap.by_sequence(tap.chosen).sum(1)
        scores = tap.scores if tap.mask is None else torch.where(tap.mask.unsqueeze(-1), tap.scores, 0)
        counted = tap.by_sequence(tap.counted).sum(1).unsqueeze(-1)
        tokens = counted.clamp_min(1)
        mean = tap.by_sequence(scores).sum(1) / tokens
        loss = (tap.experts / tap.k) * (chosen / tokens * mean).sum(-1)
        if tap.mask is None:
            return loss.mean()
        return loss.sum() / (counted > 0).sum().clamp_min(1)  # a sequence of padding has no loss, and is none

    def check(self, taps: Sequence[Taps]) -> None:
        """The transformers form adds up the counts of all layers."""
        super().check(taps)
        if self.form == "transformers" and len({t.experts for t in taps}) > 1:
            raise InputError(
                "loss 'lb' of form 'transformers' pools layers, and these have different numbers of experts",
                where=", ".join(f"{t.path}: {t.experts}" for t in taps),
                todo="use another form",
            )

    def combine(self, parts: Sequence[Any], taps: Sequence[Taps]) -> Any:
        """Over layers; pooled for the transformers form."""
        if self.form != "transformers":
            return super().combine(parts, taps)
        counts, tokens, scores = (list(p) for p in zip(*parts, strict=True))
        share = over_layers(counts, "sum") / over_layers(tokens, "sum").clamp_min(1)
        pooled = over_layers([s * n for s, n in zip(scores, tokens, strict=True)], "sum")
        return taps[0].experts * (share * pooled / over_layers(tokens, "sum").clamp_min(1)).sum()


@dataclass(frozen=True)
class ZLoss(Loss):
    """mean over tokens of (logsumexp of the logits)^2: keeps logits small (ST-MoE, arXiv 2202.08906, eq. 5)."""

    weight: float = 1e-3
    layer_reduction: str = "sum"

    name: ClassVar[str] = "z"

    def local(self, tap: Taps) -> Any:
        """Token mean."""
        return tap.mean(torch.logsumexp(tap.wide_logits, -1).square())


@dataclass(frozen=True)
class Variance(Loss):
    """- mean over tokens of sum_e (s_e - mean over tokens of s_e)^2: tokens should be routed differently.

    Guo et al., arXiv 2505.22323, as printed; their released code takes the variance over experts inside a token.
    """

    weight: float = 1e-3
    layer_reduction: str = "sum"

    name: ClassVar[str] = "var"

    def refuses(self, tap: Taps) -> str | None:
        """The probability of a single expert is 1."""
        if tap.experts < 2:
            return "one expert has probability 1 for every token; the loss is zero for every weight"
        return super().refuses(tap)

    def local(self, tap: Taps) -> Any:
        """Token mean of the squared distance to the mean scores."""
        return -tap.mean((tap.scores - tap.mean_rows(tap.scores)).square().sum(-1))
