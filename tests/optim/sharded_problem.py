"""A training problem on one process or several, and the check that both give the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moefx.optim import LiteConfig, Muon, MuonLITE, Ramp

Tensor = torch.Tensor
Made = Callable[[Any], Any]


class Context(NamedTuple):
    rank: int
    world: int
    folder: Path

    def mesh(self, *shape: int) -> DeviceMesh:
        names = ("replicate", "shard")[-len(shape) :]
        return init_device_mesh("cpu", shape, mesh_dim_names=names)


CHECKS: dict[str, Callable[[Context], None]] = {}


def check(function: Callable[[Context], None]) -> Callable[[Context], None]:
    CHECKS[function.__name__] = function
    return function


# Even and uneven cuts, tall and wide, fewer rows or experts than ranks, stacks, and what AdamW has.
SHAPES = ((8, 12), (12, 8), (7, 12), (7, 12), (1, 6), (4, 8, 12), (3, 12, 8), (1, 7, 12), (12,), (10, 6))
MATRICES = 8
FOLLOWED = LiteConfig(Ramp(1.0, 2.0, 1, 3), -0.25, Ramp(-0.25, 1.0, 1, 3), chi_diagonal=3.0, rank_fraction=0.2)
MADE: dict[str, Made] = {
    "muon": lambda g: Muon(g, lr=0.02),
    "fast": lambda g: MuonLITE(g, lr=0.02, lite=FOLLOWED),
    "damping": lambda g: MuonLITE(g, lr=0.02, lite=LiteConfig(1.0, 0.0, 1.0, chi_diagonal=8.0)),
    "left": lambda g: MuonLITE(g, lr=0.02, lite=LiteConfig(side="left")),
    "in_out": lambda g: MuonLITE(g, lr=0.02, lite=LiteConfig(side="small", damping="shared"), layout="in_out"),
    "parity": lambda g: MuonLITE(g, lr=0.02, lite=LiteConfig(mode="parity")),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradient(index: int, t: int, shape: Any) -> Tensor:
    g = random(*shape, seed=1000 + 50 * t + index)
    if len(shape) == 3 and shape[0] > 1:
        g[t % shape[0]] = 0  # an expert without tokens
    return g


def parameters(shapes: Any = SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(random(*s, seed=i)) for i, s in enumerate(shapes)]


def laid_out(params: list[nn.Parameter], mesh: DeviceMesh, placements: Any) -> list[nn.Parameter]:
    return [nn.Parameter(distribute_tensor(p.detach(), mesh, placements(p))) for p in params]


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Vectors and the embedding, which are the last two, run AdamW."""
    matrices = [p for i, p in enumerate(params) if i < MATRICES]
    return (
        [{"params": matrices}, {"params": params[MATRICES:], "role": "norm"}]
        if params[MATRICES:]
        else [{"params": matrices}]
    )


def train(params: list[nn.Parameter], optimizer: Any, steps: range, change: Any = None) -> None:
    for t in steps:
        for i, p in enumerate(params):
            g = gradient(i, t, p.shape)
            g = g if change is None else change(g, i, t)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
        optimizer.step()


def whole(x: Any) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()


def distance(found: list[Any], wanted: list[Any]) -> float:
    return max((whole(p) - whole(q)).abs().max().item() for p, q in zip(found, wanted, strict=True))


def equal_to_one_process(make: Made, mesh: DeviceMesh, placements: Any, shapes: Any = SHAPES, steps: int = 5) -> Any:
    """Parameters and every state of a sharded run are those of a run on whole tensors."""
    params, wanted = laid_out(parameters(shapes), mesh, placements), parameters(shapes)
    mine, theirs = make(groups(params)), make(groups(wanted))
    train(params, mine, range(steps))
    train(wanted, theirs, range(steps))
    assert distance(params, wanted) < 1e-6, distance(params, wanted)
    for p, q in zip(params, wanted, strict=True):
        assert mine.state[p].keys() == theirs.state[q].keys()
        for key, value in mine.state[p].items():
            if key != "basis":  # its columns may turn within equal strengths; what it does is in the weights
                assert torch.allclose(whole(value).double(), theirs.state[q][key].double(), atol=1e-6), key
            assert whole(value).shape == theirs.state[q][key].shape
    return params, wanted


def rows(p: Tensor) -> list[Any]:
    return [Shard(0)]


def inside(p: Tensor) -> list[Any]:
    """Cut the matrices, of stacks too."""
    return [Shard(max(p.ndim - 2, 0))]


def columns(p: Tensor) -> list[Any]:
    return [Shard(p.ndim - 1)]
