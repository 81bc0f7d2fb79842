"""Balance over two processes is that of one process with both batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.optim.ranks import launch

pytest.importorskip("transformers")


def test_global_balance_and_biases_on_two_ranks(tmp_path: Path) -> None:
    said = launch(2, tmp_path, ["balance"], "tests.losses.ranked")
    assert not said["balance"], said["balance"]
