"""Errors of moefx: what happened, where, why, and what to do.

Every error that a user can meet derives from `MoefxError`. The four parts are kept as attributes so that the command
line and the JSON output can show them apart; the text joins those that are known.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 400  # characters of another library's message


class MoefxError(Exception):
    """Base of all moefx errors.

    Args:
        what: one sentence saying what went wrong.
        where: module path, graph node or the user's file:line.
        why: the cause: a nearest miss, a measured value, the message of the error underneath.
        todo: what the user can do about it.
    """

    def __init__(self, what: str, where: str | None = None, why: str | None = None, todo: str | None = None) -> None:
        self.what, self.where, self.why, self.todo = what, where, why, todo
        parts = [what]
        for label, text in (("where", where), ("why", why), ("what to do", todo)):
            if text:
                parts.append(f"  {label}: {text}")
        super().__init__("\n".join(parts))

    def __reduce__(self) -> tuple[type, tuple[str | None, ...]]:
        return (type(self), (self.what, self.where, self.why, self.todo))


class CaptureError(MoefxError):
    """The model, or a part of it, could not be turned into a graph."""


class PassError(MoefxError):
    """A pass broke its contract, could not be ordered, or refused a graph."""


class RecipeError(MoefxError):
    """An unknown recipe, or a recipe with unknown or contradictory fields."""


class InputError(MoefxError):
    """Arguments that cannot be used: wrong example inputs, unknown options, a signature the model does not accept."""


class MissingPackageError(MoefxError):
    """An optional package is needed for what was asked, and is not installed."""


def first_line(e: BaseException, default: str = "") -> str:
    """The first line of an error's text that says something; with the next one, where it ends in a colon."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    if not lines:
        return default
    told = f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return told if len(told) <= LONGEST else f"{told[:LONGEST]} ..."  # torch lists every key that is missing


def nearest(name: object, known: Iterable[str]) -> str:
    """`"known are ..."` with the most similar name first, for error texts about a mistyped name."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names) or 'none'}"
