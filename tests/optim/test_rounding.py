"""bfloat16 parameters: small updates arrive by a float32 master or by stochastic rounding."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moefx.errors import InputError
from moefx.optim import AdamW, LiteConfig, Muon, MuonLITE, Soap, SoapLITE
from moefx.optim.rounding import noise_of, stochastic

Tensor = torch.Tensor
Made = Callable[..., torch.optim.Optimizer]
LITE = LiteConfig(2.0, -0.25, 1.0, chi_diagonal=4.0)
MADE: dict[str, Made] = {
    "muon": Muon,
    "muon-lite": lambda p, **o: MuonLITE(p, lite=LITE, **o),
    "muon-parity": lambda p, **o: MuonLITE(p, lite=LiteConfig(mode="parity"), **o),
    "soap": lambda p, **o: Soap(p, frequency=3, **o),
    "soap-lite": lambda p, **o: SoapLITE(p, lite=LITE, frequency=3, **o),
    "adamw": AdamW,
    "adamw-lite": lambda p, **o: AdamW(p, lite=LITE, **o),
}
CAREFUL = ("master", "stochastic")


def parameters(dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((1 + torch.rand(*s, generator=generator)).to(dtype)) for s in ((24, 32), (3, 24, 32))]


def train(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Nearly constant gradients: every step goes the same way."""
    for t in steps:
        for i, p in enumerate(params):
            drift = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 + 10 * t + i))
            p.grad = (drift + 0.1 * noise).bfloat16().to(p.dtype)
        optimizer.step()


def moved(kind: str, rounding: str, dtype: torch.dtype = torch.bfloat16, steps: int = 60) -> list[Tensor]:
    """How far weights between 1 and 2 get by updates of about 5e-4; half a unit in their last place is 4e-3."""
    params = parameters(dtype)
    before = [p.detach().clone() for p in params]
    lr = 5e-4
    train(params, MADE[kind](params, lr=lr, weight_decay=0.0, rounding=rounding), range(steps))
    return [(p - b).float().detach() for p, b in zip(params, before, strict=True)]


@pytest.mark.parametrize("kind", list(MADE))
def test_updates_below_half_a_unit_are_lost_or_arrive(kind: str) -> None:
    wanted = moved(kind, "nearest", torch.float32)
    lost = moved(kind, "nearest")
    # Almost all: the few weights just above 1 have finer neighbours below it.
    assert all((x == 0).float().mean() > 0.97 for x in lost)
    for rounding in CAREFUL:
        for x, w in zip(moved(kind, rounding), wanted, strict=True):
            size = w.square().mean()
            assert (x * w).mean() / size == pytest.approx(1, abs=0.15), rounding
    assert (lost[0] * wanted[0]).mean() / wanted[0].square().mean() < 0.2


@pytest.mark.parametrize("kind", list(MADE))
def test_a_master_is_trained_as_a_float32_parameter(kind: str) -> None:
    params, wanted = parameters(), [nn.Parameter(p.detach().float()) for p in parameters()]
    mine, theirs = MADE[kind](params, rounding="master"), MADE[kind](wanted)
    for t in range(8):
        for i, (p, q) in enumerate(zip(params, wanted, strict=True)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + i)).bfloat16()
            q.grad = p.grad.float()
        params[1].grad[t % 3] = 0
        wanted[1].grad[t % 3] = 0
        mine.step()
        theirs.step()
        for p, q in zip(params, wanted, strict=True):
            assert torch.equal(mine.state[p]["master"], q)
            assert torch.equal(p, q.bfloat16())


@pytest.mark.parametrize("rounding", CAREFUL)
@pytest.mark.parametrize("kind", list(MADE))
def test_resuming_after_any_step_is_the_uninterrupted_run_bitwise(kind: str, rounding: str) -> None:
    params = parameters()
    whole, saved = MADE[kind](params, rounding=rounding), []
    for t in range(6):
        saved.append(copy.deepcopy(([p.detach() for p in params], whole.state_dict())))
        train(params, whole, range(t, t + 1))
    for t, (values, state) in enumerate(saved):
        again = parameters()
        optimizer = MADE[kind](again, rounding=rounding)
        train(again, optimizer, range(20, 21))  # what it did before does not matter
        optimizer.load_state_dict(state)
        for p, value in zip(again, values, strict=True):
            p.data.copy_(value)
        train(again, optimizer, range(t, 6))
        for p, q in zip(params, again, strict=True):
            assert torch.equal(p, q), t
            assert all(torch.equal(x, optimizer.state[q][key]) for key, x in whole.state[p].items())


@pytest.mark.parametrize("rounding", CAREFUL)
@pytest.mark.parametrize("kind", list(MADE))
def test_float32_parameters_are_not_touched_by_it(kind: str, rounding: str) -> None:
    plain, params = parameters(torch.float32), parameters(torch.float32)
    one, two = MADE[kind](plain), MADE[kind](params, rounding=rounding)
    train(plain, one, range(4))
    train(params, two, range(4))
    for p, q in zip(plain, params, strict=True):
        assert torch.equal(p, q)
        assert one.state[p].keys() == two.state[q].keys()


