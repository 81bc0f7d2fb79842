"""What a block is run on: arguments like those that were seen, and parameters and buffers in the place of its own.

Whatever is one, zero or the identity in an example is not to be told from what is not there: a padding mask without
padding, a scale of ones, a permutation that moves nothing. A block that was recognised with such a value would lose it
without a word. So nothing is drawn that has one value alone, and buffers are drawn as parameters are.
"""

from __future__ import annotations

import torch
from torch import nn

Tensor = torch.Tensor
_RARE = 0.25  # share of the values that were not seen, in an argument or a buffer of two values


def alone(v: Tensor) -> bool:
    """Whether a tensor holds one value only."""
    flat = v.detach().reshape(-1)
    return bool(flat.numel()) and bool((flat == flat[0]).all())


def varied(v: Tensor, shape: tuple[int, ...], gen: torch.Generator, kind: str) -> Tensor:
    """An argument like `v`, which holds one value only, with other values beside it.

    Of zeros and ones both are drawn, for they may be a mask. Numbers that are no mask vary by half of themselves, and
    integers by one, downwards: they may be indices. A float without axes may be a switch as well as a factor: it is
    zero in a case of its own, `ties`.
    """
    value = v.detach().reshape(-1)[0]
    rare = (torch.rand(shape, generator=gen) < _RARE).to(v.device)
    if v.dtype == torch.bool:
        return rare ^ value
    mask = bool((value == 0) | (value == 1)) and not v.is_complex()
    if (v.is_floating_point() or v.is_complex()) and not (mask and v.dim()):
        size = (torch.rand(shape, generator=gen) + 0.5).to(v.device, v.dtype)
        if mask and kind == "ties":
            return torch.zeros_like(size)
        return size if value == 0 else size * value
    if mask:
        return torch.where(rare, 1 - value, value)
    return value - rare.to(v.dtype) if value > 0 else value.expand(shape).clone()


def redraw(copied: nn.Module, block: nn.Module, seed: int) -> None:
    """Random parameters and buffers for a copy of `block`, in float32, the same for the same seed."""
    copied.float()
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in copied.parameters():
            if p.is_floating_point():
                draw = torch.randn(p.shape, generator=gen)
                scale = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3
                # Vectors may be gains around one or biases around zero; both are met by neither.
                p.data = (draw * scale + (0.5 if p.dim() == 1 else 0)).to(p.device)
                p.grad = None
        for b, own in zip(copied.buffers(), block.buffers(), strict=True):
            b.copy_(_buffer(own, gen, seed))


def _buffer(own: Tensor, gen: torch.Generator, seed: int) -> Tensor:
    """Another value for a buffer, of which it keeps what code may rely on: signs, order, and the range of integers."""
    n, one = own.numel(), alone(own)
    draw = torch.rand(own.shape, generator=gen).to(own.device)
    if own.is_floating_point():
        if not one:
            return own * (0.5 + float(torch.rand((), generator=gen)))
        if bool(own.reshape(-1)[0] != 0):
            return own * (0.5 + draw)
        return 0.1 * torch.randn(own.shape, generator=gen).to(own.device) if n > 1 else 0.1 + 0.4 * draw
    if own.is_complex() or not n:
        return own
    if n == 1:  # a counter or a switch: as it is, and otherwise
        return ~own if own.dtype == torch.bool and seed % 2 else own + seed % 2 if own.dtype != torch.bool else own
    if own.dtype == torch.bool:
        return own ^ (draw < _RARE) if one else own
    if one and bool((own.reshape(-1)[0] == 0) | (own.reshape(-1)[0] == 1)):
        return torch.where(draw < _RARE, 1 - own, own)
    if own.dim() == 1 and torch.equal(own, torch.arange(n, dtype=own.dtype, device=own.device)):
        return own[torch.randperm(n, generator=gen).to(own.device)]
    return own


def as_given(copied: nn.Module, block: nn.Module) -> None:
    """The block's own parameters and buffers, in float32."""
    copied.float()
    with torch.no_grad():
        for p, given in zip(copied.parameters(), block.parameters(), strict=True):
            p.copy_(given)
        for b, own in zip(copied.buffers(), block.buffers(), strict=True):
            b.copy_(own)
