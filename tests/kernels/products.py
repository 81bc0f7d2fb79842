"""What tests of scaled products share: operands, bounds, and which provider takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moefx.kernels import registry
from moefx.kernels.layout import codes_fake
from moefx.precision.quantize import quantize
from moefx.precision.spec import QuantSpec

Tensor = torch.Tensor
EPS = torch.finfo(torch.float32).eps
ROW, TILE, COLUMN = (f"e4m3 {block} po2/rceil eps=1e-10" for block in ("1x128", "128x128", "128x1"))


def offsets_of(*counts: int) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers whose size differs from row to row and from block to block."""
    gen = torch.Generator().manual_seed(seed)
    size = torch.randint(-6, 6, (*shape[:-1], -(-shape[-1] // 32)), generator=gen).float().exp2()
    return torch.randn(*shape, generator=gen) * size.repeat_interleave(32, -1)[..., : shape[-1]]


def encoded(spec: str, x: Tensor, offsets: Tensor | None = None) -> tuple[Tensor, Any]:
    amax = x.abs().max() if QuantSpec.parse(spec).delayed else None
    return quantize(x, spec, offsets=offsets, amax=amax)


def assert_close(y: Tensor, want: Tensor, size: Tensor, depth: int) -> None:
    """Within rounding of fp32 sums; one more rounding where the result is narrower."""
    narrow = torch.finfo(y.dtype).eps / 2 if y.dtype != torch.float32 else 0.0
    bound = (depth + 4) * EPS * size + narrow * want.abs() * 1.01
    assert torch.isfinite(y).all()
    assert bool(((y.double() - want).abs() <= bound).all())


def integers(*shape: int, seed: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=gen).to(torch.float8_e4m3fn)


def powers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float().exp2()


def chosen(
    op: str, specs: tuple[str, ...], more: tuple[Any, ...] = (), K: int = 256, flipped: bool = False, align: int = 1
) -> str:
    """The provider of a product of 64 rows of 4 experts on CUDA."""
    with FakeTensorMode():
        offsets = torch.empty(5, dtype=torch.int32, device="cuda")

        def of(spec: str, *shape: int) -> tuple[Tensor, Tensor]:
            s = QuantSpec.parse(spec)
            groups = 4 if len(shape) == 2 else None
            scales = torch.empty(s.scale_shape(shape, groups), dtype=s.scale_dtype, device="cuda")
            return codes_fake(scales, s, shape, align), scales

        x, w = of(specs[0], 64, K), of(specs[1], *((64,) if "wgrad" in op else (4, 32)), K)
        if flipped:
            codes, scales = of(str(QuantSpec.parse(specs[1]).transposed()), 4, K, 32)
            w = codes.mT, scales.mT
        return registry.choose(op, *x, *w, offsets, *specs, torch.bfloat16, *more).name
