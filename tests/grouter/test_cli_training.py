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

from moefx.errors import InputError, MoefxError
from moefx.grouter import Grouter
from moefx.grouter.cli_training import register
from moefx.grouter.sources import load_data, load_teacher
from moefx.train.checkpoint import CheckpointError

from ..disk import full_after
from ..family import zoo
from .small import small

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
    assert [p.name for p in (tmp_path / "g" / "checkpoints").iterdir()] == ["step-00000003"]
    run(*common, "--steps", 3, "--out", tmp_path / "often", "--checkpoint-every", 2)
    assert len(list((tmp_path / "often" / "checkpoints").iterdir())) == 2
    again = run(*common, "--steps", 3, "--out", tmp_path / "g", "--resume")
    assert again["losses"] == found["losses"]
    np.save(tmp_path / "ids.npy", np.random.default_rng(1).integers(0, 256, 2000))
    with pytest.raises(CheckpointError, match=r"identity.data was .*, identity.seed was 0, is 1"):
        run(*common, "--steps", 3, "--out", tmp_path / "g", "--resume", "--seed", 1)
    tuning = ["tune", tmp_path / "g", "--data", tmp_path / "ids.npy", "--k", 2, "--steps", 2, *TINY]
    tuned = run(*tuning, "--out", tmp_path / "t", "--checkpoint-every", 1)
    kept = tmp_path / "t" / "checkpoints" / "tune"
    assert sorted(p.name for p in kept.iterdir()) == ["step-00000001", "step-00000002"]
    assert run(*tuning, "--out", tmp_path / "t", "--resume")["losses"] == tuned["losses"]
    with pytest.raises(CheckpointError, match=r"identity.seed was 0, is 1"):
        run(*tuning, "--out", tmp_path / "t", "--resume", "--seed", 1)
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


def test_folders_without_files_and_several_arrays_are_refused(tmp_path: Path) -> None:
    for folder in ("empty/deeper", "two"):
        (tmp_path / folder).mkdir(parents=True)
    for at, vocabulary in ((tmp_path / "empty", 256), (tmp_path / "empty", 64)):
        with pytest.raises(InputError, match="no file in a data folder") as caught:
            load_data([at], vocabulary, 8)
        assert caught.value.where == str(at)
    np.save(tmp_path / "two" / "a.npy", np.arange(200))
    assert len(load_data([tmp_path / "two"], 256, 8).train) == 190
    (tmp_path / "two" / "b.txt").write_text("text" * 99)
    for paths in ([tmp_path / "two"], [tmp_path / "two" / "a.npy"] * 2):
        with pytest.raises(InputError, match=r"2 data files, one of them a \.npy"):
            load_data(paths, 256, 8)


def test_damaged_arrays_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(200))
    whole = (tmp_path / "ids.npy").read_bytes()
    np.savez(tmp_path / "many.npz", a=np.arange(200))
    for damaged in (b"", whole[:20], whole[:300], (tmp_path / "many.npz").read_bytes()):
        (tmp_path / "ids.npy").write_bytes(damaged)
        with pytest.raises(InputError, match="a data file") as caught:
            load_data([tmp_path / "ids.npy"], 256, 8)
        assert caught.value.where == str(tmp_path / "ids.npy")


def test_damaged_weights_of_a_run(tmp_path: Path) -> None:
    at = tmp_path / "optimized" / "checkpoints" / "step-00000001"
    at.mkdir(parents=True)
    (at / "manifest.json").write_text('{"aliases": {}}')
    for damaged in (b"", b"garbage" * 9):
        (at / "model.safetensors").write_bytes(damaged)
        with pytest.raises(InputError, match="does not fit the teacher"):
            load_teacher(tmp_path)


def test_a_full_disk_leaves_the_earlier_results(tmp_path: Path) -> None:
    small(vocab_size=256).save_pretrained(tmp_path / "g")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 256, 2000))
    command = ["tune", tmp_path / "g", "--data", tmp_path / "ids.npy", "--out", tmp_path / "t", "--k", 2, *TINY]
    run(*command, "--steps", 1)
    before = {f.name: f.read_bytes() for f in (tmp_path / "t").iterdir() if f.is_file()}
    for limit in (5000, 20):  # of the weights, and of the report
        with pytest.raises(MoefxError, match="could not be written"), full_after(limit):
            run(*command, "--steps", 2)
        assert {f.name: f.read_bytes() for f in (tmp_path / "t").iterdir() if f.is_file()} == before
    assert set(before) == {"config.json", "model.safetensors", "report.json", "report.md"}


@pytest.mark.parametrize("option", ["--batch=0", "--seq=0", "--seq=-4"])
def test_sizes_of_nothing_are_refused(option: str) -> None:
    args = ["tune", "somewhere", "--out", "elsewhere", "--k", "2", option]
    assert CliRunner().invoke(app, args).exit_code == 2
