"""Which cases of a test are run every time, and which at night alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def nightly(*values: Any) -> Any:
    """A case for the nightly run."""
    return pytest.param(*values, marks=pytest.mark.nightly)


def often(cases: Iterable[Any], every: Collection[Any]) -> list[Any]:
    """Cases of a parametrized test: those of `every` in each run, the others at night."""
    cases = list(cases)
    assert set(every) <= set(cases)
    return [c if c in every else nightly(*c) if isinstance(c, tuple) else nightly(c) for c in cases]
