"""A Grouter small enough for tests of the tools around it, with weights that differ from token to token."""

from __future__ import annotations

from typing import Any

import torch

from moefx import Grouter

__all__ = ["Grouter", "small"]


def small(seed: int = 0, **config: Any) -> Grouter:
    """One layer of width 32; 64 tokens, 8 experts unless given."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "num_experts": 8, "hidden_size": 32, "num_layers": 1, "num_heads": 2, **config}
    made = Grouter.from_config(intermediate_size=48, **sizes)
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.mul_(20)  # the usual 0.02 gives nearly equal logits at this width
    return made.freeze()
