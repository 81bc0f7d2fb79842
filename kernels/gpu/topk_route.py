"""`topk_route` and its backward: scores, top-k and weights of a router in one pass over its logits.

A program takes so many rows that they have 1024 logits, with the experts filled up to a power of two: 8 of each
thread, a row of 128 experts in one warp, whose reductions are shuffles. Top-k are k rounds of the largest (value,
lowest index), each of which takes its expert out. Values are compared as integers in the order of fp32 with NaN on top,
as in torch.topk: a value taken out is below -inf, and a value comes back from its integer without a second search.

Where groups of experts limit the choice, each has a power of two of columns, so that a group is an axis: 20 experts
take 32 columns. Groups are chosen in rounds as experts are. The backward needs groups for masked weights alone, some of
which may be the fill, of experts outside the kept groups. It knows those by idx: no score is below the fill, and equal
ones come in the order of experts, so that the first `kept` groups in idx are the kept ones. To choose groups again
would be longer, and could end otherwise where two are as good as equal.

Bytes of a row: b E logits read, 4 E scores, 8 k indices and 4 k weights written; backward b E read and b E written,
12 k and 4 E of gradients. Of equal experts the lowest index comes first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch
from .sass import Specimen

Tensor = torch.Tensor
_LOGITS = 1024  # of a program
TAKEN = tl.constexpr(-2147483648)  # below the integers of all numbers
ZERO, LEAST = 0, -2139095041  # integers of 0 and of -inf


@triton.jit
def _ordered(x):
    """int32 in the order of fp32 numbers, with NaN on top and -0 as 0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, key)


@triton.jit
def _number(key):
    """The fp32 number of an integer of `_ordered`."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _softplus(x):
    """max(x, 0) + log1p(e^-|x|), the logarithm as 2 atanh(z), z = e / (2 + e) <= 1/3, to the power 17."""
    e = tl.exp(-tl.abs(x))
    z = e / (2 + e)
    q = z * z
    series = 1 + q * (
        1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15 + q / 17))))))
    )
    return tl.where(x > 0, x, 0.0) + 2 * z * series


@triton.jit
def _score(x, top, total, SCORE: tl.constexpr):
    """F(x), for softmax with the row's largest logit and the sum of exponentials."""
    if SCORE == "softmax":
        return tl.exp(x - top) / total
    elif SCORE == "sigmoid":
        return 1 / (1 + tl.exp(-x))
    elif SCORE == "sqrtsoftplus":
        return tl.sqrt(_softplus(x))
    else:
        return x


@triton.jit
def _experts(col, E, SIZE: tl.constexpr, SP: tl.constexpr):
    """Experts of columns, of which each group of SIZE has SP, and whether there is one."""
    if SIZE == SP:
        return col, col < E
    else:
        expert = col // SP * SIZE + col % SP
        return expert, (col % SP < SIZE) & (expert < E)


@triton.jit
def _two_largest(a, a2, b, b2):
    return tl.maximum(a, b), tl.maximum(tl.minimum(a, b), tl.maximum(a2, b2))


@triton.jit
def _limited(
    key, BT: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr,
    TOP2: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """Keys [BT, GP * SP] with FILL outside the KEPT best groups; those without an expert stay below all others."""
    grouped, group = tl.reshape(key, (BT, GP, SP)), tl.arange(0, GP)[None, :]
    if TOP2:
        a, b = tl.reduce((grouped, tl.full((BT, GP, SP), TAKEN, tl.int32)), 2, _two_largest)
        best = _ordered(_number(a) + _number(b))
    else:
        best = tl.max(grouped, 2)
    best = tl.where(group < GROUPS, best, TAKEN)
    for _ in tl.static_range(KEPT):
        _, i = tl.max(best, 1, return_indices=True, return_indices_tie_break_left=True)
        best = tl.where(group == i[:, None], TAKEN, best)
    stays = (best == TAKEN)[:, :, None] | (grouped == TAKEN)
    return tl.reshape(tl.where(stays, grouped, FILL), (BT, GP * SP))


@triton.jit
def _rows(logits, T, E, BT: tl.constexpr, EP: tl.constexpr, SIZE: tl.constexpr, SP: tl.constexpr, SCORE: tl.constexpr):
    """This program's rows (int64), columns and their experts, masks, logits in fp32, and what `_score` needs."""
    row, col = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, EP)
    expert, real = _experts(col, E, SIZE, SP)
    inside = (row < T)[:, None] & real[None, :]
    x = tl.load(logits + row[:, None] * E + expert[None, :], mask=inside, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 1)
    total = top
    if SCORE == "softmax":
        total = tl.sum(tl.exp(x - top[:, None]), 1)
    return row, col, expert, real, inside, x, top, total


