"""What a run shows while it goes on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 20  # steps; keeps the log of a run in a pipe readable


class Display:
    """Progress of one run. Use as a context manager, so that the terminal is restored whatever happens.

    Args:
        console: where to write; decides itself whether it is a terminal.
        label: what is trained.
        total, done: steps of the run, and how many of them an earlier session completed.
    """

    def __init__(self, console: Console, label: str, total: int, done: int = 0) -> None:
        self.console, self.label, self.total = console, label, total
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
            self._bar = Progress(TextColumn("{task.description}"), *columns, console=console)
            self._task = self._bar.add_task(label, total=total, completed=done, figures="")

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, loss: float, tokens_per_s: float) -> None:
        """After training step `step` (counted from 1)."""
        figures = f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        elif step % LINE_EVERY == 0 or step in (1, self.total):
            self.say(f"{self.label}: step {step}/{self.total}  {figures}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
