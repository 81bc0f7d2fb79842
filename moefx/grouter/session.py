"""A training of a Grouter that is saved now and then and when it is interrupted, and goes on later bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn
from torch.optim import Optimizer

from ..errors import InputError
from ..train import checkpoint as store
from ..train.aside import make_room, say
from ..train.console import LastingConsole
from ..train.interrupt import StopRequest, TrainingInterrupted
from .running import bar, check_figures


class Session:
    """Steps that change `model` by `optimizer`, and the checkpoints of them.

    Args:
        label: what the bar calls it.
        steps: of the whole training.
        model: holds all that the steps change.
        fingerprint: JSON values that must be equal to go on from a checkpoint.
        report: gets the figures of earlier sessions: those named by `kept`, and `seconds`.
        folder: of checkpoints; None for none, and then a signal does what it does elsewhere.
        every: steps between two checkpoints; there is one more at the end.
    """

    def __init__(
        self,
        label: str,
        steps: int,
        model: nn.Module,
        optimizer: Optimizer,
        fingerprint: Mapping[str, Any],
        report: Any,
        kept: Sequence[str],
        folder: str | Path | None,
        every: int,
    ) -> None:
        self.label, self.steps, self.fingerprint = label, steps, fingerprint
        self.model, self.optimizer = model, optimizer
        self.report, self.kept, self.every = report, (*kept, "seconds"), every
        self.folder = None if folder is None else Path(folder)
        self.first = self.done = 0

    def begin(self, resume: bool, console: Console) -> int:
        """Go back to the newest checkpoint, or move those that are there aside. Returns the steps that are done.

        Raises:
            CheckpointError: there is no checkpoint to resume from, or it is of another run.
        """
        if self.folder is None:
            return 0
        if resume:
            path = store.latest(self.folder)
            found = store.load(path, model=self.model, optimizer=self.optimizer, fingerprint=self.fingerprint)
            if not found.compared:
                say(console, "the checkpoint does not say of which model and data it is; those of now are taken")
            vars(self.report).update(found.history)
            self.first = self.done = found.step
        else:
            # Resuming takes the newest, which has the highest step, not the latest date.
            make_room(self.folder, console, [path.name for path in store.checkpoints(self.folder)])
        return self.first

    def run(self, step: Callable[[int], str], show: bool) -> None:
        """Call `step` with the number of each step that is left; it returns the figures to show.

        Raises:
            TrainingInterrupted: after SIGINT or SIGTERM, where there is a folder: a checkpoint was saved.
        """
        begin, before = time.perf_counter(), self.report.seconds
        with bar(self.label, self.steps, self.first, show) as told, stopping(self.folder is not None) as stop:
            try:
                for number in range(self.first, self.steps):
                    figures = step(number)
                    self.done = number + 1
                    self.report.seconds = before + time.perf_counter() - begin
                    told(self.done, figures)
                    if stop.requested or self.done % self.every == 0 or self.done == self.steps:
                        self._save()
                    if stop.requested:  # after the last step too: what comes after it must not start
                        raise KeyboardInterrupt
            except KeyboardInterrupt:  # within a step: what is in memory is not whole, and the last checkpoint counts
                if self.folder is None:
                    raise
                raise self._interrupted(self.folder) from None

    def _save(self) -> None:
        if self.folder is not None:
            store.save(
                self.folder, step=self.done, model=self.model, optimizer=self.optimizer, fingerprint=self.fingerprint,
                history={name: getattr(self.report, name) for name in self.kept},
            )  # fmt: skip

    def _interrupted(self, folder: Path) -> TrainingInterrupted:
        saved = store.checkpoints(folder)
        stopped = TrainingInterrupted(self.done, saved[-1] if saved else None)
        tell(f"{self.label}: {stopped}" + (HOW if saved else ""))
        return stopped


HOW = "; run the same again with --resume (in Python resume=True) to go on"


def tell(text: str) -> None:
    """A line on standard error: of an interruption it is said what is kept, whether progress is shown or not."""
    say(LastingConsole(stderr=True), text)


@contextmanager
def stopping(saving: bool) -> Iterator[StopRequest]:
    """Where something is to be saved first, signals are requests to stop; elsewhere they stop at once, as ever."""
    stop = StopRequest()
    with stop if saving else nullcontext():
        yield stop


def check_saving(folder: str | Path | None, every: int, resume: bool) -> None:
    """Raise InputError for options of checkpoints that contradict each other."""
    check_figures(checkpoint_every=(every, 1))
    if resume and folder is None:
        raise InputError("there is nothing to resume from", todo="name the checkpoint folder")
