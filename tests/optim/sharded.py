"""What must hold on several ranks. Every check runs on all of them; the oracle is the same optimizer on one."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from moefx.errors import InputError
from moefx.optim import AdamW, LiteConfig, Muon, SoapLITE
from moefx.optim import muon as product
from moefx.optim import muon_update as update

from .sharded_problem import (
    CHECKS,
    FOLLOWED,
    MADE,
    SHAPES,
    Context,
    check,
    columns,
    distance,
    equal_to_one_process,
    gradient,
    groups,
    inside,
    laid_out,
    parameters,
    random,
    rows,
    train,
    whole,
)

__all__ = ["CHECKS"]

Tensor = torch.Tensor


@check
def cut_matrices_are_stepped_as_on_one_process(c: Context) -> None:
    mesh = c.mesh(c.world)
    for make in MADE.values():
        for placements in (rows, inside, columns):
            equal_to_one_process(make, mesh, placements)


@check
def a_part_is_not_its_matrix(c: Context) -> None:
    # The negative control: orthogonalizing parts, as a step that knows nothing of ranks would, is another update.
    wanted = parameters(SHAPES[:3])
    params = laid_out(wanted, c.mesh(c.world), rows)
    alone = product._solved

    def blind(w: Tensor, mixed: Tensor, grad: Tensor, kept: Any, place: Any, *rest: Any) -> Any:
        return alone(w, mixed, grad, kept, place._replace(gather=None, cut=None), *rest)

    with mock.patch.object(product, "_solved", blind):
        train(params, Muon(params, lr=0.02), range(3))
    train(wanted, Muon(wanted, lr=0.02), range(3))
    assert distance(params, wanted) > 1e-3


@check
def hybrid_meshes_repeat_or_split(c: Context) -> None:
    for shape in ((2, c.world // 2), (1, c.world)):
        mesh = c.mesh(*shape)
        for kind in ("muon", "fast", "parity"):
            for replicas in ("repeat", "split"):

                def make(g: Any, kind: str = kind, replicas: str = replicas) -> Any:
                    return MADE[kind]([{**group, "replicas": replicas} for group in g])

                params, _ = equal_to_one_process(make, mesh, lambda p: [Replicate(), *inside(p)])
                every: list[Any] = [None] * c.world
                dist.all_gather_object(every, [p.detach().to_local() for p in params])
                twin = (c.rank + c.world // 2) % c.world if shape[0] == 2 else c.rank
                assert all(torch.equal(a, b) for a, b in zip(every[c.rank], every[twin], strict=True))


@check
def experts_cut_in_both_ways(c: Context) -> None:
    # Experts over one mesh dimension, their rows over the other.
    mesh = c.mesh(c.world // 2, 2)
    for kind in ("fast", "parity"):
        equal_to_one_process(
            MADE[kind], mesh, lambda p: [Shard(0), Shard(1)] if p.ndim == 3 else [Replicate(), Shard(0)]
        )


@check
def work_is_dealt_alike_whatever_stacks_a_rank_holds(c: Context) -> None:
    # Three experts, or one, are not as many on each rank; the matrices after them are shared all the same.
    shapes = ((3, 8, 6), (6, 6), (1, 5, 6), (6, 7), (7, 6), (7, 6), (3, 6, 6))
    mesh, hybrid = c.mesh(c.world), c.mesh(c.world // 2, 2)
    cases: list[tuple[Any, Any]] = [
        (mesh, rows),
        (mesh, lambda p: [Shard(0) if p.ndim == 3 else Replicate()]),
        (hybrid, lambda p: [Replicate(), Shard(0)]),
        (hybrid, lambda p: [Shard(0), Shard(1)] if p.ndim == 3 else [Replicate(), Shard(0)]),
    ]
    for kind in ("muon", "fast", "parity"):
        for where, placements in cases:
            equal_to_one_process(
                lambda g: MADE[kind]([{**x, "replicas": "split"} for x in g]),  # noqa: B023
                where,
                placements,
                shapes,
                steps=3,
            )
    # Experts of one rank alone, of which nobody else has as many.
    params, wanted = laid_out(parameters(shapes[1:2]), mesh, rows), parameters(shapes[1:2])
    own = nn.Parameter(random(1 + c.rank, 8, 6))
    own.grad = torch.ones_like(own)
    train(params, Muon([{"params": [own, *params]}], lr=0.02), range(2))
    train(wanted, Muon(wanted, lr=0.02), range(2))
    assert distance(params, wanted) < 1e-6


@check
def ranks_outside_of_a_mesh_are_not_waited_for(c: Context) -> None:
    half = DeviceMesh("cpu", list(range(c.world // 2)))
    if c.rank >= c.world // 2:
        return
    params, wanted = laid_out(parameters(), half, lambda p: [Replicate()]), parameters()
    train(params, Muon(groups(params), lr=0.02, replicas="split"), range(2))
    train(wanted, Muon(groups(wanted), lr=0.02), range(2))
    assert distance(params, wanted) < 1e-6


@check
def gradients_that_are_sums_over_ranks(c: Context) -> None:
    params, wanted = laid_out(parameters(), c.mesh(c.world), lambda p: [Replicate()]), parameters()
    mine, theirs = MADE["fast"](groups(params)), MADE["fast"](groups(wanted))
    for group in mine.param_groups:
        group["nonfinite"] = "raise"
    for i, p in enumerate(params):
        p.grad = DTensor.from_local(gradient(i, 0, p.shape) / c.world, p.device_mesh, [Partial()])
    mine.step()
    train(wanted, theirs, range(1))
    assert distance(params, wanted) < 1e-6


@check
def each_rank_computes_its_share(c: Context) -> None:
    shapes = [(8, 12)] * 6 + [(6, 8, 12)] * 2
    sizes, sent = [], []
    polar, move = update.polar, dist.all_to_all_single

    def counted(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        sizes.append(x.shape)
        return polar(x, *rest, **options)

    def measured(out: Tensor, given: Tensor, *rest: Any, **options: Any) -> Any:
        sent.append(given.numel())
        return move(out, given, *rest, **options)

    params = laid_out(parameters(shapes), c.mesh(c.world), inside)
    with mock.patch.object(update, "polar", counted), mock.patch.object(dist, "all_to_all_single", measured):
        train(params, Muon([{"params": params}], lr=0.02), range(1))
    assert [tuple(s) for s in sizes] == [(18 // c.world + (c.rank < 18 % c.world), 8, 12)]
    total = 18 * 8 * 12
    assert len(sent) == 2
    assert sum(sent) <= 1.3 * 2 * total / c.world  # one part of everything each way; all-gathering sends world - 1


@check
def cut_stacks_send_nothing(c: Context) -> None:
    shapes = ((4, 8, 12), (3, 12, 8), (1, 7, 12))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is to be sent")

    names = ("all_to_all_single", "all_reduce", "all_gather", "all_gather_object", "broadcast")
    for make in (*MADE.values(), lambda g: SoapLITE(g, frequency=2)):
        params, wanted = laid_out(parameters(shapes), c.mesh(c.world), rows), parameters(shapes)
        optimizer, one = make([{"params": params}]), make([{"params": wanted}])
        for t in range(5):
            for i, p in enumerate(params):
                p.grad = distribute_tensor(gradient(i, t, p.shape), p.device_mesh, p.placements)
            with mock.patch.multiple(dist, **dict.fromkeys(names, refuse)), CommDebugMode() as seen:
                optimizer.step()
            assert seen.get_total_counts() == 0
        train(wanted, one, range(5))
        assert distance(params, wanted) == 0  # the same operations, and so the same bits


@check
def soap_and_adamw_on_whole_matrices(c: Context) -> None:
    def stacks(p: Tensor) -> list[Any]:
        return [Shard(0)] if p.ndim != 2 or tuple(p.shape) == (10, 6) else [Replicate()]

    equal_to_one_process(lambda g: SoapLITE(g, lite=FOLLOWED, frequency=2), c.mesh(c.world), stacks)
    lite = LiteConfig(chi_diagonal=4.0, rank_fraction=0.2)
    for placements in (rows, columns):
        equal_to_one_process(lambda g: AdamW(g, lr=0.01, lite=lite), c.mesh(c.world), placements)


@check
def one_nan_skips_the_matrix_on_all_ranks(c: Context) -> None:
    def spoil(g: Tensor, i: int, t: int) -> Tensor:
        if t == 2 and g.shape[0] > 1:
            g.reshape(-1)[-1] = torch.nan  # on the last rank alone
        return g

    for make in (MADE["fast"], MADE["parity"]):
        params, wanted = laid_out(parameters(), c.mesh(c.world), inside), parameters()
        mine, theirs = make(groups(params)), make(groups(wanted))
        train(params, mine, range(4), spoil)
        train(wanted, theirs, range(4), spoil)
        assert distance(params, wanted) < 1e-6
        assert mine.skipped() == theirs.skipped()
        assert sum(theirs.skipped().values()) == 8
    for group in mine.param_groups:
        group["nonfinite"] = "raise"
    with pytest.raises(InputError, match="1 of 96"):  # also where the own part is finite
        train(params, mine, range(2, 3), spoil)


@check
def data_parallel_ranks_split_the_work(c: Context) -> None:
    for kind, make in MADE.items():
        params, wanted = parameters(), parameters()
        mine = make([{**g, "replicas": "split"} for g in groups(params)])
        with mock.patch.object(update, "polar", wraps=update.polar) as calls:
            train(params, mine, range(5))
        most = max(call.args[0].shape[0] for call in calls.call_args_list)
        assert most <= -(-6 // c.world), (kind, most)  # of (8, 12) there are two parameters with 1 + 4 ... matrices
        train(wanted, make(groups(wanted)), range(5))
        far = distance(params, wanted)
        assert far == 0 if kind == "muon" else far < 1e-6, (kind, far)
        every: list[Any] = [None] * c.world
        dist.all_gather_object(every, [p.detach() for p in params])
        assert all(distance(every[0], theirs) == 0 for theirs in every)


@check
def work_on_other_gradients_is_not_split(c: Context) -> None:
    for different in ("gradient", "parameters"):
        params = parameters(((8, 12), (4, 8, 12)))
        if different == "parameters" and c.rank:
            params = params[:1]
        optimizer = Muon([{"params": params}], lr=0.02, replicas="split")
        before = [p.detach().clone() for p in params]
        factor = 1 + c.rank if different == "gradient" else 1
        with pytest.raises(InputError, match="DistributedDataParallel"):
            train(params, optimizer, range(1), lambda g, i, t, factor=factor: g * factor)
        assert distance(params, before) == 0


@check
def bfloat16_with_masters_or_stochastic_rounding(c: Context) -> None:
    # Bits of an element depend on its place in the whole parameter, and so not on who holds it.
    mesh, hybrid = c.mesh(c.world), c.mesh(2, c.world // 2)
    shapes = ((8, 12), (7, 12), (4, 8, 12), (3, 12, 8), (12,), (10, 6))

    def narrow() -> list[nn.Parameter]:
        return [nn.Parameter(p.detach().bfloat16()) for p in parameters(shapes)]

    def spread(p: Tensor) -> list[Any]:
        return [Replicate(), *rows(p)]

    for rounding in ("master", "stochastic"):
        for where, placements in ((mesh, rows), (mesh, columns), (hybrid, spread)):
            for make in (
                lambda g: Muon(g, lr=1e-3, rounding=rounding),  # noqa: B023
                lambda g: Muon(g, lr=1e-3, lite=FOLLOWED, rounding=rounding),  # noqa: B023
            ):
                params, wanted = laid_out(narrow(), where, placements), narrow()
                sets = [[{"params": ps[:4]}, {"params": ps[4:], "role": "norm"}] for ps in (params, wanted)]
                mine, theirs = make(sets[0]), make(sets[1])
                train(params, mine, range(4), lambda g, i, t: g.bfloat16())
                train(wanted, theirs, range(4), lambda g, i, t: g.bfloat16())
                for p, q in zip(params, wanted, strict=True):
                    # Products of other shapes round otherwise in float32, which moves few across a boundary.
                    same = (whole(p) == whole(q)).float().mean()
                    assert same > 0.98, same
                    if rounding == "master":
                        far = whole(mine.state[p]["master"]) - theirs.state[q]["master"]
                        assert far.abs().max() < 1e-6
                twin = (c.rank + c.world // 2) % c.world if where is hybrid else c.rank
                every: list[Any] = [None] * c.world
                dist.all_gather_object(every, [p.detach().to_local() for p in params])
                assert all(torch.equal(a, b) for a, b in zip(every[c.rank], every[twin], strict=True))


@check
def split_matrices(c: Context) -> None:
    # Whole heads on each rank, blocks cut along their columns, or copies; anything else is refused.
    mesh, hybrid = c.mesh(c.world), c.mesh(c.world // 2, 2)
    cases: list[tuple[Any, Any, Any, str]] = [
        (mesh, rows, 4, "out_in"),
        (mesh, columns, 4, "out_in"),
        (mesh, columns, (8, 4, 4), "out_in"),
        (mesh, columns, 3, "in_out"),
        (mesh, rows, (6, 3, 3), "in_out"),
        (hybrid, lambda p: [Replicate(), Shard(0)], 4, "out_in"),
        (mesh, lambda p: [Replicate()], (8, 4, 4), "out_in"),
    ]
    for kind in ("fast", "parity"):
        for where, placements, split, layout in cases:
            params, wanted = laid_out(parameters([(16, 12)]), where, placements), parameters([(16, 12)])
            mine, theirs = (MADE[kind]([{"params": p, "split": split, "layout": layout}]) for p in (params, wanted))
            train(params, mine, range(4))
            train(wanted, theirs, range(4))
            assert distance(params, wanted) < 1e-6, (kind, split, layout)
            assert mine.state[params[0]].keys() == theirs.state[wanted[0]].keys()
    with CommDebugMode() as seen, mock.patch.object(dist, "all_to_all_single", side_effect=AssertionError):
        params = laid_out(parameters([(16, 12)]), mesh, rows)
        train(params, Muon([{"params": params, "split": 4}]), range(2))
    assert seen.get_comm_counts().keys() <= {torch.ops.c10d_functional.broadcast, torch.ops.c10d.scatter_}
    for split, height in (((8, 4, 4), 16), (8 if c.world == 4 else 16, 16), (3, 15)):
        params = laid_out(parameters([(height, 12)]), mesh, rows)
        with pytest.raises(InputError, match="cut it along dimension 1"):
            Muon([{"params": params, "split": split}])


@check
def layouts_that_cannot_be_stepped_are_refused(c: Context) -> None:
    mesh, flat = c.mesh(c.world // 2, 2), c.mesh(c.world)
    partial = nn.Parameter(DTensor.from_local(random(8, 12), flat, [Partial()]))
    twice = nn.Parameter(distribute_tensor(random(8, 12), mesh, [Shard(0), Shard(1)]))
    deep = nn.Parameter(distribute_tensor(random(4, 2, 8, 12), flat, [Shard(0)]))
    matrix = nn.Parameter(distribute_tensor(random(8, 12), flat, [Shard(0)]))
    cases = [(Muon, partial, "sum over ranks"), (Muon, deep, "several leading"), (SoapLITE, matrix, "use Muon")]
    if c.world > 2:  # a mesh dimension of one rank cuts nothing
        cases.append((Muon, twice, "cut twice"))
    for cls, p, text in cases:
        with pytest.raises(InputError, match=text):
            cls([p])
