"""The checks of `sharded.py` and `sharded_training.py` on two processes, and on four in the nightly run."""

from __future__ import annotations

import pytest

from .ranks import launch
from .sharded_training import CHECKS


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return launch(2, tmp_path_factory.mktemp("two"), list(CHECKS))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return launch(4, tmp_path_factory.mktemp("four"), list(CHECKS))


@pytest.mark.parametrize("name", list(CHECKS))
def test_on_two_ranks(name: str, two: dict[str, str]) -> None:
    assert not two[name], two[name]


@pytest.mark.nightly
@pytest.mark.parametrize("name", list(CHECKS))
def test_on_four_ranks(name: str, four: dict[str, str]) -> None:
    assert not four[name], four[name]
