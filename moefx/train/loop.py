"""The training loop: AdamW, warm-up and cosine, clipping, validation, metrics, checkpoints and exact resume.

On a CPU, a run that was stopped anywhere and resumed gives bit for bit the losses and weights of one that was not: a
batch depends on the step alone, and weights, optimizer and random states are restored.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.optim import Optimizer

from ..errors import MoefxError
from ..view.routing_numbers import RoutingSum, scalars
from . import checkpoint
from .aside import CHECKPOINTS, make_room, say
from .config import TrainConfig, learning_rate
from .console import LastingConsole
from .data import TokenDataset
from .interrupt import StopRequest, TrainingInterrupted
from .metrics import Metrics
from .parts import autocast, cpu_threads, device_of, evaluate, loss_of
from .parts import make_optimizer as default_optimizer
from .precision import check_measurable, precision_figures
from .prefixes import PrefixLoss
from .progress import Display
from .routing import check_places, in_short, loss_values, measured, move_biases, routing_of

UNCOMPARED = (
    "the checkpoint does not say of which model, recipe and losses it is (an earlier version of moefx wrote it); "
    "they are taken to be those of now"
)


class DivergedError(MoefxError):
    """Loss or gradient became infinite or NaN."""


@dataclass
class TrainResult:
    """What a run gave, sessions before a resume included.

    Attributes:
        losses: training loss of every step, in nats per token, as the model returns it (auxiliary losses included).
        val: (completed steps, validation loss).
        val_prefix: the same with each token routed by what was seen up to it; only for a model whose router sees later
            tokens (`moefx.Routing(router, causal=False)`), whose validation loss is too good.
        seconds: wall-clock time inside training steps.
        tokens_per_s: at the median step, leaving out the first of each session, which may compile; 0.0 when there is no
            other. The median, because other work on the machine slows single steps many times over.
        routing: of the last validation, all of its batches together (`moefx.view.routing_numbers.numbers`); empty for
            a model that does not measure its routing.
    """

    losses: list[float] = field(default_factory=list)
    val: list[tuple[int, float]] = field(default_factory=list)
    tokens_per_s: float = 0.0
    seconds: float = 0.0
    routing: dict[str, Any] = field(default_factory=dict)
    val_prefix: list[tuple[int, float]] = field(default_factory=list)


OnStep = Callable[[int, float], object]
MakeOptimizer = Callable[[nn.Module, TrainConfig], Optimizer]


def train(
    model: nn.Module,
    data: TokenDataset,
    cfg: TrainConfig,
    *,
    on_step: OnStep | None = None,
    resume: bool = False,
    label: str = "train",
    stop_after: int | None = None,
    make_optimizer: MakeOptimizer | None = None,
    identity: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train `model` in place on the device where it is.

    Args:
        model: called as model(input_ids=ids, labels=ids) with int64 [batch, seq]; returns an object whose `.loss` is a
            scalar (the transformers convention: the model shifts the labels itself).
        on_step: called after every step with (completed steps, loss); a KeyboardInterrupt from it stops the run like
            Ctrl-C.
        resume: continue from the newest checkpoint below `cfg.out`. When False, results of an earlier run found there
            are moved into `previous-N` beside them.
        stop_after: end after so many steps, although the learning rate is planned for `cfg.steps`.
        make_optimizer: from (model, cfg); the learning rate of its groups is set before every step. Default: the one
            that `cfg.optim` names.
        identity: what else the numbers depend on, as JSON values: `identity.identity` of the model and of how it was
            compiled. Checkpoints keep it, and it must be equal to resume. Without it, or with a checkpoint that has
            none, only the settings, the data, the kind of optimizer and the shapes of tensors are compared.

    Raises:
        InputError: the data does not fit, the model returns no loss, `cfg.out` cannot be written, precision metrics
            are asked for of a model that moefx did not compile, or traffic that cannot be counted.
        MissingPackageError: safetensors is not installed.
        CheckpointError: nothing to resume from, or it is damaged or of another run.
        DivergedError: loss or gradient is not finite.
        TrainingInterrupted: after SIGINT or SIGTERM; a checkpoint was saved (exit code 130).
    """
    console = console or LastingConsole()
    check_start(model, data, cfg)
    run = _Run(model, data, cfg, (make_optimizer or default_optimizer)(model, cfg), identity or {})
    with ExitStack() as stack:
        stack.enter_context(cpu_threads(cfg.threads))
        torch.manual_seed(cfg.seed)
        if not resume:
            make_room(cfg.out, console)
        elif not run.restore():
            say(console, UNCOMPARED)
        end = min(cfg.steps, cfg.steps if stop_after is None else stop_after)
        metrics = Metrics(cfg.out, run.step, console)
        stack.callback(metrics.close)
        display = stack.enter_context(Display(console, label, end, run.step))
        if resume:
            display.say(f"{label}: resumed at step {run.step}/{end}")
        stop = stack.enter_context(StopRequest())
        model.train()
        run.clear_gradients()
        try:
            _loop(run, end, metrics, display, stop, on_step)
        except KeyboardInterrupt:  # a second Ctrl-C, in the middle of a step: what is in memory is not consistent
            saved = checkpoint.checkpoints(run.directory)
            raise _interrupted(run, display, saved[-1] if saved else None) from None
    return run.result()


