"""Grouped matrix products: torch's own GEMMs on a CPU, the library kernel and Triton's on an accelerator.

Offsets are read on the host on a CPU (they live there); on an accelerator kernels take them on the device. The library
comes before Triton for the plain products, and takes bf16 with aligned rows; Triton takes bf16 and fp16 of any strides,
and the fused forms, which the library lacks. What neither takes, fp32 above all, runs the reference.
"""

from __future__ import annotations

import itertools

import torch

from .registry import holds, register, register_triton

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


def _counts(offsets: Tensor, rows: int) -> list[int]:
    """Rows of each expert, and then those behind the last offset."""
    ends: list[int] = offsets.tolist()
    return [end - start for start, end in itertools.pairwise([*ends, rows])]


def _in_one_call(a: Tensor, b: Tensor, columns: int) -> bool:
    """Whether the library multiplies these on a CPU, into rows of `columns` that are dense without padding."""
    return (
        a.dtype == b.dtype
        and a.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and columns * a.element_size() % 16 == 0
        and _aligned(a)
        and _aligned(b)
    )


@register("grouped_mm", "torch", _on_cpu)
def grouped_mm_cpu(x_SK: Tensor, w_ENK: Tensor, offsets: Tensor) -> Tensor:
    """One `mm` per expert into the output buffer: the library's loop, or the same loop here for what it refuses.

    The results are the same bits. The library's has less to do around each product: at 32 experts, 1024 rows and one
    thread it takes half the time for weights of 64 x 64, and the same for 256 x 256. It refuses float64 and rows that
    are no multiple of 16 bytes.
    """
    if _in_one_call(x_SK, w_ENK, w_ENK.shape[1]):
        y_SN = torch._grouped_mm(x_SK, w_ENK.transpose(1, 2), offs=offsets[1:])
        y_SN[int(offsets[-1]) :].zero_()  # left uninitialised
        return y_SN
    counts = _counts(offsets, x_SK.shape[0])
    y_SN = x_SK.new_empty(x_SK.shape[0], w_ENK.shape[1])
    *outs, rest = y_SN.split(counts)  # views of one split and one unbind are cheaper than slices
    for x_CK, w_KN, y_CN in zip(x_SK.split(counts), w_ENK.transpose(1, 2).unbind(0), outs, strict=False):
        if y_CN.shape[0]:
            torch.mm(x_CK, w_KN, out=y_CN)
    rest.zero_()
    return y_SN


@register("grouped_wgrad", "torch", _on_cpu)
def grouped_wgrad_cpu(a_SM: Tensor, b_SN: Tensor, offsets: Tensor) -> Tensor:
    """One `mm` per expert over its rows, like `grouped_mm_cpu`; experts without rows get zeros."""
    if _in_one_call(a_SM, b_SN, b_SN.shape[1]):
        return torch._grouped_mm(a_SM.t(), b_SN, offs=offsets[1:])
    counts = _counts(offsets, a_SM.shape[0])
    g_EMN = a_SM.new_empty(len(counts) - 1, a_SM.shape[1], b_SN.shape[1])
    for g_MN, a_MC, b_CN in zip(g_EMN.unbind(0), a_SM.t().split(counts, 1), b_SN.split(counts), strict=False):
        if b_CN.shape[0]:
            torch.mm(a_MC, b_CN, out=g_MN)
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


EXPERTS = 1024  # a program of the Triton kernels holds the offsets of all experts in its registers
# Bytes of shared memory that the largest tile takes as compiled for ROCm (`sass --target gfx950`): the stages of a
# product, and those of one whose rows are gathered along the depth.
SHARED, SHARED_GATHERED = 147_456, 245_760


def _narrow(*operands: Tensor) -> bool:
    return operands[0].dtype in (torch.bfloat16, torch.float16) and len({t.dtype for t in operands}) == 1


def _few_experts(offsets: Tensor) -> bool:
    return offsets.shape[0] <= EXPERTS + 1


def _mm(x: Tensor, w: Tensor, offsets: Tensor) -> bool:
    return _narrow(x, w) and _few_experts(offsets) and holds(x, SHARED)


def _gathered_wgrad(dy: Tensor, x: Tensor, token: Tensor, slot: Tensor, offsets: Tensor, flip: bool = False) -> bool:
    return _narrow(dy, x) and holds(dy, SHARED_GATHERED)


register_triton("grouped_mm", "grouped_mm:grouped_mm", _mm)
register_triton("grouped_wgrad", "grouped_mm:grouped_wgrad", lambda a, b, offsets: _narrow(a, b) and holds(a, SHARED))
register_triton(
    "permute_grouped_mm",
    "grouped_mm:permute_grouped_mm",
    lambda x, token, slot, w, offsets: _mm(x, w, offsets),
)
register_triton(
    "permute_grouped_mm_glu",
    "grouped_mm:permute_grouped_mm_glu",
    lambda x, token, slot, w, offsets, w_rows, kind: _mm(x, w, offsets),
)
register_triton("permute_grouped_wgrad", "grouped_mm:permute_grouped_wgrad", _gathered_wgrad)
