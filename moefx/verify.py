"""`verify=True`: outputs and gradients of a graph before and after a pass, on the example inputs.

Both graphs run on the same values with the same random state. A model graph is differentiated by autograd against fixed
random cotangents; a training graph already computes its gradients from its tangents.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from . import compat
from .errors import PassError

Tensor = torch.Tensor
# Largest relative L2 difference per numerics class and dtype. `changes` is bounded by finiteness only.
ROUNDING = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass
class Verifier:
    """Runs a graph on real values of its placeholders. `grad` says whether to differentiate (model graphs).

    What is compared: every output, every gradient, and every input that the graph writes into. The graph is run once
    at the start and once after each pass; what a pass is compared with is the run after the pass before it.
    """

    values: Sequence[Any]
    grad: bool
    seed: int = 0
    _before: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _computed_in: set[torch.dtype] = field(default_factory=set, repr=False)

    def start(self, gm: fx.GraphModule) -> None:
        """Run the graph as it is before the first pass."""
        self._before = self._run(gm)

    def compare(self, name: str, numerics: str, gm: fx.GraphModule, where: str | None = None) -> float:
        """Largest relative difference to the run before; raises `PassError` beyond the class's tolerance."""
        before = self._before
        try:
            after = self._run(gm)
        except Exception as e:
            raise PassError(
                f"pass {name} left a graph that fails on the example inputs",
                where=where,
                why=f"{type(e).__name__}: {str(e).strip()}",
                todo="mend the rewrite: what it put in has the right types, but cannot be computed or differentiated",
            ) from e
        worst, noise = 0.0, _noise(before, self._rounding)
        todo = "mend the rewrite, or declare the numerics class it really has"
        if numerics != "changes" and (odd := sorted(before.keys() ^ after.keys())):
            change = "lost" if odd[0] in before else "added"
            raise PassError(f"pass {name} {change} {', '.join(odd)}", where=where, todo=todo)
        for label in [k for k in before if k in after]:
            x, y = before[label], after[label]
            if not _infinite(x) and (lost := _infinite(y)):
                raise PassError(
                    f"pass {name} left {label} no longer finite: {lost} of {y.numel()} elements are NaN or infinite",
                    where=where,
                    why=f"its numerics class is {numerics!r}, and in every class what was finite stays finite",
                    todo="mend the rewrite: look for an overflow, a division by zero or memory that nobody wrote",
                )
            error, allowed = _difference(x, y), 0.0 if numerics == "exact" else self._rounding(x.dtype)
            if numerics == "changes":
                allowed = float("inf")
            tiny = numerics == "rounding" and x.shape == y.shape and _rms(x.double() - y.double()) <= noise[label]
            if not (error <= allowed or tiny):
                raise PassError(
                    f"pass {name} changed {label} by {error:.1e}",
                    where=where,
                    why=f"its numerics class is {numerics!r}, which allows {allowed:.1e} here",
                    todo=todo,
                )
            worst = max(worst, 0.0 if tiny and error > allowed else min(error, sys.float_info.max))
        self._before = after
        return worst

    def _rounding(self, dtype: torch.dtype) -> float:
        """What reordering may change a value by: of its own dtype, or of a coarser one that the graph computes in.

        Under autocast, or in a model of several dtypes, a float32 output is made of bfloat16 products.
        """
        return max((ROUNDING.get(d, 0.0) for d in self._computed_in), default=0.0) if dtype in ROUNDING else 0.0

    def _run(self, gm: fx.GraphModule) -> dict[str, Tensor]:
        """Outputs, gradients and written inputs by name. Interpreted: to compile a graph module takes longer."""
        placeholders = gm.graph.find_nodes(op="placeholder")
        names = [str(n.meta.get("moefx_name", n.name)) for n in placeholders]
        values = [
            v.detach().clone().requires_grad_(v.requires_grad and self.grad) if isinstance(v, Tensor) else v
            for v in self.values
        ]
        # In-place nodes would write into leaves; non-leaf aliases take the writes.
        inputs = [v.view_as(v) if isinstance(v, Tensor) and v.requires_grad else v for v in values]
        devices = list({v.device for v in values if isinstance(v, Tensor) and v.device.type == "cuda"})
        with torch.random.fork_rng(devices=devices), compat.no_fake(), torch.set_grad_enabled(self.grad):
            torch.manual_seed(self.seed)
            outs = _Noting(gm, self._computed_in).run(*inputs, enable_io_processing=False)
            found = {f"output {i}": o for i, o in enumerate(outs) if isinstance(o, Tensor)}
            # Views share the version counter: zero means that nobody wrote into this input.
            for label, v in zip(names, values, strict=True):
                if isinstance(v, Tensor) and v._version:
                    found[f"what is written into {label}"] = v
            if self.grad:
                found |= self._gradients(names, values, outs)
        return {label: t.detach() for label, t in found.items()}

    def _gradients(self, names: Sequence[str], values: Sequence[Any], outs: Sequence[Any]) -> dict[str, Tensor]:
        leaves = {n: v for n, v in zip(names, values, strict=True) if isinstance(v, Tensor) and v.requires_grad}
        roots = {i: o for i, o in enumerate(outs) if isinstance(o, Tensor) and o.requires_grad}
        if not leaves or not roots:
            return {}
        # Each output has a stream of its own, so that its cotangent does not depend on what else the graph does.
        streams = {i: torch.Generator().manual_seed(self.seed + i) for i in roots}
        cotangents = [torch.randn(o.shape, generator=streams[i]).to(o) for i, o in roots.items()]
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            list(roots.values()), list(leaves.values()), cotangents, allow_unused=True
        )
        return {f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True) if g is not None}


