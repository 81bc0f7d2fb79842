"""The CPU provider of `glu` for its two commonest kinds: torch's vectorised SiLU and GELU on strided halves.

Rounds once more than the reference in 16-bit dtypes (activation, then product), as PyTorch models themselves do.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .registry import register

Tensor = torch.Tensor
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def _supports(h: Tensor, w: Tensor | None, kind: str) -> bool:
    return h.device.type == "cpu" and w is None and (kind == "silu" or kind in _APPROXIMATE)


@register("glu", "torch", _supports)
def glu_cpu(h_S2I: Tensor, w_S: None, kind: str) -> Tensor:
    """`act(gate) * up` over the two halves of the last axis."""
    gate, up = h_S2I.chunk(2, -1)
    act = F.silu(gate) if kind == "silu" else F.gelu(gate, approximate=_APPROXIMATE[kind])
    return act.mul_(up)
