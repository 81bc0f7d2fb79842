"""The CUDA provider of `topk_route` and `topk_route_backward`, in `gpu/topk_route.py`.

It covers bf16, fp16 and fp32 logits of up to 512 experts, of which up to 16 are chosen in fp32, from groups of any size
of which up to 16 are kept. The reference runs float64, larger routers, choices by sums that are rounded to 16 bits (of
16-bit logits and a bias, or the best two of a group), and masked weights of identity scores with a fill of 0, which
scores may be below: the backward kernel knows a filled choice by its place behind the others.
"""

from __future__ import annotations

import torch

from .registry import register_triton, wide

Tensor = torch.Tensor
MOST_EXPERTS, MOST_CHOICES = 512, 16


def _sizes(logits: Tensor, k: int, kept: int) -> bool:
    return wide(logits) and 0 < k <= MOST_CHOICES and kept <= MOST_CHOICES and logits.shape[-1] <= MOST_EXPERTS


def _fill_is_least(score: str, fill: float) -> bool:
    return score != "identity" or fill < 0


def _supports(
    logits: Tensor, bias: Tensor | None, k: int, score: str = "", order: str = "scores",
    norm: str = "", eps: float = 0.0, factor: float = 1.0, out: torch.dtype | None = None,
    groups: int = 0, kept: int = 0, reducer: str = "max", fill: float = 0.0, masked: bool = False,
) -> bool:  # fmt: skip
    chosen_by = torch.float32 if order == "scores" else logits.dtype
    if bias is not None:
        chosen_by = torch.promote_types(chosen_by, bias.dtype)
    sums = bias is not None or (groups and reducer == "top2sum")
    if (sums and chosen_by != torch.float32) or (masked and not _fill_is_least(score, fill)):
        return False
    return _sizes(logits, k, kept)


def _supports_backward(
    dw: Tensor | None, dscores: Tensor | None, logits: Tensor, idx: Tensor, score: str = "", norm: str = "",
    eps: float = 0.0, factor: float = 1.0, groups: int = 0, kept: int = 0, reducer: str = "max", fill: float = 0.0,
) -> bool:  # fmt: skip
    return _sizes(logits, idx.shape[-1], kept) and (not groups or _fill_is_least(score, fill))


register_triton("topk_route", "topk_route:topk_route", _supports)
register_triton("topk_route_backward", "topk_route:topk_route_backward", _supports_backward)
