"""Grouped matrix products with torch's own GEMMs: the providers of `grouped_mm` and `grouped_wgrad`.

Offsets are read on the host on a CPU (they live there); on an accelerator the library kernel takes them on the device.
"""

from __future__ import annotations

import torch

from .registry import register

Tensor = torch.Tensor


def _on_cpu(x: Tensor, *_: object) -> bool:
    return x.device.type == "cpu"


def _library(x: Tensor, w: Tensor, *_: object) -> bool:
    # bf16 only: the fp32 kernel on accelerators loops over groups with a host synchronisation.
    return x.device.type == "cuda" and x.dtype == w.dtype == torch.bfloat16 and _aligned(x) and _aligned(w)


def _aligned(t: Tensor) -> bool:
    """The library kernel's contract: one of the last two axes is dense, steps along every other are of 16 bytes."""
    steps = [s * t.element_size() for s in t.stride()]
    dense = -1 if t.stride(-1) == 1 else -2
    del steps[dense]
    return t.stride(dense) == 1 and t.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in steps)


@register("grouped_mm", "torch", _on_cpu)
def grouped_mm_cpu(x_SK: Tensor, w_ENK: Tensor, offsets: Tensor) -> Tensor:
    """One `mm` per expert into the output buffer.

    Within 4 % of `torch._grouped_mm` at 32 experts (2048 and 256 tokens, fp32 and bf16, one thread), and unlike it free
    of alignment rules and usable in float64. Taking the experts by one `unbind` leaves three views per expert.
    """
    ends = offsets.tolist()
    y_SN = x_SK.new_empty(x_SK.shape[0], w_ENK.shape[1])
    for w_KN, start, end in zip(w_ENK.transpose(1, 2).unbind(0), ends, ends[1:], strict=False):
        if end > start:
            torch.mm(x_SK[start:end], w_KN, out=y_SN[start:end])
    y_SN[ends[-1] :].zero_()
    return y_SN


@register("grouped_wgrad", "torch", _on_cpu)
def grouped_wgrad_cpu(a_SM: Tensor, b_SN: Tensor, offsets: Tensor) -> Tensor:
    """One `mm` per expert over its rows; experts without rows get zeros."""
    ends = offsets.tolist()
    g_EMN = a_SM.new_empty(len(ends) - 1, a_SM.shape[1], b_SN.shape[1])
    for g_MN, start, end in zip(g_EMN.unbind(0), ends, ends[1:], strict=False):
        if end > start:
            torch.mm(a_SM[start:end].t(), b_SN[start:end], out=g_MN)
        else:
            g_MN.zero_()
    return g_EMN


@register("grouped_mm", "torch_grouped", _library)
def grouped_mm_library(x_SK: Tensor, w_ENK: Tensor, offsets: Tensor) -> Tensor:
    """`torch._grouped_mm`; rows behind the last offset, which it leaves uninitialised, are set to zero."""
    y_SN = torch._grouped_mm(x_SK, w_ENK.transpose(1, 2), offs=offsets[1:])
    dead = torch.arange(y_SN.shape[0], device=y_SN.device) >= offsets[-1]
    return y_SN.masked_fill_(dead[:, None], 0)


@register("grouped_wgrad", "torch_grouped", _library)
def grouped_wgrad_library(a_SM: Tensor, b_SN: Tensor, offsets: Tensor) -> Tensor:
    """`torch._grouped_mm` in its 2D x 2D form, contracting over tokens."""
    return torch._grouped_mm(a_SM.t(), b_SN, offs=offsets[1:])
