"""`moefx train --router`: teacher, Grouter and two targets, at the smallest sizes that run through every part."""

from __future__ import annotations

import importlib
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import moefx
from moefx.train.checkpoint import CheckpointError
from moefx.train.interrupt import TrainingInterrupted
from moefx.train.metrics import read_metrics
from moefx.train.routing_story import run_routing

from .toy import VOCAB, ToyLM, quiet, text_of, toy_config, toy_data

pytest.importorskip("transformers")
CONFIG = {
    "model_type": "qwen3_moe", "vocab_size": VOCAB, "hidden_size": 32, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts": 4,
    "num_experts_per_tok": 2, "norm_topk_prob": True, "max_position_embeddings": 64, "intermediate_size": 16,
}  # fmt: skip
SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16}


def tell(tmp_path: Path, name: str = "run", **options: Any) -> dict[str, Any]:
    spec = tmp_path / "model.json"
    spec.write_text(json.dumps(CONFIG))
    settings: dict[str, Any] = {
        "model": str(spec), "data": toy_data(), "cfg": toy_config(tmp_path / name), "distill_steps": 5,
        "options": {"codegen": "eager"}, "console": quiet(),
    }  # fmt: skip
    return run_routing(**{**settings, **options})


def test_teacher_grouter_and_two_targets(tmp_path: Path) -> None:
    console = quiet()
    cfg = toy_config(tmp_path / "run", places=2)
    content = tell(tmp_path, cfg=cfg, losses="lb,z,metrics", console=console)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"teacher", "grouter", "learned", "routed", "report.json"}
    assert content["grouter"]["distill"]["steps"] == 5
    assert len(content["grouter"]["distill"]["losses"]) == 5
    arms = content["arms"]
    assert [len(arms[a]["losses"]) for a in ("learned", "routed")] == [12, 12]
    # The same weights and the same batches, routed otherwise.
    assert arms["learned"]["losses"] != arms["routed"]["losses"]
    assert arms["learned"]["losses"][0] == pytest.approx(arms["routed"]["losses"][0], abs=0.2)
    rows = {p["name"]: p for p in content["reports"]["routed"]["passes"]}
    assert rows["route_by_token"]["matched"] == 2
    assert "route_by_token" not in {p["name"] for p in content["reports"]["learned"]["passes"]}
    assert json.loads((tmp_path / "run" / "report.json").read_text())["arms"] == json.loads(json.dumps(arms))
    # Both are measured, and shown side by side.
    rows = {line.split("│")[1].strip(): line.split("│")[2:4] for line in text_of(console).splitlines() if "│" in line}
    for arm, column in (("learned", 0), ("routed", 1)):
        found = arms[arm]["routing"]
        assert f"{found['mean']['max_violation']:.3f}" in rows["MaxVio, mean over layers"][column]
        sent = sum(row["remote"] for row in found["traffic"]) / 2
        assert f"{sent:.3f} (" in rows["sends per token over 2 places (if uniform)"][column]
    assert rows["path stability: hit rate 1 (its chance)"][1].strip().startswith("1.000 (")  # one choice for all layers
    # What the routed target is not trained for is said.
    assert set(content["losses_left_out"]) == {"lb", "z"}
    assert "no layer's own router" in content["losses_left_out"]["lb"]
    said = [line for line in text_of(console).splitlines() if line.startswith("routed: without the losses lb, z: ")]
    assert len(said) == 1
    assert "no layer's own router" in said[0]
    assert len(content["reports"]["routed"]["losses"]) == 1
    # What is the Grouter's stands in its column.
    tuned = content["grouter"]["tune"]
    assert [cell.strip() for cell in rows["MaxVio before tuning"]] == ["", f"{tuned['maxvio_before']:.2f}"]
    assert [cell.strip() for cell in rows["MaxVio after tuning"]] == ["", f"{tuned['maxvio_after']:.2f}"]
    # A finished Grouter is not taken for that of a run with other settings or data.
    for change in ({"cfg": toy_config(tmp_path / "run", seed=7)}, {"losses": "lb=1,z"}, {"data": toy_data(seed=1)}):
        with pytest.raises(CheckpointError, match=r"identity\.(seed|losses\.lb|data) was"):
            tell(tmp_path, resume=True, **change)


@pytest.mark.nightly
def test_a_second_target_on_the_same_grouter_is_the_same_target(tmp_path: Path) -> None:
    first = tell(tmp_path)
    again = tell(tmp_path, "again", router=str(tmp_path / "run" / "grouter"))
    assert again["arms"]["routed"]["losses"] == first["arms"]["routed"]["losses"]
    assert not (tmp_path / "again" / "teacher").exists()


