"""`topk_route`: a router as one op, with its gradient in closed form.

    topk_route(logits [.., E], bias [E]?, k, ...) -> scores [.., E], idx [.., k] int64, w [.., k]

What it computes is `route` (route.py) without a scale per expert, in fp32 (float64 for float64 logits), with one rule
more: of equal experts the one with the lowest index comes first, and of groups that are equally good the first.
`groups`, `kept`, `reducer` and `fill` are the fields of route's `Groups`; 0 groups are none. `expand_routers` emits the
op where there is a kernel for it; elsewhere a router is written out, with the ties of torch.topk. The bias has no
gradient. With s = F(l), w = factor * s_i / (sum + eps) and its kin, the gradient is that of s from both outputs,

    ds = dscores, and at the chosen  + factor * (dw_i - sum_j dw_j s_j / t) / t       t = sum s + eps

through F: p (ds - sum p ds) for softmax, ds s (1 - s) for sigmoid, ds sigmoid(l) / (2 s) for sqrtsoftplus. Scores are
computed again, so that a router keeps its logits and idx alone. Where weights are masked, the s_i of a chosen expert
outside the kept groups is the fill, a constant; only then does the backward take groups, and an idx of their choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

import moefx.kernels.topk_route  # noqa: F401  its provider comes before the reference
from moefx.errors import InputError

from ._op import alone, define
from .route import DTYPES, NAMES, Groups, RouteSpec, eager, write, write_others

Tensor = torch.Tensor


def covers(spec: RouteSpec, dtype: torch.dtype) -> bool:
    """Whether the op can say what `route` does with logits of that dtype."""
    return not spec.per_expert and dtype in NAMES and DTYPES[spec.dtype] == torch.promote_types(dtype, torch.float32)


def attributes(spec: RouteSpec) -> tuple[Any, ...]:
    """The op's arguments behind the tensors: k, score, order, norm, eps, factor, out, and those of groups if any."""
    out = None if spec.out is None else DTYPES[spec.out]
    found = spec.k, spec.score, spec.order, spec.norm, spec.eps, spec.factor, out
    return found if (g := spec.groups) is None else (*found, g.count, g.kept, g.reducer, g.fill, spec.masked)


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _spec(
    logits: Tensor, bias: Tensor | None, k: int, score: str = "softmax", order: str = "scores",
    norm: str = "none", eps: float = 0.0, factor: float = 1.0, out: torch.dtype | None = None,
    groups: int = 0, kept: int = 0, reducer: str = "max", fill: float = 0.0, masked: bool = False,
) -> RouteSpec:  # fmt: skip
    """Raises `InputError` for what is no router."""
    cast, limit = None if out is None else NAMES[out], Groups(groups, kept, reducer, fill) if groups else None
    return RouteSpec(
        score, k, NAMES[_wide(logits)], order, bias is not None, limit, masked,
        norm=norm, eps=eps, factor=factor, out=cast,
    )  # fmt: skip


