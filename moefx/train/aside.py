"""What happens to the results of an earlier run when a new one starts in its folder: moved aside, and it is said."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .metrics import FILE, unwritable

CHECKPOINTS = "checkpoints"
RESULTS = (CHECKPOINTS, FILE, "tensorboard")  # of one training
OPTIMIZED, ORIGINAL = "optimized", "original"
TEACHER, LEARNED, ROUTED, GROUTER = "teacher", "learned", "routed", "grouter"
REPORT = "report.json"


def set_aside(out: Path, names: Sequence[str] = RESULTS) -> Path | None:
    """Move the files and folders `names`, relative to `out`, into `out/previous-N`, under the same names.

    Other files stay. What was moved can be used from there as before: it is what the earlier run left.

    Returns:
        The new folder; None when none of them is there.

    Raises:
        InputError: the system does not let us.
    """
    found = [name for name in names if (out / name).exists()]
    if not found:
        return None
    number = 1
    while (target := out / f"previous-{number}").exists():
        number += 1
    try:
        for name in found:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(out / name, target / name)
    except OSError as error:
        raise unwritable(out, error) from error
    return target


def make_room(out: Path, console: Console, names: Sequence[str] = RESULTS) -> None:
    """`set_aside`, saying where things went."""
    if moved := set_aside(out, names):
        say(console, f"results of an earlier run were moved to {moved}")


def make_room_for_run(out: Path, console: Console, router: Path | None = None) -> None:
    """`make_room` of all that a `moefx train` leaves, with `--router` or without: one may follow the other in a folder.

    Not before the run can start: what lies there is worth more than a mistyped option. And all of it: otherwise a later
    resume would take a finished run of another model for this one's.

    Args:
        router: the Grouter that the run uses; where it lies in the folder, it stays.
    """
    trained = [f"{arm}/{part}" for arm in (OPTIMIZED, ORIGINAL, TEACHER, LEARNED, ROUTED) for part in RESULTS]
    used = router is not None and router.resolve().is_relative_to((out / GROUTER).resolve())
    make_room(out, console, [*trained, *([] if used else [GROUTER]), REPORT])


def say(console: Console, text: str) -> None:
    """One line, as it is: paths hold what rich would take for markup, and are copied from where they are shown."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
