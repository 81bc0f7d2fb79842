"""FSDP2 around an optimized module: the whole is sharded, its layers are not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard

import moefx

from . import ranked_training
from . import reference as ref
from .optim.ranks import launch

pytest.importorskip("transformers")


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(opt: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.full_tensor() for n, p in opt.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("one_rank")
def test_methods_of_fsdp_work_on_the_optimized_module() -> None:
    """Accumulation without communication, as FSDP2 has it."""
    plain, opt = ref.optimize(ref.tiny()), ref.optimize(ref.tiny())
    fully_shard(opt)
    assert isinstance(opt, FSDPModule)
    for step, batch in enumerate((ref.batch(seed=1), ref.batch(seed=2))):
        opt.set_requires_gradient_sync(step == 1)
        opt(**batch).loss.backward()
        plain(**batch).loss.backward()
    wanted = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    found = gradients(opt)
    assert found.keys() == wanted.keys()
    for name, g in found.items():
        torch.testing.assert_close(g, wanted[name], msg=name)
    opt.unshard()
    assert not any(hasattr(p, "placements") for p in opt.parameters())
    opt.reshard()
    assert all(hasattr(p, "placements") for p in opt.parameters())


@pytest.mark.usefixtures("one_rank")
def test_sharded_layers_are_refused_and_named() -> None:
    model = ref.tiny()
    opt = ref.optimize(model)
    fully_shard(model.model.layers[0])
    with pytest.raises(moefx.InputError, match=r"(?s)model\.layers\.0\..* is a DTensor.*fully_shard\(moefx.optimize"):
        opt(**ref.batch())
    whole = ref.tiny()
    fully_shard(whole)
    with pytest.raises(moefx.InputError, match=r"(?s)is a DTensor.*and last: fully_shard"):
        ref.optimize(whole)


@pytest.mark.nightly
def test_two_ranks_train_as_one_process(tmp_path: Path) -> None:
    said = launch(2, tmp_path, list(ranked_training.CHECKS), "tests.ranked_training")
    assert not any(said.values()), "\n".join(said.values())
