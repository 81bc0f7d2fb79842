"""A run that was stopped, by whatever, continues as if it had not been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moefx.train import checkpoint, metrics
from moefx.train import loop as loop_module
from moefx.train.aside import set_aside
from moefx.train.checkpoint import CheckpointError
from moefx.train.interrupt import StopRequest, TrainingInterrupted
from moefx.train.loop import train

from .runs import figures, interrupt_at, run
from .toy import Output, ToyLM, quiet, same_bits, text_of, toy_config, toy_data, weights

# Resuming


@pytest.mark.parametrize("stop", [1, 4, 5, 11])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path, stop: int, dtype: str) -> None:
    whole, expected = run(toy_config(tmp_path / "whole", dtype=dtype, grad_accum=2))
    cfg = toy_config(tmp_path / "parts", dtype=dtype, grad_accum=2)
    with pytest.raises(TrainingInterrupted) as caught:
        run(cfg, on_step=interrupt_at(stop))
    assert caught.value.step == stop
    torch.manual_seed(12345)  # a new process starts with other random states
    model, result = run(cfg, ToyLM(seed=9), resume=True)
    assert result.losses == expected.losses
    assert result.val == expected.val
    assert same_bits(weights(model), weights(whole))
    assert figures(cfg.out) == figures(tmp_path / "whole")


def test_without_random_states_a_resumed_run_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control to the test above: it would not notice lost random states if dropout did not matter."""
    expected = run(toy_config(tmp_path / "whole"))[1]
    cfg = toy_config(tmp_path / "parts")
    with pytest.raises(TrainingInterrupted):
        run(cfg, on_step=interrupt_at(5))
    monkeypatch.setattr(checkpoint, "set_rng_state", lambda state: None)
    result = run(cfg, ToyLM(seed=9), resume=True)[1]
    assert result.losses[:5] == expected.losses[:5]
    assert result.losses[5:] != expected.losses[5:]


def test_killed_after_a_checkpoint(tmp_path: Path) -> None:
    """A crash at step 7 loses what came after the checkpoint of step 5; its metrics do not stay twice."""
    whole, expected = run(toy_config(tmp_path / "whole"))
    cfg = toy_config(tmp_path / "parts")

    def crash(step: int, loss: float) -> None:
        if step == 7:
            raise RuntimeError("power failure")

    with pytest.raises(RuntimeError, match="power failure"):
        run(cfg, on_step=crash)
    with (cfg.out / metrics.FILE).open("a") as file:
        file.write('{"kind": "train", "st')  # the line that was being written
    console = quiet()
    model, result = run(cfg, ToyLM(seed=9), resume=True, console=console)
    assert "resumed at step 5/12" in text_of(console)
    assert result.losses == expected.losses
    assert same_bits(weights(model), weights(whole))
    assert figures(cfg.out) == figures(tmp_path / "whole")


def test_resuming_a_finished_run_trains_nothing(tmp_path: Path) -> None:
    cfg = toy_config(tmp_path)
    whole, expected = run(cfg)
    steps: list[int] = []
    model, result = run(cfg, ToyLM(seed=9), resume=True, on_step=lambda step, loss: steps.append(step))
    assert not steps
    assert result == expected
    assert same_bits(weights(model), weights(whole))


def test_lost_metrics_are_mentioned_and_losses_come_from_the_checkpoint(tmp_path: Path) -> None:
    cfg = toy_config(tmp_path)
    expected = run(cfg)[1]
    (tmp_path / metrics.FILE).unlink()
    console = quiet()
    assert run(cfg, ToyLM(), resume=True, console=console)[1].losses == expected.losses
    assert "lacks 12 of the 12 steps" in text_of(console)


@pytest.mark.parametrize("change", [{"lr": 0.06}, {"seed": 1}, {"steps": 13}, {"batch": 3}, {"dtype": "bf16"}])
def test_resuming_with_other_settings_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    cfg = toy_config(tmp_path)
    run(cfg, stop_after=3)
    before = figures(tmp_path)
    with pytest.raises(CheckpointError, match=f"other settings\n.*\n.*{next(iter(change))} was"):
        run(replace(cfg, **change), resume=True)
    assert figures(tmp_path) == before
    assert checkpoint.latest(tmp_path / loop_module.CHECKPOINTS).name == "step-00000003"