def test_stochastic_rounding_has_no_bias() -> None:
    n, unit = 100_000, 2.0**-7
    for value in (1 + 0.25 * unit, 1 + 0.9 * unit, -1 - 0.01 * unit, 3e-20, 1 + unit):
        x = torch.full((n,), value)
        found = stochastic(x, noise_of(x, 0).bits().view(-1)).double()
        low, high = found.min().item(), found.max().item()
        assert len(found.unique()) == (1 if value == 1 + unit else 2)  # the two neighbours, or itself
        at = 0.0 if high == low else (x[0].double().item() - low) / (high - low)
        bound = 5 * math.sqrt(at * (1 - at) / n) * (high - low) + 2.0**-16 * (high - low)
        assert abs(found.mean().item() - x[0].double().item()) <= bound


def test_noise_differs_between_steps_and_parameters_and_is_uniform() -> None:
    x = torch.zeros(8, 64, 32)
    draws = torch.stack([noise_of(x, 0, i, t).bits().flatten() for i in range(8) for t in range(8)]).double() / 2**16
    assert draws.min() >= 0
    assert draws.max() < 1
    each = draws.shape[1]
    assert (draws.mean(1) - 0.5).abs().max() < 5 * math.sqrt(1 / 12 / each)
    assert (draws.mean(0) - 0.5).abs().max() < 6 * math.sqrt(1 / 12 / 64)  # of one element over time
    assert (torch.corrcoef(draws) - torch.eye(64)).abs().max() < 6 / math.sqrt(each)
    for lag in (1, 32, 64 * 32):  # neighbours in a row, in a column, in the stack
        a, b = draws[0, :-lag], draws[0, lag:]
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 6 / math.sqrt(each)
    bins = torch.histc(draws, 16, 0, 1)
    assert ((bins - draws.numel() / 16).square() / (draws.numel() / 16)).sum() < 15 + 6 * math.sqrt(30)


def test_numbers_that_bfloat16_has_stay_and_so_do_nan_and_infinities() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, torch.inf, -torch.inf, 3.3895e38, 1e-40]).bfloat16().float()
    bits = torch.full(x.shape, 2**16 - 1, dtype=torch.int32)
    assert torch.equal(stochastic(x, bits).float(), x)
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert stochastic(nan, bits[:3]).isnan().all()


def test_batches_and_flips_draw_the_same_bits() -> None:
    # The element counts, not the batch that it is in; `left` works on transposed matrices.
    for lite in (None, LITE, LiteConfig(side="left")):
        found = []
        for chunk_bytes in (1, 1 << 30):
            params = parameters()
            train(params, Muon(params, lite=lite, rounding="stochastic", chunk_bytes=chunk_bytes), range(4))
            found.append([p.detach().clone() for p in params])
        far = [(a != b).float().mean() for a, b in zip(*found, strict=True)]
        assert max(far) < 1e-3  # a batch may round its products otherwise, which few elements see


def test_skipped_matrices_keep_their_weights() -> None:
    for rounding in CAREFUL:
        for make in MADE.values():
            params = parameters()
            optimizer = make(params, rounding=rounding)
            train(params, optimizer, range(3))
            before = [p.detach().clone() for p in params]
            params[0].grad[0, 0] = torch.nan
            params[1].grad[:] = torch.nan
            optimizer.step()
            assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("kind", ["muon", "soap", "adamw"])
def test_weights_loaded_into_the_model_replace_the_master(kind: str) -> None:
    params = parameters()
    optimizer = MADE[kind](params, rounding="master", lr=1e-4)
    train(params, optimizer, range(3))
    with torch.no_grad():
        params[0].fill_(5.0)
    train(params, optimizer, range(3, 4))
    assert (optimizer.state[params[0]]["master"] - 5).abs().max() < 0.01
    assert (params[1] < 3).all()


def test_wrong_roundings() -> None:
    (p, _), half = parameters(), nn.Parameter(torch.ones(3, 4, dtype=torch.float16))
    cases: list[tuple[Any, str]] = [
        (lambda: Muon([p], rounding="masters"), "did you mean 'master'"),
        (lambda: Soap([half], rounding="stochastic"), "not torch.float16"),
    ]
    for make, match in cases:
        with pytest.raises(InputError, match=match):
            make()
    AdamW([half], rounding="master")  # a master suits any dtype


@pytest.mark.parametrize("kind", list(MADE))
def test_a_resumed_run_may_round_otherwise(kind: str) -> None:
    for before in ("nearest", *CAREFUL):
        params = parameters()
        first = MADE[kind](params, rounding=before)
        train(params, first, range(4))
        saved = copy.deepcopy(first.state_dict())
        # From here on it is a run whose float32 weights begin as the rounded ones.
        wide = [nn.Parameter(p.detach().float()) for p in params]
        reference = MADE[kind](wide)
        reference.load_state_dict(saved)
        train(wide, reference, range(4, 5))
        for after in {"nearest", *CAREFUL} - {before}:
            again = parameters()
            optimizer = MADE[kind](again, rounding=after)
            train(again, optimizer, range(7, 8))  # its own masters are no longer what they were
            for p, q in zip(again, params, strict=True):
                p.data.copy_(q)
            optimizer.load_state_dict(saved)
            assert optimizer.param_groups[0]["rounding"] == after
            train(again, optimizer, range(4, 5))
            for p, q in zip(again, wide, strict=True):
                assert ("master" in optimizer.state[p]) == (after == "master")
                if after == "master":
                    assert torch.equal(optimizer.state[p]["master"], q)
                if after == "stochastic":
                    far = (p.float() - q).abs() / q.abs().clamp_min(1e-3)
                    assert far.max() < 2**-7  # one of the two neighbours
                else:
                    assert torch.equal(p, q.bfloat16())
