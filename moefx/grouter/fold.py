"""Folding: a Grouter of E_S experts becomes one of E_T < E_S (arXiv 2603.06626, expert folding)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import InputError, nearest
from .affinity import AffinityResult
from .groups import affinity_matrix, check_partition, group_experts, retained
from .surgery import require_unfolded, with_score

if TYPE_CHECKING:
    from ..models.grouter import Grouter

REDUCES = ("sum", "mean", "logsumexp")


def fold(
    grouter: Grouter,
    by: AffinityResult | npt.NDArray[Any] | Tensor | Sequence[Sequence[int]],
    num_targets: int | None = None,
    *,
    reduce: str = "sum",
    method: str = "refined",
) -> Grouter:
    """A new Grouter with one expert per group of source experts; the given one is left as it is.

    Args:
        by: an affinity [E_S, E_S], from which groups are made by `method` (see `group_experts`), or the groups.
        num_targets: E_T; needed with an affinity.
        reduce: how the logits of a group become one.
            "sum" (published): rows of the score layer are added, W' = M^T W. A product of member probabilities, so the
            spread grows with the size of the group. With groups of unequal size the logits are centred first (the mean
            row of W is subtracted), or a common offset would favour the larger groups.
            "mean": as sum, divided by the size of the group.
            "logsumexp": the probability mass of the group under the softmax over all source experts. Not linear, so the
            score layer is kept and the config records the groups (`fold_groups`).

    The selection bias is folded alike (for logsumexp: its mean over the group, exact where members share one bias).

    Raises:
        InputError: the groups are no partition of the experts, E_T is not in 1 .. E_S, or an option is unknown.
    """
    require_unfolded(grouter)
    if reduce not in REDUCES:
        raise InputError(f"unknown way to reduce logits {reduce!r}", todo=nearest(reduce, REDUCES))
    weight, bias = grouter.score.weight.detach(), grouter.selection_bias
    experts = len(weight)
    if isinstance(by, (AffinityResult, np.ndarray, Tensor)):
        if num_targets is None:
            raise InputError("num_targets is needed with an affinity", todo="say how many experts the target has")
        require_affinity_of(grouter, by)
        by = group_experts(by, num_targets, method=method)
    elif num_targets is not None and num_targets != len(by):
        raise InputError(f"{len(by)} groups, but num_targets={num_targets}", todo="leave num_targets out with groups")
    groups = check_partition(by, experts)
    if reduce == "logsumexp":
        member = membership(groups, experts).to(bias.device)
        return with_score(grouter, weight, (bias.double() @ member) / member.sum(0), fold_groups=groups)
    member = membership(groups, experts).to(weight.device)
    wide, wide_bias = weight.double(), bias.double().to(weight.device)
    if reduce == "mean":
        member = member / member.sum(0)
    elif len({len(g) for g in groups}) > 1:
        wide, wide_bias = wide - wide.mean(0), wide_bias - wide_bias.mean()
    return with_score(grouter, member.T @ wide, wide_bias @ member)


def require_affinity_of(grouter: Grouter, by: AffinityResult | npt.NDArray[Any] | Tensor) -> None:
    """Raise `InputError` where an affinity is of another number of experts than the Grouter."""
    known, experts = len(affinity_matrix(by)), len(grouter.score.weight)
    if known != experts:
        raise InputError(
            f"an affinity of {known} experts for a Grouter of {experts}",
            todo="count the affinity with this Grouter's own routing",
        )


def membership(groups: Sequence[Sequence[int]], experts: int) -> Tensor:
    """M of the paper: float64 0/1 [E_S, E_T], one 1 per row."""
    member = torch.zeros(experts, len(groups), dtype=torch.float64)
    for t, members in enumerate(groups):
        member[list(members), t] = 1.0
    return member


@dataclass(frozen=True)
class FoldReport:
    """What a partition keeps.

    Attributes:
        groups: expert numbers per group.
        sizes: members per group.
        retained: share of the affinity of all pairs that lies within groups, 0 to 1; None where there is no affinity at
            all, as of a top-1 router.
        retained_greedy, retained_random: the same of the published procedure and of a random partition.
        load: summed load of a group's members: source slots per token, in total k of the source.
        max_vio: (largest load - mean load) / mean load. The load that the folded router will have differs, as its top-k
            is another one; measure it by routing.
    """

    groups: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    retained: float | None
    retained_greedy: float | None
    retained_random: float | None
    load: tuple[float, ...]
    max_vio: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fold_report(affinity: AffinityResult, groups: Sequence[Sequence[int]], *, seed: int = 0) -> FoldReport:
    """Compare a partition with the greedy and with a random one of as many groups; `seed` is that of the random one.

    Raises:
        InputError: the groups are no partition of the experts.
    """
    checked = check_partition(groups, affinity.num_experts)
    total = affinity.pairs.sum() / 2
    kept: list[float | None] = [None, None, None]
    if total:  # greedy has nothing to go by otherwise, and there is nothing to have a share of
        others = [group_experts(affinity, len(checked), method=m, seed=seed) for m in ("greedy", "random")]
        kept = [retained(affinity.pairs, g) / total for g in (checked, *others)]
    load = [float(affinity.load[list(g)].sum()) for g in checked]
    return FoldReport(
        groups=checked,
        sizes=tuple(map(len, checked)),
        retained=kept[0],
        retained_greedy=kept[1],
        retained_random=kept[2],
        load=tuple(load),
        max_vio=max(load) / (sum(load) / len(load)) - 1,
    )
