"""Providers of the dispatch plan and of what moves routing weights along it: NumPy, and Triton on a GPU (`gpu.plan`).

A plan is a stable counting sort of a few thousand small integers, where the cost of a call outweighs its work. NumPy's
calls are short and its stable sort of 8- and 16-bit integers is a radix sort: 26 us against 160 us in torch ops for 256
tokens with 4 of 32 experts, 0.43 against 2.8 ms for 8192 tokens with 8 of 128. NumPy sees the tensors' own memory.
"""

from __future__ import annotations

import numpy as np
import torch

from .registry import register, register_triton

Tensor = torch.Tensor


def _on_cpu(t: Tensor, *_: object) -> bool:
    return t.device.type == "cpu"


@register("plan", "numpy", _on_cpu)
def plan_cpu(idx_Tk: Tensor, E: int, align: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row maps and offsets; see `moefx.dialect.routing`."""
    pairs, k = idx_Tk.numel(), max(idx_Tk.shape[-1], 1)
    S = (pairs + E * (align - 1)) // align * align
    token, order = torch.empty(S, dtype=torch.int64), torch.empty(S, dtype=torch.int64)
    slot, offsets = torch.empty(idx_Tk.shape, dtype=torch.int64), torch.empty(E + 1, dtype=torch.int32)
    order_np, slot_np, ends = order.numpy(), slot.view(-1).numpy(), offsets.numpy()

    # Read as unsigned, negative indices are huge: one minimum sends everything out of range to bucket E.
    flat = idx_Tk.reshape(-1).long().numpy().view(np.uint64)
    bucket = np.minimum(flat, E).astype(np.uint8 if E < 2**8 else np.uint16 if E < 2**16 else np.int64)
    by_expert = bucket.argsort(kind="stable")
    counts = np.bincount(bucket, minlength=E + 1)[:E]
    kept = int(counts.sum())
    ends[0] = 0
    np.cumsum((counts + align - 1) // align * align if align > 1 else counts, out=ends[1:])
    row = np.arange(kept)
    if align > 1:  # rows move down by the padding of the experts before theirs
        row += np.repeat(ends[:E] - (counts.cumsum() - counts), counts)
    if kept == S:
        order_np[:] = by_expert
    else:
        order_np.fill(-1)
        order_np[row] = by_expert[:kept]
    if kept < pairs:
        slot_np.fill(-1)
    slot_np[by_expert[:kept]] = row
    np.floor_divide(order_np, k, out=token.numpy())  # -1 // k is -1
    return token, order, slot, offsets


@register("gather_weights", "torch", _on_cpu)
def gather_weights_cpu(w_Tk: Tensor, order_S: Tensor) -> Tensor:
    """The weight of each row; zero where the row holds no pair."""
    if order_S.numel() == 0 or int(order_S.min()) >= 0:
        return w_Tk.reshape(-1).index_select(0, order_S)
    if w_Tk.numel() == 0:
        return w_Tk.new_zeros(order_S.shape)
    return w_Tk.reshape(-1).index_select(0, order_S.clamp_min(0)).masked_fill_(order_S < 0, 0)


@register("scatter_weights", "torch", _on_cpu)
def scatter_weights_cpu(dw_S: Tensor, order_S: Tensor, T: int, k: int) -> Tensor:
    """The weight of each pair; zero where no row holds the pair."""
    dw_Tk = dw_S.new_zeros(T, k)
    if order_S.numel() and int(order_S.min()) < 0:
        held = order_S >= 0
        dw_S, order_S = dw_S[held], order_S[held]
    dw_Tk.view(-1).scatter_(0, order_S, dw_S)
    return dw_Tk


def plans(idx_Tk: Tensor, E: int, align: int = 1) -> bool:
    """Whether the Triton kernels cover a plan: int32 rows, and counts of all experts in a program's registers."""
    int32_rows = idx_Tk.numel() + E * align < 2**31 - 2**20
    return idx_Tk.dim() == 2 and idx_Tk.dtype in (torch.int32, torch.int64) and 1 <= E <= 2048 and int32_rows


register_triton("plan", "plan:plan", plans)
register_triton("gather_weights", "plan:gather_weights", lambda w, order: True)
register_triton("scatter_weights", "plan:scatter_weights", lambda dw, order, T, k: True)
