"""Routing ops: the dispatch plan, and the two row movements that use it.

Shapes: T tokens, k experts per token, E experts, S rows (a static bound), H width. A plan orders the T*k (token,
choice) pairs by expert, stably, and is described by four integer tensors:

    token  int64 [S]    token held by row s, or -1 where the row holds none (padding, or the tail after dropped pairs)
    order  int64 [S]    t * k + j of row s, or -1
    slot   int64 [T, k] row that holds pair (t, j), or -1 where the pair was dropped
    offsets int32 [E+1] first row of each expert, rounded up to `align`; the last entry is the end of the last expert

Indices outside 0..E-1 are dropped: transformers marks pairs owned by another rank with E.
"""

from __future__ import annotations

from typing import Any

import torch

import moefx.kernels.permute
import moefx.kernels.plan  # noqa: F401  both register their providers before the references

from ._op import define

Tensor = torch.Tensor


def rows(pairs: int, experts: int, align: int) -> int:
    """Static number of rows S that holds `pairs` rows in `experts` groups, each rounded up to `align`."""
    return (pairs + experts * (align - 1)) // align * align


def _plan(idx_Tk: Tensor, E: int, align: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs, k = idx_Tk.numel(), max(idx_Tk.shape[-1], 1)
    S, dev = rows(pairs, E, align), idx_Tk.device
    flat = idx_Tk.reshape(-1).long()
    bucket = torch.where((flat >= 0) & (flat < E), flat, E)
    sort = bucket.argsort(stable=True)
    counts = torch.zeros(E + 1, dtype=torch.int64, device=dev).scatter_add_(0, bucket, torch.ones_like(bucket))
    padded = (counts[:E] + align - 1) // align * align
    ends = torch.cat([padded.new_zeros(1), padded.cumsum(0)])
    # Row of the p-th pair in sorted order: its expert's first row, plus its rank within the expert.
    first = counts.cumsum(0) - counts
    group = bucket[sort]
    dest = ends[group] + torch.arange(pairs, device=dev) - first[group]
    kept = group < E
    slot = torch.full((pairs,), -1, dtype=torch.int64, device=dev)
    slot[sort] = torch.where(kept, dest, -1)
    order = torch.full((S + 1,), -1, dtype=torch.int64, device=dev)
    order[torch.where(kept, dest, S)] = sort  # dropped pairs land in a spare row, cut off below
    order = order[:S].clone()
    token = torch.where(order < 0, -1, order // k)
    return token, order, slot.view(idx_Tk.shape), ends.to(torch.int32)


def _plan_fake(idx_Tk: Tensor, E: int, align: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _maps_fake(idx_Tk, rows(idx_Tk.numel(), E, align), tuple(idx_Tk.shape), E)


def _maps_fake(like: Tensor, S: int, slots: tuple[int, ...], E: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    token, order, slot = (like.new_empty(shape, dtype=torch.int64) for shape in ((S,), (S,), slots))
    return token, order, slot, like.new_empty(E + 1, dtype=torch.int32)


plan = define(
    "plan",
    "(Tensor idx, int E, int align=1) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_plan,
    fake=_plan_fake,
)


def _choice_plan(token_EC: Tensor, T: int, align: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    E, C = token_EC.shape
    wide, dev = rows(C, 1, align), token_EC.device
    place = torch.arange(E, device=dev)[:, None] * wide + torch.arange(C, device=dev)
    pair = token_EC.long() * E + torch.arange(E, device=dev)[:, None]
    token = torch.full((E * wide,), -1, dtype=torch.int64, device=dev)
    order, slot = token.clone(), torch.full((T * E,), -1, dtype=torch.int64, device=dev)
    token[place.reshape(-1)] = token_EC.reshape(-1).long()
    order[place.reshape(-1)] = pair.reshape(-1)
    slot[pair.reshape(-1)] = place.reshape(-1)
    ends = torch.arange(E + 1, device=dev, dtype=torch.int32) * wide
    return token, order, slot.view(T, E), ends


def _choice_plan_fake(token_EC: Tensor, T: int, align: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    E, C = token_EC.shape
    return _maps_fake(token_EC, E * rows(C, 1, align), (T, E), E)


# Expert choice: expert e takes the C tokens token[e], all different. Pair (t, e) counts as choice e of token t, so that
# `order` is t * E + e and `slot` is [T, E].
choice_plan = define(
    "choice_plan",
    "(Tensor token, SymInt T, int align=1) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_choice_plan,
    fake=_choice_plan_fake,
)


def _permute(x_TH: Tensor, token_S: Tensor, slot_Tk: Tensor) -> Tensor:
    if x_TH.shape[0] == 0:
        return x_TH.new_zeros(token_S.shape[0], x_TH.shape[1])
    return torch.where((token_S < 0)[:, None], 0, x_TH[token_S.clamp_min(0)])


def _permute_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, token, slot = inputs
    ctx.save_for_backward(token, slot)


def _permute_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    token, slot = ctx.saved_tensors
    return torch.ops.moefx.unpermute(dy, token, token, slot, None), None, None


# `slot` is the inverse of `token`: `slot[token[s]]` holds s. The adjoint gathers by it, and a provider may read either.
permute = define(
    "permute",
    "(Tensor x, Tensor token, Tensor slot) -> Tensor",
    reference=_permute,
    fake=lambda x, token, slot: x.new_empty(token.shape[0], x.shape[1]),
    setup=_permute_setup,
    backward=_permute_backward,
)


def _unpermute(y_SH: Tensor, token_S: Tensor, order_S: Tensor, slot_Tk: Tensor, w_Tk: Tensor | None) -> Tensor:
    if y_SH.shape[0] == 0:
        return y_SH.new_zeros(slot_Tk.shape[0], y_SH.shape[1])
    wide = y_SH.dtype if w_Tk is None else torch.promote_types(y_SH.dtype, w_Tk.dtype)
    wide = torch.promote_types(wide, torch.float32)
    picked = y_SH[slot_Tk.clamp_min(0)].to(wide)
    if w_Tk is not None:
        picked = picked * w_Tk.to(wide)[..., None]
    return torch.where((slot_Tk < 0)[..., None], 0, picked).sum(1).to(y_SH.dtype)


def _unpermute_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, token, order, slot, w = inputs
    if w is None:  # the plain sum needs no value for its backward, so none is kept alive
        ctx.save_for_backward(token, slot)
    else:
        ctx.save_for_backward(token, slot, y, order, w)


def _unpermute_backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    token, slot, *weighted = ctx.saved_tensors
    if not weighted:
        return torch.ops.moefx.permute(dout, token, slot), None, None, None, None
    y, order, w = weighted
    dy, dw = torch.ops.moefx.unpermute_backward(dout, y, token, order, slot, w)
    return dy, None, None, None, dw


unpermute = define(
    "unpermute",
    "(Tensor y, Tensor token, Tensor order, Tensor slot, Tensor? w) -> Tensor",
    reference=_unpermute,
    fake=lambda y, token, order, slot, w: y.new_empty(slot.shape[0], y.shape[1]),
    setup=_unpermute_setup,
    backward=_unpermute_backward,
)


def _unpermute_bwd(
    dout_TH: Tensor, y_SH: Tensor, token_S: Tensor, order_S: Tensor, slot_Tk: Tensor, w_Tk: Tensor
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(y_SH.dtype, w_Tk.dtype), torch.float32)
    d_SH = torch.ops.moefx.permute(dout_TH, token_S, slot_Tk).to(wide)
    dw_S = (d_SH * y_SH.to(wide)).sum(-1)
    dw = torch.where(slot_Tk < 0, 0, _take(dw_S, slot_Tk)).to(w_Tk.dtype)
    w_S = torch.ops.moefx.gather_weights(w_Tk, order_S)
    return (d_SH * w_S[:, None]).to(y_SH.dtype), dw


def _take(values_S: Tensor, index: Tensor) -> Tensor:
    """`values[index]` with -1 reading anything: the caller masks it."""
    if values_S.numel() == 0:
        return values_S.new_zeros(index.shape)
    return values_S[index.clamp_min(0)]


def _unpermute_bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _unpermute_double_backward(ctx: Any, ddy: Tensor, ddw: Tensor) -> tuple[Any, ...]:
    # dy = dout w and dw = <dout, y> are linear in each operand, so their adjoints are these ops again.
    dout, y, token, order, slot, w = ctx.saved_tensors
    unpermute, unpermute_backward = torch.ops.moefx.unpermute, torch.ops.moefx.unpermute_backward
    ddout = unpermute(ddy, token, order, slot, w) + unpermute(y, token, order, slot, ddw)
    dy, dw = unpermute_backward(dout, ddy, token, order, slot, ddw)
    return ddout, dy, None, None, None, dw


unpermute_backward = define(
    "unpermute_backward",
    "(Tensor dout, Tensor y, Tensor token, Tensor order, Tensor slot, Tensor w) -> (Tensor, Tensor)",
    reference=_unpermute_bwd,
    fake=lambda dout, y, token, order, slot, w: (y.new_empty(y.shape), w.new_empty(w.shape)),
    setup=_unpermute_bwd_setup,
    backward=_unpermute_double_backward,
)


def _gather_weights(w_Tk: Tensor, order_S: Tensor) -> Tensor:
    return torch.where(order_S < 0, 0, _take(w_Tk.reshape(-1), order_S))


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    w, order = inputs
    ctx.save_for_backward(order)
    ctx.shape = w.shape


def _gather_backward(ctx: Any, dw_S: Tensor) -> tuple[Any, ...]:
    (order,) = ctx.saved_tensors
    return torch.ops.moefx.scatter_weights(dw_S, order, ctx.shape[0], ctx.shape[1]), None


gather_weights = define(
    "gather_weights",
    "(Tensor w, Tensor order) -> Tensor",
    reference=_gather_weights,
    fake=lambda w, order: w.new_empty(order.shape),
    setup=_gather_setup,
    backward=_gather_backward,
)


def _scatter_weights(dw_S: Tensor, order_S: Tensor, T: int, k: int) -> Tensor:
    flat = dw_S.new_zeros(T * k + 1)
    flat[torch.where(order_S < 0, T * k, order_S)] = dw_S  # a pair has at most one row; empty rows hit the spare entry
    return flat[: T * k].view(T, k).clone()


def _scatter_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _scatter_backward(ctx: Any, dw_Tk: Tensor) -> tuple[Any, ...]:
    (order,) = ctx.saved_tensors
    return torch.ops.moefx.gather_weights(dw_Tk, order), None, None, None


scatter_weights = define(
    "scatter_weights",
    "(Tensor dw, Tensor order, SymInt T, SymInt k) -> Tensor",
    reference=_scatter_weights,
    fake=lambda dw, order, T, k: dw.new_empty(T, k),
    setup=_scatter_setup,
    backward=_scatter_backward,
)


def _plan_permute(x_TH: Tensor, idx_Tk: Tensor, E: int, align: int = 1) -> tuple[Tensor, ...]:
    token, order, slot, offsets = torch.ops.moefx.plan(idx_Tk, E, align)
    return torch.ops.moefx.permute(x_TH, token, slot), token, order, slot, offsets


def _plan_permute_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, token, order, slot, offsets = output
    ctx.mark_non_differentiable(token, order, slot, offsets)
    ctx.save_for_backward(token, slot)


def _plan_permute_backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    token, slot = ctx.saved_tensors
    return torch.ops.moefx.unpermute(dy, token, token, slot, None), None, None, None


plan_permute = define(
    "plan_permute",
    "(Tensor x, Tensor idx, int E, int align=1) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_plan_permute,
    fake=lambda x, idx, E, align=1: (x.new_empty(rows(idx.numel(), E, align), x.shape[1]), *_plan_fake(idx, E, align)),
    setup=_plan_permute_setup,
    backward=_plan_permute_backward,
)