def check_start(model: nn.Module, data: TokenDataset, cfg: TrainConfig) -> None:
    """Raise what `train` refuses of these three; for who gives something up before it is called."""
    data.check(seq=cfg.seq, model_vocab=None)
    check_measurable(model, cfg)
    checkpoint.safetensors()  # missing, it would be noticed at the first checkpoint, after work that is then lost
    check_places(model, data, cfg)


def _loop(run: _Run, end: int, metrics: Metrics, display: Display, stop: StopRequest, on_step: OnStep | None) -> None:
    cfg = run.cfg
    batches = run.data.batches("train", cfg.batch * cfg.grad_accum, cfg.seq, cfg.seed, run.step)
    saved, told = None, False
    while run.step < end:
        ids = next(batches)
        if cfg.precision_every and (run.step + 1) % cfg.precision_every == 0:
            # Before the step: of the weights that it runs on, and written also when it diverges.
            figures = precision_figures(run.model, ids[: cfg.batch], cfg)
            if figures:
                metrics.write("precision", run.step + 1, **figures)
            elif not told:
                display.say(f"{display.label}: the recipe makes no precision casts, so that none are measured")
                told = True
        loss, norm, speed, parts = run.train_step(ids)
        last = run.step == end
        rate = learning_rate(cfg, run.step - 1)
        metrics.write("train", run.step, loss=loss, lr=rate, grad_norm=norm, tokens_per_s=speed, **parts)
        display.step(run.step, loss, speed)
        if cfg.eval_batches and (last or (cfg.eval_every and run.step % cfg.eval_every == 0)):
            val, prefix = run.validate()
            metrics.write("val", run.step, loss=val, **({} if prefix is None else {"loss_prefix": prefix}))
            if run.routing:
                metrics.write("routing", run.step, **scalars(run.routing))
                metrics.loads(run.step, run.routing["load"])
            alone = "" if prefix is None else f", {prefix:.4f} with prefix-only routing"
            said = f"validation loss {val:.4f}{alone}{in_short(run.routing)}"
            display.say(f"{display.label}: step {run.step}/{end}  {said}")
        if on_step is not None:
            try:
                on_step(run.step, loss)
            except KeyboardInterrupt:
                stop.requested = True
        if last or stop.requested or (cfg.checkpoint_every and run.step % cfg.checkpoint_every == 0):
            saved = run.save()
        if stop.requested:  # after the last step too: what comes after this run must not start
            raise _interrupted(run, display, saved)


def _interrupted(run: _Run, display: Display, saved: Path | None) -> TrainingInterrupted:
    stopped = TrainingInterrupted(run.step, saved)
    display.say(f"{display.label}: {stopped}")
    return stopped