def test_a_new_run_moves_the_earlier_one_aside_when_it_can_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moefx.train import routing_story

    def stops(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "run"
    names = [
        "teacher/checkpoints",
        "grouter/config.json",
        "routed/metrics.jsonl",
        "optimized/checkpoints",
        "report.json",
    ]
    for name in names:
        (out / name).mkdir(parents=True)
    monkeypatch.setattr(routing_story, "train", stops)
    with pytest.raises(moefx.RecipeError):
        tell(tmp_path, recipe="fp8_flwo")
    assert all((out / name).exists() for name in names)
    monkeypatch.setattr(routing_story, "optimized", lambda *_: None)
    console = quiet()
    with pytest.raises(KeyboardInterrupt):
        tell(tmp_path, console=console)
    assert all((out / "previous-1" / name).exists() and not (out / name).exists() for name in names)
    assert f"moved to {out / 'previous-1'}" in text_of(console)
    # The Grouter that is used stays where it is.
    moefx.Grouter.from_config(vocab_size=VOCAB, num_experts=4, **SIZES).save_pretrained(out / "grouter")
    (out / "optimized" / "checkpoints").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        tell(tmp_path, router=str(out / "grouter"))
    assert (out / "previous-2" / "optimized" / "checkpoints").exists()
    assert (out / "grouter" / "config.json").exists()


@pytest.mark.parametrize("distilled", [True, False])
def test_traffic_that_cannot_be_counted_is_refused_before_anything_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distilled: bool
) -> None:
    from moefx.train import routing_story

    report = tmp_path / "run" / "report.json"
    report.parent.mkdir()
    report.write_text("mine")
    moefx.Grouter.from_config(vocab_size=VOCAB, num_experts=4, **SIZES).save_pretrained(tmp_path / "grouter")
    monkeypatch.setattr(routing_story, "optimized", lambda *_: ToyLM())  # measures nothing
    with pytest.raises(moefx.InputError, match="traffic over 2 places cannot be counted"):
        tell(
            tmp_path, cfg=toy_config(tmp_path / "run", places=2), losses="metrics",
            router="distilled" if distilled else str(tmp_path / "grouter"),
        )  # fmt: skip
    assert report.read_text() == "mine"


def test_what_is_known_before_anything_is_compiled_is_said_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moefx.train import routing_story

    monkeypatch.setattr(routing_story, "optimized", lambda *_: pytest.fail("something is compiled"))
    with pytest.raises(moefx.InputError, match="there is no such router") as caught:
        tell(tmp_path, router="distiled", data=[tmp_path / "gone.txt"])
    assert "did you mean 'distilled'?" in str(caught.value.todo)
    with pytest.raises(moefx.InputError, match="unknown codegen 'indcutor'"):
        tell(tmp_path, options={"codegen": "indcutor"}, data=[tmp_path / "gone.txt"])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(moefx.InputError, match="output directory cannot be written"):
        tell(tmp_path, "file")
    (tmp_path / "run" / "teacher" / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="a checkpoint is damaged"):
        tell(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices"),
        ('{"k": 2, "kl": 0.1, "settings": {}}', "it lacks 'exact'"),
        ('{"k": 2, "kl": "none", "exact": null, "settings": {}}', "kl is not what moefx writes"),
        ('{"k": 2, "kl": 0.1, "exact": null, "settings": {"identity": []}}', "settings is not what moefx writes"),
    ],
)
def test_a_damaged_report_of_the_grouter_is_named(tmp_path: Path, content: str, why: str) -> None:
    folder = tmp_path / "run" / "grouter"
    moefx.Grouter.from_config(vocab_size=VOCAB, num_experts=4, **SIZES).save_pretrained(folder)
    for name, text in (("distill", content), ("tune", '{"maxvio_before": 2.5, "maxvio_after": null, "settings": {}}')):
        (folder / name).mkdir()
        (folder / name / "report.json").write_text(text)
    with pytest.raises(moefx.InputError, match="report of a finished Grouter cannot be read") as caught:
        tell(tmp_path, resume=True)
    assert caught.value.where == str(folder / "distill" / "report.json")
    assert why in str(caught.value.why)


