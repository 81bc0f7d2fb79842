"""Write routing records: run a Grouter once over a data set, in steps that survive an interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import InputError, nearest
from ..routing import NORMALISERS
from .records import (
    DIGEST,
    GATES,
    HEADER,
    Header,
    RoutingRecords,
    digests,
    fingerprint,
    ids_dtype,
    mismatch,
    read_header,
    require_equal,
)
from .windows import Tokens, check_eod, count_windows, masks, window_batches

if TYPE_CHECKING:
    from ..models.grouter import Grouter

FLUSH = 64  # batches between two marks to resume from


def precompute(
    grouter: Grouter,
    tokens: Tokens,
    k: int,
    out_dir: str | Path,
    *,
    window: int | None = None,
    batch: int = 8,
    scale: float = 1.0,
    normalise: str = "softmax",
    gates: str = "bf16",
    eod_id: int | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> RoutingRecords:
    """Route every window once and store tokens, expert ids and gates.

    The records equal what the Grouter routes online for the same windows. A directory with unfinished records of the
    same Grouter, arguments and tokens is continued after its last mark; one with finished ones is opened, once the
    tokens are found to be the same.

    Args:
        tokens: see `Tokens`: one-dimensional ids with a `window` length, [windows, length], or batches of such windows.
            A tail shorter than a window is left out.
        k: experts per token.
        out_dir: made if need be.
        batch: windows per forward pass.
        scale, normalise: of the gates, see `Grouter.route`.
        gates: stored as "bf16" or "fp32".
        eod_id: token that ends a document, where the target keeps documents of a window apart.
        progress: called with windows done and their total (None: unknown).

    Raises:
        InputError: the directory holds other records, or the tokens or options cannot be used.
    """
    directory = Path(out_dir)
    batches = window_batches(tokens, window, batch)
    first = next(batches)
    header = _header(grouter, k, scale, normalise, gates, eod_id, first.shape[1])
    found = read_header(directory)
    if found is not None and (found.windows or found.complete):
        _require_same(directory, found, header)
        if found.complete:
            records = RoutingRecords.open(directory)
            records.check(itertools.chain([first], batches))
            return records
        header = found
    total, old = count_windows(tokens, window), header.windows
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            files = _open(directory, header, stack)
            stored = np.fromfile(directory / "digests.bin", dtype=f"V{DIGEST}")
            _mark(directory, files, header)
            try:
                seen = 0
                for n, windows in enumerate(itertools.chain([first], batches), start=1):
                    known = max(min(old - seen, len(windows)), 0)
                    require_equal(directory, stored[seen : seen + known], windows[:known], seen)
                    seen += len(windows)
                    if known < len(windows):
                        _append(files, _route(grouter, windows[known:], header))
                        header = dataclasses.replace(header, windows=seen)
                    if n % FLUSH == 0:
                        _mark(directory, files, header)
                    if progress is not None:
                        progress(seen, total)
                if seen < old:
                    raise mismatch(directory, f"the records hold {old} windows already, the data {seen}")
            finally:  # an interrupted run goes on from here; what a torn append left behind is cut off then
                _mark(directory, files, header)
            data = hashlib.sha256((directory / "digests.bin").read_bytes()).hexdigest()
            _mark(directory, files, dataclasses.replace(header, complete=True, data=data))
    except OSError as error:
        raise InputError(
            "the routing records could not be written",
            where=str(directory),
            why=error.strerror or str(error),
            todo="free disk space or choose another directory; run again to continue",
        ) from error
    return RoutingRecords.open(directory)


def _header(
    grouter: Grouter, k: int, scale: float, normalise: str, gates: str, eod_id: int | None, window: int
) -> Header:
    experts = len(grouter.selection_bias)
    if gates not in GATES:
        raise InputError(f"unknown format of gates {gates!r}", todo=nearest(gates, GATES))
    if normalise not in NORMALISERS:
        raise InputError(f"unknown normalise={normalise!r}", todo=nearest(str(normalise), NORMALISERS))
    try:  # numpy's numbers are no JSON
        k, scale = operator.index(k), float(scale)
        eod_id = None if eod_id is None else operator.index(eod_id)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"k={k!r}, scale={scale!r}, eod_id={eod_id!r} cannot be used",
            why=str(error),
            todo="give an integer, a number, and an integer or None",
        ) from error
    if not math.isfinite(scale):
        raise InputError(f"scale={scale} is not finite", todo="choose what the gates of a token add up to, such as 1")
    if scale <= 0:
        todo = "choose what the gates of a token add up to, such as 1"
        raise InputError(f"scale={scale:g} is not positive", todo=todo)
    check_eod(grouter, eod_id)
    if not 1 <= k <= experts:
        raise InputError(f"top-{k} of {experts} experts", todo=f"choose k from 1 to {experts}")
    return Header(
        num_experts=experts,
        k=k,
        scale=scale,
        normalise=normalise,
        window=window,
        grouter=fingerprint(grouter),
        eod_id=eod_id,
        tokens="uint16" if grouter.config.vocab_size <= 1 << 16 else "uint32",
        ids=ids_dtype(experts),
        gates=GATES[gates],
    )


def _require_same(directory: Path, found: Header, wanted: Header) -> None:
    own = dataclasses.asdict(wanted)
    differ = [
        f"{name} is {value!r} there, {own[name]!r} here"
        for name, value in dataclasses.asdict(found).items()
        if value != own[name] and name not in ("windows", "complete", "data")
    ]
    if differ:
        raise InputError(
            "this directory holds other routing records",
            where=str(directory),
            why="; ".join(differ),
            todo="choose another directory, or delete this one",
        )


def _open(directory: Path, header: Header, stack: contextlib.ExitStack) -> dict[str, IO[bytes]]:
    """The files of the records, each cut to the windows of the header and positioned at its end."""
    files: dict[str, IO[bytes]] = {}
    for name, (dtype, shape) in header.files().items():
        path, size = directory / name, header.windows * dtype.itemsize * math.prod(shape)
        file = stack.enter_context(path.open("r+b" if size else "wb"))
        if file.seek(0, os.SEEK_END) < size:
            raise InputError(
                "a file of the routing records is damaged",
                where=str(path),
                why=f"the header says at least {size} bytes",
                todo="delete the directory and compute the records again",
            )
        file.truncate(size)
        file.seek(size)
        files[name] = file
    return files


def _route(grouter: Grouter, windows: npt.NDArray[np.int64], header: Header) -> dict[str, npt.NDArray[Any]]:
    """File name -> what these windows add to it."""
    ids, kwargs = masks(grouter, windows, header.eod_id)
    with torch.no_grad():
        idx, gates = grouter.route(ids, header.k, scale=header.scale, normalise=header.normalise, **kwargs)
    if header.gates == "bfloat16":
        stored = gates.to(torch.bfloat16).cpu().view(torch.int16).numpy().view(np.uint16)
    else:
        stored = gates.float().cpu().numpy()
    dtypes = {name: dtype for name, (dtype, _) in header.files().items()}
    return {
        "tokens.bin": windows.astype(dtypes["tokens.bin"]),
        "ids.bin": idx.cpu().numpy().astype(dtypes["ids.bin"]),
        "gates.bin": stored.astype(dtypes["gates.bin"]),
        "digests.bin": digests(windows),
    }


def _append(files: dict[str, IO[bytes]], rows: dict[str, npt.NDArray[Any]]) -> None:
    for name, values in rows.items():
        files[name].write(values.tobytes())


def _mark(directory: Path, files: dict[str, IO[bytes]], header: Header) -> None:
    """Everything so far reaches the disk, then the header that says so takes the place of the old one."""
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
    temporary = directory / f".{HEADER}.tmp"
    temporary.write_text(json.dumps(dataclasses.asdict(header), indent=1) + "\n", encoding="utf-8")
    temporary.replace(directory / HEADER)
