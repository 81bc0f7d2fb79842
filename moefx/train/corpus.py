"""The default corpus: text that every Python installation carries, so that training needs no download.

Two sources: the language reference and library topics behind `help("topic")` (the `pydoc_data` package), and the
sources of the standard library. Both differ a little between Python versions, hence so does the corpus; on one
installation it is always the same.
"""

from __future__ import annotations

import hashlib
import importlib
import sysconfig
from pathlib import Path

from ..errors import InputError

LIMIT = 8_000_000  # bytes; 200 default steps see 0.2 MB of it, and hashing it all takes milliseconds
HELD_OUT = 20  # one document in this many, on average

# Left out: what is installed (not part of Python), tests, what many distributions package separately, and tables rather
# than text.
SKIPPED_DIRECTORIES = frozenset(
    [
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "__pycache__",
        "lib2to3",
        "idlelib",
        "tkinter",
        "turtledemo",
        "ensurepip",
        "distutils",
        "encodings",
        "pydoc_data",
        "__phello__",
    ]
)
# Written for one machine, or dropped into the library by a distribution.
SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")


def embedded_corpus(limit: int = LIMIT) -> list[tuple[str, bytes]]:
    """Documents (name, UTF-8 text) in a fixed order, at most `limit` bytes in all.

    Names are "topic/..." for documentation and "lib/..." for sources (with "/" on every system), sorted. Where there is
    more than `limit`, documents are chosen by a hash of their names, so that no part of the alphabet is favoured.

    Raises:
        InputError: this Python carries neither (a stripped installation).
    """
    documents = {**_topics(), **_sources(Path(sysconfig.get_path("stdlib")))}
    chosen, total = [], 0
    for name in sorted(documents, key=lambda n: (_hash(n), n)):
        total += len(documents[name])
        if total > limit:
            break
        chosen.append(name)
    if not chosen:
        raise InputError(
            "this Python installation carries no text to train on",
            where=sysconfig.get_path("stdlib"),
            why="neither pydoc_data nor sources of the standard library were found",
            todo="give text files as data",
        )
    return [(name, documents[name]) for name in sorted(chosen)]


def is_held_out(name: str) -> bool:
    """Whether a document belongs to the validation split. Its name alone decides: other documents cannot move it."""
    # Other bytes of the hash than those that choose documents under the limit: the two choices must be independent.
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[8:16], "big") % HELD_OUT == 0


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _topics() -> dict[str, bytes]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions strip it; the sources alone will do
        return {}
    return {f"topic/{name}": text.encode() for name, text in topics.items()}


def _sources(stdlib: Path) -> dict[str, bytes]:
    found = {}
    for file in sorted(stdlib.rglob("*.py")):
        path = file.relative_to(stdlib)
        if (
            SKIPPED_DIRECTORIES.intersection(path.parts[:-1])
            or path.parts[0].startswith("config-")
            or path.name.startswith(SKIPPED_PREFIXES)
        ):
            continue
        try:
            text = file.read_bytes()
            text.decode("utf-8")
        except (OSError, UnicodeDecodeError):  # a dangling link, or a file kept in another encoding
            continue
        found[f"lib/{path.as_posix()}"] = text
    return found
