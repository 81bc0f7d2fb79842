"""Tokens cut into the windows that a Grouter reads, and its routing of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import InputError
from .affinity import Ints

if TYPE_CHECKING:
    from ..models.grouter import Grouter

# One-dimensional ids with a window length, [windows, length], or an iterable of such two-dimensional batches.
Tokens = npt.NDArray[Any] | Tensor | Iterable[npt.NDArray[Any] | Tensor]


def window_batches(tokens: Tokens, window: int | None, batch: int) -> Iterator[Ints]:
    """int64 [up to batch, length] pieces in order, at least one; a tail shorter than a window is left out.

    Args:
        tokens: see `Tokens`; a memory map is read piece by piece.
        window: tokens per window; may be left out where `tokens` says it.

    Raises:
        InputError: no window length, batches of different lengths, ids that are no integers, not one whole window, or
            `batch` below 1.
    """
    if batch < 1:
        raise InputError(f"{batch} windows per forward pass", todo="choose batch >= 1")
    length, empty = window, True
    for part in [tokens] if isinstance(tokens, (np.ndarray, Tensor)) else tokens:
        rows = _rows(part, length)
        length, empty = int(rows.shape[1]), False
        for first in range(0, len(rows), batch):
            yield _int64(rows[first : first + batch])
    if empty:
        raise InputError("no tokens", todo="give at least one batch [windows, length]")


def count_windows(tokens: Tokens, window: int | None) -> int | None:
    """The number of windows; None for an iterable, which is not looked into."""
    return len(_rows(tokens, window)) if isinstance(tokens, (np.ndarray, Tensor)) else None


def sample_windows(tokens: Tokens, window: int | None, max_tokens: int) -> Ints:
    """Windows with up to `max_tokens` tokens in total, at least one: evenly spaced ones of an array, else the first."""
    if max_tokens < 1:
        raise InputError(f"max_tokens={max_tokens} is below 1", todo="choose max_tokens >= 1")
    if isinstance(tokens, (np.ndarray, Tensor)):
        rows = _rows(tokens, window)
        count = min(max(max_tokens // int(rows.shape[1]), 1), len(rows))
        return _int64(rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)])
    singles = window_batches(tokens, window, 1)
    first = next(singles)
    rest = itertools.islice(singles, max(max_tokens // first.shape[1], 1) - 1)
    return np.concatenate([first, *rest])


def document_ids(windows: Ints, eod_id: int) -> Ints:
    """[windows, length]: the number of end-of-document tokens before each token; such a token ends its own document."""
    ends: Ints = (windows == eod_id).astype(np.int64)
    return np.cumsum(ends, axis=1) - ends


def masks(grouter: Grouter, windows: Ints, eod_id: int | None) -> tuple[Tensor, dict[str, Any]]:
    """The windows on the Grouter's device, and the keyword arguments that keep documents apart.

    Raises:
        InputError: an id, or `eod_id`, is outside of the Grouter's vocabulary.
    """
    device = grouter.score.weight.device
    grouter.check_ids(torch.from_numpy(windows))  # before they are moved: looking at values waits for a device
    ids = torch.from_numpy(windows).to(device)
    check_eod(grouter, eod_id)
    if eod_id is None:
        return ids, {}
    return ids, {"document_ids": torch.from_numpy(document_ids(windows, eod_id)).to(device)}


def check_eod(grouter: Grouter, eod_id: int | None) -> None:
    """Raise InputError for an end of documents that no token of the vocabulary is."""
    if eod_id is not None and not 0 <= eod_id < grouter.config.vocab_size:
        raise InputError(
            f"eod_id {eod_id} is outside of the Grouter's vocabulary of {grouter.config.vocab_size}",
            todo="give the id that ends a document in these tokens",
        )


def routed(
    grouter: Grouter, tokens: Tokens, k: int, *, window: int | None = None, batch: int = 8, eod_id: int | None = None
) -> Iterator[Ints]:
    """The Grouter's choice for each batch of windows, int64 [up to batch, length, k]: input of `affinity`."""
    for windows in window_batches(tokens, window, batch):
        ids, kwargs = masks(grouter, windows, eod_id)
        with torch.no_grad():
            idx, _ = grouter.route(ids, k, **kwargs)
        found: Ints = idx.cpu().numpy()
        yield found


def _rows(tokens: Any, window: int | None) -> Any:
    """`tokens` as [windows, length], without a copy."""
    kind: Any = getattr(tokens, "dtype", None)
    numpy_integer = isinstance(tokens, np.ndarray) and np.issubdtype(tokens.dtype, np.integer)
    torch_integer = isinstance(tokens, Tensor) and not (kind.is_floating_point or kind.is_complex)
    if not (numpy_integer or torch_integer) or tokens.ndim not in (1, 2):
        raise InputError(
            "tokens must be integers, [tokens] or [windows, length]",
            why=f"found {kind} {list(tokens.shape)}" if kind is not None else f"found {type(tokens).__name__}",
            todo="give an array or tensor of token ids, or an iterable of two-dimensional ones",
        )
    if tokens.ndim == 1:
        if window is None or window < 1:
            raise InputError("one-dimensional tokens need a window length", todo="say window=, as in training")
        tokens = tokens[: len(tokens) // window * window].reshape(-1, window)
    elif window is not None and tokens.shape[1] != window:
        raise InputError(
            f"windows of {tokens.shape[1]} tokens where {window} are expected",
            why="routing depends on where a window begins",
            todo="cut the tokens into the windows of training, all of one length",
        )
    if not len(tokens):
        raise InputError("fewer tokens than one window", todo="give more tokens, or choose a shorter window")
    return tokens


def _int64(rows: Any) -> Ints:
    found = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
    return np.require(found, np.int64, ["C", "W"])  # torch warns of memory that it must not write, as of a memory map
