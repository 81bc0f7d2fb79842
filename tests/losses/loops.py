"""Every loss as loops over tokens, choices and experts, from its definition; differentiable, in the dtype of its input.

Nothing is shared with `moefx.losses`: rows are walked in Python, pairs are pairs, nothing is factorised.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

Tensor = torch.Tensor


@dataclass
class Layer:
    """One MoE layer: logits [T, E], chosen experts, and for each token its activations and outputs [k, width]."""

    logits: Tensor
    idx: list[list[int]]
    score: str = "softmax"
    z: list[list[Tensor]] = field(default_factory=list)
    y: list[list[Tensor]] = field(default_factory=list)
    counted: list[bool] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """Tokens that count."""
        return [t for t in range(len(self.idx)) if not self.counted or self.counted[t]]

    @property
    def experts(self) -> int:
        return self.logits.shape[1]

    def s(self, t: int, e: int) -> Tensor:
        """Probability of expert e for token t."""
        a = self.logits[t]
        if self.score == "sigmoid":
            return torch.sigmoid(a[e]) / sum(torch.sigmoid(a[j]) for j in range(self.experts))
        return torch.exp(a[e] - a.detach().max()) / sum(torch.exp(a[j] - a.detach().max()) for j in range(self.experts))

    def p(self, e: int, tokens: Sequence[int] | None = None) -> Tensor:
        tokens = self.tokens if tokens is None else tokens
        return sum((self.s(t, e) for t in tokens), torch.zeros(())) / max(len(tokens), 1)

    def c(self, e: int, tokens: Sequence[int] | None = None) -> int:
        return sum(self.idx[t].count(e) for t in (self.tokens if tokens is None else tokens))


def pairs(rows: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]


def specialization(layers: list[Layer]) -> Tensor:
    total = torch.zeros(())
    for m in layers:
        for t in m.tokens:
            for a, b in pairs(m.z[t]):
                total = total + ((a @ b) / (a.norm() * b.norm())) ** 2 / len(m.tokens)
    return total


def coupling(layers: list[Layer]) -> Tensor:
    total = torch.zeros(())
    for m, n in itertools.pairwise(layers):
        for t in m.tokens:
            for e in m.idx[t]:
                for v in n.idx[t]:
                    total = total - m.s(t, e) * n.s(t, v) / len(m.tokens)
    return total


def switch(m: Layer, tokens: Sequence[int] | None = None) -> Tensor:
    tokens = m.tokens if tokens is None else tokens
    k = len(m.idx[0])
    return m.experts * sum(m.c(e, tokens) / (k * len(tokens)) * m.p(e, tokens) for e in range(m.experts))


def sequence(m: Layer, batch: int) -> Tensor:
    length = len(m.idx) // batch
    runs = [[t for t in m.tokens if t // length == b] for b in range(batch)]
    return sum((switch(m, run) for run in runs), torch.zeros(())) / batch


def z(m: Layer) -> Tensor:
    return sum(
        torch.log(sum(torch.exp(m.logits[t, e]) for e in range(m.experts))) ** 2 for t in m.tokens
    ) / len(m.tokens)  # fmt: skip


def variance(m: Layer) -> Tensor:
    mean = [m.p(e) for e in range(m.experts)]
    return -sum((m.s(t, e) - mean[e]) ** 2 for t in m.tokens for e in range(m.experts)) / len(m.tokens)


def orthogonality(m: Layer, eps: float) -> Tensor:
    total = torch.zeros(())
    for t in m.tokens:
        for x, onto in pairs(m.y[t]):
            total = total + ((x @ onto) / (onto @ onto + eps) * onto).square().sum() / len(m.tokens)
    return total


def erc(router: Tensor, gate: Tensor, a: float) -> Tensor:
    """Without noise."""
    E = router.shape[0]
    M = [[(gate[j] @ router[i]).norm() for j in range(E)] for i in range(E)]
    total = torch.zeros(())
    for i in range(E):
        for j in range(E):
            if i != j:
                total = total + (M[i][j] - a * M[i][i]).clamp_min(0) + (M[j][i] - a * M[i][i]).clamp_min(0)
    return total / E**2


def entropy(p: Sequence[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)
