"""Optimizers on what moefx compiles: the optimized module, its original, and a run of `moefx train`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import moefx
from moefx.train.config import TrainConfig
from moefx.train.parts import make_optimizer
from tests import reference as ref

KINDS: dict[str, Any] = {
    "muon": lambda groups: moefx.optim.Muon(groups, lr=3e-3),
    "muon-lite": lambda groups: moefx.optim.MuonLITE(groups, lr=3e-3),
    "soap": lambda groups: moefx.optim.Soap(groups, lr=3e-3),
    "soap-lite": lambda groups: moefx.optim.SoapLITE(groups, lr=3e-3),
}


def losses(module: Any, optim: torch.optim.Optimizer, steps: int = 8) -> list[float]:
    found = []
    for _ in range(steps):
        loss = ref.loss(module(**ref.batch()))
        loss.backward()
        optim.step()
        optim.zero_grad()
        found.append(loss.item())
    return found


@pytest.fixture(scope="module")
def opt() -> moefx.OptimizedModule:
    pytest.importorskip("transformers")
    return ref.optimize(ref.tiny())


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_optimized_model_trains_as_its_original(kind: str, opt: moefx.OptimizedModule) -> None:
    mine, other = copy.deepcopy(opt), copy.deepcopy(opt.original)
    algorithm = kind.split("-")[0]
    groups = [moefx.optim.param_groups(m, algorithm=algorithm, verbose=False) for m in (mine, other)]
    assert [g["names"] for g in groups[0]] == [g["names"] for g in groups[1]]
    got, want = losses(mine, KINDS[kind](groups[0])), losses(other, KINDS[kind](groups[1]))
    # SOAP divides by second moments of single steps: a rounding error in a tiny gradient becomes a full step.
    assert got == pytest.approx(want, abs=2e-3 if algorithm == "muon" else 5e-2)
    assert got[:2] == pytest.approx(want[:2], abs=1e-3)
    assert got[-1] < got[0] - 0.1


def test_torchs_own_optimizers_take_the_groups(opt: moefx.OptimizedModule) -> None:
    model = copy.deepcopy(opt)
    found = losses(model, torch.optim.AdamW(moefx.optim.param_groups(model, verbose=False), lr=3e-3))
    assert found[-1] < found[0] - 0.1


@pytest.mark.parametrize("kind", list(KINDS))
def test_training_resumes_bitwise(kind: str, opt: moefx.OptimizedModule, tmp_path: Path) -> None:
    from moefx.train import checkpoint

    cfg = TrainConfig(steps=8, warmup=2, lr=3e-3, optim=kind, out=tmp_path)
    one = copy.deepcopy(opt)
    optim = make_optimizer(one, cfg)
    assert isinstance(optim, moefx.optim.Soap if kind.startswith("soap") else moefx.optim.Muon)
    first = losses(one, optim, 3)
    checkpoint.save(tmp_path, step=3, model=one, optimizer=optim, fingerprint={}, history={})
    rest = losses(one, optim, 3)
    two = copy.deepcopy(opt)
    other = make_optimizer(two, cfg)
    checkpoint.load(checkpoint.latest(tmp_path), model=two, optimizer=other, fingerprint={})
    assert losses(two, other, 3) == rest
    assert first[0] > rest[-1]


def test_an_unknown_optimizer_is_named() -> None:
    with pytest.raises(moefx.InputError, match="unknown optim 'moun'") as caught:
        TrainConfig(optim="moun")
    assert "did you mean 'muon'" in str(caught.value)


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_a_run_may_end_in_its_warm_up(steps: int, opt: moefx.OptimizedModule) -> None:
    model = copy.deepcopy(opt)
    optim = make_optimizer(model, TrainConfig(steps=steps, warmup=20, lr=3e-3, optim="muon-lite"))
    found = losses(model, optim, 3)  # one step more than planned is no error either
    assert found[-1] < found[0]
