"""`moefx grouter affinity | fold | expand | precompute | place`, end to end and into files that the API reads."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import moefx.cli
from moefx.errors import InputError
from moefx.grouter import AffinityResult, Placement, RoutingRecords
from moefx.grouter import affinity as count_affinity
from tests import command as cli

from .small import Grouter, small

LENGTH = 32


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Grouter of bytes with 8 experts, and a text."""
    monkeypatch.setattr("moefx.grouter.cli.load_grouter", Grouter.from_pretrained)
    small(vocab_size=256).save_pretrained(tmp_path / "grouter")
    rng = np.random.default_rng(0)
    words = ["routing", "expert", "token", "gate", "of", "the", "a", "place", "sample", "window"]
    (tmp_path / "text.txt").write_text(" ".join(rng.choice(words, 1500)))
    return tmp_path


def run(folder: Path, *args: str, window: bool = True) -> dict[str, Any]:
    more = ("--data", str(folder / "text.txt"), "--window", str(LENGTH)) if window else ()
    done = CliRunner().invoke(moefx.cli.app, ["grouter", *args, *more, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def grouter(folder: Path) -> str:
    return str(folder / "grouter")


def test_affinity_then_fold(folder: Path) -> None:
    made = run(folder, "affinity", grouter(folder), "--k", "3", "--out", str(folder / "a"))
    counts = AffinityResult.open(folder / "a" / "affinity.npz")
    assert (made["experts"], made["tokens"]) == (8, counts.tokens)
    assert made["load"] == counts.load.tolist()
    assert made["pairs"][0]["share"] == counts.P.max()
    assert json.loads((folder / "a" / "affinity.json").read_text()) == made
    shard = str(folder / "a" / "affinity.npz")
    twice = ("--affinity", shard, "--affinity", shard)
    folded = run(
        folder, "fold", grouter(folder), "--targets", "3", *twice, "--target-k", "2", "--out", str(folder / "f")
    )
    assert folded["tokens"] == 2 * counts.tokens
    assert folded["sizes"] == [3, 3, 2]
    assert folded["retained"] >= folded["retained_greedy"]
    assert sum(folded["routed"]["load"]) == pytest.approx(2)
    assert Grouter.from_pretrained(folder / "f").config.num_experts == 3
    assert "affinity retained" in (folder / "f" / "fold.md").read_text()
    counted = run(folder, "fold", grouter(folder), "--targets", "3", "--k", "3", "--out", str(folder / "g"))
    assert counted["groups"] == folded["groups"]
    with pytest.raises(InputError, match="an affinity of 8 experts for a Grouter of 3"):
        run(folder, "fold", str(folder / "f"), "--targets", "2", "--affinity", shard, "--out", str(folder / "h"))


def test_expand(folder: Path) -> None:
    made = run(folder, "expand", grouter(folder), "--targets", "12", "--k", "2", "--out", str(folder / "e"))
    assert (made["experts_before"], made["experts"]) == (8, 12)
    assert 0 < made["new_share"] < 1
    assert Grouter.from_pretrained(folder / "e").score.out_features == 12


def test_precompute_then_place(folder: Path) -> None:
    made = run(folder, "precompute", grouter(folder), "--k", "2", "--out", str(folder / "r"))
    records = RoutingRecords.open(folder / "r")
    text = (folder / "text.txt").read_bytes()
    train = np.frombuffer(text[: len(text) - len(text) // 20], dtype=np.uint8)
    records.check(train, Grouter.from_pretrained(folder / "grouter"))
    assert made["left_out"] == len(train) % LENGTH
    assert (made["windows"], made["complete"]) == (len(records), True)
    assert made["bytes"]["ids.bin"] + made["bytes"]["gates.bin"] == len(records) * LENGTH * 2 * 3
    placed = run(folder, "place", str(folder / "r"), "--places", "4", "--out", str(folder / "p"), window=False)
    placement = Placement.open(folder / "p" / "placement.json")
    assert placed["tokens_after"] == placement.report.tokens_after <= placed["tokens_before"]
    assert sum(placed["samples"]) == len(records) == len(placement.home)
    assert torch.equal(torch.from_numpy(placement.slot).sort().values, torch.arange(8))


def test_reports_for_people_and_missing_options(folder: Path) -> None:
    base = ["grouter", "fold", grouter(folder), "--targets", "4", "--data", str(folder / "text.txt")]
    said = CliRunner().invoke(moefx.cli.app, [*base, "--k", "3", "--out", str(folder / "f")]).stdout
    assert "| experts | 8 to 4 |" in said
    with pytest.raises(InputError, match="--affinity"):
        run(folder, *base[1:4], "4", "--out", str(folder / "f"))
    with pytest.raises(InputError, match="use expand"):
        run(folder, "fold", grouter(folder), "--targets", "9", "--k", "3", "--out", str(folder / "f"))


@pytest.mark.parametrize("command", ["affinity", "fold --targets 4", "expand --targets 12", "tune"])
def test_a_file_in_the_place_of_the_folder_is_seen_before_the_work(folder: Path, command: str) -> None:
    (folder / "file").write_text("in the way")
    name, *more = command.split()
    with pytest.raises(InputError, match="output directory cannot be written") as caught:
        run(folder, name, grouter(folder), "--k", "2", *more, "--out", str(folder / "file"), window=name != "tune")
    assert caught.value.where == str(folder / "file")


@pytest.mark.parametrize("command", ["fold --targets 4", "expand --targets 12", "tune"])
def test_the_grouter_is_not_overwritten_by_what_is_made_from_it(folder: Path, command: str) -> None:
    before = {f.name: f.read_bytes() for f in (folder / "grouter").iterdir()}
    name, *more = command.split()
    again = folder / "elsewhere" / ".." / "grouter"
    with pytest.raises(InputError, match="would overwrite the one that it is made from"):
        run(folder, name, grouter(folder), "--k", "2", *more, "--out", str(again), window=name != "tune")
    assert {f.name: f.read_bytes() for f in (folder / "grouter").iterdir()} == before


def test_an_error_is_a_message_and_exit_status_2(tmp_path: Path) -> None:
    done = cli.moefx("grouter", "place", "--places", "2", "--json", str(tmp_path))
    assert done.returncode == 2, done.stdout + done.stderr
    assert json.loads(done.stdout)["error"]["what"] == "there are no routing records here"
    assert "Traceback" not in done.stderr


def test_tokens_are_those_of_the_vocabulary(folder: Path) -> None:
    """Every tool reads an array as ids, and text as bytes for a Grouter of bytes alone."""
    ids = np.random.default_rng(1).integers(0, 64, 40 * LENGTH)
    np.save(folder / "ids.npy", ids)
    small(vocab_size=64).save_pretrained(folder / "of64")
    array = ("--data", str(folder / "ids.npy"), "--window", str(LENGTH))
    command = ("affinity", str(folder / "of64"), "--k", "2", "--out", str(folder / "a"))
    run(folder, *command, *array, window=False)
    train = ids[: 38 * LENGTH].reshape(38, LENGTH)
    want = count_affinity(small(vocab_size=64).route(torch.from_numpy(train), 2)[0], 8)
    np.testing.assert_array_equal(AffinityResult.open(folder / "a" / "affinity.npz").pairs, want.pairs)
    records = ("precompute", str(folder / "of64"), "--k", "2", "--out", str(folder / "r"))
    run(folder, *records, *array, window=False)
    RoutingRecords.open(folder / "r").check(train)
    expansion = ("expand", str(folder / "of64"), "--targets", "9", "--k", "2", "--out", str(folder / "e"))
    folding = ("fold", str(folder / "of64"), "--targets", "4", "--k", "2", "--out", str(folder / "f"))
    for refused in (command, records, expansion, folding):
        with pytest.raises(InputError, match="text is read as bytes, 256 ids, and the vocabulary has 64"):
            run(folder, *refused)


def test_a_router_of_one_expert_per_token_is_folded_by_its_load(folder: Path) -> None:
    run(folder, "affinity", grouter(folder), "--k", "1", "--out", str(folder / "a"))
    shard = ("--affinity", str(folder / "a" / "affinity.npz"))
    fold = ("fold", grouter(folder), "--targets", "4", *shard, "--out", str(folder / "f"))
    with pytest.raises(InputError, match="no two experts are ever chosen together"):
        run(folder, *fold)
    assert not any((folder / "f").iterdir())
    with pytest.raises(InputError, match="nothing to resume"):  # as nothing is counted
        run(folder, *fold, "--method", "balance", "--resume")
    made = run(folder, *fold, "--method", "balance")
    assert (made["retained"], made["retained_greedy"]) == (None, None)
    assert sum(made["load"]) == pytest.approx(1)
    assert "| affinity retained | none |" in (folder / "f" / "fold.md").read_text()
    assert Grouter.from_pretrained(folder / "f").config.num_experts == 4


def test_a_command_that_fails_late_writes_nothing(folder: Path) -> None:
    fold = ("fold", grouter(folder), "--targets", "4", "--k", "3", "--out", str(folder / "f"))
    with pytest.raises(InputError, match="unknown way to reduce"):
        run(folder, *fold, "--reduce", "product")
    assert [f.name for f in (folder / "f").iterdir()] == ["checkpoints"]  # of the count, to go on from


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("fold --targets 4 --k 9", "--k 9: top-9 of 8 experts"),
        ("fold --targets 4 --k 0", "--k 0: top-0 of 8"),
        ("fold --targets 4 --k 2 --target-k 5", "--target-k 5: top-5 of 4"),
        ("fold --targets 9 --k 2", "8 experts cannot be folded into 9"),
        ("fold --targets 4 --k 2 --method gready", "unknown method of grouping"),
        ("fold --targets 4", "no affinity to fold by"),
        ("affinity --k 9", "--k 9: top-9 of 8"),
        ("expand --targets 12 --k 9", "--k 9: top-9 of 8 experts before"),
        ("expand --targets 8 --k 2", "8 experts cannot be expanded to 8"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_counted_or_moved(folder: Path, command: str, said: str) -> None:
    kept = [folder / "o" / "checkpoints" / f"{label}.npz" for label in ("affinity", "folded", "states", "before")]
    kept[0].parent.mkdir(parents=True)
    for file in kept:
        file.write_text("earlier")
    name, *more = command.split()
    with pytest.raises(InputError, match=said):
        run(folder, name, grouter(folder), *more, "--out", str(folder / "o"))
    assert all(file.read_text() == "earlier" for file in kept)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_records_go_on_when_they_are_computed_again(
    folder: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, route = itertools.count(1), Grouter.route

    def stopped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:
            os.kill(os.getpid(), number)
        return route(*args, **kwargs)

    monkeypatch.setattr(Grouter, "route", stopped)
    command = ["precompute", grouter(folder), "--k", "2", "--out", str(folder / "r")]
    text = ("--data", str(folder / "text.txt"), "--window", str(LENGTH))
    done = CliRunner().invoke(moefx.cli.app, ["grouter", *command, *text])
    assert done.exit_code == 130, done.output
    assert f"precompute: interrupted; {folder / 'r'} keeps 16 windows; run the same again to go on" in done.stderr
    with pytest.raises(InputError, match="incomplete") as caught:
        run(folder, "place", str(folder / "r"), "--places", "4", "--out", str(folder / "p"), window=False)
    assert "run precompute again" in str(caught.value.todo)
    before = next(calls)
    run(folder, *command)
    windows = len(RoutingRecords.open(folder / "r"))
    assert next(calls) - before - 1 == -(-(windows - 16) // 8)


@pytest.mark.parametrize(
    "options",
    [
        "precompute --batch 0",
        "precompute --batch -1",
        "affinity --window 0",
        "affinity --max-tokens 0",
        "expand --targets 9 --quantile 1.5",
        "expand --targets 9 --seed 4294967296",
        "expand --targets 9 --seed -1",
    ],
)
def test_numbers_out_of_range_are_a_usage_error(options: str) -> None:
    name, *more = options.split()
    done = CliRunner().invoke(moefx.cli.app, ["grouter", name, "somewhere", "--k", "2", *more])
    assert done.exit_code == 2, done.exception


@pytest.mark.parametrize(
    ("command", "at"),
    [
        ("affinity --k 3", 2),
        ("fold --targets 4 --k 3 --target-k 2", 2),
        ("fold --targets 4 --k 3 --target-k 2", 42),
        ("expand --targets 12 --k 2", 42),
    ],
)
def test_interrupted_commands_end_with_130_and_go_on(
    folder: Path, command: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """39 batches a count: the second count is the one that is interrupted at 42. An earlier run left counts as well."""
    name, *more = command.split()
    base = [name, grouter(folder), *more, "--out", str(folder / "o")]
    want, calls, route = run(folder, *base), itertools.count(1), Grouter.route

    def stopped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return route(*args, **kwargs)

    monkeypatch.setattr(Grouter, "route", stopped)
    text = ("--data", str(folder / "text.txt"), "--window", str(LENGTH))
    done = CliRunner().invoke(moefx.cli.app, ["grouter", *base, *text])
    assert (done.exit_code, "go on" in done.stderr) == (130, True), done.output
    before = next(calls)
    assert run(folder, *base, "--resume") == want
    assert next(calls) - before - 1 < (39 if name == "affinity" else 78)
    if name == "expand":
        assert not (folder / "o" / "checkpoints" / "states.npz").exists()