def test_resuming_on_other_data_or_with_another_optimizer_is_refused(tmp_path: Path) -> None:
    cfg = toy_config(tmp_path)
    run(cfg, stop_after=3)
    with pytest.raises(CheckpointError, match="data was"):
        train(ToyLM(), toy_data(seed=1), cfg, resume=True, console=quiet())
    with pytest.raises(CheckpointError, match="optimizer was"):
        run(cfg, resume=True, make_optimizer=lambda m, c: torch.optim.SGD(m.parameters()))


RUN: dict[str, Any] = {"model": {"class": "toy", "theta": 1e4, "sizes": (1, 2)}, "recipe": "bf16", "losses": {}}


def test_resuming_as_another_run_of_equal_shapes_is_refused(tmp_path: Path) -> None:
    cfg = toy_config(tmp_path)
    run(cfg, stop_after=3, identity=RUN)
    other = {"model": {**RUN["model"], "theta": 7.0}, "recipe": "fp8_flow", "losses": {"lb": "LoadBalance(weight=10)"}}
    with pytest.raises(CheckpointError, match="other settings") as caught:
        run(cfg, resume=True, identity=other)
    assert caught.value.why == (
        "model.theta was 10000.0, is 7.0, recipe was 'bf16', is 'fp8_flow', "
        "losses.lb was None, is 'LoadBalance(weight=10)'"
    )
    console = quiet()
    assert len(run(cfg, resume=True, identity=RUN, console=console)[1].losses) == 12
    assert "does not say" not in text_of(console)


def test_a_checkpoint_of_an_earlier_version_is_resumed_and_it_is_said(tmp_path: Path) -> None:
    cfg = toy_config(tmp_path)
    run(cfg, stop_after=3)  # without an identity, as all were
    console = quiet()
    assert len(run(cfg, ToyLM(), resume=True, identity=RUN, console=console, stop_after=5)[1].losses) == 5
    assert "does not say of which model, recipe and losses" in text_of(console)
    with pytest.raises(CheckpointError, match="recipe was"):  # the next one does
        run(cfg, ToyLM(), resume=True, identity={**RUN, "recipe": "mxfp8"})
    assert len(run(cfg, ToyLM(), resume=True)[1].losses) == 12  # who does not say either is not asked


@pytest.mark.parametrize("garbage", [b"\xff\xfe{garb\n", b"{}\n", b"null\n", b'{"step": 2}\n', b"[1]\n"])
def test_garbage_among_the_metrics_does_not_stop_a_resume(tmp_path: Path, garbage: bytes) -> None:
    cfg = toy_config(tmp_path, eval_batches=0)
    run(cfg, stop_after=2)
    with (tmp_path / metrics.FILE).open("ab") as file:
        file.write(garbage)
    run(cfg, ToyLM(), resume=True, stop_after=3)
    assert [step for _, step, _ in figures(tmp_path)] == [1, 2, 3]


def test_settings_that_change_no_number_may_change(tmp_path: Path) -> None:
    cfg = toy_config(tmp_path)
    expected = run(toy_config(tmp_path / "whole"))[1].losses
    run(cfg, stop_after=3)
    other = replace(cfg, eval_every=2, eval_batches=1, checkpoint_every=1, keep=1, threads=1)
    assert run(other, ToyLM(seed=9), resume=True)[1].losses == expected


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint to resume from") as caught:
        run(toy_config(tmp_path), resume=True)
    assert caught.value.where == str(tmp_path / loop_module.CHECKPOINTS)


