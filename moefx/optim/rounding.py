"""Weights with fewer digits than their updates: float32 masters and stochastic rounding.

A bfloat16 weight has 8 significant bits: an update below a 512th of it is lost when the sum is rounded to the nearest,
in every step again. `master` keeps the sum in float32 beside the weight; `stochastic` rounds up or down with the
probabilities that keep the mean, and needs no state.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch

from ..errors import InputError, nearest
from .distributed import is_dtensor
from .polar import matrices

Tensor = torch.Tensor
ROUNDINGS = ("nearest", "master", "stochastic")


def working_dtype(p: Tensor) -> torch.dtype:
    """Of state and update: float32, and float64 for float64 parameters."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def rounds(p: Tensor) -> bool:
    """Whether a parameter has fewer digits than its update; `rounding` is about these alone."""
    return p.dtype != working_dtype(p)


def check_rounding(p: Tensor, where: str, rounding: str) -> None:
    """Raise unless a parameter can be rounded so."""
    if rounding not in ROUNDINGS:
        raise InputError(f"there is no rounding {rounding!r}", where=where, todo=nearest(str(rounding), ROUNDINGS))
    if rounding == "stochastic" and rounds(p) and p.dtype != torch.bfloat16:
        todo = 'use rounding="master", or bfloat16 parameters'
        raise InputError(f"stochastic rounding makes bfloat16, not {p.dtype}", where=where, todo=todo)


def follow(master: Tensor, p: Tensor) -> None:
    """Where a parameter is no longer the rounding of its master, somebody set it (loaded weights): it counts."""
    master.copy_(torch.where(master.to(p.dtype) == p, master, p.to(master.dtype)))


class Noise(NamedTuple):
    """Random bits for the elements of one parameter in one step.

    They are a hash of the parameter, the step and the number of the element in the whole parameter: the same after a
    resume, on every replica, in every layout and however a stack is cut into batches.
    """

    keys: tuple[int, int]  # of the parameter and the step
    lead: Tensor  # int32 [E]: number of the first element of each matrix; of a vector or scalar, [0]
    inner: Tensor  # int32 [m, n]: numbers within a matrix; of a vector, its elements'

    def bits(self, rows: slice = slice(None)) -> Tensor:
        """int32 [E, m, n] in 0 .. 2^16 - 1, for some of the matrices."""
        lead = self.lead[rows]
        h = lead.view(-1, *[1] * self.inner.ndim) + self.inner
        # The finalizer of MurmurHash3 (Appleby), with a second key between its rounds.
        h = h.bitwise_xor_(_signed(self.keys[0]))
        h = h.bitwise_xor_((h >> 16) & 0xFFFF).mul_(_signed(0x85EBCA6B)).bitwise_xor_(_signed(self.keys[1]))
        h = h.bitwise_xor_((h >> 13) & 0x7FFFF).mul_(_signed(0xC2B2AE35))
        return h.bitwise_xor_((h >> 16) & 0xFFFF).bitwise_and_(0xFFFF)


def noise_of(p: Any, *key: int | str) -> Noise:
    """Of a parameter, or of this rank's part of it; `key` tells it and the step from others."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    keys = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    numbers: list[Tensor] = []
    stride = 1
    for dim in reversed(range(p.ndim)):
        along = (_along(p, dim) * stride + 2**31) % 2**32 - 2**31
        numbers.insert(0, along.to(torch.int32))
        stride *= p.shape[dim]

    def added(axes: list[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.int32, device=p.device)
        for i, axis in enumerate(axes):
            total = total + axis.view(-1, *[1] * (len(axes) - 1 - i))
        return total

    split = max(p.ndim - 2, 0)
    return Noise(keys, added(numbers[:split]).reshape(-1), added(numbers[split:]))


def _along(p: Any, dim: int) -> Tensor:
    """int64: which indices along a dimension this rank has."""
    whole = torch.arange(p.shape[dim], device=p.device)
    if not is_dtensor(p):
        return whole
    from torch.distributed.tensor import Replicate, distribute_tensor

    line = whole.view([-1 if d == dim else 1 for d in range(p.ndim)])
    placements = [Replicate() if x.is_replicate() or x.dim != dim else x for x in p.placements]
    part: Tensor = distribute_tensor(line, p.device_mesh, placements, src_data_rank=None).to_local()  # sends nothing
    return part.reshape(-1)


def store(weights: Tensor, new: Tensor, noise: Noise | None, rows: slice = slice(None), flip: bool = False) -> None:
    """`weights` become `new`, rounded to their dtype.

    Args:
        weights: [..., m, n] or any other shape, written in place.
        new: of the same shape, or stacked as [E, m, n].
        noise: for stochastic rounding; None rounds to the nearest.
        rows: `new` has these of the E matrices alone.
        flip: the matrices of `new` are transposed.
    """
    new = new.mT if flip else new
    if noise is not None:
        new = stochastic(new, noise.bits(rows).view(new.shape))
    if rows == slice(None):
        weights.copy_(new.view(weights.shape))  # also where it has no view as a stack
    else:
        matrices(weights)[rows].copy_(new)


def stochastic(x: Tensor, bits: Tensor) -> Tensor:
    """bfloat16 of float32 `x`: the neighbour away from zero with the probability of x's place between the two.

    Args:
        x: float32.
        bits: int32 of x's shape, uniform in 0 .. 2^16 - 1.

    Numbers that bfloat16 has stay as they are, and so do NaN and infinities.
    """
    up = ((x.view(torch.int32) + bits) & -0x10000).view(torch.float32)
    return torch.where(torch.isfinite(x), up, x).to(torch.bfloat16)


def _signed(bits: int) -> int:
    """The int32 with these 32 bits."""
    return bits - 2**32 if bits >= 2**31 else bits
