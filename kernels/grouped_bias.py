"""The CPU providers of `grouped_bias` and of its adjoint `group_sum`."""

from __future__ import annotations

import torch
from torch.nn.functional import embedding_bag

from .registry import register

Tensor = torch.Tensor
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _on_cpu(y: Tensor, *_: object) -> bool:
    return y.device.type == "cpu" and y.dtype in _FLOATS


@register("grouped_bias", "torch", _on_cpu)
def grouped_bias_cpu(y_SN: Tensor, bias_EN: Tensor, offsets: Tensor) -> Tensor:
    """Add each expert's bias to its rows; rows behind the last offset stay as they are.

    Many rows per expert: one `add` per expert, a single pass over memory. Few: the call per expert would cost more than
    the work, so the bias rows are repeated into the output and `y` is added. They cross near 128 rows per expert (512
    columns, one thread).
    """
    S, E = y_SN.shape[0], bias_EN.shape[0]
    bias_EN = bias_EN.to(y_SN.dtype)
    if S < 128 * E:
        # One more expert, of zero bias, owns the rows behind the last offset.
        ends = torch.cat([offsets, offsets.new_full((1,), S)])
        rows = torch.cat([bias_EN, bias_EN.new_zeros(1, bias_EN.shape[1])])
        return rows.repeat_interleave(ends.diff(), 0, output_size=S).add_(y_SN)
    out, starts = torch.empty(y_SN.shape, dtype=y_SN.dtype), offsets.tolist()
    for bias, start, end in zip(bias_EN.unbind(0), starts, starts[1:], strict=False):
        if end > start:
            torch.add(y_SN[start:end], bias, out=out[start:end])
    out[starts[-1] :] = y_SN[starts[-1] :]
    return out


@register("group_sum", "torch", _on_cpu)
def group_sum_cpu(y_SN: Tensor, offsets: Tensor) -> Tensor:
    """Sum of each expert's rows, as one bag of consecutive rows per expert; 16-bit rows are summed in fp32.

    One thread, 8192 x 512, 32 experts, against `index_add_`: 0.5 instead of 0.8 ms in fp32, 0.2 instead of 1.7 ms in
    bf16.
    """
    end = int(offsets[-1])
    if end == 0:
        return y_SN.new_zeros(offsets.shape[0] - 1, y_SN.shape[1])
    rows = torch.arange(end)
    return embedding_bag(rows, y_SN.contiguous(), offsets.long(), mode="sum", include_last_offset=True)
