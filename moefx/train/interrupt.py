"""Stopping a run from outside without losing it: Ctrl-C and SIGTERM take effect between two steps."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any


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
