"""Balance over two processes is that of one process with both batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn

import moefx
from moefx import losses as L
from moefx.optimize import Options, reoptimize
from moefx.passes import AddLosses
from moefx.precision.recipe import BF16
from tests.family import zoo
from tests.optim.ranks import launch

from . import ranked

pytest.importorskip("transformers")


@contextmanager
def group(folder: Path, name: str = "store") -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{folder / name}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_global_balance_and_biases_on_two_ranks(tmp_path: Path) -> None:
    said = launch(2, tmp_path, ["balance"], "tests.losses.ranked")
    assert not said["balance"], said["balance"]


@pytest.mark.parametrize(("form", "over_ranks"), [("global", True), ("switch", False), ("transformers", False)])
def test_the_process_group_is_part_of_the_signature_where_a_loss_sums_over_it(
    tmp_path: Path, form: str, over_ranks: bool
) -> None:
    chain = moefx.pipeline("bf16", codegen="eager").insert(AddLosses((L.ZLoss(), L.LoadBalance(form=form))))
    opt = reoptimize(nn.Linear(2, 2), Options(BF16, chain, "eager", False, None))
    opt._structure = opt._present_structure()
    alone = opt._key([], None, exact=True)
    with group(tmp_path):
        assert (opt._key([], None, exact=True) != alone) == over_ranks
    assert opt._key([], None, exact=True) == alone


@pytest.mark.nightly  # four compilations
@pytest.mark.parametrize("form", ["global", "switch"])
def test_a_process_group_that_comes_later_is_summed_over(tmp_path: Path, form: str) -> None:
    def loss() -> float:
        opt(**batch)
        return float(opt.losses["lb"])

    batch = ranked.batch(0)
    model = zoo.build(zoo.get("deepseek_v3"), output_router_logits=False)
    opt = moefx.optimize(model, batch, codegen="eager", losses=[L.LoadBalance(form=form)])
    alone = loss()
    with group(tmp_path):
        assert loss() == alone  # one rank
        found = ["all_reduce" in str(v.program.fw_graph.graph) for v in opt.variants()]
        assert found == ([False, True] if form == "global" else [False])
        loss()
        assert len(opt.variants()) == len(found)
    assert loss() == alone  # the graph of no group is still there
