"""What an `OptimizedModule` pickles in the place of a model that cannot be pickled as it stands."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

RECORDERS = "transformers.utils.output_capturing"
INSTALLED = "_output_capturing_hooks_installed"


def without_recorders(model: nn.Module) -> nn.Module:
    """The model itself, or, where transformers records router logits or hidden states, a copy over the same tensors
    that has no recorders.

    They are hooks that are installed at the first forward, and local functions, which pickle refuses. The copy gets new
    ones at its own first forward.
    """
    if not any(_is_recorder(h) for m in model.modules() for h in m._forward_hooks.values()):
        return model
    new = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    for m in new.modules():
        for key in [k for k, h in m._forward_hooks.items() if _is_recorder(h)]:
            del m._forward_hooks[key]
        if INSTALLED in m.__dict__:
            m.__dict__[INSTALLED] = False
    return new


def _is_recorder(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == RECORDERS
