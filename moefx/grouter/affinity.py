"""Expert affinity: how often two experts are chosen by the same token (arXiv 2603.06626, section on expert folding)."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import InputError, first_line
from ..files import replacing
from .partial import Partial
from .running import batches_from

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
            with open(path, "rb") as file:
                if not zipfile.is_zipfile(file):  # numpy would suggest to read it as a pickle
                    raise ValueError("it is no .npz archive")
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


def affinity(
    routing: Routing | Iterable[Routing] | Callable[[int], Iterable[Routing]],
    num_experts: int,
    *,
    total: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 64,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    label: str = "affinity",
    progress: bool = True,
) -> AffinityResult:
    """Count co-activations, P = R^T R / tokens with a zero diagonal, R being the 0/1 routing map [tokens, E].

    Args:
        routing: expert ids [..., k] (tensor or array, any integer dtype, also a memory map), or an iterable of such
            batches, or a function from a number to the batches from that one on, which makes resuming cheap. The k ids
            of a token are distinct; their order does not matter.
        num_experts: E; ids are in [0, E).
        total: number of batches, for the bar; of an array it is known.
        checkpoint: folder for `label`.npz, the counts so far and the number of batches in them: every
            `checkpoint_every` batches, at the end, and on Ctrl-C and SIGTERM, which then take effect between two
            batches. Unless `resume`, one that is there is moved to `previous-N` inside.
        resume: go on from it, to the same counts.
        identity: JSON values that tell this routing from others; must be equal to resume.
        progress: a bar, on a terminal.

    Raises:
        InputError: no tokens, an id that is out of range or repeated within a token, batches of different k, or nothing
            to resume from.
        CheckpointError: the counts are of another routing.
        TrainingInterrupted: after Ctrl-C or SIGTERM with a `checkpoint` folder, once the counts are saved; uncaught,
            the process ends with status 130.
    """
    if isinstance(routing, (Tensor, np.ndarray)):
        routing = _pieces(routing, num_experts)
        total = len(routing)
    count = _Count(num_experts)
    partial = Partial(label, checkpoint, checkpoint_every, {"experts": num_experts, "identity": dict(identity or {})})
    count.restore(partial.begin(resume))
    stream: Iterator[Any] = batches_from(routing, partial.done)  # type: ignore[arg-type]
    partial.run(stream, count.add, count.arrays, total, progress)
    return count.result()


class _Count:
    """Counts so far."""

    def __init__(self, num_experts: int) -> None:
        self.pairs, self.tokens, self.k = np.zeros((num_experts, num_experts), np.int64), 0, 0

    def add(self, batch: Routing) -> None:
        """Count one batch."""
        experts = len(self.pairs)
        for idx_Tk in _chunks(batch, experts):
            self.k = self.k or idx_Tk.shape[1]
            if idx_Tk.shape[1] != self.k:
                raise InputError("batches of different k", why=f"top-{self.k}, then top-{idx_Tk.shape[1]}")
            map_TE = torch.zeros(len(idx_Tk), experts).scatter_(1, torch.from_numpy(idx_Tk), 1.0)
            if int(map_TE.sum(dtype=torch.float64)) != idx_Tk.size:
                raise InputError(
                    "a token has the same expert twice", todo="give the indices of a top-k, which are distinct"
                )
            self.pairs += (map_TE.T @ map_TE).numpy().astype(np.int64)
            self.tokens += len(idx_Tk)

    def arrays(self) -> dict[str, Ints]:
        """What a file holds of them."""
        return {"pairs": self.pairs, "counted": np.array([self.tokens, self.k])}

    def restore(self, arrays: Mapping[str, Ints]) -> None:
        """Go on from what `arrays` gave; from nothing, where there is nothing."""
        if arrays:
            self.pairs, (self.tokens, self.k) = arrays["pairs"], map(int, arrays["counted"])

    def result(self) -> AffinityResult:
        """Raises InputError where nothing was counted."""
        if not self.tokens:
            raise InputError("no routing to count", todo="give at least one batch with at least one token")
        pairs, chosen = self.pairs.copy(), self.pairs.diagonal().copy()
        np.fill_diagonal(pairs, 0)
        return AffinityResult(pairs, chosen, self.tokens, self.k)


def _pieces(batch: Any, num_experts: int) -> list[npt.NDArray[Any]]:
    """Views [tokens, k] of the batch whose routing maps are of a bounded size."""
    ids = batch.cpu().numpy() if isinstance(batch, Tensor) else batch
    if not isinstance(ids, np.ndarray) or ids.ndim < 1 or not np.issubdtype(ids.dtype, np.integer):
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise InputError("expert ids must be integers [..., k]", why=f"found {found}")
    flat = ids.reshape(-1, ids.shape[-1])
    step = max(_CELLS // num_experts, 1)
    return [flat[start : start + step] for start in range(0, len(flat), step)]


def _chunks(batch: Any, num_experts: int) -> Iterator[Ints]:
    """The pieces of the batch as int64 [tokens, k], checked."""
    for narrow in _pieces(batch, num_experts):
        piece = narrow.astype(np.int64)
        if piece.size and not 0 <= piece.min() <= piece.max() < num_experts:
            raise InputError(
                f"expert ids from {piece.min()} to {piece.max()} for {num_experts} experts",
                todo="give the number of experts of the router that made them",
            )
        yield piece
