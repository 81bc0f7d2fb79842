"""`moefx.route`: a router in its normal form, a marker op that `raise_routers` emits and `expand_routers` rewrites.

    route(logits [.., E], bias [E]?, scale [E]?, spec) -> scores [.., E], idx [.., k] int64, w [.., k]

    scores = F(logits)                                    F: softmax, sigmoid, sqrtsoftplus, identity
    choice = scores or logits, + bias, outside the kept groups filled with 0 or -inf
    idx    = top-k of choice
    w      = scores at idx, normalised over the k, times a factor, times scale[idx], cast

The bias (DeepSeek-V3's correction bias) takes part in the choice alone and has no gradient. Noise stays in the graph,
in front of the logits. The spec string holds everything but the tensors, so a printed graph can be read.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from operator import getitem
from typing import Any

import torch

from moefx.errors import InputError

from ._op import LIB

Tensor = torch.Tensor
SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "identity")
NORMS = ("none", "sum", "clamp", "softmax")
REDUCERS = ("max", "top2sum")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# How a step is written: `call(function or method name, *args)` runs it, or makes a node of it.
Call = Callable[..., Any]

_SPEC = re.compile(
    r"(?P<noise>noise \| )?(?P<score>\w+) (?P<dtype>\w+) \| (?P<bias>bias \| )?"
    r"(?:groups (?P<count>\d+) keep (?P<kept>\d+) by (?P<reducer>\w+) fill (?P<fill>0|-inf)(?P<masked> masked)? \| )?"
    r"top(?P<k>\d+)(?P<logits> of logits)?(?P<unsorted> unsorted)?"
    r"(?: \| (?P<norm>sum|softmax)(?: (?P<how>\+|>=) (?P<eps>[^ ]+))?)?"
    r"(?: \| x (?P<factor>[^ ]+))?(?P<per_expert> \| per-expert)?(?: \| to (?P<out>\w+))?"
)


@dataclass(frozen=True)
class Groups:
    """Group-limited choice: of `count` equal groups of experts those `kept` with the best score take part.

    The score of a group is the `max` of its experts, or the sum of its best two (`top2sum`). The others' choice is
    filled with `fill`, 0 or -inf.
    """

    count: int
    kept: int
    reducer: str = "max"
    fill: float = -math.inf


@dataclass(frozen=True)
class RouteSpec:
    """A router's normal form. Prints as `softmax f32 | top2 | sum`, or for DeepSeek-V3 as
    `sigmoid f32 | bias | groups 8 keep 4 by top2sum fill -inf | top8 unsorted | sum + 1e-20 | x 2.5`.

    Attributes:
        score: F, one of `SCORES`.
        k: experts per token.
        dtype: dtype of `DTYPES` in which the scores are computed.
        order: what the top-k is taken of: "scores", or the "logits" in their own dtype.
        bias: whether a bias is added for the choice.
        groups: the group limit, if any.
        masked: without a bias: the weights are the top-k values of the filled scores, so that an expert outside the
            kept groups that is chosen all the same gets the fill; otherwise they are read from the scores.
        norm: "none", "sum" (w / (sum + eps)), "clamp" (w / max(sum, eps)) or "softmax" over the k.
        eps: see `norm`.
        factor: number that multiplies the weights.
        per_expert: whether a scale per expert multiplies them.
        sorted: whether the k come in descending order.
        out: dtype that the weights are cast to, or None for the dtype in which they come.
        noise: whether random numbers were added to the logits in front of the op. A note; the op does nothing with it.

    Raises:
        InputError: values that contradict each other.
    """

    score: str
    k: int
    dtype: str = "f32"
    order: str = "scores"
    bias: bool = False
    groups: Groups | None = None
    masked: bool = False
    norm: str = "none"
    eps: float = 0.0
    factor: float = 1.0
    per_expert: bool = False
    sorted: bool = True
    out: str | None = None
    noise: bool = False

    def __post_init__(self) -> None:
        g = self.groups
        checks = {
            f"score {self.score!r}": self.score in SCORES,
            f"top-k of {self.k}": self.k >= 1,
            f"dtype {self.dtype!r}": self.dtype in DTYPES,
            f"cast to {self.out!r}": self.out is None or self.out in DTYPES,
            f"top-k of {self.order!r}": self.order in ("scores", "logits"),
            "identity scores are the logits; their order is 'scores'": self.order == "scores"
            or self.score != "identity",
            f"groups {g}": g is None
            or (1 <= g.kept < g.count and g.reducer in REDUCERS and g.fill in (0.0, -math.inf)),
            "masked weights with a bias, of logits, or without groups": not self.masked
            or (g is not None and not self.bias and self.order == "scores"),
            f"normaliser {self.norm!r} with {self.eps}": self.norm in NORMS
            and math.isfinite(self.eps)
            and (self.eps > 0 if self.norm == "clamp" else self.eps == 0 or (self.norm == "sum" and self.eps > 0)),
            f"factor {self.factor}": math.isfinite(self.factor) and self.factor != 0,
        }
        for what, holds in checks.items():
            if not holds:
                raise InputError(f"not a router: {what}", todo="see moefx.dialect.route.RouteSpec")

    @staticmethod
    @lru_cache
    def parse(text: str) -> RouteSpec:
        """Inverse of `str(spec)`; raises `InputError` for anything that it would not print."""
        m = _SPEC.fullmatch(text)
        spec = None
        if m is not None:
            with contextlib.suppress(ValueError):  # a number that is none
                spec = _from_match(m)
        if spec is None or str(spec) != text:
            raise InputError(f"unreadable route spec {text!r}", todo="write one like 'softmax f32 | top2 | sum'")
        return spec

    def __str__(self) -> str:
        g = self.groups
        parts = ["noise"] if self.noise else []
        parts += [f"{self.score} {self.dtype}"]
        parts += ["bias"] if self.bias else []
        if g is not None:
            fill = "0" if g.fill == 0 else "-inf"
            masked = " masked" if self.masked else ""
            parts += [f"groups {g.count} keep {g.kept} by {g.reducer} fill {fill}{masked}"]
        of = " of logits" if self.order == "logits" else ""
        parts += [f"top{self.k}{of}{'' if self.sorted else ' unsorted'}"]
        if self.norm != "none":
            eps = "" if self.eps == 0 else f" {'>=' if self.norm == 'clamp' else '+'} {self.eps!r}"
            parts += [f"{'softmax' if self.norm == 'softmax' else 'sum'}{eps}"]
        parts += [f"x {self.factor!r}"] if self.factor != 1 else []
        parts += ["per-expert"] if self.per_expert else []
        parts += [f"to {self.out}"] if self.out is not None else []
        return " | ".join(parts)


def _from_match(m: re.Match[str]) -> RouteSpec:
    groups = None
    if m["count"] is not None:
        groups = Groups(int(m["count"]), int(m["kept"]), m["reducer"], 0.0 if m["fill"] == "0" else -math.inf)
    return RouteSpec(
        score=m["score"],
        k=int(m["k"]),
        dtype=m["dtype"],
        order="logits" if m["logits"] else "scores",
        bias=m["bias"] is not None,
        groups=groups,
        masked=m["masked"] is not None,
        norm="clamp" if m["how"] == ">=" else (m["norm"] or "none"),
        eps=float(m["eps"] or 0.0),
        factor=float(m["factor"] or 1.0),
        per_expert=m["per_expert"] is not None,
        sorted=m["unsorted"] is None,
        out=m["out"],
        noise=m["noise"] is not None,
    )


# --- the definition, in steps: run on tensors by `eager`, or written into a graph by `expand_routers`


def eager(target: Any, *args: Any, **kwargs: Any) -> Any:
    """The `call` that computes: a function, or a method by name."""
    return getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)


def write_scores(call: Call, s: RouteSpec, logits: Any, dtype: torch.dtype) -> Any:
    """F(logits) of logits of the given dtype; the logits themselves where there is nothing to compute."""
    to = DTYPES[s.dtype]
    if s.score == "softmax":
        return call(torch.softmax, logits, -1) if to == dtype else call(torch.softmax, logits, -1, dtype=to)
    x = logits if to == dtype else call("to", logits, to)
    if s.score == "sigmoid":
        return call(torch.sigmoid, x)
    return call(torch.sqrt, call(torch.nn.functional.softplus, x)) if s.score == "sqrtsoftplus" else x


def write_others(call: Call, g: Groups, grouped: Any) -> Any:
    """Which groups are not kept, bool [.., count], of what experts are chosen by, [.., count, experts of a group]."""
    if g.reducer == "max":
        best = call(torch.amax, grouped, -1)
    else:
        best = call(torch.sum, call(getitem, call(torch.topk, grouped, 2, -1), 0), -1)
    kept = call(getitem, call(torch.topk, best, g.kept, -1, True, False), 1)
    return call("scatter", call(torch.ones_like, best, dtype=torch.bool), -1, kept, False)


def write_choice(call: Call, s: RouteSpec, logits: Any, scores: Any, bias: Any, experts: int) -> tuple[Any, Any]:
    """Top-k values and indices [.., k] of what experts are chosen by."""
    choice = scores if s.order == "scores" else logits
    if s.bias:
        choice = call(torch.add, choice, bias)
    if (g := s.groups) is not None:
        grouped = call("unflatten", choice, -1, (g.count, experts // g.count))
        others = write_others(call, g, grouped)
        choice = call("flatten", call("masked_fill", grouped, call("unsqueeze", others, -1), g.fill), -2)
    top = call(torch.topk, choice, s.k, -1, True, s.sorted)
    return call(getitem, top, 0), call(getitem, top, 1)


def write_weights(call: Call, s: RouteSpec, w: Any, idx: Any, scale: Any) -> Any:
    """From scores at the chosen experts to weights, both [.., k]."""
    if s.norm == "softmax":
        w = call(torch.softmax, w, -1)
    elif s.norm != "none":
        total = call(torch.sum, w, -1, keepdim=True)
        if s.norm == "clamp":
            total = call(torch.clamp, total, min=s.eps)
        elif s.eps:
            total = call(torch.add, total, s.eps)
        w = call(torch.div, w, total)
    if s.factor != 1:
        w = call(torch.mul, w, s.factor)
    return write_scale(call, s, w, idx, scale)


def write_scale(call: Call, s: RouteSpec, w: Any, idx: Any, scale: Any) -> Any:
    """The last steps of `write_weights`: the scale per expert, and the cast."""
    if s.per_expert:
        w = call(torch.mul, w, call(getitem, scale, idx))
    return w if s.out is None else call("to", w, DTYPES[s.out])


def write_gates(call: Call, chosen: Any, normalise: str, factor: float) -> Any:
    """fp32 weights [.., k] from the logits of a router of token ids at the chosen experts; see `moefx.Routing`."""
    w = call("to", chosen, torch.float32)
    if normalise == "softmax":
        w = call(torch.softmax, w, -1)
    else:
        w = call(torch.sigmoid, w)
        w = call(torch.div, w, call(torch.sum, w, -1, keepdim=True))
    return w if factor == 1 else call(torch.mul, w, factor)


def write_start(call: Call, s: RouteSpec, scores: Any, values: Any, idx: Any, dtype: torch.dtype) -> Any:
    """What the weights start from, [.., k]: the top-k's own values where that is possible, else the scores at idx."""
    if s.bias or (s.groups is not None and not s.masked):
        return call(torch.gather, scores, -1, idx)
    if s.order == "scores":
        return values
    # Elementwise scores of the k chosen logits, as people write it: vectorised, they may round otherwise than among E.
    return call(torch.gather, scores, -1, idx) if s.score == "softmax" else write_scores(call, s, values, dtype)


