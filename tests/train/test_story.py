"""The comparison that `moefx train` makes, with a stand-in for the compiler."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from moefx.errors import InputError, RecipeError
from moefx.train import checkpoint, story
from moefx.train.checkpoint import CheckpointError
from moefx.train.data import TokenDataset, unigram_nats
from moefx.train.interrupt import TrainingInterrupted
from moefx.train.loop import TrainResult
from moefx.train.metrics import read_metrics
from moefx.train.parts import val_batches
from moefx.train.story import baseline, compared_steps, max_difference, run_training, summarize, table

from .toy import ToyLM, quiet, same_bits, text_of, toy_config, toy_data, weights


class FakeReport:
    def to_dict(self) -> dict[str, Any]:
        stages = {"capture": {"seconds": 1.25, "nodes": 100}, "codegen": {"seconds": 2.5, "nodes": 0}}
        return {"casts": {"before": 12, "after": 2}, "stages": stages}


class FakeOptimized(nn.Module):
    """Stands in for OptimizedModule: same state_dict, a report, and whatever difference a test wants."""

    def __init__(self, model: nn.Module, error: float = 0.0) -> None:
        super().__init__()
        self.model, self.error, self.report = model, error, FakeReport()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(*args, **kwargs)

    def forward(self, **inputs: Any) -> Any:
        out = self.model(**inputs)
        out.loss = out.loss + self.error
        return out


class FakeCompiler:
    def __init__(self, error: float = 0.0) -> None:
        self.error = error
        self.calls: list[tuple[nn.Module, dict[str, torch.Tensor], dict[str, Any], bool]] = []

    def __call__(self, model: nn.Module, example_inputs: Any, **options: Any) -> FakeOptimized:
        self.calls.append((copy.deepcopy(model), example_inputs, options, torch.is_autocast_enabled("cpu")))
        return FakeOptimized(model, self.error)


def tell(out: Path, **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "model": ToyLM(), "data": toy_data(), "cfg": toy_config(out), "optimize": FakeCompiler(), "console": quiet(),
    }  # fmt: skip
    return run_training(**{**settings, **options})


def test_an_exact_compiler_gives_equal_curves(tmp_path: Path) -> None:
    model = ToyLM()
    before = weights(model)
    content = tell(tmp_path, model=model)
    figures = content["train"]
    assert figures["optimized"]["losses"] == figures["original"]["losses"]
    assert len(figures["optimized"]["losses"]) == 12
    assert figures["max_difference"] == {"loss": 0.0, "step": 1, "steps": 12}
    assert figures["optimized"]["val_loss"] == figures["original"]["val_loss"]
    assert content["report"]["casts"] == {"before": 12, "after": 2}
    assert json.loads((tmp_path / story.REPORT).read_text()) == content
    assert same_bits(weights(model), before)  # the caller's model is not trained


def test_a_wrong_compiler_is_seen(tmp_path: Path) -> None:
    console = quiet()
    figures = tell(tmp_path, optimize=FakeCompiler(error=0.125), console=console)["train"]
    assert figures["max_difference"]["loss"] == pytest.approx(0.125)
    assert "1.2e-01" in text_of(console)


def test_what_the_compiler_is_given(tmp_path: Path) -> None:
    compiler, model = FakeCompiler(), ToyLM().eval()
    cfg = toy_config(tmp_path, dtype="bf16", grad_accum=2)
    tell(tmp_path, model=model, cfg=cfg, optimize=compiler, recipe="fp8", options={"codegen": "eager"})
    [(given, inputs, options, autocast)] = compiler.calls
    assert same_bits(weights(given), weights(model))
    assert given.training
    assert inputs["input_ids"].shape == (2, 8)  # a microbatch: what training will call it with
    assert inputs["labels"] is inputs["input_ids"]
    assert options == {"recipe": "fp8", "codegen": "eager"}
    assert autocast


@pytest.mark.parametrize(("compare", "steps"), [("none", 0), (0, 0), (5, 5), ("5", 5), (99, 12), ("all", 12)])
def test_how_much_is_compared(tmp_path: Path, compare: str | int, steps: int) -> None:
    assert compared_steps(compare, 12) == steps
    console = quiet()
    figures = tell(tmp_path, compare=compare, console=console)["train"]
    if steps == 0:
        assert figures["original"] is None
        assert figures["max_difference"] is None
        assert "largest loss difference" not in text_of(console)
    else:
        assert figures["original"]["losses"] == figures["optimized"]["losses"][:steps]
        assert figures["max_difference"]["steps"] == steps
        assert f"largest loss difference in {steps} steps" in text_of(console)


@pytest.mark.parametrize("compare", ["some", "-1", -1, "1.5", ""])
def test_compare_misspelt(compare: str | int) -> None:
    with pytest.raises(InputError, match="is not understood"):
        compared_steps(compare, 10)


def test_baseline_is_of_the_predicted_tokens() -> None:
    data, cfg = toy_data(), toy_config(Path("unused"))
    predicted = torch.cat([w[:, 1:].reshape(-1) for w in val_batches(data, cfg)]).numpy()
    assert baseline(data, cfg) == pytest.approx(unigram_nats(data.train, predicted, 16))
    assert baseline(data, toy_config(Path("unused"), eval_batches=0)) is None


def test_largest_difference() -> None:
    assert max_difference([1.0, 2.0, 3.0], [1.0, 2.5, 2.75, 9.0]) == {"loss": 0.5, "step": 2, "steps": 3}
    assert max_difference([], [1.0]) is None


def test_summary_and_table_without_validation_or_original() -> None:
    cfg = toy_config(Path("somewhere"))
    figures = summarize(TrainResult([2.0, 1.0], [], 10.0, 0.5), None, cfg, toy_data(), None)
    assert figures["optimized"]["final_loss"] == 1.0
    assert figures["optimized"]["val_loss"] is None
    assert figures["config"]["out"] == "somewhere"
    assert figures["data"]["train_tokens"] == 2000
    json.dumps(figures)
    console = quiet()
    console.print(table({"train": figures, "report": {}}))
    assert "1.0000" in text_of(console)
    assert "casts" not in text_of(console)


def test_table_shows_what_matters() -> None:
    optimized, original = (
        TrainResult([2.0, 1.0], [(2, 1.5)], 300.0, 1.0),
        TrainResult([2.0, 1.25], [(2, 1.5)], 200.0, 1.0),
    )
    figures = summarize(optimized, original, toy_config(Path("out")), toy_data(), 2.75)
    console = quiet()
    console.print(table({"train": figures, "report": FakeReport().to_dict()}))
    rows = {line.split("│")[1].strip(): line for line in text_of(console).splitlines() if line.startswith("│")}
    assert "1.2500" in rows["final training loss"]
    assert "2.5e-01" in rows["final training loss"]
    assert "at step 2" in rows["largest loss difference in 2 steps"]
    assert "2.7500" in rows["unigram baseline of validation"]
    assert "1.50x" in rows["tokens/s"]
    assert [c.strip() for c in rows["precision casts per step, of 12 as written"].split("│")[2:4]] == ["2", "0"]
    assert "1.25" in rows["capture"]
    assert "3.75" in rows["all stages"]


# Interrupted stories


@contextmanager
def interrupted(label: str, step: int) -> Iterator[None]:
    """Inside, the run named `label` is stopped at `step`, as Ctrl-C would; the run before it is not."""
    train = story.train

    def on_step(done: int, loss: float) -> None:
        if done == step:
            raise KeyboardInterrupt

    def stopping(*args: Any, **options: Any) -> TrainResult:
        return train(*args, **options, on_step=on_step if options["label"] == label else None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story, "train", stopping)
        yield


@pytest.mark.parametrize("label", ["optimized", "original"])
def test_resume_continues_wherever_it_was(tmp_path: Path, label: str) -> None:
    expected = tell(tmp_path / "whole")
    tell(tmp_path / "parts", cfg=toy_config(tmp_path / "parts", seed=5))  # an older run of other settings lies there
    with interrupted(label, 4), pytest.raises(TrainingInterrupted):
        tell(tmp_path / "parts")
    content = tell(tmp_path / "parts", model=ToyLM(), resume=True)
    for name in ("optimized", "original"):
        assert content["train"][name]["losses"] == expected["train"][name]["losses"]
        assert content["train"][name]["val"] == expected["train"][name]["val"]
        steps = [r["step"] for r in read_metrics(tmp_path / "parts" / name) if r["kind"] == "train"]
        assert steps == list(range(1, 13))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": "fp8_flow"}, "recipe was 'bf16', is 'fp8_flow'"),
        ({"options": {"losses": "sp=50"}}, 'losses.sp was None, is "Specialization(weight=50.0'),
    ],
)
def test_a_run_is_resumed_as_itself_only(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    with interrupted("optimized", 4), pytest.raises(TrainingInterrupted):
        tell(tmp_path, options={"codegen": "inductor"})
    with pytest.raises(CheckpointError, match="other settings") as caught:
        tell(tmp_path, resume=True, **change)
    assert str(caught.value.why).startswith(named)
    # What only measures, and what generates the code, may be another.
    content = tell(tmp_path, resume=True, options={"codegen": "eager", "losses": "metrics"}, compare="none")
    assert len(content["train"]["optimized"]["losses"]) == 12


def test_a_start_that_fails_moves_nothing_and_one_that_does_not_moves_all(tmp_path: Path) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise InputError("no such recipe")

    tell(tmp_path)
    (tmp_path / "optimized" / "notes.txt").write_text("mine")
    report = (tmp_path / story.REPORT).read_text()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="no such recipe"):
        tell(tmp_path, optimize=fails)
    assert sorted(tmp_path.rglob("*")) == before
    console = quiet()
    tell(tmp_path, cfg=toy_config(tmp_path, seed=3), compare="none", console=console)
    old = tmp_path / "previous-1"
    assert f"moved to {old}" in text_of(console)
    assert (old / story.REPORT).read_text() == report != (tmp_path / story.REPORT).read_text()
    assert not (tmp_path / "original" / "checkpoints").exists()  # of another seed: no later resume may take it
    assert (tmp_path / "optimized" / "notes.txt").read_text() == "mine"
    # It is a run like any other.
    assert tell(old, resume=True)["train"]["original"]["losses"] == json.loads(report)["train"]["original"]["losses"]


def test_results_of_a_run_with_router_are_moved_aside_as_well(tmp_path: Path) -> None:
    """All that a report tells of lies beside it, whichever of both commands ran before."""
    names = ["teacher/checkpoints", "learned/metrics.jsonl", "routed/tensorboard", "grouter/config.json", "report.json"]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    tell(tmp_path, compare="none")
    assert sorted(p.name for p in tmp_path.rglob("metrics.jsonl")) == ["metrics.jsonl"] * 2  # of learned, and the new
    assert all((tmp_path / "previous-1" / name).exists() for name in names)


def test_traffic_that_cannot_be_counted_is_refused_before_anything_is_moved(tmp_path: Path) -> None:
    tell(tmp_path, compare="none")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="traffic over 2 places cannot be counted"):
        tell(tmp_path, cfg=toy_config(tmp_path, places=2), options={"losses": "metrics"})
    assert sorted(tmp_path.rglob("*")) == before


def test_added_losses_are_not_compared_and_lb_takes_the_place_of_the_models_own(tmp_path: Path) -> None:
    model, compiler, console = ToyLM(), FakeCompiler(), quiet()
    model.config = SimpleNamespace(output_router_logits=True)  # type: ignore[assignment]
    content = tell(tmp_path, model=model, optimize=compiler, options={"losses": "lb,metrics"}, console=console)
    [(given, _, options, _)] = compiler.calls
    assert options["losses"] == "lb,metrics"
    assert not given.config.output_router_logits  # type: ignore[union-attr]
    assert model.config.output_router_logits
    assert "switched off, in favour of 'lb'" in text_of(console)
    assert content["train"]["losses_added"] == ["lb"]
    assert content["train"]["max_difference"] is None
    assert "largest loss difference" not in text_of(console)
    assert "no differences: lb changes what the optimized model is trained for" in text_of(console)
    [row] = [line for line in text_of(console).splitlines() if "final training loss" in line]
    assert [bool(cell.strip()) for cell in row.split("│")[2:5]] == [True, True, False]


def test_resume_of_nothing(tmp_path: Path) -> None:
    compiler = FakeCompiler()
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        tell(tmp_path, resume=True, optimize=compiler)
    assert not compiler.calls  # said before the long compilation


def test_what_is_known_before_the_compiler_runs_is_said_before(tmp_path: Path) -> None:
    compiler = FakeCompiler()
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises(InputError, match="output directory cannot be written") as refused:
        tell(tmp_path / "file.txt", optimize=compiler)
    assert refused.value.where == str(tmp_path / "file.txt")
    tell(tmp_path / "run")
    for arm in ("original", "optimized"):
        newest = checkpoint.latest(tmp_path / "run" / arm / "checkpoints")
        (newest / checkpoint.STATE).unlink()
        with pytest.raises(CheckpointError, match="a checkpoint is damaged") as caught:
            tell(tmp_path / "run", resume=True, optimize=compiler)
        assert caught.value.where == str(newest)
    assert not compiler.calls


def test_names_are_looked_up_before_data_is_read(tmp_path: Path) -> None:
    gone = {"data": [tmp_path / "gone.txt"], "optimize": None}
    with pytest.raises(InputError, match="unknown codegen 'indcutor'"):
        tell(tmp_path, options={"codegen": "indcutor"}, **gone)
    with pytest.raises(RecipeError, match="unknown recipe 'fp8_flwo'"):
        tell(tmp_path, recipe="fp8_flwo", **gone)


def test_data_and_model_must_fit(tmp_path: Path) -> None:
    class Config:
        vocab_size = 8

    model = ToyLM()
    model.config = Config()  # type: ignore[assignment]
    compiler = FakeCompiler()
    with pytest.raises(InputError, match="token id 15 is outside of a vocabulary of 8"):
        tell(tmp_path, model=model, optimize=compiler)
    assert not compiler.calls
    data = toy_data()
    with pytest.raises(InputError, match="less than one sequence"):
        tell(tmp_path, data=TokenDataset(data.train[:3], data.val, 16, "short"))
    with pytest.raises(InputError, match="cannot be read"):
        tell(tmp_path, data=[tmp_path / "gone.txt"])
    with pytest.raises(InputError, match="no such model"):
        tell(tmp_path, model="no_such_model")


def test_report_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="report could not be written"):
        story.write_json(tmp_path / "file" / "report.json", {})
    story.write_json(tmp_path / "report.json", {"a": float("nan")})
    assert json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail) == {"a": None}
    story.write_json(tmp_path / "report.json", {"a": 1})
    with pytest.raises(TypeError):
        story.write_json(tmp_path / "report.json", {("no", "key"): 1})  # type: ignore[dict-item]
    assert json.loads((tmp_path / "report.json").read_text()) == {"a": 1}
