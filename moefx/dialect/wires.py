"""The wires between ranks, as ops: what is dispatched to the experts' ranks, and what comes back combined.

    dispatch(x [T, H]) -> the rows that this rank's experts need      combine(y) -> the rows of this rank's tokens

On one process both are the identity. They are in the graph all the same, so that what travels has a place where a
precision recipe can say in which format it does; `lower_wires` takes them out before code is generated. They are each
other's adjoint: a sum over ranks in `combine` is a copy in its backward.
"""

from __future__ import annotations

from typing import Any

import torch

from ._op import define

Tensor = torch.Tensor


def _nothing_to_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


# A copy, because a functional op returns memory of its own.
dispatch = define(
    "dispatch",
    "(Tensor x) -> Tensor",
    reference=lambda x: x.clone(),
    fake=lambda x: x.new_empty(x.shape),
    setup=_nothing_to_save,
    backward=lambda ctx, dy: torch.ops.moefx.combine(dy),
)

combine = define(
    "combine",
    "(Tensor y) -> Tensor",
    reference=lambda y: y.clone(),
    fake=lambda y: y.new_empty(y.shape),
    setup=_nothing_to_save,
    backward=lambda ctx, dx: torch.ops.moefx.dispatch(dx),
)
