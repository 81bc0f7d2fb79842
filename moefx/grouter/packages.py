"""Packages that only some tools need."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import MissingPackageError


def optional(name: str, purpose: str) -> Any:
    """Import module `name`. Raises MissingPackageError with the way to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = {"sklearn": "scikit-learn"}.get(name.partition(".")[0], name.partition(".")[0])
        raise MissingPackageError(
            f"{package} is needed {purpose}", why=str(error), todo="pip install 'moefx[routing]'"
        ) from error
