"""The `moefx` command as a user meets it: output, JSON, exit status, messages on errors."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import moefx
from moefx.precision.recipe import get_recipe
from moefx.report import Report
from moefx.stages import Stages
from moefx.train.console import LastingConsole

from .command import moefx as cli

FAST = ["--seq", "16", "--batch", "1"]


def process(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = "from moefx.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=cwd, timeout=300)


def test_inspect_json_has_the_stable_keys_and_every_block_raised() -> None:
    run = cli("inspect", "default", "--json", *FAST, "--stage", "dead_code", "--diff", "captured", "expand_experts")
    assert run.returncode == 0, run.stderr
    data = json.loads(run.stdout)
    assert {"blocks", "passes", "casts", "stages", "memory", "providers", "signatures"} <= set(data)
    assert [b["raised"] for b in data["blocks"]] == [True] * len(data["blocks"])
    assert data["blocks"]
    assert "moefx.plan_permute" in data["stage"]
    changed = [line for line in data["diff"].splitlines() if line[0] in "+-"]
    assert any(line.startswith("-") and "moefx.experts" in line for line in changed)
    assert any(line.startswith("+") and "moefx.grouped_mm" in line for line in changed)
    assert data["graphs"][0] == "captured"
    assert data["graphs"][-1] == "backward"


def test_inspect_prints_the_report_for_people() -> None:
    run = cli("inspect", *FAST)
    assert run.returncode == 0, run.stderr
    for word in ("MoE blocks: 4 raised", "expand_experts", "training passes", "casts: 0 before, 0 after", "graphs:"):
        assert word in run.stdout


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("inspect", "--recipe", "bf61"), "bf16"),
        (("inspect", *FAST, "--stage", "expand_expert"), "expand_experts"),
        (("inspect", "--batch", "0"), "--batch is out of range"),
        (("inspect", "no/such/config.json"), "no/such/config.json"),
        (("inspect", "collections:OrderedDict"), "OrderedDict"),
        (("inspect", "not_a_module_at_all:thing"), "not_a_module_at_all"),
        (("train", "--data", "no_such_text.txt"), "no_such_text.txt"),
        (("train", "--dtype", "fp8"), "fp32"),
        (("train", "--compare", "some"), "all"),
        (("train", "--router", "distilled", "--compare", "none"), "--compare is given with --router"),
        (("inspect", "--routing", "--stage", "captured"), "--stage is given with --routing"),
        (("inspect", "--routing", "--diff", "captured", "dead_code"), "--diff is given with --routing"),
        (("inspect", "--routing", "--verify"), "--verify is given with --routing"),
        (("inspect", "--batches", "3"), "--batches is given without --routing"),
    ],
)
def test_errors_name_the_culprit_and_exit_with_2(
    args: tuple[str, ...], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = cli(*args)
    assert run.returncode == 2, run.stderr
    assert named in run.stderr
    assert "what to do:" in run.stderr
    assert "Traceback" not in run.stderr


def test_errors_are_json_too(tmp_path: Path) -> None:
    run = process("inspect", "--recipe", "bf61", "--json", cwd=tmp_path)
    error = json.loads(run.stdout)["error"]
    assert run.returncode == 2
    assert error["type"] == "RecipeError"
    assert "bf16" in error["todo"]


def test_passes_and_recipes_are_listed() -> None:
    rows = json.loads(cli("passes", "--json").stdout)
    recipes = json.loads(cli("recipes", "--json").stdout)
    names = [r["name"] for r in rows]
    assert set(recipes["bf16"]["passes"]) <= set(names)
    assert recipes["fp8_flow"]["specs"]["input.wire"] == "e4m3 1x128 po2/rceil eps=1e-10"
    assert "e4m3 128x128 po2/rceil eps=1e-10 weight.fprop, weight.dgrad" in cli("recipes").stdout
    assert all(r["about"] and r["level"] in ("model", "training") for r in rows)


def test_recipes_can_be_built_again_from_what_is_listed() -> None:
    listed = json.loads(cli("recipes", "--json").stdout)
    assert list(listed) == moefx.recipes
    for name, fields in listed.items():
        assert moefx.Recipe(name, **fields) == get_recipe(name)
        # The pipeline follows from the other fields: all of those were printed.
        assert moefx.Recipe(name, **{f: v for f, v in fields.items() if f != "passes"}) == get_recipe(name)


def test_inspect_shows_what_became_of_each_cast() -> None:
    lines = cli("inspect", "default", "--recipe", "fp8_flow").stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("as written"))
    ledger = lines[at + 1 : lines.index("", at)]
    assert len(ledger) == 14
    assert all(" x4 " in line for line in ledger)
    kept = [line for line in ledger if "   Q  " in line]
    assert [line.split()[2] for line in kept] == ["X", "W1", "W2", "dY"]
    assert any(line.startswith("casts: 48 before, 8 after (8 fused into activations") for line in lines)


def test_a_model_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from transformers import MixtralConfig, MixtralForCausalLM\n"
        "def make():\n"
        "    c = MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,\n"
        "                      num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)\n"
        "    return MixtralForCausalLM(c)\n"
    )
    run = process("inspect", "mine:make", "--json", *FAST, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["model"] == "MixtralForCausalLM"


def test_routing_that_is_not_finite_is_valid_json(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"mean": {"token_entropy": float("nan")}, "load": [[0.5, float("inf")]]}
    monkeypatch.setattr("moefx.train.inspect_routing.inspect_routing", lambda *args, **options: (found, ""))
    run = cli("inspect", "default", "--routing", "--json")
    assert json.loads(run.stdout, parse_constant=pytest.fail) == {
        "mean": {"token_entropy": None},
        "load": [[0.5, None]],
    }


def test_a_training_outlives_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    consoles = list[object]()

    def trains(**given: object) -> dict[str, object]:
        consoles.append(given["console"])
        return {}

    monkeypatch.setattr("moefx.train.story.run_training", trains)
    assert (cli("train").returncode, cli("train", "--json").returncode) == (0, 0)
    assert [type(c) for c in consoles] == [LastingConsole] * 2


def test_compiling_goes_on_when_nobody_reads_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    nobody = os.fdopen(write, "w", buffering=1)  # as standard error is
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", nobody)
        stages = Stages(Report("model", "bf16", "eager"), "model")
        stages.start -= 60
        with stages("capture") as done:
            done(None)
    assert "capture" in stages.report.stages
    with contextlib.suppress(OSError):
        nobody.close()
