"""The graph of the tests of the pass manager."""

from __future__ import annotations

import pytest

from tests.passes.subject import H, Subject, T, model_graph, rand

from .edited import Block


@pytest.fixture(scope="package")
def graph() -> Subject:
    """The model graph of `Block`."""
    return model_graph(Block(), rand(T, H))
