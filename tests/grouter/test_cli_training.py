"""The commands, in this process: distil from a folder, go on, tune what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from moefx.errors import InputError
from moefx.grouter import Grouter
from moefx.grouter.cli_training import register
from moefx.grouter.sources import load_data, load_teacher
from moefx.train.checkpoint import CheckpointError

from ..family import zoo

app = typer.Typer()
register(app)
TINY = ["--seq", "8", "--batch", "2", "--json"]
SMALL = ["--hidden", "16", "--heads", "2", "--layers", "1", "--intermediate", "24"]


def run(*args: Any) -> dict[str, Any]:
    done = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    entry = zoo.get("qwen3_moe")
    zoo.build(entry, vocab_size=256).save_pretrained(folder)
    return folder


def test_distil_go_on_and_tune(teacher: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 256, 2000))
    common = ["distill", "--teacher", teacher, "--data", tmp_path / "ids.npy", *TINY, *SMALL]
    found = run(*common, "--steps", 3, "--out", tmp_path / "g")
    assert found["k"] == 2
    assert len(found["losses"]) == 3
    assert found["measured_on"] == "128 held-out tokens"
    g = Grouter.from_pretrained(tmp_path / "g")
    assert (g.config.vocab_size, g.config.num_experts, g.config.causal) == (256, 8, True)
    assert (tmp_path / "g" / "report.md").is_file()
    again = run(*common, "--steps", 3, "--out", tmp_path / "g", "--resume")
    assert again["losses"] == found["losses"]
    np.save(tmp_path / "ids.npy", np.random.default_rng(1).integers(0, 256, 2000))
    with pytest.raises(CheckpointError, match=r"identity.data was .*, identity.seed was 0, is 1"):
        run(*common, "--steps", 3, "--out", tmp_path / "g", "--resume", "--seed", 1)
    tuned = run(
        "tune", tmp_path / "g", "--data", tmp_path / "ids.npy", "--out", tmp_path / "t", "--k", 2, "--steps", 2, *TINY
    )
    assert tuned["overlap"] > 0.5
    after = Grouter.from_pretrained(tmp_path / "t").state_dict()
    assert [n for n, t in g.state_dict().items() if not torch.equal(t, after[n])] == ["score.weight"]


def test_a_run_of_moefx_train_as_teacher(tmp_path: Path) -> None:
    from moefx.train.checkpoint import save
    from moefx.train.models import load_model

    model = load_model("default", seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    save(tmp_path / "optimized" / "checkpoints", step=1, model=model, optimizer=optimizer, fingerprint={}, history={})
    found = load_teacher(tmp_path)
    assert not found.training
    for (name, a), b in zip(model.state_dict().items(), found.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(InputError, match="no teacher in this folder"):
        load_teacher(tmp_path / "optimized")


def test_data_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "texts" / "deeper").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text("abc" * 200)
    (tmp_path / "texts" / "deeper" / "b.txt").write_text("xyz" * 200)
    data = load_data([tmp_path / "texts"], 256, 8)
    assert len(data.train) + len(data.val) > 1200
    with pytest.raises(InputError, match="read as bytes"):
        load_data([tmp_path / "texts"], 1000, 8)
    np.save(tmp_path / "ids.npy", np.arange(400, dtype=np.int32))
    assert len(load_data([tmp_path / "ids.npy"], 400, 8).train) == 380
    with pytest.raises(InputError, match="token id 399 is outside"):
        load_data([tmp_path / "ids.npy"], 399, 8)
    np.save(tmp_path / "bad.npy", np.zeros((3, 4)))
    with pytest.raises(InputError, match="not a file of token ids"):
        load_data([tmp_path / "bad.npy"], 9, 8)
