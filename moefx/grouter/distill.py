"""Train a Grouter to imitate the router of a finished model (arXiv 2603.06626, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..models.grouter import Grouter
from ..optim.schedule import WarmupCosine
from ..train.console import LastingConsole
from ..train.loop import DivergedError
from ..train.modes import modes_kept
from .reports import write_report
from .running import Batch, Batches, batches_from, check_figures, for_grouter, next_batch, overlap, require_tokens
from .session import Session, check_saving
from .tap import Tap, tap

KEPT = ("losses", "kl_curve", "exact_curve", "recall_curve", "tokens")  # of a report, in checkpoints
NOT_OF_TEACHER = ("document_ids", "labels")  # what transformers models do not take, and what routing does not need


@dataclass
class DistillReport:
    """How well a Grouter imitates its teacher.

    Attributes:
        losses, kl_curve, exact_curve, recall_curve: per step, on the step's batch before it was learned from.
        kl: KL(teacher || student) in nats per token, without temperature.
        exact: share of tokens with the teacher's set of k experts.
        recall: mean share of the teacher's k experts among the student's.
        measured_on: what `kl`, `exact` and `recall` are means over.
        tokens: tokens that were learned from; padding does not count.
        seconds: of training, earlier sessions included.
    """

    steps: int
    k: int
    settings: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    kl_curve: list[float] = field(default_factory=list)
    exact_curve: list[float] = field(default_factory=list)
    recall_curve: list[float] = field(default_factory=list)
    kl: float = math.nan
    exact: float = math.nan
    recall: float = math.nan
    measured_on: str = ""
    tokens: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """What a table shows."""
        return [
            ("steps", str(self.steps)),
            ("tokens", f"{self.tokens:,}"),
            ("loss at the first step", f"{self.losses[0]:.4f}" if self.losses else "-"),
            ("KL(teacher, student), nats per token", f"{self.kl:.4f}"),
            (f"exact top-{self.k} set", f"{self.exact:.1%}"),
            (f"top-{self.k} recall", f"{self.recall:.1%}"),
            ("measured on", self.measured_on),
            ("seconds", f"{self.seconds:.1f}"),
        ]

    def write(self, folder: str | Path) -> None:
        """`report.json` and `report.md`."""
        write_report(Path(folder), "report", "Distilling a Grouter", self.to_dict(), dict(self.rows()), head="| | |")


def distill(
    teacher: nn.Module | Tap | Callable[[Batch], Tensor],
    grouter: Grouter,
    batches: Batches,
    *,
    steps: int,
    lr: float = 3e-4,
    warmup: int | None = None,
    weight_decay: float = 0.01,
    temperature: float = 1.0,
    layer: int = 0,
    k: int | None = None,
    score_only: bool = False,
    eval_batches: Iterable[Batch] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
    report: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> DistillReport:
    """Train `grouter` in place on T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over tokens.

    All experts' logits are imitated, not only the top-k. AdamW with default betas, linear warm-up, cosine to 0, no
    clipping. The teacher has no gradient.

    Args:
        teacher: a model, which is tapped at MoE layer `layer` with the first batch; a `Tap`; or any function from a
            batch to logits [B, S, E].
        grouter: fp32, with as many logits as the teacher has experts.
        batches: ids [B, S], or dicts with input_ids and if need be position_ids, document_ids, attention_mask (padding
            does not count; the teacher gets all but the document ids). Or a function from a step to the batches from
            there on, which makes resuming cheap. One batch per step.
        warmup: steps; None for 3/10 of all, the published share.
        temperature: 1 keeps the size of the gates, which the method needs.
        k: experts per token for the figures; None for the teacher's.
        score_only: train the score layer alone, on top of what the network has learned.
        eval_batches: held-out batches for the final figures; None for the last tenth of the training batches, each
            measured before it is learned from.
        checkpoint: folder for checkpoints, every `checkpoint_every` steps, at the end, and on Ctrl-C and SIGTERM, which
            then take effect between two steps. Unless `resume`, those that are there are moved to `previous-N` inside.
        resume: go on from the newest one; the result is bitwise that of an uninterrupted run with the same data.
        report: folder for report.json and report.md.
        identity: what tells this teacher and these batches from others, as JSON values (digests, sizes, seeds): it is
            kept in checkpoints and in the report, and must be equal to resume. Both are opaque here: without it,
            whoever resumes answers for them.
        progress: a bar, on a terminal.

    Raises:
        InputError: sizes, settings or data that do not fit.
        CaptureError: a teacher that cannot be tapped.
        CheckpointError: no checkpoint to resume from, or one of another run.
        DivergedError: the loss is not finite; the Grouter is as it was before that step.
        TrainingInterrupted: after Ctrl-C or SIGTERM with a `checkpoint` folder, once a checkpoint is saved; uncaught,
            the process ends with status 130.
    """
    warmup = steps * 3 // 10 if warmup is None else warmup
    check_figures(steps=(steps, 1), lr=(lr, 0), warmup=(warmup, 0), weight_decay=(weight_decay, 0))
    check_figures(temperature=(temperature, 1e-3))
    check_saving(checkpoint, checkpoint_every, resume)
    if wrong := {p.dtype for p in grouter.parameters()} - {torch.float32, torch.float64}:
        raise InputError(
            f"the Grouter has parameters in {', '.join(map(str, wrong))}",
            why="small steps of the optimizer would be rounded away",
            todo="distil grouter.float(), and convert it afterwards",
        )
    schedule = WarmupCosine(lr, warmup, steps + 1, 0.0)
    source, k = _source(teacher, batches, layer, k)
    settings = {
        "steps": steps, "lr": lr, "warmup": warmup, "weight_decay": weight_decay, "temperature": temperature,
        "layer": source.layer if isinstance(source, Tap) else None, "k": k, "score_only": score_only,
        "grouter": asdict(grouter.config), **({"identity": dict(identity)} if identity else {}),
    }  # fmt: skip
    found, console = DistillReport(steps, k, settings), LastingConsole(stderr=True, quiet=not progress)
    with _trainable(grouter, score_only) as parameters:
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
        session = Session("distill", steps, grouter, optimizer, settings, found, KEPT, checkpoint, checkpoint_every)
        stream = batches_from(batches, session.begin(resume, console))

        def one(step: int) -> str:
            for group in optimizer.param_groups:
                group["lr"] = schedule(step + 1)
            loss = _step(grouter, source, next_batch(stream, step, steps), optimizer, found, step, temperature)
            return f"loss {loss:.4f}"

        session.run(one, progress)
    _final(found, grouter, source, eval_batches)
    if report is not None:
        found.write(report)
    return found


def kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of logits [n, E]: the mean over rows, in nats, fp32."""
    p, q = ((x.float() / temperature).log_softmax(-1) for x in (teacher, student))
    return F.kl_div(q, p, log_target=True, reduction="batchmean") * temperature**2


