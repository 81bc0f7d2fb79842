"""Parameters that several ranks share: what each rank holds, of them and of their state.

A DTensor's local tensor is stepped in place. Elementwise work and state stay where they are. Three cases for matrices:

whole      Every local matrix is complete (an unsharded tensor, a stack [E, m, n] cut along E): nothing is sent.
cut        Rows or columns of a matrix lie on several ranks (FSDP): `exchange` brings them together to be stepped.
copied     Several ranks hold the same matrices (DDP, the replicated dimension of an HSDP mesh). Each computes them all,
           or with `replicas="split"` a share of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..errors import InputError

Tensor = torch.Tensor


class Place(NamedTuple):
    """Where the rest of a parameter is, and where it is again."""

    shape: torch.Size  # of the whole parameter
    cut: int | None = None  # the cut one of a matrix's dimensions, -2 or -1
    gather: Any = None  # the process group that has all parts of each matrix
    parts: tuple[Any, ...] = ()  # process groups along which any dimension is cut, that of the stack too
    copies: tuple[Any, ...] = ()  # process groups that share the work on their copies

    @property
    def ways(self) -> int:
        """Into how many parts each matrix is cut."""
        return 1 if self.gather is None else int(dist.get_world_size(self.gather))


def is_dtensor(x: Tensor) -> bool:
    """By an attribute: there are builds of torch that have no DTensor to import."""
    return getattr(x, "placements", None) is not None


def local(x: Any) -> Tensor:
    """This rank's part, with the storage of `x`."""
    return x.to_local().detach() if is_dtensor(x) else x  # type: ignore[no-any-return]


def grad_of(p: Any) -> Tensor:
    """A parameter's gradient, in the parameter's layout."""
    grad = p.grad
    if is_dtensor(p) and grad.placements != p.placements:  # what tensor parallelism leaves to be summed
        grad = grad.redistribute(placements=p.placements)
    return grad  # type: ignore[no-any-return]


def place_of(p: Tensor, replicas: str = "repeat") -> Place:
    """The place of a parameter of any shape; `copies` only with replicas="split"."""
    if not is_dtensor(p):
        shared = replicas == "split" and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return Place(p.shape, copies=(dist.group.WORLD,) if shared else ())
    mesh, cut, gather, parts, copies = p.device_mesh, None, None, [], []  # type: ignore[attr-defined]
    for i, placement in enumerate(p.placements):  # type: ignore[attr-defined]
        if mesh.size(i) == 1:
            continue
        if placement.is_replicate():
            copies.append(mesh.get_group(i))
            continue
        parts.append(mesh.get_group(i))
        if placement.is_partial():  # a gradient's, never a parameter's
            continue
        if p.ndim >= 2 and placement.dim >= p.ndim - 2:
            cut, gather = placement.dim - p.ndim, parts[-1]
    return Place(p.shape, cut, gather, tuple(parts), tuple(copies) if replicas == "split" else ())


def check_placements(p: Any, where: str, *, matrices: bool, cut: bool = True) -> None:
    """Refuse layouts that cannot be stepped.

    Args:
        p: a parameter; one that is no DTensor passes.
        where: its name, for the error.
        matrices: whether matrices are updated as wholes, rather than element by element.
        cut: whether an algorithm can bring the parts of a matrix together.
    """
    if not is_dtensor(p):
        return
    layout = f"placements {tuple(p.placements)} of {list(p.shape)}"
    if any(x.is_partial() for x in p.placements):
        raise InputError("a parameter is a sum over ranks", where, layout, "redistribute it to Shard or Replicate")
    if not matrices:
        return
    dims = [x.dim for i, x in enumerate(p.placements) if not x.is_replicate() and p.device_mesh.size(i) > 1]
    inside = [d for d in dims if d >= p.ndim - 2]
    # Strided shards (FSDP over tensor parallelism) report no plain shard here, and their rows are out of order.
    if len(inside) > 1 or (inside and not all(x.is_replicate() or x.is_shard() for x in p.placements)):
        todo = "cut each matrix along one mesh dimension; others may cut the stack or replicate"
        raise InputError("the matrices of a parameter are cut twice", where, layout, todo)
    if p.ndim > 3 and any(d < p.ndim - 2 for d in dims):
        raise InputError("a stack with several leading dimensions is cut", where, layout, "store it as [E, m, n]")
    if inside and not cut:
        todo = "shard stacks along their first dimension, replicate matrices, or use Muon, which gathers them"
        raise InputError("the matrices of a parameter are cut", where, layout, todo)


