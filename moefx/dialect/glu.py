"""Activations between the two expert products: gated (GLU) and plain, with an optional weight per row.

A kind is a short string that a printed graph shows: the activation, with `plain` in front when there is no gate (h is
[S, I]) and `interleaved` when gate and up columns alternate instead of being two halves of h [S, 2I]:

    silu, gelu, gelu_tanh, relu, relu2 (squared ReLU)     act(gate) * up, or act(h) when plain
    clamp(limit,alpha)                                    gpt-oss: g = min(gate, limit), u = clamp(up, -limit, limit),
                                                          g * sigmoid(alpha * g) * (u + 1); gated only
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

import moefx.kernels.glu  # noqa: F401  registers the CPU provider before the reference
from moefx.errors import InputError, nearest

from ._op import alone, define

Tensor = torch.Tensor
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamp")
FLAGS: tuple[list[str], ...] = ([], ["plain"], ["interleaved"])


_NUMBER = r"([-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|inf))"


def _shortest(x: float) -> str:
    """The shortest text that reads back as `x`: the string is what the op computes with."""
    return f"{x:g}" if float(f"{x:g}") == x else repr(x)


@dataclass(frozen=True)
class GluKind:
    """Parsed form of a kind string. `limit` and `alpha` are those of `clamp`."""

    act: str
    gated: bool = True
    interleaved: bool = False
    limit: float = 0.0
    alpha: float = 0.0

    @staticmethod
    @lru_cache
    def parse(text: str) -> GluKind:
        """Read `[plain |interleaved ]act[(limit,alpha)]`; raises `InputError` on anything else."""
        *flags, name = text.split(" ")
        match = re.fullmatch(rf"(\w+)(?:\({_NUMBER},{_NUMBER}\))?", name)
        if match is None or match[1] not in ACTIVATIONS or (match[1] == "clamp") != (match[2] is not None):
            todo = f"{nearest(name.split('(')[0], ACTIVATIONS)}; only clamp takes numbers: clamp(limit,alpha)"
            raise InputError(f"unknown activation kind {text!r}", todo=todo)
        if flags not in FLAGS or (match[1] == "clamp" and "plain" in flags):
            todo = "write nothing, 'plain' or 'interleaved' before the name; clamp is always gated"
            raise InputError(f"contradictory activation kind {text!r}", todo=todo)
        limit, alpha = float(match[2] or 0), float(match[3] or 0)
        if match[1] == "clamp" and not limit > 0:
            raise InputError(f"activation kind {text!r} clamps to {limit:g}", todo="give a limit above zero")
        return GluKind(match[1], "plain" not in flags, "interleaved" in flags, limit, alpha)

    def __str__(self) -> str:
        name = f"{self.act}({_shortest(self.limit)},{_shortest(self.alpha)})" if self.act == "clamp" else self.act
        return ("" if self.gated else "plain ") + ("interleaved " if self.interleaved else "") + name


def _split(h: Tensor, kind: GluKind) -> tuple[Tensor, Tensor]:
    if kind.interleaved:
        return h[..., ::2], h[..., 1::2]
    gate, up = h.chunk(2, -1)
    return gate, up


def _join(dgate: Tensor, dup: Tensor, kind: GluKind) -> Tensor:
    return torch.stack([dgate, dup], -1).flatten(-2) if kind.interleaved else torch.cat([dgate, dup], -1)


def _act(g: Tensor, act: str) -> Tensor:
    if act == "silu":
        return g * torch.sigmoid(g)
    if act == "gelu":
        return g * 0.5 * (1 + torch.erf(g * math.sqrt(0.5)))
    if act == "gelu_tanh":
        return 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g * g * g)))
    return torch.relu(g) if act == "relu" else torch.relu(g).square()


def _act_derivative(g: Tensor, act: str) -> Tensor:
    if act == "silu":
        s = torch.sigmoid(g)
        return s * (1 + g * (1 - s))
    if act == "gelu":
        return 0.5 * (1 + torch.erf(g * math.sqrt(0.5))) + g * torch.exp(-0.5 * g * g) * (1 / math.sqrt(2 * math.pi))
    if act == "gelu_tanh":
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (g + 0.044715 * g * g * g))
        return 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * c * (1 + 3 * 0.044715 * g * g)
    return (g > 0).to(g.dtype) if act == "relu" else 2 * torch.relu(g)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def glu_reference(h: Tensor, w_S: Tensor | None, kind: str) -> Tensor:
    """Definition of `glu`, computed in fp32 (float64 for float64) and rounded once."""
    k = GluKind.parse(kind)
    if not k.gated:
        a = _act(_wide(h), k.act)
    else:
        gate, up = _split(_wide(h), k)
        if k.act == "clamp":
            g = gate.clamp(max=k.limit)
            a = g * torch.sigmoid(k.alpha * g) * (up.clamp(-k.limit, k.limit) + 1)
        else:
            a = _act(gate, k.act) * up
    if w_S is not None:
        a = a * _wide(w_S)[:, None]
    return a.to(h.dtype)


def glu_backward_reference(da: Tensor, h: Tensor, w_S: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """Gradients with respect to `h` and the row weights (an empty tensor when there are none)."""
    k = GluKind.parse(kind)
    d, wide = _wide(da), _wide(h)
    dw = da.new_empty(0)
    if w_S is not None:
        dw = (d * _wide(glu_reference(wide, None, kind))).sum(-1).to(w_S.dtype)
        d = d * _wide(w_S)[:, None]
    if not k.gated:
        return (d * _act_derivative(wide, k.act)).to(h.dtype), dw
    gate, up = _split(wide, k)
    if k.act == "clamp":
        g, u = gate.clamp(max=k.limit), up.clamp(-k.limit, k.limit)
        s = torch.sigmoid(k.alpha * g)
        dgate = torch.where(gate <= k.limit, d * (u + 1) * s * (1 + k.alpha * g * (1 - s)), 0)
        dup = torch.where((up >= -k.limit) & (up <= k.limit), d * g * s, 0)
    else:
        dgate, dup = d * up * _act_derivative(gate, k.act), d * _act(gate, k.act)
    return _join(dgate, dup, k).to(h.dtype), dw


def _check(h: Tensor, w: Tensor | None, kind: str) -> None:
    width = h.shape[-1]
    if GluKind.parse(kind).gated:
        torch._check(width % 2 == 0, lambda: f"glu: {kind!r} needs gate and up columns, h is {tuple(h.shape)}")
    if w is not None:
        torch._check(h.dim() == 2, lambda: f"glu: row weights need h [S, width], got {tuple(h.shape)}")
        torch._check(w.shape == h.shape[:1], lambda: f"glu: h is {tuple(h.shape)} but w is {tuple(w.shape)}, not [S]")


def _glu_fake(h: Tensor, w: Tensor | None, kind: str) -> Tensor:
    width = h.shape[-1]
    return h.new_empty(*h.shape[:-1], width // 2 if GluKind.parse(kind).gated else width)


def _glu_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, w, ctx.kind = inputs
    ctx.save_for_backward(h, w)


def _glu_backward(ctx: Any, da: Tensor) -> tuple[Any, ...]:
    h, w = ctx.saved_tensors
    dh, dw = torch.ops.moefx.glu_backward(da, h, w, ctx.kind)
    return dh, None if w is None else dw, None


glu = define(
    "glu",
    "(Tensor h, Tensor? w, str kind) -> Tensor",
    reference=glu_reference,
    fake=_glu_fake,
    check=_check,
    setup=_glu_setup,
    backward=_glu_backward,
)


def _glu_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    da, h, w, ctx.kind = inputs
    ctx.save_for_backward(da, h, w)


def _glu_double_backward(ctx: Any, ddh: Tensor, ddw: Tensor) -> tuple[Any, ...]:
    """Second derivatives (third ones too): autograd differentiates the reference. Too rare to be written by hand."""
    da, h, w = ctx.saved_tensors
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because one operand may itself depend on another: each is differentiated as if it stood alone.
        given = [alone(t) for t in (da, h, w) if t is not None]
        outputs = glu_backward_reference(given[0], given[1], given[2] if w is not None else None, ctx.kind)
        n = len(given) - 1
        grads = torch.autograd.grad(outputs[:n], given, (ddh, ddw)[:n], allow_unused=True, create_graph=further)
    return *grads, *(None,) * (4 - len(given))


def _gradients_fake(da: Tensor, h: Tensor, w: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), da.new_empty(0) if w is None else w.new_empty(w.shape)


glu_backward = define(
    "glu_backward",
    "(Tensor da, Tensor h, Tensor? w, str kind) -> (Tensor, Tensor)",
    reference=glu_backward_reference,
    fake=_gradients_fake,
    check=lambda da, h, w, kind: _check(h, w, kind),
    setup=_glu_backward_setup,
    backward=_glu_double_backward,
)


def _again_reference(da: Tensor, h: Tensor, w_S: Tensor | None, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Definition of `glu_backward_again`: the gradients, and the activation that they are those of."""
    dh, dw = torch.ops.moefx.glu_backward(da, h, w_S, kind)
    return dh, dw, torch.ops.moefx.glu(h, w_S, kind)


def _again_backward(ctx: Any, ddh: Tensor, ddw: Tensor, d_again: Tensor) -> tuple[Any, ...]:
    """The gradient of each op that it stands for."""
    dda, *of_gradients = _glu_double_backward(ctx, ddh, ddw)[:3]
    _, h, w = ctx.saved_tensors
    of_value = torch.ops.moefx.glu_backward(d_again, h, w, ctx.kind)
    both = zip((h, w), of_gradients, of_value, strict=True)
    return dda, *(None if t is None else b if a is None else a + b for t, a, b in both), None


# What a backward that keeps `h` alone needs of it, from one reading: dh, dw, and `glu(h, w, kind)`.
glu_backward_again = define(
    "glu_backward_again",
    "(Tensor da, Tensor h, Tensor? w, str kind) -> (Tensor, Tensor, Tensor)",
    reference=_again_reference,
    fake=lambda da, h, w, kind: (*_gradients_fake(da, h, w, kind), _glu_fake(h, w, kind)),
    check=lambda da, h, w, kind: _check(h, w, kind),
    setup=_glu_backward_setup,
    backward=_again_backward,
)
