"""Checkpoints: what is saved comes back, and everything that can be wrong with one is said and changes nothing."""

from __future__ import annotations

import json
import os
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moefx.errors import MissingPackageError
from moefx.module import OptimizedModule
from moefx.train import checkpoint
from moefx.train.checkpoint import CheckpointError
from moefx.train.rng import get_rng_state, set_rng_state, undisturbed_rng

from .toy import ToyLM, same_bits, toy_data, weights

PRINT = {"lr": 0.1, "betas": (0.9, 0.99), "data": "abc"}


def trained(seed: int = 0, steps: int = 2) -> tuple[ToyLM, torch.optim.Optimizer]:
    torch.manual_seed(seed)  # of dropout
    model = ToyLM(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    batches = toy_data().batches("train", 2, 8, seed)
    for _ in range(steps):
        ids = next(batches)
        loss = model(ids, ids).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def write(directory: Path, step: int = 3, **changes: Any) -> Path:
    model, optimizer = trained()
    given: dict[str, Any] = {"model": model, "optimizer": optimizer, "fingerprint": PRINT, "history": {"losses": [1.0]}}
    return checkpoint.save(directory, step=step, **{**given, **changes})


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(np.random.random())


def test_round_trip(tmp_path: Path) -> None:
    model, optimizer = trained()
    history = {"losses": torch.tensor([1.5, 0.25], dtype=torch.float64), "val": [[2, 0.5]], "seconds": 0.125}
    path = checkpoint.save(tmp_path, step=2, model=model, optimizer=optimizer, fingerprint=PRINT, history=history)
    expected = draws()

    other, other_optimizer = trained(seed=1, steps=1)
    assert not same_bits(weights(model), weights(other))
    found = checkpoint.load(path, model=other, optimizer=other_optimizer, fingerprint=PRINT)
    assert draws() == expected
    assert same_bits(weights(model), weights(other))
    assert found.step == 2
    assert found.history["losses"].tolist() == [1.5, 0.25]
    assert found.history["val"] == [[2, 0.5]]
    assert found.history["seconds"] == 0.125
    before, after = optimizer.state_dict(), other_optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for number, state in before["state"].items():
        assert state.keys() == after["state"][number].keys()
        assert all(torch.equal(state[k], after["state"][number][k]) for k in state)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = write(tmp_path)
    stored = load_file(path / checkpoint.MODEL)
    assert set(stored) == {"embed.weight", "norm.weight", "norm.bias", "seen"}
    assert json.loads((path / checkpoint.MANIFEST).read_text())["aliases"] == {"head.weight": "embed.weight"}
    model, optimizer = trained(seed=1)
    checkpoint.load(path, model=model, optimizer=optimizer, fingerprint=PRINT)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.weight, trained()[0].embed.weight)


def test_tying_must_match(tmp_path: Path) -> None:
    path = write(tmp_path)
    model, _ = trained(seed=1)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    with pytest.raises(CheckpointError, match="ties other weights") as caught:
        load(path, model)
    assert "head.weight" in str(caught.value.why)


