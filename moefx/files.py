"""Results on disk that are whole or absent: written beside their places, flushed to disk, then moved into them.

And results as JSON that every reader takes: what is no finite number is null.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError

_PREFIX = ".new-"


@contextmanager
def replacing(folder: str | Path, what: str) -> Iterator[Path]:
    """Files that take their places in `folder` together, over older ones of the same names.

    Yields an empty folder to write them into. After an error, of the caller or of the system, `folder` holds what it
    held before: every new file has reached the disk before the first one is moved, and only a process that is killed
    between two moves leaves some of either kind. Calls can be nested.

    Args:
        folder: made if need be.
        what: subject of "... could not be written".

    Raises:
        InputError: the system does not let us write, or there is something else than a file in a place.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=target))
        try:
            yield new
            written = sorted(new.iterdir())
            for file in written:
                flush(file)
                if (place := target / file.name).exists() and not place.is_file():
                    # A folder refuses by itself, but a device would be replaced.
                    raise FileExistsError(errno.EEXIST, f"{file.name} is there and is no regular file")
            for file in written:
                os.replace(file, target / file.name)
            flush(target)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{what} could not be written",
            where=str(Path(*(part for part in target.parts if not part.startswith(_PREFIX)))),  # not the inner folder
            why=error.strerror or str(error),
            todo="free disk space or choose another output directory; what was there before is unchanged",
        ) from error


def json_text(content: Any, **options: Any) -> str:
    """`json.dumps`, with null for NaN and infinities, which JSON has no words for and other readers refuse.

    For what people and other programs read. What moefx itself reads back to go on from (checkpoints, fingerprints) is
    written by `json.dumps` as it is: there an infinite option has to stay one.
    """
    return json.dumps(_finite(content), allow_nan=False, **options)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list | tuple) else content


def flush(path: Path) -> None:
    """The file, or the entries of the folder, reach the disk."""
    if path.is_dir() and os.name != "posix":  # elsewhere a directory cannot be opened
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
