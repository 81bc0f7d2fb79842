"""Routing records: the choices of a Grouter for a data set, computed once and read beside the tokens ever after.

A directory of records holds `header.json` and four flat little-endian files, in the order of the windows:

    tokens.bin   uint16 or uint32 [windows, length]
    ids.bin      uint8 (up to 256 experts) or uint16 [windows, length, k], best expert first
    gates.bin    bfloat16 bits or float32 [windows, length, k]; entry j belongs to entry j of the ids
    digests.bin  8 bytes per window: BLAKE2b of its tokens as int64
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import InputError
from ..routing import NORMALISERS
from ..train.identity import state_digest
from .windows import Tokens, window_batches

if TYPE_CHECKING:
    from ..models.grouter import Grouter

FORMAT = 1
HEADER = "header.json"
DIGEST = 8  # bytes
GATES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclasses.dataclass(frozen=True)
class Header:
    """What `header.json` says.

    Attributes:
        num_experts, k, scale, normalise: of the routing; `scale` is what the gates of a token add up to.
        window: tokens per window; routing depends on where windows begin.
        windows: windows written.
        complete: False while they are being computed.
        grouter: fingerprint of the Grouter, see `fingerprint`.
        eod_id: the token that ends a document, if documents were kept apart.
        tokens, ids, gates: numpy dtypes of the files; "bfloat16" is stored as its bits.
        data: SHA-256 of all digests, once complete.
    """

    num_experts: int
    k: int
    scale: float
    normalise: str
    window: int
    grouter: str
    eod_id: int | None
    tokens: str
    ids: str
    gates: str
    windows: int = 0
    complete: bool = False
    data: str | None = None
    format: int = FORMAT

    def files(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """File name -> stored dtype and the shape of one window."""
        gates = "<u2" if self.gates == "bfloat16" else "<f4"
        return {
            "tokens.bin": (np.dtype(self.tokens).newbyteorder("<"), (self.window,)),
            "ids.bin": (np.dtype(self.ids).newbyteorder("<"), (self.window, self.k)),
            "gates.bin": (np.dtype(gates), (self.window, self.k)),
            "digests.bin": (np.dtype(f"V{DIGEST}"), ()),
        }


class RoutingRecords:
    """Records of a directory, memory-mapped. Opened by `open`; iterating or indexing gives windows.

    Attributes:
        header: see `Header`.
        idx: uint8 or uint16 [windows, length, k]: input of `affinity` and `place`.
    """

    def __init__(self, directory: Path, header: Header) -> None:
        self.directory, self.header = directory, header
        maps = {}
        for name, (dtype, shape) in header.files().items():
            path, want = directory / name, header.windows * dtype.itemsize * int(np.prod(shape))
            found = path.stat().st_size if path.is_file() else None
            if found != want:
                raise InputError(
                    "a file of the routing records is damaged",
                    where=str(path),
                    why=f"the header says {want} bytes, found {'no file' if found is None else f'{found} bytes'}",
                    todo="compute the records again into an empty directory",
                )
            maps[name] = np.memmap(path, dtype=dtype, mode="r", shape=(header.windows, *shape))
        self._tokens, self.idx, self._gates, self._digests = maps.values()

    @classmethod
    def open(cls, directory: str | Path) -> RoutingRecords:
        """Open finished records. Raises InputError if there are none, or they are incomplete or damaged."""
        path = Path(directory)
        header = read_header(path)
        if header is None:
            raise InputError(
                "there are no routing records here", where=str(path), todo="make them with moefx grouter precompute"
            )
        if not header.complete:
            raise InputError(
                "these routing records are incomplete",
                where=str(path),
                why=f"their computation ended after {header.windows} windows",
                todo="run precompute again with the same arguments; it continues there",
            )
        return cls(path, header)

    def __reduce__(self) -> tuple[Any, ...]:
        return (RoutingRecords.open, (self.directory,))  # a pickled memory map would carry the data to every worker

    def __len__(self) -> int:
        """The number of windows."""
        return self.header.windows

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return map(self.window, range(len(self)))

    def window(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Window i: tokens int64 [length], idx int64 [length, k], gates float32 [length, k]."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        return self._read(i)

    @overload
    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]: ...
    @overload
    def __getitem__(self, i: slice | Sequence[int] | npt.NDArray[Any] | Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
    def __getitem__(self, i: Any) -> tuple[Tensor, Tensor, Tensor]:
        """A window, or a batch of windows with a leading axis for a slice, a sequence of window numbers, or a mask
        bool [windows] of those that are wanted.

        Raises:
            IndexError: a window is not there.
            InputError: `i` is none of these.
        """
        if isinstance(i, (int, np.integer)):
            return self.window(int(i))
        if isinstance(i, slice):
            return self._read(i)
        at = np.asarray(i)
        if at.dtype == np.bool_ and at.shape == (len(self),):
            at = np.flatnonzero(at)
        elif at.dtype.kind not in "iu" and at.size:
            raise InputError(
                "windows of routing records are chosen by their numbers, a slice, or one bool per window",
                where=str(self.directory),
                why=f"found {at.dtype} {list(at.shape)} for {len(self)} windows",
                todo="give integers, or a mask of all windows",
            )
        return self._read(at.astype(np.int64))

    def _read(self, i: Any) -> tuple[Tensor, Tensor, Tensor]:
        tokens, idx = (torch.from_numpy(np.asarray(m[i], dtype=np.int64)) for m in (self._tokens, self.idx))
        stored = np.array(self._gates[i])
        if self.header.gates == "bfloat16":
            return tokens, idx, torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16).float()
        return tokens, idx, torch.from_numpy(stored)

    def check(self, tokens: Tokens, grouter: Grouter | None = None) -> None:
        """Raise InputError unless `tokens` (cut as in `precompute`) are those of the records, window for window.

        Args:
            grouter: if given, it must be the one that made the records, too.
        """
        if grouter is not None and (found := fingerprint(grouter)) != self.header.grouter:
            raise InputError(
                "these routing records are of another Grouter",
                where=str(self.directory),
                why=f"fingerprint {self.header.grouter[:12]}, the Grouter's is {found[:12]}",
                todo="use the Grouter that made them, or precompute them again",
            )
        seen = 0
        for batch in window_batches(tokens, self.header.window, 64):
            require_equal(self.directory, self._digests[seen : seen + len(batch)], batch, seen)
            seen += len(batch)
        if seen != len(self):
            raise mismatch(self.directory, f"the records hold {len(self)} windows, the data {seen}")


def fingerprint(grouter: Grouter) -> str:
    """SHA-256 of the Grouter's config and of every tensor of its state, dtypes included."""
    return state_digest(grouter, json.dumps(dataclasses.asdict(grouter.config), sort_keys=True))


