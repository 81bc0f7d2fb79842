"""Activations on registers: what `glu` kernels and epilogues of products compute, in fp32.

The formulas, their order of operations, and what NaN and infinities do are those of the definition in `moefx.dialect`.
Kernels that use them turn the fusion of products and sums off (`EXACT`), so that one formula gives one result wherever
it is inlined. The exponential is the hardware's: it is off by about |x| + 2 units in the last place.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

EXACT = {"enable_fp_fusion": False}


@lru_cache
def constants(kind: str) -> dict[str, Any]:
    """The constexprs by which a kernel knows a kind: ACT, LAYOUT ("plain", "halves", "interleaved"), LIMIT, ALPHA."""
    *flags, name = kind.split(" ")
    act, _, numbers = name.rstrip(")").partition("(")
    limit, alpha = map(float, numbers.split(",")) if numbers else (0.0, 0.0)
    return {"ACT": act, "LAYOUT": flags[0] if flags else "halves", "LIMIT": limit, "ALPHA": alpha}


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), in five instructions where a division alone takes eight: no argument needs to be scaled, as
    the root is of 1 or more. Off by 3 units in the last place besides the exponential's; of 1 the root is 1."""
    r = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return r * r


@triton.jit
def act(g, KIND: tl.constexpr):
    """silu, gelu, gelu_tanh, relu or relu2 of fp32 `g`."""
    if KIND == "silu":
        return g * sigmoid(g)
    elif KIND == "gelu":
        return g * 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # (1 + tanh(z)) / 2 is sigmoid(2z): no cancellation where tanh is close to -1.
        return g * sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    else:
        tl.static_assert(KIND == "relu" or KIND == "relu2")
        r = tl.where(g <= 0, 0.0, g)  # NaN stays NaN
        return r if KIND == "relu" else r * r


@triton.jit
def act_derivative(g, KIND: tl.constexpr):
    """The derivative of `act`; that of relu is 0 at 0."""
    if KIND == "silu":
        s = sigmoid(g)
        return s * (1.0 + g * (1.0 - s))
    elif KIND == "gelu":
        return 0.5 * (1.0 + tl.erf(g * 0.7071067811865476)) + g * tl.exp(-0.5 * g * g) * 0.3989422804014327
    elif KIND == "gelu_tanh":
        s = sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        return s + g * (s * (1.0 - s)) * (1.5957691216057308 * (1.0 + 0.134145 * g * g))
    else:
        tl.static_assert(KIND == "relu" or KIND == "relu2")
        return tl.where(g > 0, 1.0, 0.0) if KIND == "relu" else 2.0 * tl.where(g <= 0, 0.0, g)


@triton.jit
def glu_value(gate, up, KIND: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """act(gate) * up, or the clamped form; `up` is None for a plain activation."""
    if KIND == "clamp":
        g = tl.where(gate > LIMIT, LIMIT, gate)
        u = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        return g * sigmoid(ALPHA * g) * (u + 1.0)
    elif up is None:
        return act(gate, KIND)
    else:
        return act(gate, KIND) * up


@triton.jit
def glu_gradients(d, gate, up, KIND: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """`d` times the derivatives of `glu_value` with respect to gate and up (the same twice when `up` is None)."""
    if KIND == "clamp":
        g = tl.where(gate > LIMIT, LIMIT, gate)
        u = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        s = sigmoid(ALPHA * g)
        dgate = tl.where(gate <= LIMIT, d * (u + 1.0) * s * (1.0 + ALPHA * g * (1.0 - s)), 0.0)
        dup = tl.where((up >= -LIMIT) & (up <= LIMIT), d * g * s, 0.0)
    elif up is None:
        dgate = d * act_derivative(gate, KIND)
        dup = dgate
    else:
        dgate = d * up * act_derivative(gate, KIND)
        dup = d * act(gate, KIND)
    return dgate, dup


@triton.jit
def load_pair(h, row, wanted, column, I, COLUMNS: tl.constexpr, LAYOUT: tl.constexpr):
    """Gate and up, [rows, COLUMNS] each in h's dtype, of columns `column`.. of I in the activation; 0 if not `wanted`.

    Both are the same values when the layout is plain. `row` is int [rows], of 64 bits unless row * 2I is below 2^31;
    `wanted` bool [rows].
    """
    at = column + tl.arange(0, COLUMNS)
    if LAYOUT == "interleaved":
        both = 2 * column + tl.arange(0, 2 * COLUMNS)
        mask = wanted[:, None] & (both < 2 * I)[None, :]
        pairs = tl.load(h + row[:, None] * (2 * I) + both[None, :], mask=mask, other=0)
        gate, up = tl.split(tl.reshape(pairs, (row.shape[0], COLUMNS, 2)))
    else:
        mask = wanted[:, None] & (at < I)[None, :]
        if LAYOUT == "halves":
            here = h + row[:, None] * (2 * I) + at[None, :]
            gate = tl.load(here, mask=mask, other=0)
            up = tl.load(here + I, mask=mask, other=0)
        else:
            gate = tl.load(h + row[:, None] * I + at[None, :], mask=mask, other=0)
            up = gate
    return gate, up


@triton.jit
def store_pair(dh, gate, up, row, wanted, column, I, LAYOUT: tl.constexpr):
    """Store gradients of gate and up [rows, columns], in dh's dtype, where `load_pair` reads their operands."""
    COLUMNS: tl.constexpr = gate.shape[1]
    at = column + tl.arange(0, COLUMNS)
    if LAYOUT == "interleaved":
        both = 2 * column + tl.arange(0, 2 * COLUMNS)
        mask = wanted[:, None] & (both < 2 * I)[None, :]
        tl.store(dh + row[:, None] * (2 * I) + both[None, :], tl.interleave(gate, up), mask=mask)
    else:
        mask = wanted[:, None] & (at < I)[None, :]
        if LAYOUT == "halves":
            here = dh + row[:, None] * (2 * I) + at[None, :]
            tl.store(here, gate, mask=mask)
            tl.store(here + I, up, mask=mask)
        else:
            tl.store(dh + row[:, None] * I + at[None, :], gate, mask=mask)
