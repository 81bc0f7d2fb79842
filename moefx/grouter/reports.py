"""What a command leaves behind: JSON for programs and a short table for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import replacing
from ..train.story import write_json


def require_another(out: Path, grouter: Path) -> None:
    """Raise InputError where the Grouter that is made would take the place of the one that it is made from."""
    if out.resolve() == grouter.resolve():
        raise InputError(
            "the new Grouter would overwrite the one that it is made from",
            where=str(out),
            why="--out names the same folder",
            todo="choose another --out; to begin again, or to make it otherwise, the old one is needed",
        )


def write_report(
    out: Path,
    name: str,
    title: str,
    result: Mapping[str, Any],
    rows: Mapping[str, str],
    head: str = "| figure | value |",
) -> str:
    """Write `name`.json (all of `result`) and `name`.md (title and `rows`, figure -> value) into `out`: both or none.

    Returns:
        The text of the second.

    Raises:
        InputError: the system does not let us write.
    """
    table = "".join(f"| {figure} | {value} |\n" for figure, value in rows.items())
    text = f"# {title}\n\n{head}\n|---|---|\n{table}"
    with replacing(out, "the report") as new:
        write_json(new / f"{name}.json", result)
        (new / f"{name}.md").write_text(text, encoding="utf-8")
    return text


def share(value: float | None) -> str:
    """0.123 as 12.3 %, None as none."""
    return "none" if value is None else f"{100 * value:.1f} %"
