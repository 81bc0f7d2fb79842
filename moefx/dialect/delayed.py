"""Casts whose scale follows the largest magnitudes of earlier steps.

    quantize_delayed(x, offsets, history [n], specs) -> codes, scales of each spec in turn, then amax [] of x
    gather_amax(amax, rows, count) -> [count]: the magnitudes of this step at their rows, -1 elsewhere

History 0 is no history, nor is one that is not finite: where there is no other, x itself is measured. Values beyond
what the scale reaches saturate, but for an infinity: as a NaN does, it makes x read back as NaN, so that whoever looks
for an overflow (a loss scaler) finds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moefx.precision.quantize import fp32_scales
from moefx.precision.quantize import quantize as quantize_tensor
from moefx.precision.spec import QuantSpec

from ._op import define
from .scaled import _no_context, encoded_fake, groups_of, training_only

Tensor = torch.Tensor
UNSEEN = -1.0


def _quantize(x: Tensor, offsets: Tensor | None, history: Tensor, specs: Sequence[str]) -> list[Tensor]:
    rows = x
    if offsets is not None:
        rows = torch.where((torch.arange(x.shape[0], device=x.device) < offsets[-1])[:, None], x, 0)
    now = rows.abs().amax().float() if x.numel() else history.new_zeros(())
    before = torch.where(history.isfinite(), history, 0).amax()
    amax = torch.where((before > 0) & now.isfinite(), before, now)
    out: list[Tensor] = []
    for text in specs:
        spec = QuantSpec.parse(text)
        codes, scales = quantize_tensor(x, text, offsets=offsets, amax=amax if spec.delayed else None)
        # A spec that measures x may have two levels of scales: graphs carry their product.
        out += [codes, scales if isinstance(scales, Tensor) else fp32_scales(scales, spec)]
    return [*out, now]


quantize_delayed = define(
    "quantize_delayed",
    "(Tensor x, Tensor? offsets, Tensor history, str[] specs) -> Tensor[]",
    reference=_quantize,
    fake=lambda x, offsets, history, specs: [
        *encoded_fake(x, specs, groups_of(offsets)),
        history.new_empty(()),
    ],
    setup=_no_context,
    backward=training_only("quantize_delayed"),
)


def _gather(amax: Sequence[Tensor], rows: Sequence[int], count: int) -> Tensor:
    out = amax[0].new_full((count,), UNSEEN)
    for a, row in zip(amax, rows, strict=True):
        out[row] = a
    return out


gather_amax = define(
    "gather_amax",
    "(Tensor[] amax, int[] rows, int count) -> Tensor",
    reference=_gather,
    fake=lambda amax, rows, count: amax[0].new_empty(count),
    setup=_no_context,
    backward=training_only("gather_amax"),
)