def test_a_new_run_moves_the_old_one_aside(tmp_path: Path) -> None:
    cfg = toy_config(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    first = run(cfg)[1]
    for number in (1, 2):
        console = quiet()
        run(replace(cfg, seed=number), console=console)
        assert f"previous-{number}" in text_of(console)
    old = tmp_path / "previous-1"
    assert [loss for kind, _, loss in figures(old) if kind == "train"] == first.losses
    assert checkpoint.latest(old / loop_module.CHECKPOINTS).name == "step-00000012"
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len([f for f in figures(tmp_path) if f[0] == "train"]) == 12
    assert set_aside(tmp_path / "nowhere") is None


# Interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_between_steps_and_save(tmp_path: Path, number: signal.Signals) -> None:
    def on_step(step: int, loss: float) -> None:
        if step == 3:
            os.kill(os.getpid(), number)

    before, console = signal.getsignal(number), quiet()
    with pytest.raises(TrainingInterrupted) as caught:
        run(toy_config(tmp_path), on_step=on_step, console=console)
    stopped = caught.value
    assert stopped.code == 130
    assert stopped.checkpoint == checkpoint.latest(tmp_path / loop_module.CHECKPOINTS)
    assert stopped.checkpoint.name == "step-00000003"
    assert "interrupted at step 3; resume continues from" in text_of(console)
    assert signal.getsignal(number) is before


def test_a_signal_in_the_last_step_still_stops_what_follows(tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted) as caught:
        run(toy_config(tmp_path), on_step=interrupt_at(12))
    assert caught.value.step == 12
    assert len(run(toy_config(tmp_path), ToyLM(seed=9), resume=True)[1].losses) == 12


def test_a_second_ctrl_c_stops_at_once_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    class Stuck(ToyLM):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
            if int(self.seen) == 7 * 16:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            return super().forward(input_ids, labels)

    cfg = toy_config(tmp_path)
    with pytest.raises(TrainingInterrupted) as caught:
        run(cfg, Stuck())
    assert caught.value.step == 7
    assert caught.value.checkpoint is not None
    assert caught.value.checkpoint.name == "step-00000005"
    assert run(cfg, ToyLM(seed=9), resume=True)[1].losses == run(toy_config(tmp_path / "whole"))[1].losses


def test_interrupted_before_anything_was_saved(tmp_path: Path) -> None:
    class Stuck(ToyLM):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
            raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted, match="at step 0; nothing was saved") as caught:
        run(toy_config(tmp_path), Stuck())
    assert caught.value.checkpoint is None


def test_process_ends_with_130_and_resumes(tmp_path: Path) -> None:
    """The whole way: a real SIGTERM from outside, a new process that resumes, weights as without the interruption."""
    program = """
import sys, pathlib, torch
from moefx.train.loop import train
from tests.train.toy import ToyLM, toy_config, toy_data, quiet
out, resume = pathlib.Path(sys.argv[1]), sys.argv[2] == "resume"
def ready(step, loss):
    if step == 4 and not resume:
        print("ready", flush=True)
        sys.stdin.readline()
model = ToyLM(seed=9 if resume else 0)
train(model, toy_data(), toy_config(out), on_step=ready, resume=resume, console=quiet())
torch.save(model.state_dict(), out / "end.pt")
"""
    root = str(Path(__file__).parents[2])

    def start(mode: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, str(tmp_path / "run"), mode]
        pipe = subprocess.PIPE
        environment = {**os.environ, "PYTHONPATH": root}
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=root, env=environment)

    first = start("new")
    assert first.stdout is not None
    assert first.stdout.readline() == "ready\n"
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate("\n", timeout=60)
    assert first.returncode == 130, errors
    assert "SIGTERM: finishing this step" in errors
    second = start("resume")
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    whole, _ = run(toy_config(tmp_path / "whole"))
    assert same_bits(torch.load(tmp_path / "run" / "end.pt"), weights(whole))


def test_no_handlers_outside_of_the_main_thread() -> None:
    before, inside = signal.getsignal(signal.SIGINT), []

    def enter() -> None:
        with StopRequest() as stop:
            inside.append((signal.getsignal(signal.SIGINT), stop.requested))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == [(before, False)]
