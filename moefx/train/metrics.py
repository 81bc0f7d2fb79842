"""Where a run writes its figures: `metrics.jsonl`, and TensorBoard when it is installed."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..errors import InputError

FILE = "metrics.jsonl"
_told = False


class Metrics:
    """Appends one JSON object per line: {"kind": "train" | "val", "step": completed steps, "loss": nats, ...}.

    "train" has the losses of routing, too, as `loss_sp`. Kind "routing" holds `moefx.view.routing_numbers.scalars`,
    measured in validation, and kind "precision" the figures of `precision.summarize`, measured in the step itself.

    Args:
        directory: of the run; created when missing.
        step: completed steps; what an earlier session wrote beyond them is removed, since it will be computed again.
    """

    def __init__(self, directory: Path, step: int, console: Console) -> None:
        path = directory / FILE
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _truncate(path, step)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise unwritable(directory, error) from error
        known = sum(r["kind"] == "train" for r in read_metrics(directory))
        if known < step:
            console.print(f"{path} lacks {step - known} of the {step} steps before the resumed one", soft_wrap=True)
        self._board = _tensorboard(directory / "tensorboard", step, console)

    def write(self, kind: str, step: int, **values: float) -> None:
        """Append one record. Every record is flushed: a run that is killed leaves its figures behind."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def loads(self, step: int, load: Sequence[Sequence[float]]) -> None:
        """TensorBoard gets a histogram per layer of the experts' loads, 1 being the mean."""
        if self._board is not None:
            for layer, row in enumerate(load):
                self._board.add_histogram(f"routing/load/{layer}", np.asarray(row) * len(row), step)

    def close(self) -> None:
        """Close the file and flush TensorBoard."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; an incomplete last line (of a killed process) is left out."""
    records = []
    for line in (directory / FILE).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def unwritable(directory: Path, error: OSError) -> InputError:
    """The error for a run's directory that the system does not let us write."""
    why, todo = error.strerror or str(error), "choose another output directory"
    return InputError("the output directory cannot be written", where=str(directory), why=why, todo=todo)


def _truncate(path: Path, step: int) -> None:
    kept = [json.dumps(r) + "\n" for r in read_metrics(path.parent) if r["step"] <= step]
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