class _Run:
    """State of a run between steps: all that a checkpoint must hold."""

    def __init__(
        self,
        model: nn.Module,
        data: TokenDataset,
        cfg: TrainConfig,
        optimizer: Optimizer,
        identity: Mapping[str, Any],
    ) -> None:
        self.model, self.data, self.cfg, self.optimizer = model, data, cfg, optimizer
        self.directory = cfg.out / CHECKPOINTS
        self.losses: list[float] = []
        self.val: list[tuple[int, float]] = []
        self.val_prefix: list[tuple[int, float]] = []
        self.prefix: PrefixLoss | None = None
        self._looked = False  # whether the router sees later tokens
        self.routing: dict[str, Any] = {}
        self.seconds = 0.0
        self.step_seconds: list[float] = []
        self._fresh = True
        kind = type(optimizer)
        self.fingerprint = {
            **identity,
            **cfg.identity(),
            "data": data.fingerprint,
            "optimizer": f"{kind.__module__}.{kind.__qualname__}",
        }

    @property
    def step(self) -> int:
        return len(self.losses)

    def train_step(self, ids: torch.Tensor) -> tuple[float, float, float, dict[str, float]]:
        """One optimizer step on int64 [batch * grad_accum, seq].

        Returns loss, unclipped gradient norm of what the optimizer trains, tokens/s, and the losses of routing
        (`loss_values`), mean over microbatches.
        """
        began = time.perf_counter()
        cfg, step = self.cfg, self.step
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        total, parts = torch.zeros(()), dict[str, float]()
        for micro in ids.to(device_of(self.model)).split(cfg.batch):
            with autocast(self.model, cfg):
                loss = loss_of(self.model, micro) / cfg.grad_accum
            loss.backward()
            for name, part in loss_values(self.model).items():
                parts[name] = parts.get(name, 0.0) + part / cfg.grad_accum
            total = total + loss.detach().float().cpu()
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        parameters = [p for p in self.model.parameters() if p.grad is not None and id(p) in trained]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, cfg.clip or math.inf))
        value = float(total)
        if not (math.isfinite(value) and math.isfinite(norm)):
            self.clear_gradients()
            raise self._diverged(value, norm)
        self.optimizer.step()
        move_biases(self.model)
        self.clear_gradients()
        self.losses.append(value)
        seconds = time.perf_counter() - began
        self.seconds += seconds
        if not self._fresh:
            self.step_seconds.append(seconds)
        self._fresh = False
        return value, norm, cfg.tokens_per_step / seconds, parts

    def clear_gradients(self) -> None:
        """Of the whole model: the optimizer may hold a part of it, and what the others gather would never be freed."""
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)

    def validate(self) -> tuple[float, float | None]:
        """Validate and remember the loss, and what the model measured of its routing meanwhile.

        Returns the loss, and for a router that sees later tokens that under prefix-only routing.
        """
        seen = RoutingSum()
        loss = evaluate(self.model, self.data, self.cfg, after=lambda: seen.add(routing_of(self.model)))
        self.routing = measured(self.model, seen, self.cfg.places)
        self.val.append((self.step, loss))
        if not self._looked:
            self._looked, self.prefix = True, PrefixLoss.of(self.model, self.data, self.cfg)
        if self.prefix is None:
            return loss, None
        alone = self.prefix(self.data, self.cfg)
        self.val_prefix.append((self.step, alone))
        return loss, alone

    def save(self) -> Path:
        history = {
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "val": [list(v) for v in self.val],
            "val_prefix": [list(v) for v in self.val_prefix],
            "routing": self.routing,
            "seconds": self.seconds,
            "step_seconds": torch.tensor(self.step_seconds, dtype=torch.float64),
        }
        return checkpoint.save(
            self.directory,
            step=self.step,
            model=self.model,
            optimizer=self.optimizer,
            fingerprint=self.fingerprint,
            history=history,
            keep=self.cfg.keep,
        )

    def restore(self) -> bool:
        """Go back to the newest checkpoint. Returns whether it says of which model, recipe and losses it is."""
        path = checkpoint.latest(self.directory)
        found = checkpoint.load(path, model=self.model, optimizer=self.optimizer, fingerprint=self.fingerprint)
        self.losses = found.history["losses"].tolist()
        self.val = [(int(step), float(loss)) for step, loss in found.history["val"]]
        self.val_prefix = [(int(step), float(loss)) for step, loss in found.history.get("val_prefix", ())]
        self.routing = found.history.get("routing", {})
        self.seconds, self.step_seconds = found.history["seconds"], found.history["step_seconds"].tolist()
        return found.compared

    def result(self) -> TrainResult:
        speed = self.cfg.tokens_per_step / statistics.median(self.step_seconds) if self.step_seconds else 0.0
        return TrainResult(list(self.losses), list(self.val), speed, self.seconds, self.routing, list(self.val_prefix))

    def _diverged(self, loss: float, norm: float) -> DivergedError:
        saved = checkpoint.checkpoints(self.directory)
        why = f"loss {loss}, gradient norm {norm}, learning rate {learning_rate(self.cfg, self.step):.3g}"
        kept = f"; the weights before it are in {saved[-1]}" if saved else ""
        todo = f"lower lr, or raise warmup{kept}"
        return DivergedError(
            "the training diverged", where=f"step {self.step + 1} of {self.cfg.steps}", why=why, todo=todo
        )
