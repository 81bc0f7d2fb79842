"""`verify=True`: outputs and gradients of a graph before and after a pass, on the example inputs.

Both graphs run on the same values with the same random state. A model graph is differentiated by autograd against fixed
random cotangents; a training graph already computes its gradients from its tangents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from . import compat
from .errors import PassError
from .graph.edit import copy_plain

Tensor = torch.Tensor
# Largest relative L2 difference per numerics class and dtype. `changes` is bounded by finiteness only.
ROUNDING = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass
class Verifier:
    """Holds the real values of a graph's placeholders. `grad` says whether to differentiate (model graphs)."""

    values: Sequence[Any]
    grad: bool
    seed: int = 0

    def compare(self, name: str, numerics: str, before: fx.Graph, after: fx.GraphModule) -> float:
        """Largest relative difference over outputs and gradients; raises `PassError` beyond the class's tolerance."""
        a = self._run(fx.GraphModule(after, before))
        b = self._run(fx.GraphModule(after, copy_plain(after.graph)))
        worst = 0.0
        for (label, x), (_, y) in zip(a, b, strict=True):
            error, allowed = _difference(x, y), 0.0 if numerics == "exact" else ROUNDING.get(x.dtype, 0.0)
            if numerics == "changes":
                allowed = float("inf") if bool(torch.isfinite(y).all()) or not bool(torch.isfinite(x).all()) else 0.0
            if not error <= allowed:
                raise PassError(
                    f"pass {name} changed {label} by {error:.1e}",
                    why=f"its numerics class is {numerics!r}, which allows {allowed:.1e} for {x.dtype}",
                    todo="mend the rewrite, or declare the numerics class it really has",
                )
            worst = max(worst, error)
        return worst

    def _run(self, gm: fx.GraphModule) -> list[tuple[str, Tensor]]:
        values = [
            v.detach().clone().requires_grad_(v.requires_grad and self.grad) if isinstance(v, Tensor) else v
            for v in self.values
        ]
        # In-place nodes would write into leaves; non-leaf aliases take the writes.
        inputs = [v.view_as(v) if isinstance(v, Tensor) and v.requires_grad else v for v in values]
        devices = list({v.device for v in values if isinstance(v, Tensor) and v.device.type == "cuda"})
        with torch.random.fork_rng(devices=devices), compat.no_fake(), torch.set_grad_enabled(self.grad):
            torch.manual_seed(self.seed)
            outs = gm(*inputs)
            flat = [(f"output {i}", o) for i, o in enumerate(outs) if isinstance(o, Tensor)]
            if self.grad:
                flat += self._gradients(values, [o for _, o in flat])
        return [(label, t.detach()) for label, t in flat]

    def _gradients(self, values: Sequence[Any], outs: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        leaves = [(i, v) for i, v in enumerate(values) if isinstance(v, Tensor) and v.requires_grad]
        roots = [o for o in outs if o.requires_grad]
        if not leaves or not roots:
            return []
        cotangents = [torch.randn_like(o) for o in roots]
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            roots, [v for _, v in leaves], cotangents, allow_unused=True
        )
        return [(f"gradient of input {i}", g) for (i, _), g in zip(leaves, grads, strict=True) if g is not None]


def _difference(x: Tensor, y: Tensor) -> float:
    if torch.equal(x, y):
        return 0.0
    if not x.dtype.is_floating_point:
        return float("inf")
    a, b = x.double(), y.double()
    if bool((torch.isnan(a) != torch.isnan(b)).any()):
        return float("inf")
    a, b = torch.nan_to_num(a), torch.nan_to_num(b)
    return float((a - b).norm() / a.norm().clamp_min(1e-30))