def per_matrix(p: Any, whole: Tensor, rows: bool = False) -> Tensor:
    """State [E, ...] of the E matrices of `p`, laid out as they are.

    Args:
        p: the parameter.
        whole: [E, ...] for all matrices; may be expanded, only this rank's part is stored.
        rows: cut dimension 1 across the ranks among which the matrices are cut; otherwise they all keep it whole.
    """
    if not is_dtensor(p):
        return whole.clone(memory_format=torch.contiguous_format)
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    def kept(placement: Any) -> Any:
        if placement.is_replicate():
            return placement
        if placement.dim < p.ndim - 2:
            return placement
        return Shard(1) if rows else Replicate()

    placements = [kept(x) for x in p.placements]
    part = distribute_tensor(whole, p.device_mesh, placements, src_data_rank=None).to_local()  # sends nothing
    part = part.clone(memory_format=torch.contiguous_format)
    stride = torch.empty(whole.shape, device="meta").stride()
    made: Tensor = DTensor.from_local(
        part, p.device_mesh, placements, run_check=False, shape=whole.shape, stride=stride
    )
    return made


def as_laid_out(value: Any, here: Any) -> Tensor:
    """`value` in the layout of `here`, which may be another mesh, or none; a copy."""
    from_mesh = is_dtensor(value)
    if not is_dtensor(here):
        return value.full_tensor().clone() if from_mesh else value.detach().clone()  # type: ignore[no-any-return]
    if from_mesh and value.device_mesh == here.device_mesh and tuple(value.placements) == tuple(here.placements):
        return value.detach().clone()  # type: ignore[no-any-return]
    from torch.distributed.tensor import distribute_tensor

    value = value.full_tensor() if from_mesh else value
    made: Tensor = distribute_tensor(value, here.device_mesh, here.placements, src_data_rank=None)
    return made.clone()


def agreed(values: Sequence[Tensor], places: Sequence[Place], op: str = "sum") -> list[Tensor]:
    """Each value [...] summed ("sum") or maximised ("max") over the ranks that hold parts of its parameter.

    One collective for all values of the same ranks; none for those of whole parameters.
    """
    found = list(values)
    buckets: dict[tuple[Any, ...], list[int]] = {}
    for index, place in enumerate(places):
        if place.parts:
            buckets.setdefault(place.parts, []).append(index)
    for groups, members in buckets.items():
        together = torch.stack([found[i] for i in members])
        for group in groups:
            dist.all_reduce(together, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group)
        for index, value in zip(members, together, strict=True):
            found[index] = value
    return found


def check_copies(grads: Sequence[Tensor], places: Sequence[Place]) -> None:
    """Refuse to share work on parameters without a mesh that differ from rank to rank (waits for them).

    Raises:
        InputError: on every rank, if they are not the same everywhere, or nobody averaged their gradients.
    """
    plain = [g for g, place in zip(grads, places, strict=True) if place.copies and dist.group.WORLD in place.copies]
    if not plain:
        return
    mine = [(tuple(g.shape), float(g.double().abs().sum())) for g in plain]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)

    def other(a: tuple[Any, float], b: tuple[Any, float]) -> bool:
        # Sums over the same gradient, in which only rounding may differ; one that is not finite is so everywhere.
        unusable = not (math.isfinite(a[1]) or math.isfinite(b[1]))
        return a[0] != b[0] or not (unusable or math.isclose(a[1], b[1], rel_tol=1e-3))

    for rank, theirs in enumerate(every):
        differ = [a[0] for a, b in zip(every[0], theirs, strict=False) if other(a, b)]
        if differ or len(theirs) != len(every[0]):
            found = (
                f"another gradient of a parameter {list(differ[0])}" if differ else f"other parameters ({len(theirs)})"
            )
            raise InputError(
                'replicas="split" needs the same parameters and gradients on all ranks',
                why=f"rank {rank} has {found} than rank 0, which has {len(every[0])} parameters",
                todo='average gradients (DistributedDataParallel), and give experts of their own replicas="repeat"',
            )
