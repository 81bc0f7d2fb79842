"""The CUDA provider of `topk_route` and `topk_route_backward`, in `gpu/topk_route.py`.

It covers bf16, fp16 and fp32 logits of up to 512 experts, of which up to 16 are chosen in fp32: float64, larger routers
and a bias added to 16-bit logits (whose sum is rounded) run the reference.
"""

from __future__ import annotations

import torch

from .registry import register_triton, wide

Tensor = torch.Tensor
MOST_EXPERTS, MOST_CHOICES = 512, 16


def _sizes(logits: Tensor, k: int) -> bool:
    return wide(logits) and 0 < k <= MOST_CHOICES and logits.shape[-1] <= MOST_EXPERTS


def _supports(logits: Tensor, bias: Tensor | None, k: int, score: str = "", order: str = "scores", *_: object) -> bool:
    if bias is not None:
        chosen_by = torch.float32 if order == "scores" else logits.dtype
        if torch.promote_types(chosen_by, bias.dtype) != torch.float32:
            return False
    return _sizes(logits, k)


def _supports_backward(dw: Tensor | None, dscores: Tensor | None, logits: Tensor, idx: Tensor, *_: object) -> bool:
    return _sizes(logits, idx.shape[-1])


register_triton("topk_route", "topk_route:topk_route", _supports)
register_triton("topk_route_backward", "topk_route:topk_route_backward", _supports_backward)