def write(
    call: Call, s: RouteSpec, logits: Any, bias: Any, scale: Any, dtype: torch.dtype, experts: int
) -> tuple[Any, Any, Any]:
    """All steps: scores, idx, w. `dtype` and `experts` are those of the logits."""
    scores = write_scores(call, s, logits, dtype)
    values, idx = write_choice(call, s, logits, scores, bias, experts)
    start = write_start(call, s, scores, values, idx, dtype)
    return scores, idx, write_weights(call, s, start, idx, scale)


def expand(logits: Tensor, bias: Tensor | None, scale: Tensor | None, spec: str) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `route`. Raises `InputError` when the tensors are not those that the spec speaks of."""
    s, E = RouteSpec.parse(spec), logits.shape[-1]
    for name, t, wanted in (("bias", bias, s.bias), ("scale", scale, s.per_expert)):
        if (t is not None) != wanted or (t is not None and tuple(t.shape) != (E,)):
            got = "none" if t is None else f"one of shape {tuple(t.shape)}"
            raise InputError(f"route {spec!r} got a {name}: {got}", todo=f"pass [{E}]" if wanted else "pass None")
    if s.k > E or (s.groups is not None and E % s.groups.count):
        raise InputError(f"route {spec!r} got logits of {E} experts", todo="k and the groups must fit them")
    bias = None if bias is None else bias.detach()
    scores, idx, w = write(eager, s, logits, bias, scale, logits.dtype, E)
    # An op returns no view of what it was given.
    scores = scores.clone(memory_format=torch.contiguous_format) if scores is logits else scores.contiguous()
    return scores, idx.contiguous(), w.contiguous()


LIB.define("route(Tensor logits, Tensor? bias, Tensor? scale, str spec) -> (Tensor scores, Tensor idx, Tensor w)")
LIB.impl("route", expand, "CompositeImplicitAutograd")
route = torch.ops.moefx.route
