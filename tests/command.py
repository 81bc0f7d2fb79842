"""The `moefx` command within this process: one of its own takes longer to import torch than most commands run."""

from __future__ import annotations

import io
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

from moefx.cli import main


class Done(NamedTuple):
    """What a command printed, and its exit status."""

    returncode: int
    stdout: str
    stderr: str


def moefx(*args: str) -> Done:
    """Run `moefx ...`."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    status = 0
    with warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(err):
        sys.argv = ["moefx", *args]
        try:
            main()
        except SystemExit as e:
            status = int(e.code or 0)
        finally:
            sys.argv = argv
    return Done(status, out.getvalue(), err.getvalue())
