"""What routing by a Grouter does to training, on the recipe of benchmarks/routing_effect.py. Nightly: ten minutes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.nightly
def test_a_causal_grouter_trains_better_than_learned_routing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    effect: Any = importlib.import_module("routing_effect")
    effect.prepare(0, tmp_path)
    for arm in ("learned", "grouter", "random"):
        effect.run(arm, 0, tmp_path)
    rows = [line.split(",") for line in (tmp_path / "rows.csv").read_text().splitlines()]
    found = {(arm, int(step), name): float(v) for _, arm, step, name, v in rows}

    def loss(arm: str, step: int) -> float:
        return found[arm, step, "validation loss"]

    assert loss("grouter", 300) <= loss("learned", 300) - 0.03
    assert loss("grouter", 1000) <= loss("learned", 1000) - 0.015
    # The structure matters, not that it is frozen. At step 1000 the gap was 0.09 on both seeds (docs/performance.md).
    assert loss("random", 300) >= loss("grouter", 300) + 0.10
    assert loss("random", 1000) >= loss("grouter", 1000) + 0.05
    full, prefixes = (found["grouter", 1000, f"loss; {kind}"] for kind in ("whole windows", "prefixes alone"))
    assert abs(full - prefixes) <= 1e-3
    assert found["causal", 600, "distil KL"] < 0.03
    assert found["causal", 600, "exact top-2 set"] > 0.6
