"""Training over ranks, checked on each of them against one process that sees the batches of all (`test_sharded.py`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import moefx
from tests import reference as ref
from tests.optim.sharded_problem import Context

Tensor = torch.Tensor
STEPS = 3
WIDE = {"hidden_size": 128, "moe_intermediate_size": 128}  # a block of the recipes


def trained(model: Any, batches: list[list[dict[str, Tensor]]]) -> list[Tensor]:
    """All parameters after SGD on the mean over the batches of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches:
        optimizer.zero_grad()
        for part in batch:
            (model(**part).loss / len(batch)).backward()
        optimizer.step()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def _as_one_process(c: Context, recipe: str, wrap: Any) -> None:
    batches = [[ref.batch(seed=10 * step + rank) for rank in range(c.world)] for step in range(STEPS)]
    mine = [[step[c.rank]] for step in batches]
    start = [p.detach().clone() for p in ref.tiny(**WIDE).parameters()]
    wanted = trained(ref.optimize(ref.tiny(**WIDE), recipe=recipe), batches)
    found = trained(wrap(ref.optimize(ref.tiny(**WIDE), recipe=recipe)), mine)
    alone = trained(ref.optimize(ref.tiny(**WIDE), recipe=recipe), mine)
    moved, far = (sum(float((a - b).square().sum()) for a, b in zip(x, wanted, strict=True)) for x in (start, alone))
    error = sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True))
    assert error < 1e-6 * moved, (error, moved)
    assert far > 1e-3 * moved  # the control: a rank that heard nothing of the others


def sharded_in_bf16(c: Context) -> None:
    _as_one_process(c, "bf16", fully_shard)


def sharded_in_fp8(c: Context) -> None:
    _as_one_process(c, "fp8_flow", fully_shard)


def replicated_in_fp8(c: Context) -> None:
    _as_one_process(c, "fp8_flow", DistributedDataParallel)


def accumulated_without_communication(c: Context) -> None:
    """Gradients of two micro-batches, exchanged once."""
    opt: Any = fully_shard(ref.optimize(ref.tiny()))
    plain = ref.optimize(ref.tiny())
    for part in range(2):
        opt.set_requires_gradient_sync(part == 1)
        opt(**ref.batch(seed=10 * part + c.rank)).loss.backward()
        for rank in range(c.world):
            (plain(**ref.batch(seed=10 * part + rank)).loss / c.world).backward()
    wanted = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    found = {n: p.grad.full_tensor() for n, p in opt.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, g in found.items():
        torch.testing.assert_close(g, wanted[name], msg=name)


def layers_are_refused_on_every_rank(c: Context) -> None:
    model = ref.tiny()
    fully_shard(model.model.layers[0])
    with pytest.raises(moefx.InputError, match="DTensor"):
        ref.optimize(model)


CHECKS = {
    f.__name__: f
    for f in (
        sharded_in_bf16, sharded_in_fp8, replicated_in_fp8, accumulated_without_communication,
        layers_are_refused_on_every_rank,
    )
}  # fmt: skip
