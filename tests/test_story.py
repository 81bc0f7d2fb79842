"""The main job: train the default model on real text through moefx and beside it the original, and compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from moefx.train.config import TrainConfig
from moefx.train.data import open_dataset
from moefx.train.story import run_training

STEPS = 120  # `make train` does 200


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, TrainConfig]:
    out = tmp_path_factory.mktemp("story")
    cfg = TrainConfig(steps=STEPS, out=out, threads=1)
    result = run_training(cfg=cfg, compare="all", console=Console(quiet=True))
    return result, out, cfg


def test_loss_curves_agree_at_every_step(story: tuple[dict[str, Any], Path, TrainConfig]) -> None:
    optimized, original = (np.array(story[0]["train"][arm]["losses"]) for arm in ("optimized", "original"))
    assert len(optimized) == len(original) == STEPS
    assert np.abs(optimized - original).max() <= 1e-3
    # The curves carry information: the loss moved by far more than the tolerance, and the runs are not the same run.
    assert optimized[0] - optimized[-1] > 1
    assert (optimized != original).any()


def test_validation_beats_a_unigram_model(story: tuple[dict[str, Any], Path, TrainConfig]) -> None:
    data = open_dataset(())
    counts = np.bincount(np.asarray(data.train), minlength=256) + 1.0
    unigram = -np.log(counts / counts.sum())
    held_out = np.asarray(data.val)
    baseline = unigram[held_out].mean()
    for arm in ("optimized", "original"):
        assert story[0]["train"][arm]["val_loss"] < baseline - 0.2
    assert story[0]["train"]["unigram_nats"] == pytest.approx(baseline, abs=0.15)  # of the validated part of the split


def test_report_json_holds_the_run_and_the_compiler_report(story: tuple[dict[str, Any], Path, TrainConfig]) -> None:
    result, out, _ = story
    stored = json.loads((out / "report.json").read_text())
    assert stored["train"]["optimized"]["losses"] == result["train"]["optimized"]["losses"]
    assert [b["raised"] for b in stored["report"]["blocks"]] == [True] * 4
    assert stored["report"]["stages"]["joint"]["nodes"] > 500
    assert stored["report"]["casts"]["before"] == stored["report"]["casts"]["after"] == 0


def test_only_the_loss_was_differentiated(story: tuple[dict[str, Any], Path, TrainConfig]) -> None:
    """Training differentiates the loss alone; the report's backward must be the one without the logits' tangent."""
    modes = [(s["mode"], s["grad"]) for s in story[0]["report"]["signatures"]]
    assert modes == [("train", True), ("eval", False)]