class Awkward(nn.Module):
    """State that file formats dislike: views of one memory, odd strides, empty and float8 tensors, no tensor."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        fused = torch.full((4, 6), fill)
        self.register_buffer("left", fused[:2])
        self.register_buffer("right", fused[2:])
        self.register_buffer("turned", torch.full((3, 5), fill).t())
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("also_empty", torch.zeros(0, 4))
        self.register_buffer("narrow", torch.full((3,), fill, dtype=torch.bfloat16))
        self.register_buffer("codes", torch.full((3,), fill).to(torch.float8_e4m3fn))
        self.weight = nn.Parameter(torch.full((2,), fill))
        self.note = f"filled with {fill}"

    def get_extra_state(self) -> Any:
        return {"note": self.note}

    def set_extra_state(self, state: Any) -> None:
        self.note = state["note"]


def test_awkward_state_round_trip(tmp_path: Path) -> None:
    source, target = Awkward(1.5), Awkward(0.0)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (source, target)]
    path = checkpoint.save(tmp_path, step=1, model=source, optimizer=optimizers[0], fingerprint={}, history={})
    checkpoint.load(path, model=target, optimizer=optimizers[1], fingerprint={})
    assert target.note == "filled with 1.5"
    for name, value in source.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value.float(), target.state_dict()[name].float()), name
    # The two halves of the fused memory are still one memory, not two copies.
    assert target.left.untyped_storage().data_ptr() == target.right.untyped_storage().data_ptr()


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 30):
        write(tmp_path, step, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000010", "step-00000030"]
    assert checkpoint.latest(tmp_path).name == "step-00000030"
    write(tmp_path, 5, keep=1)  # an earlier step, written later: what was just written is never deleted
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000005", "step-00000030"]


def test_same_step_again_replaces(tmp_path: Path) -> None:
    write(tmp_path, 3)
    path = write(tmp_path, 3, history={"losses": [2.0]})
    model, optimizer = trained(seed=1)
    assert checkpoint.load(path, model=model, optimizer=optimizer, fingerprint=PRINT).history == {"losses": [2.0]}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_killed_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 3)
    rename = Path.rename

    def die(self: Path, target: Path) -> Path:
        if self.name.startswith(".tmp"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 3)
    path = checkpoint.latest(tmp_path)
    assert path.name == "step-00000003.old"
    assert load(path, trained(seed=1)[0]).step == 3
    write(tmp_path, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("failing", [checkpoint.MODEL, checkpoint.STATE, checkpoint.MANIFEST])
def test_a_failed_save_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    good = write(tmp_path, 3)
    flush = checkpoint._flush

    def full(path: Path) -> None:
        if path.name == failing:
            raise OSError(28, "No space left on device")
        flush(path)

    monkeypatch.setattr(checkpoint, "_flush", full)
    with pytest.raises(CheckpointError, match="could not be written") as caught:
        write(tmp_path, 4)
    assert caught.value.why == "No space left on device"
    assert [p.name for p in tmp_path.iterdir()] == [good.name]
    assert load(good, trained(seed=1)[0]).step == 3


@pytest.mark.parametrize("writer", ["safetensors", "torch"])
def test_what_the_writers_make_of_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str) -> None:
    """Neither raises an OSError: safetensors has an error of its own, torch's archive a RuntimeError."""
    from safetensors import SafetensorError

    good = write(tmp_path, 3)

    def full(*_: Any, **__: Any) -> None:
        error = SafetensorError if writer == "safetensors" else RuntimeError
        raise error("No space left on device\nand a second line")

    if writer == "safetensors":
        monkeypatch.setattr(checkpoint.safetensors(), "save_file", full)
    else:
        monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="could not be written") as caught:
        write(tmp_path, 4)
    assert caught.value.why == "No space left on device"
    assert [p.name for p in tmp_path.iterdir()] == [good.name]


def test_remains_of_a_killed_process_are_removed_and_never_loaded(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-00000009-1").mkdir(parents=True)
    (tmp_path / "step-notes").mkdir()
    write(tmp_path, 3)
    assert checkpoint.latest(tmp_path).name == "step-00000003"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-notes"]


def load(path: Path, model: nn.Module, fingerprint: Any = None) -> checkpoint.Restored:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return checkpoint.load(path, model=model, optimizer=optimizer, fingerprint=fingerprint or PRINT)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def put(**entries: Any) -> Any:
    """Other entries of a manifest."""

    def harm(file: Path) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))

    return harm


