"""What a long stage has reached, as arrays in one file, so that it goes on after an interruption to the same result."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import InputError, first_line
from ..files import replacing
from ..train.aside import make_room
from ..train.checkpoint import compare
from ..train.console import LastingConsole
from ..train.interrupt import TrainingInterrupted
from .running import bar
from .session import HOW, check_saving, stopping, tell

Arrays = Mapping[str, npt.NDArray[Any]]
Item = TypeVar("Item")


class Partial:
    """A stage of equal parts (batches, chunks), and the file `label`.npz of a folder that holds what they gave so far.

    Args:
        label: what the bar and the file are called.
        folder: None for no file, and then a signal does what it does elsewhere.
        every: parts between two writings; there is one more at the end.
        origin: JSON values that must be equal to go on.
    """

    def __init__(self, label: str, folder: str | Path | None, every: int, origin: Mapping[str, Any]) -> None:
        self.label, self.every, self.origin, self.done = label, every, dict(origin), 0
        self.file = None if folder is None else Path(folder) / f"{label}.npz"

    def begin(self, resume: bool) -> dict[str, npt.NDArray[Any]]:
        """What was reached, or nothing; without `resume`, a file that is there is moved to `previous-N` beside it.

        Raises:
            InputError: nothing to resume from, or a file that cannot be read.
            CheckpointError: the file is of another run.
        """
        check_saving(self.file, self.every, resume)
        if self.file is None:
            return {}
        if not resume:
            make_room(self.file.parent, LastingConsole(stderr=True), [self.file.name])
            return {}
        if not self.file.is_file():
            todo = "start without resuming, or name the folder of what was interrupted"
            raise InputError("there is nothing to resume from", where=str(self.file), todo=todo)
        try:
            with np.load(self.file, allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files}
            origin, self.done = json.loads(str(arrays.pop("origin"))), int(arrays.pop("done"))
        except Exception as error:  # zipfile, and numpy's reading of a head as Python text, raise many kinds
            raise InputError(
                "what was reached cannot be read", where=str(self.file), why=first_line(error, type(error).__name__),
                todo="start without resuming",
            ) from error  # fmt: skip
        compare(self.file, origin, self.origin)
        return arrays

    def save(self, arrays: Arrays) -> None:
        """Write what was reached; after an InputError (a full disk) the earlier file is unchanged."""
        if self.file is None:
            return
        kept: dict[str, Any] = {"origin": json.dumps(self.origin), "done": self.done, **arrays}
        with replacing(self.file.parent, "a checkpoint") as new, (new / self.file.name).open("wb") as file:
            np.savez(file, **kept)

    def run(
        self,
        parts: Iterable[Item],
        add: Callable[[Item], object],
        reached: Callable[[], Arrays],
        total: int | None,
        show: bool,
    ) -> None:
        """`add` every part that is left; `reached` gives the arrays to write.

        Raises:
            TrainingInterrupted: after SIGINT or SIGTERM, where there is a folder; what was reached is written.
        """
        written = self.done
        with bar(self.label, total, self.done, show) as told, stopping(self.file is not None) as stop:
            try:
                for part in parts:
                    add(part)
                    self.done += 1
                    told(self.done, "")
                    if stop.requested or self.done % self.every == 0:
                        self.save(reached())
                        written = self.done
                    if stop.requested:
                        raise KeyboardInterrupt
                if written != self.done:
                    self.save(reached())
            except KeyboardInterrupt:  # within a part: what is in memory is not whole, and the file counts
                if self.file is None:
                    raise
                raise self._interrupted(self.file) from None

    def _interrupted(self, file: Path) -> TrainingInterrupted:
        kept = file if file.is_file() else None
        what = f"{file} is kept{HOW}" if kept else "nothing was saved"
        tell(f"{self.label}: interrupted after {self.done} parts; {what}")
        return TrainingInterrupted(self.done, kept)


@contextmanager
def stage(text: str, show: bool) -> Iterator[None]:
    """Say, on a terminal, what is going on while it cannot say how far it is."""
    console = LastingConsole(stderr=True)
    if not (show and console.is_terminal):
        yield
        return
    with console.status(text):
        yield
