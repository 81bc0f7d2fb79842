"""Where a run writes its figures: `metrics.jsonl`, and TensorBoard when it is installed."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..errors import InputError
from ..files import json_text

FILE = "metrics.jsonl"
_told = False


class Metrics:
    """Appends one JSON object per line: {"kind": "train" | "val", "step": completed steps, "loss": nats, ...}.

    A figure that is no finite number (a loss that diverged) is null.

    "train" has the losses of routing, too, as `loss_sp`, and "val" has `loss_prefix` for a router of later tokens. Kind
    "routing" holds `moefx.view.routing_numbers.scalars`, measured in validation, and kind "precision" the figures of
    `precision.summarize`, measured in the step itself.

    Args:
        directory: of the run; created when missing.
        step: completed steps; what an earlier session wrote beyond them is removed, since it will be computed again.
    """

    def __init__(self, directory: Path, step: int, console: Console) -> None:
        path = directory / FILE
        self._path, self._console = path, console
        self._failed = self._torn = False
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _truncate(path, step)
            # Unbuffered: a record is in the file when it is written, or is known not to be.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise unwritable(directory, error) from error
        known = sum(r["kind"] == "train" for r in read_metrics(directory))
        if known < step:
            console.print(f"{path} lacks {step - known} of the {step} steps before the resumed one", soft_wrap=True)
        self._board: Any = None
        with self._forgiving():
            self._board = _tensorboard(directory / "tensorboard", step, console)

    def write(self, kind: str, step: int, **values: float) -> None:
        """Append one record at once: a run that is killed leaves its figures behind.

        Where the disk refuses, it is said, once, and the record is lost: the weights are worth more than their curves.
        """
        with self._forgiving():
            self._append(json_text({"kind": kind, "step": step, **values}) + "\n")
        if self._board is not None:
            with self._forgiving():
                for name, value in values.items():
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def loads(self, step: int, load: Sequence[Sequence[float]]) -> None:
        """TensorBoard gets a histogram per layer of the experts' loads, 1 being the mean."""
        if self._board is not None:
            with self._forgiving():
                for layer, row in enumerate(load):
                    self._board.add_histogram(f"routing/load/{layer}", np.asarray(row) * len(row), step)

    def close(self) -> None:
        """Close the file and flush TensorBoard."""
        with self._forgiving():
            self._file.close()
        if self._board is not None:
            with self._forgiving():
                self._board.close()

    def _append(self, line: str) -> None:
        # A line that was cut off by a full disk ends here: only that one is unreadable.
        data = ("\n" + line if self._torn else line).encode()
        while data:
            data = data[self._file.write(data) :]
            self._torn = bool(data)

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._failed:
                self._failed = True
                why = error.strerror or str(error)
                said = f"warning: metrics cannot be written to {self._path.parent} ({why}); training goes on without"
                self._console.print(said, markup=False, highlight=False, soft_wrap=True)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; what is none (the cut line of a killed process, garbage) is left out."""
    records = []
    for line in (directory / FILE).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and "kind" in record:
            records.append(record)
    return records


def require_folder(out: Path) -> None:
    """Make the folder for results. Called before the work, which would be lost. Raises InputError when it cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error) from error


def unwritable(directory: Path, error: OSError) -> InputError:
    """The error for a run's directory that the system does not let us write."""
    why, todo = error.strerror or str(error), "choose another output directory"
    return InputError("the output directory cannot be written", where=str(directory), why=why, todo=todo)


def _truncate(path: Path, step: int) -> None:
    kept = [json_text(r) + "\n" for r in read_metrics(path.parent) if r["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _tensorboard(directory: Path, step: int, console: Console) -> Any:
    try:
        module = importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        global _told
        if not _told:
            _told = True
            console.print("TensorBoard is not installed (pip install 'moefx[train]'); metrics go to metrics.jsonl only")
        return None
    # Records of an earlier session beyond the resumed step would otherwise be shown as a second curve.
    return module.SummaryWriter(str(directory), purge_step=step + 1 if step else None)
