"""Where low precision is slower than the wide program: measured layers, one row per device, recipe and shape.

Casts cost bytes, products gain operations, and with small experts the casts win: users measure FP8 slower than bf16 on
layers of 128 experts of width 768. No formula says where, so the table holds what was measured on a device (`python -m
benchmarks.gpu --decide`), and a shape that nothing like it was measured for has no verdict. `speedup` is wide time over
narrow time, forward and backward.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moefx.errors import InputError
from moefx.precision.recipe import get_recipe, recipe_names

FIELDS = ("device", "recipe", "T", "H", "I", "E", "k", "speedup")
NEAR = 1.5  # a measured layer speaks for shapes whose sizes are within this factor of its own


@dataclass(frozen=True)
class Row:
    """One measured layer: T tokens, width H, experts' width I, E experts, k per token."""

    device: str
    recipe: str
    T: int
    H: int
    I: int
    E: int
    k: int
    speedup: float

    @property
    def sizes(self) -> tuple[float, float, float]:
        """Rows per expert, H, I: what products and casts of a layer depend on."""
        return self.T * self.k / self.E, self.H, self.I

    def __str__(self) -> str:
        return f"T={self.T} H={self.H} I={self.I} E={self.E} k={self.k} on {self.device}: {self.speedup:.2f}x"


def read(file: Path) -> tuple[Row, ...]:
    """The rows of a table.

    Raises:
        InputError: other columns than `FIELDS`, or a value that no measured layer has; it names the line.
    """
    with file.open(newline="") as f:
        lines = csv.DictReader(f)
        if tuple(lines.fieldnames or ()) != FIELDS:
            raise _malformed(file, 1, f"the columns are {', '.join(lines.fieldnames or ()) or 'none'}")
        return tuple(_row(r, file, lines.line_num) for r in lines)


def _row(r: dict[str, Any], file: Path, line: int) -> Row:
    try:
        if None in r or None in r.values():
            raise ValueError(f"the row has not {len(FIELDS)} values")
        sizes = {n: int(r[n]) for n in "THIEk"}
        found = Row(r["device"], r["recipe"], speedup=float(r["speedup"]), **sizes)
    except ValueError as error:
        raise _malformed(file, line, str(error)) from error
    if not (found.device and found.recipe and min(sizes.values()) > 0 and 0 < found.speedup < math.inf):
        raise _malformed(file, line, f"the row says {found}, under {found.recipe!r}")
    return found


def _malformed(file: Path, line: int, why: str) -> InputError:
    return InputError(
        "a table of measured layers cannot be read",
        where=f"{file}:{line}",
        why=why,
        todo=f"columns {','.join(FIELDS)}; names, sizes of at least 1, a finite speedup above 0; "
        "python -m benchmarks.gpu --decide writes such tables",
    )


@cache
def table() -> tuple[Row, ...]:
    """The table that comes with moefx."""
    return read(Path(__file__).with_name("decisions.csv"))


def verdict(
    device: str, specs: Mapping[str, str], pairs: int, H: int, I: int, E: int, rows: tuple[Row, ...] | None = None
) -> Row | None:
    """The measured layer nearest to one of so many (token, expert) pairs, if one is near, on that device.

    A measured recipe speaks for every recipe with the same `specs`, whatever its name.
    """
    alike = {name for name in recipe_names() if get_recipe(name).specs == specs}
    sizes = (pairs / max(E, 1), H, I)
    best, distance = None, math.log(NEAR)
    for row in table() if rows is None else rows:
        if row.device == device and row.recipe in alike and min(sizes) > 0:
            apart = max(abs(math.log(a / b)) for a, b in zip(sizes, row.sizes, strict=True))
            if apart <= distance:
                best, distance = row, apart
    return best


def device_name(device: torch.device) -> str:
    """The name that tables know a device by."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
