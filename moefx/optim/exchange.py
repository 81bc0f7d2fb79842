"""Functions of whole matrices whose parts, or copies, are on several ranks: who computes which, and what is sent.

Cut matrices are dealt out: each rank receives the parts of its share by all-to-all, computes, and sends every rank its
part of the result. No rank ever holds them all. Ranks with copies compute a share each, and all-gather the results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from .distributed import Place

Tensor = torch.Tensor
Tensors = dict[str, Tensor]
Function = Callable[[Tensors], Tensors]
Cuts = dict[str, tuple[int, int]]  # name -> (dimension that is cut, its whole length)


def run(function: Function, inputs: Tensors, place: Place, cuts: Cuts, turn: int) -> Tensors:
    """`function` of whole matrices, wherever their parts are.

    Args:
        function: inputs [B, ...] of the same names -> outputs [B, ...], matrix by matrix; B may be 0.
        inputs: [N, ...] this rank's parts.
        place: where the matrices are.
        cuts: of inputs and outputs; one that is not named is whole on every rank.
        turn: which rank takes the odd matrix, so that buckets of one do not all go to the first.

    Returns:
        [N, ...] this rank's parts of the outputs, in the floating dtype of the inputs.
    """
    one = function
    if place.gather is not None:

        def one(share: Tensors) -> Tensors:
            return _dealt(function, share, place.gather, cuts, turn)

    for group in place.copies:
        one = _split(one, group, turn)
    return one(inputs)


def _counts(total: int, ways: int, turn: int) -> list[int]:
    """How many of `total` matrices each of `ways` ranks takes."""
    return [total // ways + ((rank - turn) % ways < total % ways) for rank in range(ways)]


def _lengths(total: int, ways: int) -> list[int]:
    """Lengths of the parts of a dimension, as torch cuts them: the last ones may be shorter, or empty."""
    step = -(-total // ways)
    return [max(0, min(step, total - rank * step)) for rank in range(ways)]


def _dealt(function: Function, inputs: Tensors, group: Any, cuts: Cuts, turn: int) -> Tensors:
    """Parts of matrices to their owners, and parts of the results back: two all-to-alls."""
    ways, me = dist.get_world_size(group), dist.get_rank(group)
    like = next(iter(inputs.values()))
    owned = _runs(_counts(len(like), ways, turn))
    mine = owned[me]
    count = mine.stop - mine.start

    sent = {name: x for name, x in inputs.items() if name in cuts}
    rows = _packed(list(sent.values()))
    shapes = [[_part(x, *cuts[name], ways, rank) for name, x in sent.items()] for rank in range(ways)]
    incoming = [(count, sum(shape.numel() for shape in each)) for each in shapes]
    parts = [
        _unpacked(flat, each)
        for flat, each in zip(_all_to_all([rows[at] for at in owned], incoming, group), shapes, strict=True)
    ]
    whole = {name: torch.cat([part[i] for part in parts], cuts[name][0]) for i, name in enumerate(sent)}
    outputs = function({**{name: x[mine] for name, x in inputs.items() if name not in cuts}, **whole})

    def of(rank: int) -> list[Tensor]:
        return [
            x.split(_lengths(cuts[name][1], ways), cuts[name][0])[rank] if name in cuts else x
            for name, x in outputs.items()
        ]

    back = [_packed([x.to(like.dtype) for x in of(rank)]) for rank in range(ways)]
    returning = [(at.stop - at.start, back[me].shape[1]) for at in owned]
    flat = torch.cat(_all_to_all(back, returning, group))
    return dict(zip(outputs, _unpacked(flat, [x.shape[1:] for x in of(me)]), strict=True))


def _part(x: Tensor, dim: int, length: int, ways: int, rank: int) -> torch.Size:
    """Shape, without the first dimension, of another rank's part of what `x` is this rank's part of."""
    shape = list(x.shape)
    shape[dim] = _lengths(length, ways)[rank]
    return torch.Size(shape[1:])


def _runs(counts: list[int]) -> list[slice]:
    return [slice(sum(counts[:i]), sum(counts[: i + 1])) for i in range(len(counts))]


def _packed(tensors: list[Tensor]) -> Tensor:
    """[N, total]: one row for each matrix."""
    return torch.cat([x.reshape(len(x), x.shape[1:].numel()) for x in tensors], 1)


def _unpacked(flat: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    pieces = flat.split([shape.numel() for shape in shapes], 1)
    return [piece.reshape(len(flat), *shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _all_to_all(parts: list[Tensor], shapes: list[tuple[int, int]], group: Any) -> list[Tensor]:
    """Part i goes to rank i; `shapes` are those of what comes, by sender."""
    sizes = [rows * columns for rows, columns in shapes]
    out = parts[0].new_empty(sum(sizes))
    dist.all_to_all_single(
        out, torch.cat([x.reshape(-1) for x in parts]), sizes, [x.numel() for x in parts], group=group
    )
    return [x.view(shape) for x, shape in zip(out.split(sizes), shapes, strict=True)]


def _split(function: Function, group: Any, turn: int) -> Function:
    """Ranks with the same inputs compute a share each, and all receive all results."""
    ways, me = dist.get_world_size(group), dist.get_rank(group)

    def shared(inputs: Tensors) -> Tensors:
        like = next(iter(inputs.values()))
        counts = _counts(len(like), ways, turn)
        outputs = function({name: x[_runs(counts)[me]] for name, x in inputs.items()})
        rows = _packed([x.to(like.dtype) for x in outputs.values()])
        padded = rows.new_zeros(max(counts), rows.shape[1])
        padded[: len(rows)] = rows
        every = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(every, padded, group=group)
        flat = torch.cat([block[:count] for block, count in zip(every, counts, strict=True)])
        return dict(zip(outputs, _unpacked(flat, [x.shape[1:] for x in outputs.values()]), strict=True))

    return shared
