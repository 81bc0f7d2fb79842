"""What lies around a step and must not change it, or must: autocast, the default device, schedulers of momentum."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moefx.errors import InputError
from moefx.optim import AdamW, LiteConfig, Muon, MuonLITE

from .test_state import MADE, RAMPED, problem, train

Tensor = torch.Tensor


@pytest.mark.parametrize("kind", [*MADE, "adamw", "muon-half", "muon-master"])
def test_under_autocast_everything_is_as_outside_bitwise(kind: str) -> None:
    def made(groups: Any) -> torch.optim.Optimizer:
        if kind == "adamw":
            return AdamW([{**g, "algorithm": "adamw"} for g in groups], lite=RAMPED)
        if kind in ("muon-half", "muon-master"):
            return MuonLITE(groups, polar_dtype="bfloat16", rounding="master", lite=LiteConfig(damping="shared"))
        return MADE[kind](groups)

    results = []
    for amp in (False, True):
        params, groups = problem(torch.bfloat16 if kind == "muon-master" else torch.float32)
        found: dict[str, Any] = {}
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            optimizer = made(groups)
            train(params, optimizer, range(8))
            if isinstance(optimizer, Muon):
                found = optimizer.diagnostics()
            assert torch.is_autocast_enabled("cpu") == amp
        metrics = [x for one in found.values() for x in one.values()]
        results.append([*params, *(x for p in params for x in optimizer.state[p].values()), *metrics])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_halved_products_are_not_for_autocast_either() -> None:
    # From 512 rows on, polar factors are written block by block into float32.
    results = []
    for amp in (False, True):
        p = nn.Parameter(torch.zeros(512, 520))
        p.grad = torch.randn(512, 520, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            Muon([p], lr=0.02, polar_steps=1).step()
        results.append(p.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", [*MADE, "adamw"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_conversion_from_or_to_float64_is_refused_before_anything_moves(
    kind: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    model = nn.ParameterDict({"w": nn.Parameter(torch.eye(6, 8)), "b": nn.Parameter(torch.ones(4, 3))}).to(dtypes[0])
    optimizer = (AdamW if kind == "adamw" else MADE[kind])([{"params": [*model.values()], "names": ["w", "b"]}])  # type: ignore[operator]
    for p in model.to(dtypes[1]).parameters():
        p.grad = torch.ones_like(p)
    before = {n: p.detach().clone() for n, p in model.items()}
    with pytest.raises(InputError) as e:
        optimizer.step()
    assert e.value.what == f"a parameter is {dtypes[1]}, and its optimizer state {dtypes[0]}"
    assert e.value.where == "w"
    assert "build the optimizer after the conversion" in str(e.value.todo)
    assert all(torch.equal(p, before[n]) for n, p in model.items())
    assert int(optimizer.param_groups[0]["step"]) == 0


def test_halving_keeps_float32_state_and_goes_on() -> None:
    model = nn.Linear(6, 8, bias=False)
    optimizer = Muon([model.weight])
    for p in (model.weight, model.to(torch.bfloat16).weight):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert model.weight.dtype == torch.bfloat16
    assert optimizer.state[model.weight]["momentum_buffer"].dtype == torch.float32


def test_a_closure_keeps_the_autocast() -> None:
    params, groups = problem()
    optimizer, seen = MADE["muon-lite"](groups), []

    def closure() -> Tensor:
        product = params[0] @ params[1].mT
        seen.append(product.dtype)
        product.float().square().mean().backward()
        return product

    with torch.autocast("cpu", torch.bfloat16):
        assert optimizer.step(closure).dtype == torch.bfloat16
    optimizer.step(closure)
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("kind", list(MADE))
def test_the_default_device_does_not_matter(kind: str) -> None:
    results = []
    for device in ("cpu", "meta"):
        params, groups = problem()
        with torch.device(device):
            optimizer = MADE[kind](groups)
        generators = [torch.Generator().manual_seed(t) for t in range(4)]
        for generator in generators:
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            with torch.device(device):
                optimizer.step()
        with torch.device(device):
            found = optimizer.diagnostics() if isinstance(optimizer, Muon) else {}
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        metrics = [x for one in found.values() for x in one.values()]
        results.append([*params, *(x for p in params for x in optimizer.state[p].values()), *metrics])
    assert all(a.device.type == "cpu" and torch.equal(a, b) for a, b in zip(*results, strict=True))


CYCLES: dict[str, Callable[[Any], Any]] = {
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
}


@pytest.mark.parametrize("cycle", list(CYCLES))
def test_momentum_that_a_scheduler_cycles_is_muons_too(cycle: str) -> None:
    params, groups = problem()
    optimizer = Muon(groups, lr=0.02)
    scheduler = CYCLES[cycle](optimizer)
    # What an optimizer with nothing but a momentum gets from the same scheduler, set by hand.
    others, groups = problem()
    by_hand = Muon(groups, lr=0.02)
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.02, momentum=0.9)
    theirs = CYCLES[cycle](sgd)
    seen = []
    for t in range(6):
        (wanted,) = sgd.param_groups
        for group in by_hand.param_groups:
            group.update(lr=wanted["lr"], momentum=wanted["momentum"], betas=(wanted["momentum"], 0.95))
        seen.append(wanted["momentum"])
        train(others, by_hand, range(t, t + 1))
        train(params, optimizer, range(t, t + 1))
        sgd.step()
        scheduler.step()
        theirs.step()
    assert max(seen) - min(seen) > 0.09
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, by_hand.state[q][key]), key