def test_resume_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        tell(tmp_path, resume=True)
    (tmp_path / "run" / "teacher" / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no checkpoint to resume from") as caught:
        tell(tmp_path, resume=True, router=str(tmp_path / "grouter"))  # which needs no teacher
    assert caught.value.where == str(tmp_path / "run" / "learned" / "checkpoints")


@pytest.mark.nightly
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tell(tmp_path, "whole", distill_steps=15)
    from moefx.train import routing_story

    # First within tuning, in the second of three steps: it is finished and saved.
    tune = importlib.import_module("moefx.grouter.tune")
    step_of_tuning, tuned = tune._step_score, list[int]()

    def interrupt(*args: Any) -> float:
        tuned.append(args[-1])
        if tuned == [0, 1]:
            signal.raise_signal(signal.SIGINT)
        return float(step_of_tuning(*args))

    monkeypatch.setattr(tune, "_step_score", interrupt)
    with pytest.raises(TrainingInterrupted):
        tell(tmp_path, "cut", distill_steps=15)
    assert tuned == [0, 1]

    train, calls = routing_story.train, list[str]()

    def cut(*args: Any, label: str, **kwargs: Any) -> Any:
        calls.append(label)

        def stop(step: int, loss: float) -> None:
            if label == "learned" and step == 4:
                raise KeyboardInterrupt

        return train(*args, label=label, on_step=stop, **kwargs)

    monkeypatch.setattr(routing_story, "train", cut)
    with pytest.raises(TrainingInterrupted):
        tell(tmp_path, "cut", resume=True, distill_steps=15)
    assert tuned == [0, 1, 2]
    assert calls == ["teacher", "learned"]
    monkeypatch.setattr(routing_story, "train", train)
    resumed = tell(tmp_path, "cut", resume=True, distill_steps=15)
    assert resumed["arms"]["routed"]["losses"] == whole["arms"]["routed"]["losses"]
    assert resumed["arms"]["learned"]["losses"] == whole["arms"]["learned"]["losses"]
    for part in ("distill", "tune"):
        assert resumed["grouter"][part]["losses"] == whole["grouter"][part]["losses"]
    assert len(read_metrics(tmp_path / "cut" / "teacher")) > 0


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, in which training fails the test."""
    from moefx.train import routing_story

    def trains(*_: Any, label: str, **__: Any) -> None:
        pytest.fail(f"{label} is trained")

    monkeypatch.setattr(routing_story, "train", trains)
    return routing_story


@pytest.mark.usefixtures("untrained")
@pytest.mark.filterwarnings("ignore::moefx.grouter.FutureTokensWarning")
def test_a_grouter_that_does_not_fit_is_refused_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    """Of another vocabulary, of another number of experts, or one that sees the future."""
    torch.manual_seed(0)
    moefx.Grouter.from_config(vocab_size=VOCAB - 1, num_experts=4, **SIZES).save_pretrained(tmp_path / "few")
    with pytest.raises(moefx.InputError, match=re.escape(f"knows {VOCAB - 1} token ids, the model has {VOCAB}")):
        tell(tmp_path, router=str(tmp_path / "few"))
    moefx.Grouter.from_config(vocab_size=VOCAB, num_experts=8, **SIZES).save_pretrained(tmp_path / "many")
    with pytest.raises(moefx.PassError, match="the router has 8 experts, the layer has 4"):
        tell(tmp_path, "many", router=str(tmp_path / "many"))
    made = moefx.Grouter.from_config(vocab_size=VOCAB, num_experts=4, causal=False, init_std=0.5, **SIZES)
    made.save_pretrained(tmp_path / "both")
    with pytest.raises(moefx.InputError, match="depends on tokens behind it"):
        tell(tmp_path, "both-run", router=str(tmp_path / "both"))


@pytest.mark.parametrize(("losses", "kept"), [("metrics", True), ("z", True), ("lb,z", False)])
def test_the_models_own_balance_loss_goes_only_where_lb_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: str, kept: bool
) -> None:
    """Of the teacher and the learned arm; the routed one, which uses no router, never has it."""
    from moefx.train import routing_story

    balanced: list[bool] = []

    def optimized(model: Any, *_: Any) -> None:
        balanced.append(model.config.output_router_logits)

    def stops(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(routing_story, "optimized", optimized)
    monkeypatch.setattr(routing_story, "train", stops)
    moefx.Grouter.from_config(vocab_size=VOCAB, num_experts=4, **SIZES).save_pretrained(tmp_path / "grouter")
    for router in ("distilled", str(tmp_path / "grouter")):  # the teacher and what it will route; both arms
        with pytest.raises(KeyboardInterrupt):
            tell(tmp_path, router=router, losses=losses)
    assert balanced == [kept, False] * 2


def test_a_model_that_cannot_be_routed_is_refused_before_the_teacher_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untrained: Any
) -> None:
    """A layer with another number of experts than the one that the Grouter is distilled from."""
    network = untrained._network
    monkeypatch.setattr(untrained, "_network", lambda target, vocab, experts: network(target, vocab, experts + 1))
    with pytest.raises(moefx.PassError, match="the router has 5 experts, the layer has 4"):
        tell(tmp_path)


def test_a_distilled_grouter_knows_all_ids_of_a_model_that_has_more_than_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moefx.train import routing_story

    class MadeError(Exception):
        pass

    def network(_: Any, vocab_size: int, experts: int) -> None:
        raise MadeError(vocab_size, experts)

    monkeypatch.setitem(CONFIG, "vocab_size", VOCAB + 3)
    monkeypatch.setattr(routing_story, "_train", lambda *_: None)
    monkeypatch.setattr(routing_story, "_network", network)
    with pytest.raises(MadeError) as caught:
        tell(tmp_path)
    assert caught.value.args == (VOCAB + 3, 4)
