"""The loop: it learns, follows its schedule, shows and writes what it does, and says what is wrong."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from moefx.errors import InputError, MissingPackageError
from moefx.train import checkpoint, metrics
from moefx.train import loop as loop_module
from moefx.train.config import TrainConfig, learning_rate
from moefx.train.console import LastingConsole
from moefx.train.data import TokenDataset
from moefx.train.loop import DivergedError, train
from moefx.train.metrics import read_metrics
from moefx.train.parts import adamw, evaluate

from .runs import run
from .toy import Output, ToyLM, quiet, same_bits, text_of, toy_config, toy_data, weights

# Training


def test_training_goes_on_when_nobody_reads_what_it_says(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody:  # whose closing flushes, as the interpreter does at its exit
        _, result = run(toy_config(tmp_path), console=LastingConsole(file=nobody))
    assert len(result.losses) == 12
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-00000012"
    assert capfd.readouterr().err.count("nobody reads the output any more") == 1


def test_training_goes_on_when_nobody_reads_warnings_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", nobody)
        _, result = run(toy_config(tmp_path), console=LastingConsole(stderr=True))
    assert len(result.losses) == 12


def test_training_learns(tmp_path: Path) -> None:
    data = toy_data()
    model = ToyLM(dropout=0.0)
    cfg = toy_config(tmp_path, steps=60)
    before = evaluate(model, data, cfg)
    result = train(model, data, cfg, console=quiet())
    assert len(result.losses) == 60
    assert result.val[-1] == (60, evaluate(model, data, cfg))
    assert result.val[-1][1] < 0.6 * before
    assert result.tokens_per_s > 0
    assert result.seconds > 0


def test_same_seed_same_run_other_seed_another(tmp_path: Path) -> None:
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        runs[name] = run(toy_config(tmp_path / name, seed=seed))
    assert runs["a"][1].losses == runs["b"][1].losses
    assert same_bits(weights(runs["a"][0]), weights(runs["b"][0]))
    assert runs["a"][1].losses != runs["c"][1].losses


def test_first_step_against_plain_torch(tmp_path: Path) -> None:
    """One step by hand: mean over microbatches, clipping, warm-up, weight decay on matrices alone."""
    cfg = toy_config(tmp_path, steps=1, grad_accum=3, clip=0.01, weight_decay=0.5, eval_batches=0)
    expected = ToyLM(dropout=0.0)
    ids = next(toy_data().batches("train", 6, 8, cfg.seed))
    total = torch.zeros(())
    for part in ids.split(2):
        loss = expected(part, part).loss
        assert loss is not None
        (loss / 3).backward()
        total += loss.detach() / 3
    torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.01)
    decayed = [p for p in expected.parameters() if p.dim() >= 2]
    plain = [p for p in expected.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": plain, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=cfg.lr / 2, betas=cfg.betas, eps=cfg.eps).step()

    model, result = run(cfg, ToyLM(dropout=0.0))
    assert result.losses == [pytest.approx(total.item(), abs=1e-6)]
    torch.testing.assert_close(weights(model), weights(expected))


def test_accumulation_sees_the_batches_of_one_large_batch(tmp_path: Path) -> None:
    large = run(toy_config(tmp_path / "a", batch=4), ToyLM(dropout=0.0))[1]
    parts = run(toy_config(tmp_path / "b", batch=2, grad_accum=2), ToyLM(dropout=0.0))[1]
    assert parts.losses == pytest.approx(large.losses, abs=1e-4)


def test_frozen_parameters_and_old_gradients_do_not_matter(tmp_path: Path) -> None:
    model = ToyLM()
    model.norm.weight.requires_grad_(False)
    before = model.norm.weight.clone()
    model.embed.weight.grad = torch.full_like(model.embed.weight, 1e6)
    fresh = ToyLM()
    fresh.norm.weight.requires_grad_(False)
    losses = [run(toy_config(tmp_path / str(i)), m)[1].losses for i, m in enumerate((model, fresh))]
    assert losses[0] == losses[1]
    assert torch.equal(model.norm.weight, before)


def test_an_optimizer_of_a_part_is_clipped_by_its_own_gradients(tmp_path: Path) -> None:
    """What the rest gathers is neither part of the norm, nor does it pile up from step to step."""

    def trained(name: str, freeze: bool) -> tuple[ToyLM, list[float]]:
        model = ToyLM(dropout=0.0)
        for parameter in (model.embed.weight, model.norm.bias) if freeze else ():
            parameter.requires_grad_(False)
        run(
            toy_config(tmp_path / name, clip=0.01),
            model,
            make_optimizer=lambda m, cfg: torch.optim.SGD([model.norm.weight], lr=cfg.lr),
        )
        return model, [r["grad_norm"] for r in read_metrics(tmp_path / name) if r["kind"] == "train"]

    (part, norms), (frozen, expected) = trained("part", False), trained("frozen", True)
    assert norms == expected
    assert same_bits(weights(part), weights(frozen))
    assert all(p.grad is None for p in part.parameters())


def test_a_model_without_anything_to_train(tmp_path: Path) -> None:
    for optim in ("adamw", "muon"):
        with pytest.raises(InputError, match="no parameter that trains"):
            run(toy_config(tmp_path, optim=optim), ToyLM().requires_grad_(False))
    assert not list(tmp_path.iterdir())


def test_optimizer_groups() -> None:
    model = ToyLM()
    optimizer = adamw(model, TrainConfig(weight_decay=0.3))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays == {id(p): 0.3 if p.dim() >= 2 else 0.0 for p in model.parameters()}


def test_own_optimizer_gets_the_schedule(tmp_path: Path) -> None:
    rates = []

    class Recorder(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            rates.append(self.param_groups[0]["lr"])
            super().step(closure)

    cfg = toy_config(tmp_path, steps=6)
    run(cfg, make_optimizer=lambda model, cfg: Recorder(model.parameters(), lr=1.0))
    assert rates == [learning_rate(cfg, step) for step in range(6)]
    assert rates == [r["lr"] for r in read_metrics(tmp_path) if r["kind"] == "train"]


def test_schedule() -> None:
    cfg = TrainConfig(steps=110, warmup=10, lr=1.0, min_lr=0.2)
    rates = [learning_rate(cfg, step) for step in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.6)
    assert rates[110] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(TrainConfig(steps=5, warmup=5, lr=2.0), 4) == 2.0
    assert learning_rate(TrainConfig(steps=5, warmup=0, lr=2.0), 0) == 2.0


def test_evaluation_leaves_no_trace(tmp_path: Path) -> None:
    often = run(toy_config(tmp_path / "a", eval_every=1))
    never = run(toy_config(tmp_path / "b", eval_batches=0))
    assert often[1].losses == never[1].losses
    assert same_bits(weights(often[0]), weights(never[0]))
    assert [step for step, _ in often[1].val] == list(range(1, 13))
    assert never[1].val == []


def test_evaluation_keeps_the_mode_of_every_part() -> None:
    model = ToyLM()
    model.dropout.eval()
    value = evaluate(model, toy_data(), TrainConfig(seq=8))
    assert model.training
    assert not model.dropout.training
    assert value == evaluate(model.eval(), toy_data(), TrainConfig(seq=8))
    assert not model.training
    assert int(model.seen) == 0


def test_validation_steps(tmp_path: Path) -> None:
    assert [step for step, _ in run(toy_config(tmp_path / "a", eval_every=5))[1].val] == [5, 10, 12]
    assert [step for step, _ in run(toy_config(tmp_path / "b", eval_every=0))[1].val] == [12]


def test_bf16_computes_under_autocast_with_fp32_weights(tmp_path: Path) -> None:
    wide, narrow = (run(toy_config(tmp_path / d, dtype=d), ToyLM(dropout=0.0)) for d in ("fp32", "bf16"))
    assert isinstance(narrow[0], ToyLM)
    assert isinstance(wide[0], ToyLM)
    assert set(narrow[0].autocast_seen) == {True}
    assert set(wide[0].autocast_seen) == {False}
    assert {p.dtype for p in narrow[0].parameters()} == {torch.float32}
    assert narrow[1].losses != wide[1].losses
    assert narrow[1].losses == pytest.approx(wide[1].losses, rel=0.05)


def test_threads_are_set_and_put_back(tmp_path: Path) -> None:
    before, seen = torch.get_num_threads(), []
    run(toy_config(tmp_path, steps=1, threads=1), on_step=lambda *_: seen.append(torch.get_num_threads()))
    assert seen == [1]
    assert torch.get_num_threads() == before


def test_stop_after_follows_the_whole_schedule(tmp_path: Path) -> None:
    whole = run(toy_config(tmp_path / "a"))[1]
    part = run(toy_config(tmp_path / "b"), stop_after=7)[1]
    assert part.losses == whole.losses[:7]
    rest = run(toy_config(tmp_path / "b"), resume=True)[1]
    assert rest.losses == whole.losses


# What goes wrong


def test_divergence_is_an_error_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    class Explodes(ToyLM):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
            out = super().forward(input_ids, labels)
            if out.loss is not None and int(self.seen) == 7 * 16:
                out.loss = out.loss * math.nan
            return out

    model = Explodes()
    with pytest.raises(DivergedError, match="diverged") as caught:
        run(toy_config(tmp_path), model)
    assert caught.value.where == "step 7 of 12"
    assert "loss nan" in str(caught.value.why)
    assert "step-00000005" in str(caught.value.todo)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert checkpoint.latest(tmp_path / loop_module.CHECKPOINTS).name == "step-00000005"


def test_infinite_gradient_with_finite_loss(tmp_path: Path) -> None:
    class Steep(ToyLM):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
            out = super().forward(input_ids, labels)
            zero = (self.embed.weight[0, 0] * 0).abs()
            return Output(None if out.loss is None else out.loss + zero.sqrt(), out.logits)

    model = Steep()
    before = weights(model)
    with pytest.raises(DivergedError, match=r"gradient norm (nan|inf)"):
        run(toy_config(tmp_path), model)
    assert torch.equal(model.embed.weight, before["embed.weight"])


@pytest.mark.parametrize(("value", "found"), [(None, "None"), ("per token", r"Tensor \[2\]"), (1.0, "float")])
def test_a_model_without_a_scalar_loss(tmp_path: Path, value: Any, found: str) -> None:
    class Lossless(ToyLM):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            out = super().forward(input_ids, labels)
            return Output(out.logits[:, 0, 0] if value == "per token" else value, out.logits)

    with pytest.raises(InputError, match=rf"no scalar loss\n.*Lossless\n.*{found}"):
        run(toy_config(tmp_path), Lossless())


def test_data_that_does_not_fit(tmp_path: Path) -> None:
    data = toy_data()
    with pytest.raises(InputError, match="less than one sequence of 8"):
        train(ToyLM(), TokenDataset(data.train, data.val[:7], 16, "short"), toy_config(tmp_path), console=quiet())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0 is out of range"),
        ({"lr": math.inf}, "lr=inf is out of range\n.*\n.*a finite number, at least 0"),
        ({"batch": 0}, "batch=0"),
        ({"seq": 1}, "seq=1"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"clip": -0.5}, "clip=-0.5"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed=18446744073709551616"),
        ({"keep": 0}, "keep=0"),
        ({"threads": 0}, "threads=0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"optim": "muon", "betas": (0.8, 0.9)}, "betas"),
        ({"optim": "soap-lite", "eps": 1e-6}, "eps"),
        ({"dtype": "bf61"}, "did you mean 'bf16'"),
        ({"eval_every": -1}, "eval_every=-1"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(**change)


# What a run shows and writes


def test_lines_in_a_pipe(tmp_path: Path) -> None:
    console = quiet()
    run(toy_config(tmp_path, steps=45, eval_every=0), console=console, label="toy")
    steps = [line.split()[2] for line in text_of(console).splitlines() if "tokens/s" in line]
    assert steps == ["1/45", "20/45", "40/45", "45/45"]
    assert "toy: step 45/45  validation loss" in text_of(console)


def test_bar_on_a_terminal(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    run(toy_config(tmp_path), console=console, label="toy")
    assert "12/12" in text_of(console)
    assert "tokens/s" in text_of(console)
    assert "toy: step 1/12" not in text_of(console)


def test_metrics_file(tmp_path: Path) -> None:
    cfg = toy_config(tmp_path)
    result = run(cfg)[1]
    records = read_metrics(tmp_path)
    assert [r["loss"] for r in records if r["kind"] == "train"] == result.losses
    assert [(r["step"], r["loss"]) for r in records if r["kind"] == "val"] == result.val
    assert {"lr", "grad_norm", "tokens_per_s"} < set(records[0])
    for line in (tmp_path / metrics.FILE).read_text().splitlines():
        json.loads(line)


def test_every_line_of_the_metrics_is_valid_json(tmp_path: Path) -> None:
    (tmp_path / metrics.FILE).write_text('{"kind": "train", "step": 1, "loss": NaN}\n')  # of an earlier version
    written = metrics.Metrics(tmp_path, 1, quiet())
    written.write("routing", 2, entropy=float("nan"), load=float("inf"))
    written.close()
    lines = (tmp_path / metrics.FILE).read_text().splitlines()
    assert [list(json.loads(x, parse_constant=pytest.fail).values())[2:] for x in lines] == [[None], [None, None]]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_metrics_on_a_full_disk_are_lost_and_it_is_said_once(tmp_path: Path) -> None:
    console = quiet()
    written = metrics.Metrics(tmp_path, 0, console)
    written.write("train", 1, loss=1.0)
    file = written._file
    with open("/dev/full", "ab", buffering=0) as written._file:
        for step in (2, 3):
            written.write("train", step, loss=1.0)
    assert text_of(console).count("metrics cannot be written") == 1
    assert "No space left" in text_of(console)
    written._file = file  # there is room again
    file.write(b'{"kind": "train", "st')  # what became of a line when the disk was full
    written._torn = True
    written.write("train", 4, loss=1.0)
    written.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 4]


def test_the_output_may_be_text(tmp_path: Path) -> None:
    assert TrainConfig(out=str(tmp_path)).out == tmp_path  # type: ignore[arg-type]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = toy_config(tmp_path)
    run(cfg, stop_after=7)
    result = run(cfg, ToyLM(), resume=True)[1]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("train/loss")
    assert [e.step for e in scalars] == list(range(1, 13))
    assert [e.value for e in scalars] == pytest.approx(result.losses)
    assert [e.step for e in events.Scalars("val/loss")] == [4, 7, 8, 12]


def test_tensorboard_missing_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(metrics, "_told", False)
    console = quiet()
    for name in ("a", "b"):
        result = run(toy_config(tmp_path / name), console=console)[1]
        assert len(result.losses) == 12
    assert text_of(console).count("TensorBoard is not installed") == 1
    assert len(read_metrics(tmp_path / "b")) == 15


def test_output_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="output directory cannot be written") as caught:
        run(toy_config(tmp_path / "file"))
    assert caught.value.where == str(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"


def test_missing_safetensors_is_found_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    model = ToyLM()
    with pytest.raises(MissingPackageError, match="safetensors"):
        run(toy_config(tmp_path), model)
    assert int(model.seen) == 0
