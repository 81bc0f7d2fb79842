"""What a run writes about its precision casts, and that the run is the same with it and without."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import moefx
from moefx.cli import app
from moefx.errors import InputError
from moefx.train import story
from moefx.train.loop import train
from moefx.train.metrics import read_metrics
from moefx.train.precision import summarize

from .runs import run
from .toy import ToyLM, quiet, text_of, toy_config, toy_data

SUFFIXES = ("underflow_worst", "underflow_mean", "saturation_worst", "saturation_mean", "sqnr_db_worst",
            "sqnr_db_mean", "scale_spread_max")  # fmt: skip
NAMES = {f"{role}.{suffix}" for role in ("input", "weight", "grad", "hidden") for suffix in SUFFIXES}


def one_layer() -> nn.Module:
    """A causal language model of one MoE layer with widths that blocks of 128 divide, and attention dropout."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=128, intermediate_size=128, moe_intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=4, num_experts_per_tok=2,
        output_router_logits=True, attention_dropout=0.2, use_cache=False, pad_token_id=None, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen3MoeForCausalLM(config).train()


def optimized(recipe: str = "fp8_flow") -> Any:
    ids = torch.zeros(2, 8, dtype=torch.int64)
    return moefx.optimize(one_layer(), {"input_ids": ids, "labels": ids}, recipe=recipe, codegen="eager")


def precision(out: Path) -> list[dict[str, Any]]:
    return [r for r in read_metrics(out) if r["kind"] == "precision"]


@pytest.fixture(autouse=True)
def _transformers() -> None:
    pytest.importorskip("transformers")


def test_the_command_writes_finite_figures(tmp_path: Path) -> None:
    args = ["--steps", "3", "--batch", "1", "--seq", "16", "--recipe", "fp8_flow", "--codegen", "eager", "--json"]
    args += ["--model", f"{__name__}:one_layer", "--precision-every", "2", "--compare", "1", "--threads", "1"]
    done = CliRunner().invoke(app, ["train", *args, "--out", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0
    (record,) = precision(tmp_path / story.OPTIMIZED)
    assert record.pop("kind") == "precision"
    assert record.pop("step") == 2
    assert record.keys() == NAMES
    assert all(math.isfinite(v) for v in record.values())
    assert 20 < record["weight.sqnr_db_worst"] <= record["weight.sqnr_db_mean"] < 40
    assert 0 <= record["input.underflow_mean"] <= record["input.underflow_worst"] < 0.1
    assert record["grad.scale_spread_max"] > 0
    assert precision(tmp_path / story.ORIGINAL) == []
    assert json.loads((tmp_path / story.REPORT).read_text())["train"]["config"]["precision_every"] == 2


@pytest.mark.nightly
def test_the_run_is_the_same_and_resumes_with_another_interval(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = toy_config(tmp_path / "plain", steps=4, eval_batches=0)
    often = toy_config(tmp_path / "often", steps=4, eval_batches=0, checkpoint_every=1, precision_every=1)
    assert plain.identity() == often.identity()
    want = run(plain, optimized())[1].losses
    first = optimized()
    assert run(often, first, stop_after=2)[1].losses == want[:2]
    later = toy_config(tmp_path / "often", steps=4, eval_batches=0, precision_every=3)
    assert run(later, optimized(), resume=True)[1].losses == want
    assert precision(tmp_path / "plain") == []
    assert [r["step"] for r in precision(tmp_path / "often")] == [1, 2, 3]
    events = EventAccumulator(str(tmp_path / "often" / "tensorboard"))
    events.Reload()
    for name in ("input.underflow_worst", "grad.sqnr_db_mean"):
        scalars = events.Scalars(f"precision/{name}")
        assert [e.step for e in scalars] == [1, 2, 3]
        assert [e.value for e in scalars] == pytest.approx([r[name] for r in precision(tmp_path / "often")])
    # A step is measured on the weights that it runs on.
    ids = next(toy_data().batches("train", 2, 8, often.seed))
    rows = optimized().precision_metrics(input_ids=ids, labels=ids)
    first_record, last_record = precision(tmp_path / "often")[0], precision(tmp_path / "often")[-1]
    for name in ("weight.sqnr_db_worst", "weight.underflow_mean"):
        assert first_record[name] == summarize(rows)[name] != last_record[name]
    assert len(first.report.signatures) == 1  # what is measured is what training runs


def test_bf16_autocast_measures_the_variant_that_trains(tmp_path: Path) -> None:
    cfg = toy_config(tmp_path, steps=2, eval_batches=0, dtype="bf16", grad_accum=2, precision_every=1)
    model = optimized("fp8_naive")
    run(cfg, model)
    assert len(precision(tmp_path)) == 2
    assert len(model.report.signatures) == 2  # compiled in fp32 above, and under autocast here


def test_without_casts_nothing_is_written_and_it_is_said_once(tmp_path: Path) -> None:
    console = quiet()
    run(toy_config(tmp_path, steps=3, eval_batches=0, precision_every=1), optimized("bf16"), console=console)
    assert precision(tmp_path) == []
    assert text_of(console).count("no precision casts") == 1


def test_a_model_that_moefx_did_not_compile(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="precision_every=1 asks for precision metrics"):
        train(ToyLM(), toy_data(), toy_config(tmp_path, precision_every=1), console=quiet())
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="precision_every=-1 is out of range"):
        toy_config(tmp_path, precision_every=-1)


def row(role: str, **values: float) -> dict[str, Any]:
    return {"role": role, "underflow": 0.0, "saturation": 0.0, "sqnr_db": math.inf, "scale_spread": 0.0, **values}


def test_figures_of_a_few_rows() -> None:
    rows = [
        row("grad", underflow=0.5, sqnr_db=20.0, scale_spread=3.0), row("grad", saturation=0.1, sqnr_db=30.0),
        row("grad", underflow=0.1), row("weight"),
    ]  # fmt: skip
    got = summarize(rows)
    assert got == {
        "grad.underflow_worst": 0.5, "grad.underflow_mean": pytest.approx(0.2), "grad.saturation_worst": 0.1,
        "grad.saturation_mean": pytest.approx(0.1 / 3), "grad.sqnr_db_worst": 20.0,
        "grad.sqnr_db_mean": pytest.approx(-10 * math.log10((0.01 + 0.001) / 3)), "grad.scale_spread_max": 3.0,
        "weight.underflow_worst": 0.0, "weight.underflow_mean": 0.0, "weight.saturation_worst": 0.0,
        "weight.saturation_mean": 0.0, "weight.scale_spread_max": 0.0,
    }  # fmt: skip
    assert summarize([]) == {}
