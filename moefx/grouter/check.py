"""Does a router see the future? The question to ask before a model is trained on its decisions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..routing import TOLERANCE, compare_prefixes
from ..train.modes import modes_kept

Router = nn.Module | Callable[[Tensor], Tensor]
GRID = 16  # prefixes that are tried unless some are named


@dataclass(frozen=True)
class Consistency:
    """What cutting off the future changed.

    Attributes:
        consistent: whether the difference is within the tolerance.
        max_difference: of a logit with and without the later tokens, over the largest logit.
        changed_sets: share of tokens whose set of k experts is another one. Below the tolerance, these are near ties.
        prefixes: number of prefixes that were compared in each sequence.
    """

    consistent: bool
    max_difference: float
    changed_sets: float
    prefixes: int


@torch.no_grad()
def prefix_consistency(
    router: Router,
    ids: Tensor,
    *,
    k: int = 2,
    lengths: Sequence[int] | None = None,
    tolerance: float = TOLERANCE,
) -> Consistency:
    """Compare the routing of a token in the whole window with that in the window which ends at the token.

    Args:
        router: from ids [B, S] to logits [B, S, E]; a Grouter, or any function.
        ids: int64 [B, S], S >= 2.
        k: experts per token, at most E.
        lengths: prefix lengths, each in 1..S-1; None for up to 16 spread over the window.
        tolerance: relative to the largest logit.

    Raises:
        InputError: the window is too short, a length is not inside of it, or an id is outside of the vocabulary of a
            Grouter.
    """
    S = ids.shape[1]
    if S < 2:
        raise InputError(f"a window of {S} tokens has no later tokens to cut off", todo="give longer sequences")
    if lengths is None:
        lengths = torch.linspace(1, S - 1, min(GRID, S - 1)).round().int().unique().tolist()
    if not lengths or not all(0 < n < S for n in lengths):
        raise InputError(f"prefix lengths {list(lengths)} do not all lie in 1..{S - 1}", todo="name other lengths")
    if check := getattr(router, "check_ids", None):
        check(ids)
    with modes_kept(router) if isinstance(router, nn.Module) else nullcontext():
        if isinstance(router, nn.Module):
            router.eval()
        full, alone = compare_prefixes(lambda cut: router(cut["input_ids"]), {"input_ids": ids}, lengths)
    if not 1 <= k <= full.shape[-1]:
        raise InputError(f"top-{k} of {full.shape[-1]} experts", todo="choose another k")
    difference = float((full - alone).abs().max() / full.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
    changed = (top_set(full, k) != top_set(alone, k)).any(-1)
    return Consistency(difference <= tolerance, difference, float(changed.double().mean()), len(lengths))


def assert_causal(
    router: Router, ids: Tensor | None = None, *, vocab_size: int | None = None, seed: int = 0, **options: object
) -> Consistency:
    """`prefix_consistency`, with an error where the router sees the future.

    Args:
        ids: int64 [B, S]; None for two windows of 32 random ids.
        vocab_size: of the random ids; a Grouter knows its own.
        options: k, lengths, tolerance of `prefix_consistency`.

    Raises:
        InputError: with the measured difference.
    """
    if ids is None:
        size = vocab_size or getattr(getattr(router, "config", None), "vocab_size", None)
        if size is None:
            raise InputError("the vocabulary of this router is not known", todo="give ids, or vocab_size")
        device = next(router.parameters()).device if isinstance(router, nn.Module) else torch.device("cpu")
        ids = torch.randint(0, size, (2, 32), generator=torch.Generator().manual_seed(seed)).to(device)
    found = prefix_consistency(router, ids, **options)  # type: ignore[arg-type]
    if not found.consistent:
        raise InputError(
            "this router sees the future: the routing of a token changes when later tokens are cut off",
            where=type(router).__qualname__,
            why=f"logits differ by {found.max_difference:.1e} of the largest one, and {found.changed_sets:.0%} of the "
            "tokens get other experts",
            todo="use a causal router (Grouter's default); with another one, a causal model's loss is too good",
        )
    return found


def top_set(logits: Tensor, k: int) -> Tensor:
    """bool like `logits` [.., E]: whether an expert is among the best k."""
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    return chosen.scatter_(-1, logits.topk(k, dim=-1).indices, True)
