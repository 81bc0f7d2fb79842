"""One measurement of the benchmark, whatever its part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Found = dict[str, Any]  # columns of a row, with `ms` of each repeat and the `rate` of its floor
DECISIVE, USUAL, LAST = 0, 1, 2  # ranks


@dataclass(frozen=True)
class Case:
    """Rows that come from one measurement.

    `run(machine, missing)` gives what was found for each name, or None where the provider cannot be had; packages that
    are not installed are added to `missing`. Nothing is made on the device before. Cases of a lower rank come first.
    """

    part: str
    names: tuple[str, ...]
    provider: str
    rank: int
    run: Callable[[Any, set[str]], list[Found] | None]