def sample_identity(grouter: Grouter, sample: npt.NDArray[np.int64], eod_id: int | None) -> dict[str, Any]:
    """What a Grouter makes of windows depends on, as JSON values: digests of both, and the end of documents."""
    tokens = hashlib.sha256(np.ascontiguousarray(sample).tobytes()).hexdigest()
    return {"grouter": fingerprint(grouter), "windows": list(sample.shape), "tokens": tokens, "eod_id": eod_id}


def read_header(directory: Path) -> Header | None:
    """The header of a directory; None if it has none. Raises InputError for one that cannot be read."""
    path = directory / HEADER
    if not path.is_file():
        return None
    try:
        header = Header(**json.loads(path.read_text(encoding="utf-8")))
        if wrong := _impossible(header):
            raise ValueError("no run writes " + ", ".join(f"{name}={getattr(header, name)!r}" for name in wrong))
        return header
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            "the header of the routing records cannot be read",
            where=str(path),
            why=str(error),
            todo="compute the records again into an empty directory, with this version of moefx",
        ) from error


def _impossible(header: Header) -> list[str]:
    """The fields whose values `precompute` never writes."""
    h = header

    def count(value: Any, least: int) -> bool:
        return type(value) is int and value >= least

    known = count(h.num_experts, 1)
    right = {
        "format": h.format == FORMAT,
        "num_experts": known,
        "k": count(h.k, 1) and known and h.k <= h.num_experts,
        "scale": type(h.scale) in (int, float) and math.isfinite(h.scale),
        "normalise": h.normalise in NORMALISERS,
        "window": count(h.window, 1),
        "grouter": isinstance(h.grouter, str),
        "eod_id": h.eod_id is None or type(h.eod_id) is int,
        "tokens": h.tokens in ("uint16", "uint32"),
        "ids": known and h.ids == ids_dtype(h.num_experts),
        "gates": h.gates in GATES.values(),
        "complete": isinstance(h.complete, bool),
        "windows": count(h.windows, 1 if h.complete is True else 0),
        "data": isinstance(h.data, str) if h.complete is True else h.data is None,
    }
    return [name for name, fine in right.items() if not fine]


def ids_dtype(num_experts: int) -> str:
    """The smallest unsigned dtype that holds expert ids."""
    return np.min_scalar_type(num_experts - 1).name


def digests(windows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """One digest per window, [windows] of dtype V8."""
    rows = np.ascontiguousarray(windows, dtype="<i8")
    found = b"".join(hashlib.blake2b(row.tobytes(), digest_size=DIGEST).digest() for row in rows)
    return np.frombuffer(found, dtype=f"V{DIGEST}")


def require_equal(directory: Path, stored: npt.NDArray[Any], windows: npt.NDArray[np.int64], first: int) -> None:
    own = digests(windows)
    for i, mine in enumerate(own):
        if i >= len(stored):
            raise mismatch(directory, f"the records end after window {first + len(stored) - 1}, the data goes on")
        if mine.tobytes() != stored[i].tobytes():
            raise mismatch(directory, f"window {first + i} is the first that differs")


def mismatch(directory: Path, why: str) -> InputError:
    return InputError(
        "the routing records do not match the data",
        where=str(directory),
        why=why,
        todo="use the tokens, their order and the window length that the records were made with, or precompute again",
    )
