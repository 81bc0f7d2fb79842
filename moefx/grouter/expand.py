"""Expansion: a Grouter of E_S experts becomes one of E_T > E_S.

The old rows of the score layer stay; new ones are aimed at the tokens that no old expert claims. The procedure is that
of the code published with arXiv 2603.06626 (the paper has none), with the sign of every new row towards its tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import InputError
from .affinity import Floats
from .clusters import check_kmeans, kmeans
from .partial import Partial, stage
from .records import sample_identity
from .surgery import require_unfolded, with_score
from .windows import Tokens, masks, sample_windows

if TYPE_CHECKING:
    from ..models.grouter import Grouter

STATES = "states"
_RANK_TOLERANCE = 1e-5  # of the longest centroid: hidden states are fp32 or narrower


def expand(
    grouter: Grouter,
    tokens: Tokens,
    num_targets: int,
    *,
    window: int | None = None,
    eod_id: int | None = None,
    max_tokens: int = 1 << 18,
    quantile: float = 0.2,
    iterations: int = 100,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 64,
    resume: bool = False,
    progress: bool = True,
) -> Grouter:
    """A new Grouter with `num_targets` experts, the first E_S of them the old ones; the given one stays as it is.

    Balance it afterwards (`moefx.grouter.tune`): a new expert's logits have the spread of an old one's, not its load.

    Args:
        tokens: see `window_batches`; evenly spaced windows with up to `max_tokens` tokens are used, whose
            hidden states are held in memory (fp32).
        num_targets: E_T; E_T - E_S is at most hidden size - rank of the old rows, as new rows are orthogonal to all.
        eod_id: token that ends a document, where the target keeps documents of a window apart.
        quantile, iterations, seed: see `new_rows`.
        checkpoint: folder for `states.npz`, the hidden states so far: every `checkpoint_every` batches of 8 windows and
            on Ctrl-C and SIGTERM, see `affinity`. Clustering, which follows, is done again.
        resume: go on from there, with the same Grouter and tokens, to the same result.
        progress: a bar, on a terminal.

    Raises:
        CheckpointError: the states are of another Grouter or other tokens.
        TrainingInterrupted: after Ctrl-C or SIGTERM with a `checkpoint` folder, once the states are saved.
        InputError: E_T is not in its range, an option or a token id is not in its own, or the tokens are too few or
            too alike for so many new experts.
        MissingPackageError: scikit-learn is not installed.
    """
    check_expansion(grouter, num_targets)
    _check_options(quantile, iterations, seed)
    old = grouter.score.weight.detach()
    sample = sample_windows(tokens, window, max_tokens)
    origin = sample_identity(grouter, sample, eod_id) if checkpoint is not None else {}
    partial = Partial(STATES, checkpoint, checkpoint_every, origin)
    states = hidden_states(grouter, sample, eod_id, partial=partial, resume=resume, progress=progress)
    with stage("expand: clustering the unclaimed tokens", progress):
        rows, _ = new_rows(
            old.double().cpu().numpy(), states, num_targets - len(old), quantile=quantile, iterations=iterations,
            seed=seed,
        )  # fmt: skip
    weight = torch.cat([old, torch.from_numpy(rows).to(old.device, old.dtype)])
    bias = grouter.selection_bias
    return with_score(grouter, weight, torch.cat([bias, bias.new_zeros(len(rows))]))


def check_expansion(grouter: Grouter, num_targets: int) -> None:
    """Raise InputError unless the Grouter can get so many experts."""
    require_unfolded(grouter)
    old = grouter.score.weight.detach().double().cpu().numpy()
    require_room(old, num_targets - len(old))


def hidden_states(
    grouter: Grouter,
    windows: npt.NDArray[np.int64],
    eod_id: int | None = None,
    *,
    partial: Partial | None = None,
    resume: bool = False,
    progress: bool = False,
) -> npt.NDArray[Any]:
    """What enters the score layer, float32 [tokens, hidden], for windows int64 [windows, length]."""
    partial = partial or Partial(STATES, None, 1, {})
    found = list(partial.begin(resume).values())
    parts = np.array_split(windows, -(-len(windows) // 8))

    @torch.no_grad()
    def add(part: npt.NDArray[np.int64]) -> None:
        ids, kwargs = masks(grouter, part, eod_id)
        found.append(grouter.hidden(ids, **kwargs).flatten(0, 1).float().cpu().numpy())

    partial.run(parts[partial.done :], add, lambda: {"states": np.concatenate(found)}, len(parts), progress)
    return np.concatenate(found)


def new_rows(
    old: Floats, states: npt.NDArray[Any], count: int, *, quantile: float = 0.2, iterations: int = 100, seed: int = 0
) -> tuple[Floats, Floats]:
    """Score rows for `count` new experts, and the centroids that they are aimed at.

    Args:
        old: [E_S, hidden] score rows.
        states: [tokens, hidden] inputs of the score layer.
        quantile: share of the tokens, those of lowest best logit, that counts as claimed by no expert.
        iterations, seed: of k-means; seeds are below 2^32.

    Returns:
        rows [count, hidden]: orthogonal to the old rows and to each other, as long as an old row is on average; their
            product with the centroids is positive.
        centroids [count, hidden]: those of the unclaimed tokens without their part in the span of the old rows, the
            one of most tokens first.

    Raises:
        InputError: an option is out of its range, or there is no room, or too few different tokens.
    """
    _check_options(quantile, iterations, seed)
    require_room(old, count)
    best = (states @ old.T.astype(states.dtype)).max(1)
    unclaimed = np.flatnonzero(best <= np.quantile(best, quantile))
    if len(unclaimed) < count:
        unclaimed = np.argsort(best, kind="stable")[: 4 * count]
    points = states[unclaimed].astype(np.float64)
    distinct = len(np.unique(points, axis=0))
    if distinct < count:
        raise InputError(
            f"{count} new experts, but only {distinct} different unclaimed tokens to aim them at",
            todo="give more tokens, or expand by fewer experts",
        )
    found = kmeans(count, "to cluster the unclaimed tokens", starts=1, iterations=iterations, seed=seed)
    members = np.bincount(found.fit_predict(points), minlength=count)
    span = _row_basis(old)
    centroids = found.cluster_centers_[np.argsort(-members, kind="stable")]
    centroids = centroids - (centroids @ span.T) @ span
    # With the old span in front, QR makes the new rows orthogonal to it to the last bit.
    Q, R = np.linalg.qr(np.concatenate([span, centroids]).T)
    toward = R.diagonal()[len(span) :]
    usable = int((np.abs(toward) > _RANK_TOLERANCE * np.linalg.norm(centroids, axis=1).max()).sum())
    if usable < count:
        raise InputError(
            f"{count} new experts, but the unclaimed tokens span only {usable} directions outside of the old rows",
            todo="give more varied tokens, raise the quantile, or expand by fewer experts",
        )
    rows = Q[:, len(span) :].T * np.sign(toward)[:, None] * np.linalg.norm(old, axis=1).mean()
    return rows, centroids


def require_room(old: Floats, count: int) -> None:
    """Raise InputError unless `count` > 0 rows orthogonal to `old` [E_S, hidden] and to each other exist."""
    rank = len(_row_basis(old))
    room = old.shape[1] - rank
    if count < 1:
        raise InputError(
            f"{len(old)} experts cannot be expanded to {len(old) + count}",
            why="expansion adds experts",
            todo="use fold to get fewer",
        )
    if count > room:
        raise InputError(
            f"{len(old)} experts cannot be expanded to {len(old) + count}",
            why=f"new rows are orthogonal to the old ones: hidden size {old.shape[1]} less rank {rank} leaves {room}",
            todo=f"ask for at most {len(old) + room} experts",
        )


def _check_options(quantile: float, iterations: int, seed: int) -> None:
    if not 0 <= quantile <= 1:
        raise InputError(f"quantile={quantile} is no share of the tokens", todo="choose one from 0 to 1, such as 0.2")
    check_kmeans(iterations, seed)


def _row_basis(rows: Floats) -> Floats:
    """Orthonormal rows [rank, hidden] that span the given ones."""
    _, strength, basis = np.linalg.svd(rows, full_matrices=False)
    return np.asarray(basis[strength > _RANK_TOLERANCE * strength.max(initial=0.0)])
