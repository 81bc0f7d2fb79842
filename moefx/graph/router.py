"""What a slice of a model graph computes, if it is a router: its normal form, by trial.

The slice is run on trial logits, biases and scales, and compared with the normal form (dialect/route.py): indices,
weights and gradients, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moefx import compat
from moefx.dialect.route import NAMES, RouteSpec, eager, write
from moefx.dialect.route_fit import Hints, Trial, fit, same

from .edit import same_sizes, targets, value
from .effects import name_of
from .slices import Slice

Tensor = torch.Tensor
# What makes logits.
PRODUCTS = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum")
# Between a router and its experts: other shapes and types of the same numbers.
MOVES = ("view", "reshape", "flatten", "contiguous", "squeeze", "to", "int", "long", "type", "float", "detach")
KINDS, TRIAL_ROWS = 6, 144  # of trial logits: kinds of rows, and rows at least


class NoRouter(Exception):  # noqa: N818  control flow: why a candidate is not raised, for the report
    """These logits do not lead to the experts by a normal form. The later the stage, the nearer the miss."""

    def __init__(self, why: str, stage: int) -> None:
        self.why, self.stage = why, stage
        super().__init__(why)


def route_of(idx: Any) -> fx.Node | None:
    """The `moefx.route` node that made these indices, through reshapes and casts; None where there is none."""
    while isinstance(idx, fx.Node) and idx.args and name_of(idx) in MOVES:
        idx = idx.args[0]
    source = idx.args[0] if isinstance(idx, fx.Node) and idx.target is compat.getitem else None
    return source if isinstance(source, fx.Node) and source.target in targets(torch.ops.moefx.route) else None


def linear_weight(logits: Any) -> fx.Node | None:
    """[E, H] weight of the linear layer that makes the logits."""
    while isinstance(logits, fx.Node) and logits.args and name_of(logits) in MOVES:
        logits = logits.args[0]
    if not isinstance(logits, fx.Node) or name_of(logits) != "linear" or len(logits.args) < 2:
        return None
    return logits.args[1] if isinstance(logits.args[1], fx.Node) else None


def computed_again(logits: fx.Node) -> list[fx.Node]:
    """Other linear layers with the weight of these logits: a model's own loss may compute the logits once more."""
    w = linear_weight(logits)
    return [] if w is None else [n for n in w.users if name_of(n) == "linear" and w in n.args[1:2]]


@dataclass(frozen=True)
class Form:
    """What a slice computes: the spec, which sides are bias and scale, what each value read elsewhere is equal to."""

    spec: RouteSpec
    bias: int | None
    scale: int | None
    outside: tuple[int, ...]


def form_of(part: Slice) -> Form:
    """The normal form of the slice from logits [.., E] to (idx, w) [.., k]; raises `NoRouter`."""
    with compat.no_fake(), torch.enable_grad():
        return _Fitting(part).form()


