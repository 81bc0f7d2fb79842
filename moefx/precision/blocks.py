"""Blocks of a matrix, also where rows belong to experts: the largest value per block, a block's value at each element.

Everything is whole-tensor arithmetic with sizes known beforehand: the offsets of experts are never read on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from moefx.errors import InputError

from .spec import QuantSpec

Tensor = torch.Tensor


@dataclass(frozen=True)
class Rows:
    """Rows [0, M) that belong to experts: rows of expert e are offsets[e]:offsets[e+1], the others nobody's."""

    offsets: Tensor
    expert: Tensor  # int64 [M], of a row that belongs to nobody some expert
    live: Tensor  # bool [M]

    @staticmethod
    def of(offsets: Tensor | None, M: int, shape: torch.Size, device: torch.device) -> Rows | None:
        """Check `offsets` (int32 or int64 [E+1], not decreasing, at most M) for a tensor of `shape`."""
        if offsets is None:
            return None
        if offsets.dim() != 1 or offsets.dtype not in (torch.int32, torch.int64) or offsets.shape[0] < 2:
            raise InputError(
                "offsets are int32 [E + 1], the first row of each expert and the end",
                why=f"got {offsets.dtype} {tuple(offsets.shape)}",
            )
        if len(shape) != 2:
            raise InputError("offsets divide the rows of a matrix [M, N]", why=f"the tensor is {tuple(shape)}")
        ends = offsets[1:]
        row = torch.arange(M, dtype=offsets.dtype, device=device)
        expert = torch.searchsorted(ends, row, right=True)
        live = (expert < ends.shape[0]) & (row >= offsets[0])
        return Rows(offsets, expert.clamp(max=ends.shape[0] - 1), live)

    def blocks(self, br: int | None, R: int) -> Tensor:
        """int64 [M]: the block of each row, where a block has `br` rows of one expert (None: all); `R` if nobody's."""
        if br is None:
            return torch.where(self.live, self.expert, R)
        counts = (self.offsets.diff() + (br - 1)) // br
        first = counts.cumsum(0) - counts
        row = torch.arange(self.expert.shape[0], device=self.expert.device)
        return torch.where(self.live, first[self.expert] + (row - self.offsets[self.expert]) // br, R)


@dataclass(frozen=True)
class Blocks:
    """The blocks of a spec in a tensor [..., M, N]; `R` rows and `C` columns of blocks."""

    M: int
    N: int
    R: int
    C: int
    br: int
    bc: int
    rows: Rows | None
    row_block: Tensor | None  # int64 [M] where blocks of several rows stop at experts; R for rows of nobody

    @staticmethod
    def of(spec: QuantSpec, shape: torch.Size, rows: Rows | None) -> Blocks:
        """Blocks of `spec` in a tensor of `shape`, within the experts of `rows`."""
        M, N = shape[-2:]
        R, C = spec.scale_shape(shape, None if rows is None else rows.offsets.shape[0] - 1)[-2:]
        br, bc = (max(n, 1) if b is None else b for b, n in ((spec.br, M), (spec.bc, N)))
        grouped = rows is not None and spec.br != 1
        return Blocks(M, N, R, C, br, bc, rows, rows.blocks(spec.br, R) if rows is not None and grouped else None)

    @property
    def within_rows(self) -> bool:
        """Whether each row has a row of blocks to itself."""
        return self.row_block is None and self.br == 1 and self.R == self.M

    @property
    def within_columns(self) -> bool:
        """Whether each column has a column of blocks to itself."""
        return self.bc == 1 and self.C == self.N

    def amax(self, t: Tensor, low: float = 0) -> Tensor:
        """Largest `t` [..., M, N] of each block, `low` in blocks without elements: [..., R, C]. NaN is the largest."""
        if not self.within_columns:
            t = pad(t, (0, self.C * self.bc - self.N), value=low) if self.C * self.bc != self.N else t
            t = t.unflatten(-1, (self.C, self.bc)).amax(-1)
        return self.amax_of_rows(t, low)

    def amax_of_rows(self, t: Tensor, low: float = 0) -> Tensor:
        """Largest `t` [..., M, any] over the rows of each block: [..., R, any]."""
        if self.row_block is not None:
            out = t.new_full((self.R + 1, t.shape[-1]), low)
            return out.scatter_reduce_(0, self.row_block[:, None].expand_as(t), t, "amax")[: self.R]
        if self.within_rows:
            return t
        if self.R * self.br != self.M:
            t = pad(t, (0, 0, 0, self.R * self.br - self.M), value=low)
        top: Tensor = t.unflatten(-2, (self.R, self.br)).amax(-2)
        return top

    def at_rows(self, s: Tensor) -> Tensor:
        """Values of blocks [..., R, C] at the rows: [..., M, C]."""
        if self.row_block is not None:
            return s.index_select(-2, self.row_block.clamp(max=self.R - 1))
        if self.within_rows:
            return s
        return (
            s.expand(*s.shape[:-2], self.M, -1) if self.R == 1 else s.repeat_interleave(self.br, -2)[..., : self.M, :]
        )

    def at_elements(self, s: Tensor) -> Tensor:
        """Values of blocks [..., R, C] at the elements: [..., M, N]."""
        s = self.at_rows(s)
        if self.within_columns:
            return s
        return s.expand(*s.shape[:-1], self.N) if self.C == 1 else s.repeat_interleave(self.bc, -1)[..., : self.N]

    def combine(self, op: Callable[[Tensor, Tensor], Tensor], x: Tensor, s: Tensor) -> Tensor:
        """`op` of `x` [..., M, N] and its blocks' `s` [..., R, C], without spreading `s` in memory where blocks fit."""
        if x.numel() == 0 or self.C * self.bc != self.N:
            return op(x, self.at_elements(s))
        if self.row_block is not None or self.R * self.br != self.M:
            s, R, br = self.at_rows(s), self.M, 1
        else:
            R, br = self.R, self.br
        parts = x.unflatten(-2, (R, br)).unflatten(-1, (self.C, self.bc))
        return op(parts, s[..., :, None, :, None]).reshape(x.shape)

    def unused(self) -> Tensor | None:
        """bool [R, 1]: rows of blocks with no element in them; None when there are none.

        For blocks within a row, those of rows that belong to nobody.
        """
        if self.rows is None:
            return None
        if self.row_block is None:
            return ~self.rows.live[:, None]
        unused = torch.ones(self.R + 1, 1, dtype=torch.bool, device=self.row_block.device)
        return unused.index_fill_(0, self.row_block, False)[: self.R]