@pytest.mark.parametrize(
    ("name", "harm", "why"),
    [
        (checkpoint.MODEL, cut, "model.safetensors has .* bytes, .* were written"),
        (checkpoint.STATE, cut, "state.pt has .* bytes, .* were written"),
        (checkpoint.MODEL, flip, "SHA-256 of model.safetensors differs"),
        (checkpoint.STATE, flip, "SHA-256 of state.pt differs"),
        (checkpoint.MODEL, Path.unlink, "model.safetensors is missing"),
        (checkpoint.STATE, Path.unlink, "state.pt is missing"),
        (checkpoint.MANIFEST, Path.unlink, "manifest.json: .*No such file"),
        (checkpoint.MANIFEST, cut, "manifest.json: "),
        (checkpoint.MANIFEST, lambda f: f.write_text('{"format": 1, "step": 3}'), "lacks aliases, files"),
        (checkpoint.MANIFEST, lambda f: f.write_text(f.read_text().replace("sha256", "sha1")), "SHA-256"),
        (checkpoint.MANIFEST, put(step="x"), "step is a str, not a int"),
        (checkpoint.MANIFEST, put(step=True), "step is a bool"),
        (checkpoint.MANIFEST, put(fingerprint=None), "fingerprint is a NoneType, not a dict"),
        (checkpoint.MANIFEST, put(files=[]), "files is a list"),
        (checkpoint.MANIFEST, put(files={checkpoint.MODEL: 3}), "model.safetensors has .* bytes, an unknown number"),
        (checkpoint.MANIFEST, put(tensors=None), "tensors is a NoneType"),
        (checkpoint.MANIFEST, put(aliases=None), "aliases is a NoneType"),
        (checkpoint.MANIFEST, put(aliases={"head.weight": ["embed.weight"]}), "head.weight is tied to no tensor"),
        (checkpoint.MANIFEST, put(aliases={"head.weight": "gone"}), "head.weight is tied to no tensor"),
    ],
)
def test_damage_is_named_and_nothing_is_changed(tmp_path: Path, name: str, harm: Any, why: str) -> None:
    older, path = write(tmp_path, 2), write(tmp_path, 3)
    harm(path / name)
    model, optimizer = trained(seed=1)
    before, state = weights(model), optimizer.state_dict()["state"][0]["exp_avg"].clone()
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        checkpoint.load(path, model=model, optimizer=optimizer, fingerprint=PRINT)
    assert caught.value.where == str(path)
    assert re.search(why, str(caught.value.why)), caught.value.why
    assert older.name in str(caught.value.todo)
    assert same_bits(weights(model), before)
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], state)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_damage_without_an_older_checkpoint(tmp_path: Path) -> None:
    path = write(tmp_path)
    cut(path / checkpoint.STATE)
    with pytest.raises(CheckpointError) as caught:
        load(path, trained()[0])
    assert "start the run again" in str(caught.value.todo)


def test_other_format(tmp_path: Path) -> None:
    path = write(tmp_path)
    for content, found in (('{"format": 99}', "format 99, expected 1"), ("[]", "format None")):
        (path / checkpoint.MANIFEST).write_text(content)
        with pytest.raises(CheckpointError, match=f"another format\n.*\n.*{found}"):
            load(path, trained()[0])


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint to resume from") as caught:
        checkpoint.latest(tmp_path / "gone")
    assert caught.value.why == "the directory does not exist"
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint.latest(tmp_path)
    with pytest.raises(CheckpointError, match="a checkpoint is missing"):
        load(tmp_path / "step-00000001", trained()[0])