def _source(
    teacher: nn.Module | Tap | Callable[[Batch], Tensor], batches: Batches, layer: int, k: int | None
) -> tuple[Callable[[Batch], Tensor], int]:
    if isinstance(teacher, nn.Module):
        if not callable(batches) and iter(batches) is batches:
            raise InputError(
                "the batches are an iterator, whose first batch would be lost to tapping the teacher",
                todo="give a list or a function from a step to batches, or tap the teacher first (moefx.grouter.tap)",
            )
        teacher = tap(teacher, _for_teacher(next_batch(batches_from(batches, 0), 0, 1)), layer=layer)
    if k is None:
        if not isinstance(teacher, Tap):
            raise InputError("the teacher's experts per token are not known", todo="give k")
        k = teacher.spec.k
    return teacher, k


def _for_teacher(batch: Batch) -> Batch:
    return batch if isinstance(batch, Tensor) else {n: t for n, t in batch.items() if n not in NOT_OF_TEACHER}


def _pair(grouter: Grouter, source: Callable[[Batch], Tensor], batch: Batch, k: int) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher for the tokens that count, [n, E] each."""
    ids, masks, counted = for_grouter(grouter, batch)
    with torch.no_grad():
        target = source(_for_teacher(batch) if isinstance(source, Tap) else batch).to(ids.device)
    logits = grouter(ids, **masks)
    if target.shape != logits.shape or not 1 <= k <= target.shape[-1]:
        raise InputError(
            f"the teacher's logits are {tuple(target.shape)}, the Grouter's {tuple(logits.shape)}, and k is {k}",
            todo="build the Grouter with num_experts of the teacher; fold or expand it afterwards",
        )
    return logits[counted], target.detach()[counted]


def _step(
    grouter: Grouter,
    source: Callable[[Batch], Tensor],
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    found: DistillReport,
    step: int,
    temperature: float,
) -> float:
    student, target = _pair(grouter, source, batch, found.k)
    require_tokens(len(target), step)
    loss = kl(target, student, temperature)
    value = float(loss.detach())
    if not math.isfinite(value):
        finite = bool(target.isfinite().all())
        raise DivergedError(
            f"the loss is {value} at step {step + 1}",
            why=None if finite else "the teacher's logits are not finite",
            todo="lower lr, or begin with a longer warm-up" if finite else "give a teacher and inputs without NaN",
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    student = student.detach()
    exact, recall = overlap(student, target, found.k)
    found.losses.append(value)
    found.kl_curve.append(value if temperature == 1 else float(kl(target, student)))
    found.exact_curve.append(exact)
    found.recall_curve.append(recall)
    found.tokens += len(target)
    return value


@torch.no_grad()
def _final(
    found: DistillReport,
    grouter: Grouter,
    source: Callable[[Batch], Tensor],
    eval_batches: Iterable[Batch] | None,
) -> None:
    if eval_batches is None:
        last = max(found.steps // 10, 1)
        curves = (found.kl_curve, found.exact_curve, found.recall_curve)
        found.kl, found.exact, found.recall = (math.fsum(c[-last:]) / last for c in curves)
        found.measured_on = f"the last {last} training batches, each before it was learned from"
        return
    total, count = [0.0, 0.0, 0.0], 0
    for batch in eval_batches:
        student, target = _pair(grouter, source, batch, found.k)
        if not len(target):  # nothing but padding: a mean over no tokens would be none of all of them
            continue
        for i, figure in enumerate((float(kl(target, student)), *overlap(student, target, found.k))):
            total[i] += figure * len(target)
        count += len(target)
    if not count:
        raise InputError("there is no token in eval_batches", todo="give batches that can be read more than once")
    found.kl, found.exact, found.recall = (t / count for t in total)
    found.measured_on = f"{count:,} held-out tokens"


@contextmanager
def _trainable(grouter: Grouter, score_only: bool) -> Iterator[list[nn.Parameter]]:
    """While active, the Grouter trains, or its score layer alone; flags and modes come back at the end."""
    flags = [(p, p.requires_grad) for p in grouter.parameters()]
    try:
        with modes_kept(grouter):
            grouter.train().requires_grad_(not score_only)
            grouter.score.requires_grad_(True)
            yield [p for p in grouter.parameters() if p.requires_grad]
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
            p.grad = None
