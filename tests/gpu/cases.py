"""Operands of every op that has a Triton kernel, at sizes that are odd on purpose, under three routings.

A name is that of an op, or of an op and what is special about the operands: "transpose_scaled tile_max". A new op needs
an entry in OPERANDS, and in `checks.EXPECTED` if float64 says something about it; tests/kernels/test_gpu_cases.py fails
until it has one, and runs each entry without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import moefx.dialect
import moefx.kernels.symmetric  # noqa: F401  both register ops

Tensor = torch.Tensor
ops = torch.ops.moefx
ROW, COLUMN, TILE = (f"e4m3 {block} po2/rceil eps=1e-10" for block in ("1x128", "128x1", "128x128"))
MXFP4, WIDENED = "e2m1 1x32 e8m0/rceil", "e4m3 128x1 po2/rceil"
DEVICE = "cuda"  # tests/kernels/test_gpu_cases.py tries the operands on a CPU
ROUTINGS = ("balanced", "skewed", "adversarial")
# T, H, I, E, k: odd token counts, widths that are no multiples of 128 for the wide ops, k that is no power of two.
WIDE = ((4001, 576, 192, 72, 6), (513, 2880, 320, 32, 4), (1, 256, 128, 8, 2), (2048, 2048, 768, 128, 8))
NARROW = ((4001, 512, 256, 72, 6), (513, 2048, 768, 128, 8), (1, 256, 128, 8, 2))


def routing(kind: str, T: int, E: int, k: int) -> Tensor:
    """Indices int64 [T, k], different within a row but for the hot expert of "adversarial"."""
    gen = torch.Generator(DEVICE).manual_seed(T + E)
    if kind == "balanced":
        return (torch.arange(T * k, device=DEVICE).view(T, k) * (1 if k <= E else 0)) % E
    if kind == "skewed":
        logits = torch.randn(E, generator=gen, device=DEVICE) * 2 + torch.randn(T, E, generator=gen, device=DEVICE)
        return logits.topk(k).indices
    idx = torch.randint(0, max(E // 4, 1), (T, k), generator=gen, device=DEVICE)  # three quarters of experts are empty
    idx[:, 0] = E - 1
    idx[::7, -1] = E  # a pair of another rank: dropped
    return idx


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Normal numbers with some rows far larger than others."""
    gen = torch.Generator(DEVICE).manual_seed(seed + sum(shape))
    x = torch.randn(shape, generator=gen, device=DEVICE)
    rows = torch.exp2(torch.randint(-6, 6, (*shape[:-1], 1), generator=gen, device=DEVICE).float())
    return (x * rows).to(dtype)


def op_of(name: str) -> str:
    return name.split()[0]


def cases(name: str, kind: str) -> Iterator[tuple[str, Callable[[], tuple[Any, ...]]]]:
    """Size and operands of each case of an entry; operands are made when asked for."""
    for T, H, I, E, k in NARROW if op_of(name) in SCALED else WIDE:
        yield f"T{T} H{H} I{I} E{E} k{k}", lambda s=(T, H, I, E, k): OPERANDS[name](kind, *s)