def test_other_settings_are_named(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert load(path, trained()[0], {**PRINT, "betas": [0.9, 0.99]}).step == 3  # a tuple is a list in JSON
    with pytest.raises(CheckpointError, match="other settings") as caught:
        load(path, trained()[0], {"lr": 0.2, "betas": (0.9, 0.99), "new": 1})
    assert caught.value.why == "lr was 0.1, is 0.2, new was None, is 1, data was 'abc', is None"


def test_another_model_is_named(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(CheckpointError, match="another model") as caught:
        load(path, ToyLM(width=4))
    assert "embed.weight: stored float32[16, 8], model float32[16, 4]" in str(caught.value.why)
    assert "and 1 more" in str(caught.value.why)
    with pytest.raises(CheckpointError, match="another model") as caught:
        load(path, nn.Linear(2, 2))
    assert "weight: stored nothing, model float32[2, 2]" in str(caught.value.why)


def test_another_models_extra_state(tmp_path: Path) -> None:
    class Plain(Awkward):
        get_extra_state = nn.Module.get_extra_state

    model = Awkward(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = checkpoint.save(tmp_path, step=1, model=model, optimizer=optimizer, fingerprint={}, history={})
    with pytest.raises(CheckpointError, match=r"another model\n.*\n.*extra state of"):
        checkpoint.load(path, model=Plain(0.0), optimizer=optimizer, fingerprint={})


@pytest.mark.parametrize(("stored", "wanted"), [(16, 0), (0, 16), (16, 4)])
def test_another_history_of_delayed_scaling_changes_nothing(tmp_path: Path, stored: int, wanted: int) -> None:
    def delayed(model: ToyLM, steps: int) -> OptimizedModule:
        options = SimpleNamespace(recipe=SimpleNamespace(amax_history=steps), routing=None)
        return OptimizedModule(model, lambda *_: None, options, None)  # type: ignore[arg-type,return-value]

    model, optimizer = trained()
    path = write(tmp_path, model=delayed(model, stored), optimizer=optimizer)
    model, optimizer = trained(seed=1)
    before, state = weights(model), optimizer.state_dict()["state"][0]["exp_avg"].clone()
    with pytest.raises(CheckpointError, match="another recipe") as caught:
        checkpoint.load(path, model=delayed(model, wanted), optimizer=optimizer, fingerprint=PRINT)
    assert f"last {stored} steps was stored, the model's recipe keeps {wanted}" in str(caught.value.why)
    assert same_bits(weights(model), before)
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], state)
    assert checkpoint.load(path, model=delayed(model, stored), optimizer=optimizer, fingerprint=PRINT).step == 3


def test_other_optimizer_groups(tmp_path: Path) -> None:
    path = write(tmp_path)
    model, _ = trained(seed=1)
    before = weights(model)
    optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters()], lr=0.1)
    with pytest.raises(CheckpointError, match="optimizer does not fit"):
        checkpoint.load(path, model=model, optimizer=optimizer, fingerprint=PRINT)
    assert same_bits(weights(model), before)


@pytest.mark.parametrize("value", [object(), np.float64(1.0), lambda step: 0.1])
def test_state_that_could_not_be_read_back_is_refused_at_once(tmp_path: Path, value: Any) -> None:
    model, optimizer = trained()
    optimizer.param_groups[0]["schedule"] = [1, value]
    with pytest.raises(CheckpointError, match="cannot be saved") as caught:
        write(tmp_path, model=model, optimizer=optimizer)
    assert caught.value.where == "optimizer['param_groups'][0]['schedule'][1]"
    assert type(value).__name__ in str(caught.value.why)
    assert not checkpoint.checkpoints(tmp_path)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    """The hashes say that a file was not damaged, not that it is honest."""

    class Attack:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "owned"),))

    path = write(tmp_path / "run")
    torch.save({"optimizer": Attack()}, path / checkpoint.STATE)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest["files"][checkpoint.STATE] = checkpoint._digest(path / checkpoint.STATE)
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="UnpicklingError"):
        load(path, trained()[0])
    assert not (tmp_path / "owned").exists()


def test_safetensors_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingPackageError, match="safetensors is needed") as caught:
        load(path, trained()[0])
    assert "moefx[train]" in str(caught.value.todo)
    with pytest.raises(MissingPackageError, match="safetensors is needed"):
        write(tmp_path, 4)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_random_states_are_restored_and_undisturbed() -> None:
    random.gauss(0, 1)  # leaves a second number waiting, which is part of the state
    np.random.standard_normal()
    state = get_rng_state()
    expected = (draws(), random.gauss(0, 1), float(np.random.standard_normal()))
    set_rng_state(state)
    with undisturbed_rng():
        assert draws() == expected[0]
        torch.manual_seed(99)
    assert (draws(), random.gauss(0, 1), float(np.random.standard_normal())) == expected