class _Noting(fx.Interpreter):
    """Runs a graph and notes the floating dtypes of its values."""

    def __init__(self, gm: fx.GraphModule, dtypes: set[torch.dtype]) -> None:
        super().__init__(gm)
        self.dtypes = dtypes

    def run_node(self, n: fx.Node) -> Any:
        """As the interpreter does."""
        made = super().run_node(n)
        self.dtypes |= {v.dtype for v in pytree.tree_leaves(made) if isinstance(v, Tensor) and v.dtype in ROUNDING}
        return made


def _infinite(x: Tensor) -> int:
    """How many elements are NaN or infinite. Not every format of 8 bits knows `isfinite`."""
    wide = x.float() if x.dtype.is_floating_point and x.element_size() == 1 else x
    return int((~torch.isfinite(wide)).sum())


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _noise(found: dict[str, Tensor], rounding: Callable[[torch.dtype], float]) -> dict[str, float]:
    """What a value may differ by however small it is itself: for gradients, rounding noise of the largest of them.

    A gradient that is zero by symmetry (of a shift in front of a softmax) is all noise, and has no relative error.
    """
    grads = [v for k, v in found.items() if k.startswith("gradient") and v.numel()]
    largest = max(map(_rms, grads), default=0.0)
    return {k: 0.05 * rounding(v.dtype) * largest * k.startswith("gradient") for k, v in found.items()}


def _difference(x: Tensor, y: Tensor) -> float:
    if x.shape != y.shape or x.dtype != y.dtype:
        return float("inf")
    if torch.equal(x, y):
        return 0.0
    if not x.dtype.is_floating_point:
        return float((x != y).double().mean())
    a, b = x.double(), y.double()
    finite = torch.isfinite(a) & torch.isfinite(b)
    if bool((~finite & (a != b) & ~(torch.isnan(a) & torch.isnan(b))).any()):
        return float("inf")
    a, b = torch.where(finite, a, 0.0), torch.where(finite, b, 0.0)
    return float((a - b).norm() / a.norm().clamp_min(1e-30))
