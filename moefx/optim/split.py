"""Matrices that are several in one: fused projections and the heads of attention, updated block by block.

A group's `split` cuts the output features of its matrices, rows in layout "out_in": an int is the size of equal blocks
(a head), a sequence the sizes of blocks that follow one another (queries, keys, values). Runs of equal blocks are
stacks, so that heads go through one batch. Blocks are views: no weight is copied, and the update of a block is that of
a parameter by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from ..errors import InputError
from .distributed import is_dtensor

Tensor = torch.Tensor
Split = int | Sequence[int]


def check_split(p: Any, where: str, split: Split, layout: str) -> None:
    """Refuse what cannot be cut so.

    Raises:
        InputError: not a matrix, sizes that do not add up, or a DTensor whose ranks hold parts of blocks.
    """
    if p.ndim != 2:
        todo = "leave it out of the group: each matrix of a stack is a block already"
        raise InputError(f"a parameter {list(p.shape)} is no matrix to split", where=where, todo=todo)
    dim = 1 if layout == "in_out" else 0
    size = p.shape[dim]
    sizes: list[Any] = [split] if isinstance(split, int) else list(split)
    if not sizes or not all(isinstance(x, int) and x > 0 for x in sizes):
        raise InputError(f"split={split!r} is no size", where=where, todo="give positive numbers of output features")
    if isinstance(split, int) and size % split:
        todo = f"give a divisor of {size}, or the sizes of all blocks"
        raise InputError(f"{size} output features are not blocks of {split}", where=where, todo=todo)
    if not isinstance(split, int) and sum(sizes) != size:
        why = f"{' + '.join(map(str, sizes))} = {sum(sizes)}"
        raise InputError(f"the blocks do not add up to {size} output features", where, why, "give the size of each")
    if not is_dtensor(p):
        return
    mesh, runs, ways, plain = p.device_mesh, _runs(split, size), 1, True
    for i, placement in enumerate(p.placements):
        if not placement.is_replicate() and placement.dim == dim:
            ways, plain = ways * mesh.size(i), plain and placement.is_shard()
    if ways > 1 and not (plain and len(runs) == 1 and runs[0][0] % ways == 0):
        raise InputError(
            "blocks of a split matrix lie on several ranks",
            where,
            why=f"placements {tuple(p.placements)} of {list(p.shape)}, blocks of {split}",
            todo=f"cut it along dimension {1 - dim} (fully_shard: shard_placement_fn), or split it into equal blocks "
            "of which each rank holds as many",
        )


def blocks(x: Any, split: Split | None, layout: str) -> list[Any]:
    """Views [count, rows, n] of a matrix (DTensors too), one for each run of equal blocks; without a split, [x]."""
    if split is None:
        return [x]
    if layout == "in_out":
        return [block.mT for block in blocks(x.mT, split, "out_in")]
    found, start, runs = [], 0, _runs(split, x.shape[0])
    for count, rows in runs:
        part = x if len(runs) == 1 else x[start : start + count * rows]
        found.append(part.unflatten(0, (count, rows)))
        start += count * rows
    return found


def _runs(split: Split, size: int) -> list[tuple[int, int]]:
    """(how many, output features each) of blocks of one size that follow one another."""
    if isinstance(split, int):
        return [(size // split, split)]
    return [(len(list(same)), rows) for rows, same in groupby(split)]
