"""Balance without a loss: the bias of the choice follows the load.

Source: Wang et al., arXiv 2408.15664; DeepSeek-V3 uses a rate of 1e-3 for most of its training, then 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .base import Item, finite, takes_all
from .ranks import all_reduce
from .taps import Taps


@dataclass(frozen=True)
class BiasUpdate(Item):
    """Counts the choices of every layer; `opt.update_router_bias()` after an optimizer step moves the biases.

    For routers with a correction bias, which takes part in the choice alone. All counts since the last update are used,
    those of several micro-batches together, and summed over ranks when torch.distributed is initialised.
    """

    rate: float = 1e-3

    name: ClassVar[str] = "bias"

    def __post_init__(self) -> None:
        finite(self, "rate", least=0)

    def refuses(self, tap: Taps) -> str | None:
        """There must be a bias to move, and a choice that it can move."""
        if (why := super().refuses(tap) or takes_all(tap, "their loads are equal")) is not None:
            return why
        return None if tap.bias else "its router has no correction bias"

    def local(self, tap: Taps) -> Any:
        """[E] choices of each expert in this call."""
        return tap.counts


@torch.no_grad()
def sign_update(bias_E: torch.Tensor, counts_E: torch.Tensor, rate: float) -> None:
    """b_e += rate * sign(mean of c - c_e) in place: an expert with too little load is chosen more easily.

    Args:
        bias_E: [E] floating point.
        counts_E: [E] choices on this rank; summed over ranks here.
    """
    counts = all_reduce(counts_E)
    bias_E.add_(torch.sign(counts.mean() - counts).to(bias_E), alpha=rate)