def _maps(kind: str, T: int, E: int, k: int, align: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made: tuple[Tensor, Tensor, Tensor, Tensor] = ops.plan(routing(kind, T, E, k), E, align)
    return made


def _unpermute(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    token, order, slot, _ = _maps(kind, T, E, k)
    return rand(len(token), H), token, order, slot, rand(T, k, dtype=torch.float32)


def _codes(x: Tensor, spec: str, offsets: Tensor | None = None, align: int = 1) -> tuple[Tensor, Tensor]:
    codes, scales = ops.quantize(x, offsets, [spec], align)
    return codes, scales


def _permute_scaled(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    token, _, slot, _ = _maps(kind, T, E, k, 16)
    return *_codes(rand(T, H), ROW), token, slot


def _grouped(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    token, _, _, offsets = _maps(kind, T, E, k)
    return rand(len(token), H), rand(E, 2 * I, H, seed=1), offsets


def _wgrad(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    token, _, _, offsets = _maps(kind, T, E, k)
    return rand(len(token), 2 * I), rand(len(token), H, seed=1), offsets


def _scaled_mm(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    token, _, _, offsets = _maps(kind, T, E, k, 16)
    x, w = _codes(rand(len(token), H), ROW), _codes(rand(E, 2 * I, H, seed=1), TILE)
    return *x, *w, offsets, ROW, TILE, torch.bfloat16


def _scaled_wgrad(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    token, _, _, offsets = _maps(kind, T, E, k, 16)
    align = 1 if kind == "skewed" else 16  # decoded, and by columns
    a, b = (_codes(rand(len(token), n, seed=n), COLUMN, offsets, align) for n in (2 * I, H))
    return *a, *b, offsets, COLUMN, COLUMN, torch.float32, align


def _glu_quantize(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    token, _, _, offsets = _maps(kind, T, E, k, 16)
    S = len(token)
    return rand(S, 2 * I), rand(S, 1, dtype=torch.float32)[:, 0], offsets, "silu", [ROW, COLUMN], [], 16


def _glu_backward_quantize(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    h, w, offsets, *_ = _glu_quantize(kind, T, H, I, E, k)
    return rand(h.shape[0], I, seed=2), h, None, w, offsets, "silu", "", [ROW, COLUMN], [], 16


def _transpose(kind: str, T: int, H: int, I: int, E: int, k: int, rule: str = "tight") -> tuple[Any, ...]:
    token, _, _, offsets = _maps(kind, T, E, k, 16)
    return *_codes(rand(len(token), H), ROW), offsets, ROW, COLUMN, rule, 16


def _quantize(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    token, _, _, offsets = _maps(kind, T, E, k, 16)
    return rand(len(token), H), offsets, [ROW, COLUMN], 16


def _overlap(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    token, _, slot, _ = _maps(kind, T, E, k)
    return rand(len(token), I), slot, 1e-12


def _convert(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    token, _, _, offsets = _maps(kind, T, E, k, 16)
    return *_codes(rand(len(token), H), ROW), offsets, ROW, MXFP4, 1


def _convert_wider(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    token, _, _, offsets = _maps(kind, T, E, k, 16)
    align = 1 if kind == "skewed" else 16  # by rows, and by columns
    return *_codes(rand(len(token), H), MXFP4), offsets, MXFP4, WIDENED, align


def _gather_weights(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    return rand(T, k, dtype=torch.float32), _maps(kind, T, E, k, 16)[1]


def _scatter_weights(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    order = _maps(kind, T, E, k, 16)[1]
    return rand(len(order), 1, dtype=torch.float32)[:, 0].contiguous(), order, T, k


def _gram(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    """A few matrices of the size of gate and up, or of down; not more, for the reference multiplies all of each."""
    wide = kind == "balanced"
    return rand(3, max(2 * I if wide else H, 256), H if wide else I), None


def _quadratic(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    a = rand(3, max(2 * I, 256), max(2 * I, 256)) * 2.0**-5
    return a + a.mT, -1.5, 0.5, None


def _gathered(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    token, _, slot, offsets = _maps(kind, T, E, k)
    return rand(T, H), token, slot, rand(E, 2 * I, H, seed=1), offsets


def _gathered_glu(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    x, token, *rest = _gathered(kind, T, H, I, E, k)
    w = None if kind == "balanced" else rand(len(token), 1, dtype=torch.float32)[:, 0].contiguous()
    return x, token, *rest, w, "silu"


def _gathered_wgrad(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    token, _, slot, offsets = _maps(kind, T, E, k)
    return rand(len(token), 2 * I), rand(T, H, seed=1), token, slot, offsets, kind == "skewed"


ROUTERS = {
    "balanced": ("softmax", "scores", "sum", 1e-20, 1.0),
    "skewed": ("sigmoid", "scores", "sum", 1e-20, 2.5),
    "adversarial": ("sqrtsoftplus", "logits", "clamp", 1e-9, 1.0),
}  # one kind of router in place of each routing


def _logits(T: int, E: int, dtype: torch.dtype) -> Tensor:
    """Steps of 1/8 in another order in each row: no two scores are so near that rounding could exchange them."""
    gen = torch.Generator(DEVICE).manual_seed(T)
    return ((torch.rand(T, E, generator=gen, device=DEVICE).argsort(-1) - E // 2) / 8).to(dtype)


def _topk_route(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    biased = kind == "skewed"
    bias = (torch.arange(E, device=DEVICE) % 3 == 0).float() * 2 if biased else None
    return _logits(T, E, torch.float32 if biased else torch.bfloat16), bias, k, *ROUTERS[kind]


def _topk_route_groups(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    """Few different logits: sums of two are equal or far apart, and equal groups and experts are many."""
    x, bias, *_ = _topk_route(kind, T, H, I, E, k)
    gen = torch.Generator(DEVICE).manual_seed(T)
    few = torch.randint(0, 5, (T, E), generator=gen, device=DEVICE).to(x.dtype)
    groups = {
        "balanced": (4, 2, "max", 0.0, True),
        "skewed": (4, 2, "top2sum", -torch.inf, False),
        "adversarial": (4, 1, "max", 0.0, False),
    }[kind] if E % 4 == 0 else (3, 2, "max", 0.0, False)  # fmt: skip
    return few, bias, k, *ROUTERS[kind], None, *groups


def _topk_route_backward_masked(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    """Of one group that has fewer than k experts, so that each row has a filled choice."""
    dw, dscores, logits, _, score, *rest = _topk_route_backward(kind, T, H, I, E, k)
    limit = E // max(n for n in range(1, k) if E % n == 0), 1, "max", 0.0
    idx = ops.topk_route(logits, None, k, score, "scores", *rest, None, *limit, True)[1]
    return dw, dscores, logits, idx, score, *rest, *limit


def _topk_route_backward(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    score, _, norm, eps, factor = ROUTERS[kind]
    logits = _logits(T, E, torch.bfloat16)
    dw, dscores = rand(T, k, dtype=torch.float32), rand(T, E, dtype=torch.float32, seed=1)
    return dw, dscores, logits, logits.topk(k).indices, score, norm, eps, factor


def _glu_backward(kind: str, T: int, H: int, I: int, E: int, k: int) -> tuple[Any, ...]:
    return rand(T * k, I, seed=2), rand(T * k, 2 * I), rand(T * k, 1, dtype=torch.float32)[:, 0], "silu"


OPERANDS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "plan": lambda kind, T, H, I, E, k: (routing(kind, T, E, k), E, 16),
    "permute": lambda kind, T, H, I, E, k: (rand(T, H), *_maps(kind, T, E, k)[0:3:2]),
    "unpermute": _unpermute,
    "unpermute_backward": lambda *a: (rand(a[1], a[2], seed=3), *_unpermute(*a)),
    "permute_scaled": _permute_scaled,
    "grouped_mm": _grouped,
    "grouped_wgrad": _wgrad,
    "glu": lambda kind, T, H, I, E, k: (rand(T * k, 2 * I), rand(T * k, 1, dtype=torch.float32)[:, 0], "silu"),
    "glu_backward": _glu_backward,
    "glu_backward_again": _glu_backward,
    "quantize": _quantize,
    "dequantize": lambda *a: (*_codes(_quantize(*a)[0], ROW), None, ROW, torch.bfloat16),
    "transpose_scaled": _transpose,
    "glu_quantize": _glu_quantize,
    "glu_backward_quantize": _glu_backward_quantize,
    "scaled_grouped_mm": _scaled_mm,
    "scaled_grouped_wgrad": _scaled_wgrad,
    "transpose_scaled tile_max": lambda *a: _transpose(*a, rule="tile_max"),
    "convert": _convert,
    "convert wider": _convert_wider,
    "gather_weights": _gather_weights,
    "scatter_weights": _scatter_weights,
    "plan_permute": lambda kind, T, H, I, E, k: (rand(T, H), routing(kind, T, E, k), E, 16),
    "gram": _gram,
    "quadratic": _quadratic,
    "permute_grouped_mm": _gathered,
    "permute_grouped_mm_glu": _gathered_glu,
    "permute_grouped_wgrad": _gathered_wgrad,
    "scaled_grouped_mm_quantize": lambda *a: (*_scaled_mm(*a), [ROW]),
    "topk_route": _topk_route,
    "topk_route_backward": _topk_route_backward,
    "topk_route groups": _topk_route_groups,
    "topk_route_backward masked": _topk_route_backward_masked,
    "overlap": _overlap,
    "overlap_backward": lambda *a: (rand(a[1], 1, dtype=torch.float32)[:, 0], *_overlap(*a)),
}  # fmt: skip
SCALED = ("permute_scaled", "quantize", "dequantize", "transpose_scaled", "glu_quantize", "glu_backward_quantize",
          "scaled_grouped_mm", "scaled_grouped_wgrad", "scaled_grouped_mm_quantize", "convert")  # fmt: skip
# Movement and casts give the same bits; the others differ by the order of fp32 sums and by the last bits of exp.
EXACT = ("plan", "permute", "permute_scaled", "quantize", "dequantize", "transpose_scaled", "convert",
         "gather_weights", "scatter_weights", "plan_permute")  # fmt: skip