class _Fitting:
    """One slice on trial."""

    def __init__(self, part: Slice) -> None:
        self.part = part
        self.idx, self.w = part.targets
        self.outside = list(part.outside_readers())
        leaves = torch.utils._pytree.tree_leaves([(n.args, n.kwargs) for n in part.nodes])
        self.literals = list(dict.fromkeys(x for x in leaves if type(x) in (int, float)))
        shape = [compat.size_hint(n) for n in value(part.source).shape]
        rows = max(1, torch.Size(shape[:-1]).numel())
        # Few rows are tried more often, so that each kind of row is met. In the last trial all tokens prefer the same
        # experts: a capacity would drop some.
        count = max(2, -(-TRIAL_ROWS // rows))
        self.draws = [self._draw(shape, seed, skewed=seed == count) for seed in range(count + 1)]

    def _draw(self, shape: list[int], seed: int, skewed: bool) -> dict[fx.Node, Any]:
        """Values of logits and sides."""
        g = torch.Generator().manual_seed(seed)
        val = value(self.part.source)
        # Wider than any clamp or cap in the code, and within the dtype.
        wide = min(max([400.0, *(4 * abs(c) for c in self.literals if abs(c) < 1e30)]), torch.finfo(val.dtype).max / 16)
        logits = trial_logits(shape, seed, g, wide, torch.finfo(val.dtype).eps)
        if skewed:
            logits = torch.randn(shape, generator=g) + torch.linspace(20, 0, shape[-1])
        logits = logits.to(val.device, val.dtype).requires_grad_()
        return {self.part.source: logits, **{n: self._side(n, seed, g) for n in self.part.sides}}

    def _side(self, n: fx.Node, seed: int, g: torch.Generator) -> Any:
        val = value(n)
        if compat.is_symbol(val):
            return compat.size_hint(val)
        if not isinstance(val, Tensor):
            raise NoRouter(f"it reads {name_of(n)}, which is no tensor", 2)
        shape = [compat.size_hint(s) for s in val.shape]
        if val.dtype in NAMES:
            # A bias that is negative for all experts lets a fill of 0 win.
            t = torch.randn(shape, generator=g) * 0.5 - (seed % 2)
            return t.to(val.device, val.dtype).requires_grad_()
        return torch.randint(0, 2, shape, generator=g).to(val.device, val.dtype)

    def form(self) -> Form:
        """The normal form of the slice; raises `NoRouter`."""
        runs = [self._run(d) for d in self.draws]
        bias, scale = self._roles(runs[0])
        trials = [self._trial(d, r, bias, scale) for d, r in zip(self.draws, runs, strict=True)]
        specs, why = fit(trials, self._hints())
        miss = ""
        for spec in specs:
            try:
                outside = self._check(spec, runs, bias, scale)
            except NoRouter as e:
                miss = miss or e.why
            else:
                sides = self.part.sides
                at = [None if n is None else sides.index(n) for n in (bias, scale)]
                return Form(spec, at[0], at[1], outside)
        raise NoRouter(miss, 5) if miss else NoRouter(why(), 4)

    def _run(self, draw: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        try:
            return self.part.run(draw)
        except Exception as e:
            raise NoRouter(f"it cannot be tried by itself ({type(e).__name__}: {e})".split("\n")[0], 2) from e

    def _roles(self, run: dict[fx.Node, Any]) -> tuple[fx.Node | None, fx.Node | None]:
        """Which side is a bias (it moves the choice) and which a scale (it moves the weights alone)."""
        bias = scale = None
        E = self.draws[0][self.part.source].shape[-1]
        for i, n in enumerate(self.part.sides):
            if not isinstance(value(n), Tensor):
                continue
            other = self._run({**self.draws[0], n: self._side(n, i, torch.Generator().manual_seed(100 + i))})
            moved = not torch.equal(other[self.idx], run[self.idx])
            if not moved and all(same(other[m], run[m]) for m in (self.w, *self._tensors())):
                continue  # read for its dtype or shape
            if vector(n, E) is None or value(n).dtype not in NAMES:
                raise NoRouter(f"it depends on a tensor {tuple(value(n).shape)} besides the logits", 3)
            if (bias if moved else scale) is not None:
                raise NoRouter("it depends on several tensors [E] in the same way", 3)
            bias, scale = (n, scale) if moved else (bias, n)
        return bias, scale

    def _tensors(self) -> list[fx.Node]:
        return [n for n in self.outside if isinstance(value(n), Tensor)]

    def _trial(self, draw: dict[fx.Node, Any], run: dict[fx.Node, Any], bias: Any, scale: Any) -> Trial:
        logits = draw[self.part.source].detach()
        flat = [run[n].detach().reshape(-1, run[n].shape[-1]) for n in (self.idx, self.w)]
        sides = [None if n is None else draw[n].detach().flatten() for n in (bias, scale)]
        return Trial(logits.reshape(-1, logits.shape[-1]), sides[0], sides[1], flat[0], flat[1])

    def _hints(self) -> Hints:
        """Numbers that stand in the code of the slice."""
        E = value(self.part.source).shape[-1]
        rows = [value(n) for n in (self.part.source, *self.part.nodes) if isinstance(value(n), Tensor)]
        dtypes = list(dict.fromkeys(v.dtype for v in rows if v.dtype in NAMES))
        sizes = [s for v in rows for s in v.shape[1:] if type(s) is int] + [x for x in self.literals if type(x) is int]
        counts = [s for s in dict.fromkeys(sizes) if 1 < s <= E and E % s == 0]
        constants = [float(x) for x in self.literals if math.isfinite(x) and x != 0]
        flags = [n.args[4] if len(n.args) > 4 else n.kwargs.get("sorted", True) for n in self._topks()]
        return Hints(
            tuple(dtypes),
            tuple(counts),
            tuple(s for s in dict.fromkeys(sizes) if 0 < s < E),
            tuple(constants),
            (bool(flags[-1]),) if flags else (True,),
        )

    def _topks(self) -> list[fx.Node]:
        return [n for n in self.part.nodes if name_of(n) == "topk"]

    def _check(self, s: RouteSpec, runs: list[dict[fx.Node, Any]], bias: Any, scale: Any) -> tuple[int, ...]:
        """All rows of all draws, values and gradients; which output each value read elsewhere is."""
        found: list[tuple[int, ...]] = []
        for seed, (draw, run) in enumerate(zip(self.draws, runs, strict=True)):
            logits = draw[self.part.source]
            with self.part.mode(self.part.nodes[0]):
                outs = write(
                    eager,
                    s,
                    logits,
                    None if bias is None else draw[bias].detach().flatten(),
                    None if scale is None else draw[scale].flatten(),
                    logits.dtype,
                    logits.shape[-1],
                )
            if not torch.equal(outs[1], run[self.idx]) or not same(outs[2], run[self.w]):
                raise NoRouter(f"it is {s} for some logits and differs for others", 4)
            wrt = [logits, *(draw[n] for n in self.part.sides if isinstance(draw[n], Tensor) and draw[n].requires_grad)]
            if seed + 1 < len(runs):  # values are enough for the skewed one
                same_gradients(run[self.w], outs[2], wrt, "w", seed)
            found.append(tuple(self._output(n, run, outs, wrt, seed) for n in self.outside))
        return found[0]

    def _output(self, n: fx.Node, run: dict[fx.Node, Any], outs: tuple[Any, ...], wrt: list[Tensor], seed: int) -> int:
        for i, out in enumerate(outs):
            if isinstance(run[n], Tensor) and same(run[n], out):
                same_gradients(run[n], out, wrt, "the scores", seed)
                return i
        raise NoRouter(f"{name_of(n)} between logits and weights is read elsewhere, and is no output of the form", 5)


def vector(n: fx.Node, E: int) -> fx.Node | None:
    """The tensor [E] behind views of it as [1, E], or None."""
    while isinstance(value(n), Tensor) and value(n).dim() > 1 and name_of(n) in ("unsqueeze", "view", "reshape"):
        n = n.args[0]  # type: ignore[assignment]
    return n if isinstance(value(n), Tensor) and same_sizes(value(n).shape, (E,)) else None


def trial_logits(shape: list[int], seed: int, g: torch.Generator, wide: float, eps: float) -> Tensor:
    """Logits [.., E] whose rows are in turn: normal, tied, nearly tied, spread wide, wider (softmax of most is 0), and
    very low (sigmoid is 0).
    """
    E = shape[-1]
    x = torch.randn(shape, generator=g).reshape(-1, E)
    rows = (torch.arange(x.shape[0]) + seed) % KINDS
    kinds = [x, (x * 2).round() / 2, x * 4 * eps, x * 40, x * wide, x - torch.linspace(80, 110, E).flip(0)]
    return torch.stack(kinds)[rows, torch.arange(x.shape[0])].reshape(shape)


def same_gradients(a: Tensor, b: Tensor, wrt: list[Tensor], what: str, seed: int) -> None:
    """Raise `NoRouter` unless both have the same gradients, by autograd, of a random cotangent."""
    if a.requires_grad != b.requires_grad:
        raise NoRouter(f"{what} {'has' if a.requires_grad else 'has no'} gradient, unlike that of the normal form", 5)
    if not a.requires_grad:
        return
    cotangent = torch.randn(a.shape, generator=torch.Generator().manual_seed(seed)).to(a)
    try:
        found = [torch.autograd.grad(t, wrt, cotangent, retain_graph=True, allow_unused=True) for t in (a, b)]
    except RuntimeError as e:
        raise NoRouter(f"it cannot be differentiated by itself ({e})".split("\n")[0], 5) from e
    for x, y in zip(*found, strict=True):
        if (x is None) != (y is None) or (x is not None and not same(x, y)):
            raise NoRouter(f"the gradient of {what} differs from that of the normal form, though the values agree", 5)
