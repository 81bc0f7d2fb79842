"""Expert affinity: how often two experts are chosen by the same token (arXiv 2603.06626, section on expert folding)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import InputError, first_line
from ..files import replacing

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Routing = Tensor | npt.NDArray[Any]  # [..., k] expert ids of an integer dtype

_CELLS = 1 << 23  # of one 0/1 routing map; a float32 product over so few tokens counts exactly (below 2^24)


@dataclass(frozen=True, eq=False)
class AffinityResult:
    """Exact counts; results of different shards add up with `+` to the result of all their tokens.

    Attributes:
        pairs: int64 [E, E]; tokens that chose both experts; symmetric, zero diagonal.
        chosen: int64 [E]; tokens that chose the expert.
        tokens: number of tokens counted.
        k: experts per token.
    """

    pairs: Ints
    chosen: Ints
    tokens: int
    k: int

    @property
    def num_experts(self) -> int:
        return len(self.chosen)

    @property
    def P(self) -> Floats:  # noqa: N802
        """float64 [E, E]: share of the tokens that chose both experts. Row i sums to (k - 1) * load[i]."""
        return self.pairs / self.tokens

    @property
    def load(self) -> Floats:
        """float64 [E]: share of the tokens that chose the expert; sums to k."""
        return self.chosen / self.tokens

    def save(self, path: str | Path) -> None:
        """Write the counts as a NumPy .npz archive. After InputError, for a full disk, an earlier file is unchanged."""
        path = Path(path)
        # Through an open file: given a name, numpy would add an ending to it.
        with replacing(path.parent, "the affinity") as new, (new / path.name).open("wb") as file:
            np.savez(file, pairs=self.pairs, chosen=self.chosen, tokens=self.tokens, k=self.k)

    @classmethod
    def open(cls, path: str | Path) -> AffinityResult:
        """Read what `save` wrote. Raises InputError for another file."""
        try:
            with np.load(path) as found:
                read = cls(found["pairs"], found["chosen"], int(found["tokens"]), int(found["k"]))
            E = len(read.chosen)
            if {read.pairs.dtype, read.chosen.dtype} != {np.dtype(np.int64)} or read.pairs.shape != (E, E):
                raise ValueError(f"pairs {read.pairs.dtype} {list(read.pairs.shape)} of {E} experts")
            if read.tokens < 1 or not 1 <= read.k <= E:
                raise ValueError(f"{read.tokens} tokens, top-{read.k} of {E} experts")
            return read
        except Exception as error:  # zipfile, and numpy's reading of a head as Python text, raise many kinds
            raise InputError(
                "no affinity can be read from this file",
                where=str(path),
                why=first_line(error, type(error).__name__),
                todo="name an affinity.npz that moefx grouter affinity wrote",
            ) from error

    def __add__(self, other: AffinityResult) -> AffinityResult:
        if (self.num_experts, self.k) != (other.num_experts, other.k):
            raise InputError(
                "affinities of different routers cannot be added",
                why=f"{self.num_experts} experts, top-{self.k} and {other.num_experts} experts, top-{other.k}",
                todo="count all shards with one router and one k",
            )
        return AffinityResult(self.pairs + other.pairs, self.chosen + other.chosen, self.tokens + other.tokens, self.k)


def affinity(routing: Routing | Iterable[Routing], num_experts: int) -> AffinityResult:
    """Count co-activations, P = R^T R / tokens with a zero diagonal, R being the 0/1 routing map [tokens, E].

    Args:
        routing: expert ids [..., k] (tensor or array, any integer dtype, also a memory map), or an iterable of such
            batches. The k ids of a token are distinct; their order does not matter.
        num_experts: E; ids are in [0, E).

    Raises:
        InputError: no tokens, an id that is out of range or repeated within a token, batches of different k.
    """
    pairs = np.zeros((num_experts, num_experts), np.int64)
    tokens, k = 0, 0
    for batch in [routing] if isinstance(routing, (Tensor, np.ndarray)) else routing:
        for idx_Tk in _chunks(batch, num_experts):
            k = k or idx_Tk.shape[1]
            if idx_Tk.shape[1] != k:
                raise InputError("batches of different k", why=f"top-{k}, then top-{idx_Tk.shape[1]}")
            map_TE = torch.zeros(len(idx_Tk), num_experts).scatter_(1, torch.from_numpy(idx_Tk), 1.0)
            if int(map_TE.sum(dtype=torch.float64)) != idx_Tk.size:
                raise InputError(
                    "a token has the same expert twice", todo="give the indices of a top-k, which are distinct"
                )
            pairs += (map_TE.T @ map_TE).numpy().astype(np.int64)
            tokens += len(idx_Tk)
    if not tokens:
        raise InputError("no routing to count", todo="give at least one batch with at least one token")
    chosen = pairs.diagonal().copy()
    np.fill_diagonal(pairs, 0)
    return AffinityResult(pairs, chosen, tokens, k)


def _chunks(batch: Any, num_experts: int) -> Iterator[Ints]:
    """The batch as int64 [tokens, k] pieces whose routing maps are of a bounded size."""
    ids = batch.cpu().numpy() if isinstance(batch, Tensor) else batch
    if not isinstance(ids, np.ndarray) or ids.ndim < 1 or not np.issubdtype(ids.dtype, np.integer):
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise InputError("expert ids must be integers [..., k]", why=f"found {found}")
    flat = ids.reshape(-1, ids.shape[-1])
    step = max(_CELLS // num_experts, 1)
    for start in range(0, len(flat), step):
        piece = flat[start : start + step].astype(np.int64)
        if piece.size and not 0 <= piece.min() <= piece.max() < num_experts:
            raise InputError(
                f"expert ids from {piece.min()} to {piece.max()} for {num_experts} experts",
                todo="give the number of experts of the router that made them",
            )
        yield piece
