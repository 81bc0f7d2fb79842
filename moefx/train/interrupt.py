"""Stopping a run from outside without losing it: Ctrl-C and SIGTERM take effect between two steps.

Where there are no steps (compiling, measuring, between the trainings of one command) they take effect at once.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from .aside import CHECKPOINTS
from .checkpoint import checkpoints


class TrainingInterrupted(SystemExit):
    """The run was stopped by a signal; uncaught, the process ends with code 130.

    Attributes:
        step: completed steps.
        checkpoint: what a resumed run will start from; None when there is none yet.
    """

    def __init__(self, step: int, checkpoint: Path | None) -> None:
        super().__init__(130)
        self.step, self.checkpoint = step, checkpoint

    def __str__(self) -> str:
        if self.checkpoint is None:
            return f"interrupted at step {self.step}; nothing was saved"
        return f"interrupted at step {self.step}; resume continues from {self.checkpoint}"


class StopRequest:
    """Context in which SIGINT and SIGTERM set `requested` and do not stop the process; a second SIGINT does.

    In a thread other than the main one no handler can be installed, and signals do what they did before.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None: the handler was installed by other than Python code, and Python cannot install it again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        name = signal.Signals(number).name
        # One write: print may be in the middle of another line when the signal comes.
        sys.stderr.write(f"\nmoefx: {name}: finishing this step, then saving; Ctrl-C again stops at once\n")


@contextmanager
def stoppable(out: Path, resume: bool) -> Iterator[None]:
    """Context of a whole command: SIGINT and SIGTERM end it with code 130, saying what is kept and how to go on.

    Inside a training loop `StopRequest` takes their place. In a thread other than the main one, SIGTERM does what it
    did before.

    Args:
        out: folder of the command's runs, a folder each.
        resume: whether the command goes on with what lies there; otherwise that is an earlier run's, and not counted.
    """
    before = {} if resume else _kept(out)
    try:
        with terminable():
            yield
    except (KeyboardInterrupt, TrainingInterrupted):
        names = [name for name, written in _kept(out).items() if before.get(name) != written]
        told = (
            f"kept in {out}: {', '.join(names)}; the same command with --resume goes on from there"
            if names
            else "nothing was saved yet; the same command starts again"
        )
        sys.stderr.write(f"\nmoefx: interrupted; {told}\n")
        raise SystemExit(130) from None


@contextmanager
def terminable() -> Iterator[None]:
    """Context in which SIGTERM raises KeyboardInterrupt, as Ctrl-C does; in other threads it does what it did."""
    main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _interrupt) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _kept(out: Path) -> dict[str, int]:
    """What resuming would go on from, relative to `out`, and when it was written: newest checkpoints, Grouters."""
    newest = [found[-1] for folder in sorted(out.glob(f"*/{CHECKPOINTS}")) if (found := checkpoints(folder))]
    finished = sorted(path.parent for path in out.glob("*/config.json"))
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in (*newest, *finished)}
