"""Operands of single ops for `ops`: sizes, routings and tensors, each made when it is first asked for."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

import moefx.dialect  # noqa: F401  registers the ops

Tensor = torch.Tensor
ops = torch.ops.moefx
ROUTINGS = ("random", "balanced", "one hot expert")


def routing(kind: str, T: int, E: int, k: int, gen: torch.Generator) -> Tensor:
    """Experts of each token, int64 [T, k], different within a row.

    "random" draws them evenly, so that experts differ as counts of a multinomial do; "balanced" gives all experts as
    many; "one hot expert" sends every token to the last one and leaves most others without any.
    """
    device = gen.device
    if kind == "random":
        return torch.randn(T, E, generator=gen, device=device).topk(k).indices
    if kind == "balanced":
        return torch.arange(T * k, device=device).view(T, k) % E
    others = max(E // 4, k - 1)
    idx = torch.full((T, k), E - 1, device=device)
    idx[:, 1:] = torch.randn(T, others, generator=gen, device=device).topk(k - 1).indices
    return idx


class Operands:
    """Tensors of one shape and routing.

    P = T k rows hold a token. With `align` above 1, as under FP8 recipes on CUDA, experts begin at multiples of it, and
    tensors have S > P rows, a static bound: bytes and operations of a case are those of the P rows, which is what
    others count, and what is spent on the others is this layout's cost.
    """

    def __init__(self, shape: tuple[int, ...], device: str, kind: str = "random", align: int = 1) -> None:
        self.T, self.H, self.I, self.E, self.k = shape
        self.P, self.align, self.device = self.T * self.k, align, device
        self.gen = torch.Generator(device).manual_seed(0)
        self.idx = routing(kind, self.T, self.E, self.k, self.gen)
        self.token, self.order, self.slot, self.offsets = ops.plan(self.idx, self.E, align)
        self.S = len(self.token)
        self.live = int((self.offsets.diff() > 0).sum())  # experts whose weights are read

    def rand(self, *size: int) -> Tensor:
        """Normal numbers in bf16; zeros would be multiplied faster."""
        return torch.empty(size, dtype=torch.bfloat16, device=self.device).normal_(generator=self.gen)

    def codes(self, x: Tensor, spec: str, by_expert: bool = False) -> list[Tensor]:
        """Codes and scales; by columns where the spec's blocks are columns and `align` allows it."""
        found: list[Tensor] = ops.quantize(x, self.offsets if by_expert else None, [spec], self.align)
        return found

    @cached_property
    def x(self) -> Tensor:
        return self.rand(self.T, self.H)

    @cached_property
    def rows(self) -> Tensor:
        return self.rand(self.S, self.H)

    @cached_property
    def h(self) -> Tensor:
        return self.rand(self.S, 2 * self.I)

    @cached_property
    def da(self) -> Tensor:
        return self.rand(self.S, self.I)

    @cached_property
    def w_rows(self) -> Tensor:
        return self.rand(self.S).float().abs()

    @cached_property
    def w_pairs(self) -> Tensor:
        return self.rand(self.T, self.k).float().abs()

    @cached_property
    def w1(self) -> Tensor:
        return self.rand(self.E, 2 * self.I, self.H)

    @cached_property
    def logits(self) -> Tensor:
        return self.rand(self.T, self.E)

    def like(self, rows: int) -> Any:
        """Operands of so many rows that belong to no experts."""
        return Loose(self, rows)


class Loose:
    """Rows without experts, as whoever publishes figures of single kernels measures them: no offsets, no dead rows."""

    def __init__(self, of: Operands, rows: int) -> None:
        self.h, self.da, self.rows = of.rand(rows, 2 * of.I), of.rand(rows, of.I), of.rand(rows, of.H)
        self.w_rows = of.rand(rows).float().abs()