def _lowest_index_first(target: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs steps as `eager`, with a top-k that takes the lowest index of equal numbers."""
    if target is not torch.topk:
        return eager(target, *args, **kwargs)
    values, idx = torch.sort(args[0], dim=-1, descending=True, stable=True)
    return values[..., : args[1]], idx[..., : args[1]]


def _topk_route(logits: Tensor, bias: Tensor | None, k: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    s = _spec(logits, bias, k, *rest)
    scores, idx, w = write(_lowest_index_first, s, logits, bias, None, logits.dtype, logits.shape[-1])
    return scores.clone() if scores is logits else scores, idx.clone(), w.clone() if w is scores else w


def _check(logits: Tensor, bias: Tensor | None, k: int, *rest: Any) -> None:
    g, E = _spec(logits, bias, k, *rest).groups, logits.shape[-1]
    if k > E or (bias is not None and tuple(bias.shape) != (E,)):
        given = "no bias" if bias is None else f"a bias {tuple(bias.shape)}"
        raise InputError(f"topk_route of k = {k} got {E} experts and {given}", todo=f"k within {E}, a bias [{E}]")
    if g is not None and (E % g.count or (g.reducer == "top2sum" and E // g.count < 2)):
        raise InputError(f"topk_route got {E} experts in {g}", todo="equal groups, of two experts or more for top2sum")


def _fake(logits: Tensor, bias: Tensor | None, k: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = rest[5] if len(rest) > 5 and rest[5] is not None else _wide(logits)
    shape = (*logits.shape[:-1], k)
    scores = logits.new_empty(logits.shape, dtype=_wide(logits))
    return scores, logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=out)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, _, ctx.score, _, ctx.norm, ctx.eps, ctx.factor, _, *groups, masked = inputs
    ctx.groups = groups if masked else ()
    ctx.set_materialize_grads(False)  # who reads the weights alone pays for no zeros [.., E]
    ctx.save_for_backward(logits, output[1])


def _backward(ctx: Any, dscores: Tensor | None, _: Any, dw: Tensor | None) -> tuple[Any, ...]:
    logits, idx = ctx.saved_tensors
    rest = ctx.score, ctx.norm, ctx.eps, ctx.factor, *ctx.groups
    return torch.ops.moefx.topk_route_backward(dw, dscores, logits, idx, *rest), *(None,) * 13


topk_route = define(
    "topk_route",
    '(Tensor logits, Tensor? bias, int k, str score="softmax", str order="scores", str norm="none", float eps=0.0, '
    'float factor=1.0, ScalarType? out=None, int groups=0, int kept=0, str reducer="max", float fill=0.0, '
    "bool masked=False) -> (Tensor scores, Tensor idx, Tensor w)",
    reference=_topk_route,
    fake=_fake,
    check=_check,
    setup=_setup,
    backward=_backward,
)


def _topk_route_backward(
    dw: Tensor | None, dscores: Tensor | None, logits: Tensor, idx: Tensor,
    score: str = "softmax", norm: str = "none", eps: float = 0.0, factor: float = 1.0,
    groups: int = 0, kept: int = 0, reducer: str = "max", fill: float = 0.0,
) -> Tensor:  # fmt: skip
    """Gradient of the logits [.., E], in their dtype; the groups are those of masked weights."""
    x = logits.to(_wide(logits))
    s = {
        "softmax": lambda: x.softmax(-1),
        "sigmoid": lambda: x.sigmoid(),
        "sqrtsoftplus": lambda: F.softplus(x).sqrt(),
        "identity": lambda: x,
    }[score]()
    ds = torch.zeros_like(x) if dscores is None else dscores.to(x.dtype)
    if dw is not None:
        start = s.gather(-1, idx)
        if groups:
            limit = Groups(groups, kept, reducer, fill)
            others = write_others(_lowest_index_first, limit, s.detach().unflatten(-1, (groups, -1)))
            filled = others.gather(-1, idx // (x.shape[-1] // groups))
            start = start.masked_fill(filled, fill)
        g = _start_gradient(factor * dw.to(x.dtype), start, norm, eps)
        ds = ds.scatter_add(-1, idx, g.masked_fill(filled, 0) if groups else g)
    if score == "softmax":
        ds = s * (ds - (s * ds).sum(-1, keepdim=True))
    elif score == "sigmoid":
        ds = ds * s * (1 - s)
    elif score == "sqrtsoftplus":
        ds = torch.where(s == 0, 0, ds * x.sigmoid() / (2 * s))
    return ds.to(logits.dtype)


def _start_gradient(dw: Tensor, s: Tensor, norm: str, eps: float) -> Tensor:
    """Gradient of the scores at the chosen experts [.., k] from that of weights normalised over them."""
    if norm == "none":
        return dw
    if norm == "softmax":
        p = s.softmax(-1)
        return p * (dw - (dw * p).sum(-1, keepdim=True))
    total = s.sum(-1, keepdim=True)
    if norm == "clamp":
        moves, total = total >= eps, total.clamp_min(eps)
        return (dw - torch.where(moves, (dw * s).sum(-1, keepdim=True) / total, 0)) / total
    total = total + eps
    return (dw - (dw * s).sum(-1, keepdim=True) / total) / total


def _second_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dw, dscores, logits, idx, *ctx.rest = inputs
    ctx.save_for_backward(dw, dscores, logits, idx)


def _second_backward(ctx: Any, ddlogits: Tensor) -> tuple[Any, ...]:
    """Second derivatives: autograd differentiates the reference, as for `glu_backward`."""
    dw, dscores, logits, idx = ctx.saved_tensors
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        given: list[Any] = [None if t is None else alone(t) for t in (dw, dscores, logits)]
        out = _topk_route_backward(given[0], given[1], given[2], idx, *ctx.rest)
        there = [t for t in given if t is not None]
        found = iter(torch.autograd.grad(out, there, ddlogits, create_graph=further, allow_unused=True))
    return *(None if t is None else next(found) for t in given), *(None,) * 9


topk_route_backward = define(
    "topk_route_backward",
    '(Tensor? dw, Tensor? dscores, Tensor logits, Tensor idx, str score="softmax", str norm="none", float eps=0.0, '
    'float factor=1.0, int groups=0, int kept=0, str reducer="max", float fill=0.0) -> Tensor',
    reference=_topk_route_backward,
    fake=lambda dw, dscores, logits, *_: logits.new_empty(logits.shape),
    setup=_second_setup,
    backward=_second_backward,
)
