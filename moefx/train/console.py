"""The console of long work: it outlives whoever reads it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import IO

from rich.console import Console


class LastingConsole(Console):
    """A console that falls silent when its reader goes away (`moefx train | head`), where rich ends the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _discard(self.file)
        try:
            # One write, as everywhere where work is in the middle of something.
            sys.stderr.write("\nmoefx: warning: nobody reads the output any more; the work goes on without\n")
            sys.stderr.flush()
        except BrokenPipeError:  # the same pipe, or the same reader
            _discard(sys.stderr)


def _discard(stream: IO[str]) -> None:
    """Let what is written to the stream from now on go nowhere.

    What it still holds would fail again when it is flushed, at the exit of the interpreter at the latest.
    """
    with suppress(OSError, ValueError):  # a stream without a file descriptor has nothing behind it that could break
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
