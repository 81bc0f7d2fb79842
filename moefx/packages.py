"""Packages that only some features need."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import MissingPackageError

_DISTRIBUTIONS = {"sklearn": "scikit-learn", "transformer_engine_torch": "transformer_engine"}


def optional(name: str, purpose: str, extra: str = "routing", instead: str = "") -> Any:
    """Import module `name`. `purpose` ends the sentence "PACKAGE is needed ..".

    Raises:
        MissingPackageError: with the way to install it, `moefx[extra]`, and what can be done `instead`.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: its shared libraries
        top = name.partition(".")[0]
        raise MissingPackageError(
            f"{_DISTRIBUTIONS.get(top, top)} is needed {purpose}",
            why=str(error),
            todo=f"pip install 'moefx[{extra}]'" + (f", or {instead}" if instead else ""),
        ) from error
