"""The CUDA provider of `overlap` and `overlap_backward`, in `gpu/overlap.py`.

It covers bf16, fp16 and fp32 rows of any width and up to 32 choices of a token; float64 and more choices run the
reference.
"""

from __future__ import annotations

import torch

from .registry import register_triton, wide

MOST_CHOICES = 32


def _supports(z: torch.Tensor, slot: torch.Tensor, *_: object) -> bool:
    return wide(z) and z.shape[1] > 0 and 0 < slot.shape[1] <= MOST_CHOICES


register_triton("overlap", "overlap:overlap", _supports)
register_triton("overlap_backward", "overlap:overlap_backward", lambda dout, *args: _supports(*args))
