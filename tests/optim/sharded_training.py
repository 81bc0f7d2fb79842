"""Models under FSDP2 and DDP and their checkpoints on several ranks; `sharded.py` has the optimizers alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from moefx.models.moe_lm import MoELM
from moefx.optim import LiteConfig, Muon, MuonLITE, Ramp, SoapLITE, param_groups

from .sharded import CHECKS  # those of the optimizers alone, to which this file adds
from .sharded_problem import Context, check, distance, random, whole

__all__ = ["CHECKS"]

Tensor = torch.Tensor
LITE = LiteConfig(Ramp(1.0, 2.0, 1, 6), -0.25, Ramp(-0.25, 1.0, 1, 6), chi_diagonal=Ramp(1.0, 4.0, 0, 6))
PARITY = LiteConfig(mode="parity")
MADE: dict[str, Callable[[Any], Any]] = {
    "fast": lambda g: MuonLITE(g, lr=2e-3, lite=LITE),
    "parity": lambda g: MuonLITE(g, lr=2e-3, lite=PARITY),
}


def model() -> MoELM:
    return MoELM(vocab=32, hidden=16, width=12, layers=2, heads=2, experts=4, k=2, idiom="E2")


def cut_model(mesh: DeviceMesh, inside: bool = False) -> MoELM:
    """Each layer by itself, then the rest; `inside` cuts the matrices of stacks, not the stacks."""
    made = model()

    def place(p: nn.Parameter) -> Shard | None:
        return Shard(1) if inside and p.ndim == 3 else None

    for layer in made.layers:
        fully_shard(layer, mesh=mesh, shard_placement_fn=place)
    fully_shard(made, mesh=mesh, shard_placement_fn=place)
    return made


def train(module: nn.Module, optimizer: Any, steps: range) -> None:
    for t in steps:
        ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(t))
        logits = module(ids[:, :-1])["logits"]
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def groups(module: nn.Module, algorithm: str = "muon") -> list[dict[str, Any]]:
    return param_groups(module, algorithm=algorithm, verbose=False)


def trained(steps: int, make: Callable[[Any], Any]) -> tuple[MoELM, Any]:
    module = model()
    optimizer = make(groups(module))
    train(module, optimizer, range(steps))
    return module, optimizer


def table(made: list[dict[str, Any]]) -> Any:
    return [{k: v for k, v in g.items() if k != "params"} for g in made]


@check
def groups_of_sharded_and_wrapped_models_are_those_of_the_model(c: Context) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    wanted = table(groups(model()))
    assert {g["role"] for g in wanted} >= {"router", "embedding", "head", "norm", "expert", "attention"}
    assert table(groups(cut_model(c.mesh(c.world)))) == wanted
    assert table(groups(DistributedDataParallel(model()))) == wanted
    assert table(groups(torch.compile(model()))) == wanted
    checkpointed = model()
    checkpointed.layers[1] = checkpoint_wrapper(checkpointed.layers[1])
    assert table(groups(checkpointed)) == wanted


@check
def groups_of_a_sharded_optimized_model_are_those_of_the_model(c: Context) -> None:
    import moefx

    ids = torch.randint(0, 32, (2, 8))
    optimized = moefx.optimize(model(), (ids,), codegen="eager")
    wanted = table(groups(model()))
    assert table(groups(optimized)) == wanted
    fully_shard(optimized.original, mesh=c.mesh(c.world))
    found = groups(optimized)
    assert table(found) == wanted
    assert all(isinstance(p, DTensor) for g in found for p in g["params"])


@check
def fsdp_trains_as_one_process(c: Context) -> None:
    for make in MADE.values():
        one, _ = trained(4, make)
        for mesh, inside in ((c.mesh(c.world), False), (c.mesh(c.world), True), (c.mesh(c.world // 2, 2), True)):
            module = cut_model(mesh, inside)
            train(module, optimizer := make(groups(module)), range(4))
            far = distance(list(module.parameters()), list(one.parameters()))
            assert far < 1e-6, far
            for p in module.parameters():  # elementwise state lies where its parameter does
                for key in {"momentum_buffer", "exp_avg", "exp_avg_sq"} & set(optimizer.state[p]):
                    assert optimizer.state[p][key].placements == p.placements
                if p.ndim == 2 and "basis" in optimizer.state[p]:
                    basis = optimizer.state[p]["basis"]
                    assert basis.to_local().numel() * mesh.size(mesh.ndim - 1) == basis.numel()
    assert distance(list(one.parameters()), list(model().parameters())) > 1e-3


@check
def expert_parallel_stacks_under_fsdp(c: Context) -> None:
    # Experts over one dimension, then fully_shard over the other: strided shards of the stack, whole matrices.
    mesh = c.mesh(c.world // 2, 2)

    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(random(8, 6, 5))

    one, bank = Bank(), Bank()
    bank.w = nn.Parameter(distribute_tensor(bank.w.detach(), mesh["shard"], [Shard(0)]))
    fully_shard(bank, mesh=mesh["replicate"])
    optimizer = MuonLITE(bank.parameters(), lr=0.02, lite=LITE)
    reference = MuonLITE(one.parameters(), lr=0.02, lite=LITE)
    for t in range(4):
        g = random(8, 6, 5, seed=20 + t)
        one.w.grad = g
        bank.w.grad = distribute_tensor(g, bank.w.device_mesh, bank.w.placements, src_data_rank=None)
        optimizer.step()
        reference.step()
    assert distance([bank.w], [one.w]) < 1e-6
    assert distance([optimizer.state[bank.w]["momentum_buffer"]], [reference.state[one.w]["momentum_buffer"]]) < 1e-6


@check
def ddp_trains_as_one_process(c: Context) -> None:
    for make in MADE.values():
        one, _ = trained(4, make)
        wrapped = DistributedDataParallel(model())
        split = [{**g, "replicas": "split"} if g["algorithm"] == "muon" else g for g in groups(wrapped)]
        train(wrapped, make(split), range(4))
        far = distance(list(wrapped.parameters()), list(one.parameters()))
        assert far < 1e-6, far


def state(module: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {"model": get_model_state_dict(module), "optimizer": get_optimizer_state_dict(module, optimizer)}


def load(module: nn.Module, optimizer: Any, **how: Any) -> None:
    found = state(module, optimizer)
    dcp.load(found, **how)
    set_model_state_dict(module, found["model"])
    set_optimizer_state_dict(module, optimizer, found["optimizer"])


def continues(module: nn.Module, optimizer: Any, make: Callable[[Any], Any]) -> None:
    """From step 3 to step 6, as a run of six steps."""
    assert {int(g["step"]) for g in optimizer.param_groups} == {3}
    train(module, optimizer, range(3, 6))
    wanted, theirs = trained(6, make)
    far = distance(list(module.parameters()), list(wanted.parameters()))
    assert far < 1e-6, far
    for p, q in zip(module.parameters(), wanted.parameters(), strict=True):
        for key, value in theirs.state[q].items():  # in one order on all ranks, which gather together
            assert key == "basis" or torch.allclose(whole(optimizer.state[p][key]), value, atol=1e-6), key


@check
def checkpoints_move_between_numbers_of_ranks(c: Context) -> None:
    for kind, make in MADE.items():
        everyone, half = c.mesh(c.world), DeviceMesh("cpu", list(range(c.world // 2)), mesh_dim_names=("shard",))
        inside = kind == "parity"
        names = ("all", "half", "one") if kind == "fast" or c.world > 2 else ("all",)  # two are run often, and quickly
        saved = {name: str(c.folder / f"{kind}-{name}") for name in names}
        module = cut_model(everyone, inside)
        train(module, optimizer := make(groups(module)), range(3))
        dcp.save(state(module, optimizer), checkpoint_id=saved["all"])
        continues(module, optimizer, make)  # saving changed nothing
        if "half" in saved and c.rank < c.world // 2:
            fewer = cut_model(half)
            train(fewer, optimizer := make(groups(fewer)), range(3))
            dcp.save(state(fewer, optimizer), checkpoint_id=saved["half"], process_group=half.get_group())
        if "one" in saved and c.rank == 0:
            alone, optimizer = trained(3, make)
            dcp.save(state(alone, optimizer), checkpoint_id=saved["one"], no_dist=True)
        dist.barrier()

        for path in saved.values():
            for mesh, cut in ((everyone, not inside), (c.mesh(c.world // 2, 2), inside)):
                module = cut_model(mesh, cut)
                train(module, optimizer := make(groups(module)), range(7, 8))  # what it did before does not matter
                load(module, optimizer, checkpoint_id=path)
                continues(module, optimizer, make)
            if c.rank == 0:
                alone, optimizer = trained(1, make)
                load(alone, optimizer, checkpoint_id=path, no_dist=True)
                continues(alone, optimizer, make)
            dist.barrier()


@check
def a_saved_state_without_a_mesh_is_laid_out(c: Context) -> None:
    # torch.save on one process, and the full state that torch gathers: each loads into the other.
    def make(g: Any) -> Any:
        return SoapLITE(g, frequency=2)

    for build, algorithm in ((MADE["fast"], "muon"), (make, "soap")):
        one = model()
        optimizer = build(groups(one, algorithm))
        train(one, optimizer, range(3))
        module = model()
        if algorithm == "muon":
            module = cut_model(c.mesh(c.world))
        mine = build(groups(module, algorithm))
        set_model_state_dict(module, one.state_dict(), options=StateDictOptions(full_state_dict=True))
        mine.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(module, mine, range(3, 5))
        full = get_optimizer_state_dict(module, mine, options=StateDictOptions(full_state_dict=True))
        train(one, optimizer, range(3, 5))
        assert distance(list(module.parameters()), list(one.parameters())) < 1e-6
        optimizer.load_state_dict(full)
        train(one, optimizer, range(5, 7))
        train(module, mine, range(5, 7))
        assert distance(list(module.parameters()), list(one.parameters())) < 1e-6


@check
def parameters_without_gradient_are_left_alone(c: Context) -> None:
    module = cut_model(c.mesh(c.world))
    optimizer = Muon(groups(module), lr=2e-3)
    before = whole(module.head.weight).clone()
    module.head.weight.requires_grad_(False)
    train(module, optimizer, range(1))
    assert torch.equal(whole(module.head.weight), before)
