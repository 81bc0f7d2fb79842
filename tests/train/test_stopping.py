"""Signals that come to `moefx train` outside of a training loop."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moefx.train import routing_story, story
from tests import command

from .test_routing_story import CONFIG

pytest.importorskip("transformers")
NOTHING = "interrupted; nothing was saved yet; the same command starts again"


def stop(number: int) -> Any:
    def stage(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(30)
        pytest.fail("the signal did not stop the command")

    return stage


def train(tmp_path: Path, *more: str) -> command.Done:
    (tmp_path / "model.json").write_text(json.dumps({**CONFIG, "vocab_size": 256}))
    sizes = ("--steps", "2", "--batch", "1", "--seq", "8", "--codegen", "eager")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    done = command.moefx(
        "train", "--model", str(tmp_path / "model.json"), "--out", str(tmp_path / "run"), *sizes, *more
    )
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    return done


def checkpoint(folder: Path, step: int = 2) -> None:
    (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """What an earlier run left in the folder is none of this one's, unless it is resumed."""
    monkeypatch.setattr(story, "optimized", stop(number))
    monkeypatch.setattr(story, "check", lambda _: None)  # the stand-in below is an empty folder
    checkpoint(tmp_path / "run" / "optimized")
    done = train(tmp_path)
    assert done.returncode == 130
    assert NOTHING in done.stderr
    done = train(tmp_path, "--resume")
    assert done.returncode == 130
    kept = os.path.join("optimized", "checkpoints", "step-00000002")
    assert f"kept in {tmp_path / 'run'}: {kept}; the same command with --resume goes on from there" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["tap", "distill", "tune"])
def test_between_the_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, number: int) -> None:
    from moefx import grouter

    def trains(*_: Any, **__: Any) -> None:
        checkpoint(tmp_path / "run" / "teacher")

    monkeypatch.setattr(routing_story, "optimized", lambda *_: None)
    monkeypatch.setattr(routing_story, "_try_routing", lambda *_: None)
    monkeypatch.setattr(routing_story, "train", trains)
    logits = SimpleNamespace(shape=(1, 8, 4))
    cut = lambda *_: logits  # noqa: E731
    cut.spec = SimpleNamespace(k=2)  # type: ignore[attr-defined]
    monkeypatch.setattr(grouter, "tap", lambda *_: cut)
    monkeypatch.setattr(grouter, "distill", lambda *_, **__: None)
    monkeypatch.setattr(grouter, stage, stop(number))
    done = train(tmp_path, "--router", "distilled")
    assert done.returncode == 130, done.stderr
    kept = os.path.join("teacher", "checkpoints", "step-00000002")
    assert f"kept in {tmp_path / 'run'}: {kept}; the same command with --resume goes on from there" in done.stderr
