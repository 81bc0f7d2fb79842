"""Balance over ranks, checked on every rank against one process that sees the batches of all (`test_ranks.py`)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import moefx
from moefx import losses as L
from tests.family import zoo
from tests.optim.sharded_problem import Context

from . import hooked, loops

Tensor = torch.Tensor
GLOBAL, BIAS = L.LoadBalance(form="global", weight=0.5), L.BiasUpdate(rate=0.25)


def batch(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (2, 5), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def mean_over_ranks(value: Tensor) -> Tensor:
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def part(m: loops.Layer, rank: int, world: int) -> range:
    """The tokens of a rank."""
    T = len(m.idx) // world
    return range(rank * T, rank * T + T)


def local_balance(m: loops.Layer, tokens: range) -> Tensor:
    """Choices of all ranks, probabilities of one."""
    k = len(m.idx[0])
    return m.experts * sum(m.c(e) / (k * len(m.idx)) * m.p(e, tokens) for e in range(m.experts))


def balance(context: Context) -> None:
    """Loss, gradients and biases, of two micro-batches with an update behind them."""
    rank, world = context.rank, context.world
    model: Any = zoo.build(zoo.get("deepseek_v3"), output_router_logits=False)
    wide = copy.deepcopy(model).double()
    wide.config._experts_implementation = "eager"  # grouped products have no float64
    biases = {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    before = {n: b.clone() for n, b in biases.items()}
    opt = moefx.optimize(model, batch(rank), codegen="eager", losses=[GLOBAL, BIAS])
    chosen: list[list[int]] = [[] for _ in biases]
    for step in range(2):
        batches = [batch(10 * step + r) for r in range(world)]
        whole = {n: torch.cat([b[n] for b in batches]) for n in batches[0]}
        out, layers = hooked.run("deepseek_v3", wide, whole)
        want = sum(loops.switch(m) for m in layers)
        (out.loss + GLOBAL.weight * want).backward()

        opt(**batches[rank]).loss.backward()
        own = sum(local_balance(m, part(m, rank, world)) for m in layers)
        torch.testing.assert_close(opt.losses["lb"].double(), own.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(mean_over_ranks(opt.losses["lb"]).double(), want.detach(), rtol=1e-5, atol=0)
        alone = sum(loops.switch(m, part(m, rank, world)) for m in layers)
        assert abs(float(alone - own)) > 1e-3  # what a rank would say of itself is something else
        for seen, m in zip(chosen, layers, strict=True):
            seen += [e for row in m.idx for e in row]
    expected = {n: p.grad for n, p in wide.named_parameters() if p.grad is not None}
    largest = max(float(g.norm()) for g in expected.values())
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for n, g in expected.items():
        error = float((mean_over_ranks(found[n]).double() - g).norm())
        assert error <= 1e-4 * max(float(g.norm()), 1e-3 * largest), n

    opt.update_router_bias()
    for (n, bias), seen in zip(biases.items(), chosen, strict=True):
        counts = [seen.count(e) for e in range(len(bias))]
        signs = torch.tensor([(len(seen) > c * len(bias)) - (len(seen) < c * len(bias)) for c in counts])
        torch.testing.assert_close(bias, before[n] + BIAS.rate * signs)


CHECKS: dict[str, Callable[[Context], None]] = {"balance": balance}