@triton.jit
def _topk_route(
    logits, bias, scores, idx, w, T, E, eps, factor,
    K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr, SIZE: tl.constexpr,
    SCORE: tl.constexpr, OF_LOGITS: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr, FILL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row, col, expert, real, inside, x, top, total = _rows(logits, T, E, BT, GP * SP, SIZE, SP, SCORE)
    s = _score(x, top[:, None], total[:, None], SCORE)
    tl.store(scores + row[:, None] * E + expert[None, :], s, mask=inside)
    choice = x if OF_LOGITS else s
    if BIAS:
        choice += tl.load(bias + expert, mask=real, other=0.0).to(tl.float32)[None, :]
    key = tl.where(real[None, :], _ordered(choice), TAKEN)
    if GROUPS:
        key = _limited(key, BT, GROUPS, KEPT, GP, SP, TOP2, FILL)

    at_k = tl.arange(0, KP)[None, :]
    chosen, start = tl.zeros((BT, KP), tl.int32), tl.zeros((BT, KP), tl.float32)
    for j in tl.static_range(K):
        best, i = tl.max(key, 1, return_indices=True, return_indices_tie_break_left=True)
        here = col[None, :] == i[:, None]
        if BIAS or (GROUPS and not MASKED):
            value = tl.sum(tl.where(here, s, 0.0), 1)  # one term
        else:
            value = _number(best)
            if OF_LOGITS:
                value = _score(value, top, total, SCORE)
        key = tl.where(here, TAKEN, key)
        chosen, start = tl.where(at_k == j, i[:, None], chosen), tl.where(at_k == j, value[:, None], start)

    if NORM == "softmax":
        start = tl.where(at_k < K, start, float("-inf"))
        start = tl.exp(start - tl.max(start, 1)[:, None])
    if NORM != "none":
        of_k = tl.sum(start, 1)[:, None]  # filled up with zeros
        if NORM == "sum":
            of_k += eps
        elif NORM == "clamp":
            of_k = tl.where(of_k < eps, eps, of_k)
        start = start / of_k
    out, there = row[:, None] * K + at_k, (row < T)[:, None] & (at_k < K)
    chosen, _ = _experts(chosen, E, SIZE, SP)
    tl.store(idx + out, chosen.to(tl.int64), mask=there)
    tl.store(w + out, (start * factor).to(w.dtype.element_ty), mask=there)


@triton.jit
def _start_gradient(dw, s, dot, total, NORM: tl.constexpr):
    """Of scores at chosen experts: `total` and `dot` are the row's, as `_topk_route_backward` makes them."""
    if NORM == "softmax":
        return s / total * (dw - dot)
    elif NORM == "none":
        return dw
    else:
        return (dw - dot) / total


@triton.jit
def _outside(group, at_k, BT: tl.constexpr, K: tl.constexpr, KEPT: tl.constexpr):
    """Whether the groups [BT, KP] of chosen experts are others than the first KEPT; -1 is none."""
    found = tl.zeros((BT,), tl.int32)
    for j in tl.static_range(K):
        here = tl.sum(tl.where(at_k == j, group, 0), 1)
        new = (here >= 0) & (found < KEPT)
        group = tl.where(new[:, None] & (group == here[:, None]), -1, group)
        found += new.to(tl.int32)
    return group >= 0


@triton.jit
def _topk_route_backward(
    dw, dscores, logits, idx, dlogits, T, E, eps, factor,
    K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr, EP: tl.constexpr,
    SCORE: tl.constexpr, NORM: tl.constexpr, DW: tl.constexpr, DSCORES: tl.constexpr,
    SIZE: tl.constexpr, KEPT: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    row, col, _, _, inside, x, top, total = _rows(logits, T, E, BT, EP, EP, EP, SCORE)
    s = _score(x, top[:, None], total[:, None], SCORE)
    at = row[:, None] * E + col[None, :]
    ds = tl.zeros((BT, EP), tl.float32)
    if DSCORES:
        ds += tl.load(dscores + at, mask=inside, other=0.0).to(tl.float32)
    if DW:
        at_k = tl.arange(0, KP)[None, :]
        there = (row < T)[:, None] & (at_k < K)
        i = tl.load(idx + row[:, None] * K + at_k, mask=there, other=0)
        d = factor * tl.load(dw + row[:, None] * K + at_k, mask=there, other=0.0).to(tl.float32)
        # The chosen logits again, from a cache: shorter than a search of each among the row's.
        x_k = tl.load(logits + row[:, None] * E + i, mask=there, other=0.0).to(tl.float32)
        s_k = _score(x_k, top[:, None], total[:, None], SCORE)
        if KEPT:
            filled = _outside(tl.where(there, i.to(tl.int32) // SIZE, -1), at_k, BT, K, KEPT)
            s_k = tl.where(filled, FILL, s_k)
        if NORM == "softmax":
            s_k = tl.where(at_k < K, s_k, float("-inf"))
            s_k = tl.exp(s_k - tl.max(s_k, 1)[:, None])
        s_k = tl.where(at_k < K, s_k, 0.0)
        of_k = tl.sum(s_k, 1)
        if NORM == "sum":
            of_k += eps
        dot = tl.sum(d * s_k, 1) / of_k
        if NORM == "clamp":
            dot, of_k = tl.where(of_k < eps, 0.0, dot), tl.where(of_k < eps, eps, of_k)
        g = _start_gradient(d, s_k, dot[:, None], of_k[:, None], NORM)
        if KEPT:
            g = tl.where(filled, 0.0, g)
        for j in tl.static_range(K):
            here = tl.sum(tl.where(at_k == j, i, 0), 1)[:, None] == col[None, :]
            ds += tl.where(here, tl.sum(tl.where(at_k == j, g, 0.0), 1)[:, None], 0.0)
    if SCORE == "softmax":
        ds = s * (ds - tl.sum(s * ds, 1)[:, None])
    elif SCORE == "sigmoid":
        ds = ds * s * (1 - s)
    elif SCORE == "sqrtsoftplus":
        ds = tl.where(s == 0, 0.0, ds / (2 * s) / (1 + tl.exp(-x)))
    tl.store(dlogits + at, ds.to(dlogits.dtype.element_ty), mask=inside)


def _columns(E: int, groups: int) -> tuple[int, int, int]:
    """Groups and columns of each, both powers of two, and experts of each; without groups all are one."""
    size = E // groups if groups else E
    sp = triton.next_power_of_2(size) if groups else max(16, triton.next_power_of_2(size))
    return max(triton.next_power_of_2(max(groups, 1)), 16 // sp), sp, size if groups else sp


def _constants(columns: int, k: int) -> dict[str, int]:
    # 8 scores of a thread stay in registers, with their keys, at any E.
    return {"K": k, "KP": triton.next_power_of_2(k), "BT": max(1, _LOGITS // columns), "num_warps": 4}


def topk_route(
    logits: Tensor, bias: Tensor | None, k: int, score: str = "softmax", order: str = "scores",
    norm: str = "none", eps: float = 0.0, factor: float = 1.0, out: torch.dtype | None = None,
    groups: int = 0, kept: int = 0, reducer: str = "max", fill: float = 0.0, masked: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `moefx.dialect.topk_route`: logits [.., E] -> scores fp32, idx int64, w in `out` or fp32."""
    E, device = logits.shape[-1], logits.device
    T, shape = logits.numel() // E, (*logits.shape[:-1], k)
    scores = torch.empty(logits.shape, dtype=torch.float32, device=device)
    idx = torch.empty(shape, dtype=torch.int64, device=device)
    w = torch.empty(shape, dtype=out or torch.float32, device=device)
    gp, sp, size = _columns(E, groups)
    c, x = _constants(gp * sp, k), logits.contiguous()
    shift = x if bias is None else bias.contiguous()
    launch(
        _topk_route, (cdiv(T, c["BT"]),), x, shift, scores, idx, w, T, E, eps, factor, GP=gp, SP=sp, SIZE=size,
        SCORE=score, OF_LOGITS=order == "logits", BIAS=bias is not None, NORM=norm, GROUPS=groups, KEPT=kept,
        TOP2=reducer == "top2sum", FILL=LEAST if fill else ZERO, MASKED=masked, **c,
    )  # fmt: skip
    return scores, idx, w


def topk_route_backward(
    dw: Tensor | None, dscores: Tensor | None, logits: Tensor, idx: Tensor,
    score: str = "softmax", norm: str = "none", eps: float = 0.0, factor: float = 1.0,
    groups: int = 0, kept: int = 0, reducer: str = "max", fill: float = 0.0,
) -> Tensor:  # fmt: skip
    """Gradient of the logits [.., E], in their dtype; the groups are those of masked weights."""
    E, x = logits.shape[-1], logits.contiguous()
    T = x.numel() // E
    dlogits = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ep = max(16, triton.next_power_of_2(E))
    c, given = _constants(ep, idx.shape[-1]), [x if t is None else t.contiguous() for t in (dw, dscores)]
    launch(
        _topk_route_backward, (cdiv(T, c["BT"]),), *given, x, idx.contiguous(), dlogits, T, E, eps, factor, EP=ep,
        SCORE=score, NORM=norm, DW=dw is not None, DSCORES=dscores is not None,
        SIZE=E // max(groups, 1), KEPT=kept if groups else 0, FILL=fill, **c,
    )  # fmt: skip
    return dlogits


def specimens() -> list[Specimen]:
    """Qwen3-30B-A3B, DeepSeek-V3, DeepSeek-V2 (groups of 20, masked weights), Qwen3-Next, and an odd one."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def pair(
        T: int, E: int, k: int, score: str, norm: str, dtype: torch.dtype, bias: bool, *groups: Any
    ) -> tuple[Any, Any]:
        x, f32 = meta(T, E, dtype=dtype), torch.float32
        shift = meta(E, dtype=f32) if bias else None
        dw, dscores, idx = meta(T, k, dtype=f32), meta(T, E, dtype=f32), meta(T, k, dtype=torch.int64)
        of_masked = groups[:4] if groups and groups[4] else ()
        return (
            lambda: topk_route(x, shift, k, score, "scores", norm, 0.0, 1.0, None, *groups),
            lambda: topk_route_backward(dw, dscores, x, idx, score, norm, 0.0, 1.0, *of_masked),
        )

    f32, bf16, found = torch.float32, torch.bfloat16, []
    v3, v2 = (8, 4, "top2sum", -torch.inf, False), (8, 3, "max", 0.0, True)
    for name, *sizes in (
        ("Qwen3", 8192, 128, 8, "softmax", "sum", bf16, False),
        ("DeepSeek-V3", 8192, 256, 8, "sigmoid", "sum", f32, True, *v3),
        ("DeepSeek-V2", 8192, 160, 6, "softmax", "none", f32, False, *v2),
        ("E=512 k=10", 8192, 512, 10, "softmax", "sum", bf16, False),
        ("E=60 k=6", 4001, 60, 6, "sqrtsoftplus", "clamp", f32, True),
    ):
        forward, backward = pair(*sizes)  # type: ignore[arg-type]
        found.append(Specimen(name, forward, has=("SHFL",), registers=96))
        found.append(Specimen(f"{name} backward", backward, has=("SHFL",), registers=144))
    return found
