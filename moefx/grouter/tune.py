"""Rebalance a Grouter on the target's data (arXiv 2603.06626, section 3.2): its score layer, or a bias, and no more."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, nearest
from ..models.grouter import Grouter
from ..optim.schedule import WarmupCosine
from ..train.console import LastingConsole
from ..train.loop import DivergedError
from ..train.modes import modes_kept
from .check import top_set
from .distill import kl
from .records import fingerprint
from .reports import write_report
from .running import (
    Batch,
    Batches,
    batches_from,
    check_figures,
    for_grouter,
    max_violation,
    next_batch,
    require_tokens,
)
from .session import Session, check_saving

OBJECTIVES = ("sequence", "global")
METHODS = ("score", "bias")
MEASURED = 8  # first batches of the stream, unless eval_batches are given


@dataclass
class TuneReport:
    """Balance before and after, on the same tokens.

    Attributes:
        losses: of the objective times E, per step; 1 is about the least.
        maxvio_before, maxvio_after: (max - mean) / mean of the experts' loads over all measured tokens.
        sequence_maxvio_before, sequence_maxvio_after: the same within a sequence, the mean over sequences.
        balance_before, balance_after: E times the objective.
        overlap: mean share of the k experts of a token that it had before.
        load: share of all slots per expert, after.
    """

    steps: int
    k: int
    settings: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    maxvio_before: float = math.nan
    maxvio_after: float = math.nan
    sequence_maxvio_before: float = math.nan
    sequence_maxvio_after: float = math.nan
    balance_before: float = math.nan
    balance_after: float = math.nan
    overlap: float = math.nan
    load: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """What a table shows."""
        return [
            ("steps", str(self.steps)),
            ("MaxVio", f"{self.maxvio_before:.3f} -> {self.maxvio_after:.3f}"),
            ("MaxVio within a sequence", f"{self.sequence_maxvio_before:.3f} -> {self.sequence_maxvio_after:.3f}"),
            (
                f"E x balance loss ({self.settings['objective']})",
                f"{self.balance_before:.3f} -> {self.balance_after:.3f}",
            ),
            (f"top-{self.k} overlap with the untuned router", f"{self.overlap:.1%}"),
            ("measured on", f"{self.tokens:,} tokens"),
            ("seconds", f"{self.seconds:.1f}"),
        ]

    def write(self, folder: str | Path) -> None:
        """`report.json` and `report.md`."""
        write_report(Path(folder), "report", "Tuning a Grouter", self.to_dict(), dict(self.rows()), head="| | |")


def tune(
    grouter: Grouter,
    batches: Batches,
    *,
    k: int,
    steps: int = 400,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    objective: str = "sequence",
    anchor: float = 0.0,
    clip: float = 1.0,
    method: str = "score",
    eval_batches: Sequence[Batch] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
    report: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> TuneReport:
    """Train the score layer of `grouter`, in place, on the balance loss alone. 0 steps change nothing.

    The loss is sum_i f_i p_i, with f_i the share of slots that expert i gets (no gradient) and p_i its mean softmax
    probability. Its trivial optimum is a router without preferences: few steps, or the anchor, keep the structure.

    Args:
        k: experts per token of the target.
        steps, lr, weight_decay, clip: AdamW, cosine to 0 without warm-up, gradient norm at most `clip`.
        objective: "sequence" balances every sequence (the published one; it also wears down the specialisation by topic
            that placement lives on), "global" the batch as a whole.
        anchor: weight of KL(router before || router now) beside the balance loss.
        method: "score", or "bias": `selection_bias` -= lr * sign(load - 1/E), which leaves all logits and the gates of
            chosen experts as they are; lr does not decay, objective, clip and weight_decay do not apply, and an anchor
            is an error.
        eval_batches: what the report measures on, before and after; None for the first 8 batches of the data.
        checkpoint, checkpoint_every, resume, identity: as `distill` has them. A checkpoint holds what is tuned, not the
            Grouter: give the same, untuned Grouter to resume, which is checked.
        progress: a bar, on a terminal.

    The score layer is trained in fp32 and rounded once, at the end. Padding does not count.

    Raises:
        InputError: settings or data that do not fit; the Grouter is as it was.
        CheckpointError: no checkpoint to resume from, or one of another run.
        DivergedError: the loss is not finite; the Grouter is as it was.
        TrainingInterrupted: after Ctrl-C or SIGTERM with a `checkpoint` folder; a checkpoint is saved, and the Grouter
            is as it was.
    """
    for name, given, known in (("objective", objective, OBJECTIVES), ("method", method, METHODS)):
        if given not in known:
            raise InputError(f"unknown {name}={given!r}", todo=nearest(str(given), known))
    check_saving(checkpoint, checkpoint_every, resume)
    check_figures(steps=(steps, 0), lr=(lr, 0), weight_decay=(weight_decay, 0), anchor=(anchor, 0), clip=(clip, 1e-12))
    if anchor and method == "bias":
        raise InputError(
            f"anchor={anchor:g} is given for method='bias'", why="a bias leaves all logits as they are",
            todo="leave it out, or tune the score layer",
        )  # fmt: skip
    if not 1 <= k <= grouter.num_routed:
        raise InputError(f"top-{k} of {grouter.num_routed} experts", todo="choose another k")
    settings = {
        "lr": lr, "weight_decay": weight_decay, "objective": objective, "anchor": anchor, "clip": clip,
        "method": method, **({"identity": dict(identity)} if identity else {}),
    }  # fmt: skip
    found, begin, tuned = TuneReport(steps, k, settings), time.perf_counter(), _Tuned(grouter, settings)
    # With the Grouter before: another one would be tuned to other weights, and measured against itself.
    origin = {**settings, "steps": steps, "k": k, "grouter": fingerprint(grouter) if checkpoint is not None else ""}
    session = Session("tune", steps, tuned, tuned.optimizer, origin, found, ("losses",), checkpoint, checkpoint_every)
    session.begin(resume, LastingConsole(stderr=True, quiet=not progress))
    before = found.seconds
    if eval_batches is None:
        stream = batches_from(batches, 0)
        eval_batches = list(itertools.islice(stream, MEASURED))
        if not callable(batches):  # an iterator cannot be begun again
            batches = itertools.chain(eval_batches, stream)
    with modes_kept(grouter):
        grouter.eval()
        raw = [_logits(grouter, batch) for batch in eval_batches]
        if not sum(counted.sum() for _, counted in raw):
            raise InputError("there is no token to measure balance on", todo="give batches")
        bias = grouter.selection_bias.clone()
        found.maxvio_before, found.sequence_maxvio_before, found.balance_before, _ = _balance(raw, bias, k, objective)
        _train(grouter, tuned, session, batches_from(batches, session.first), found, progress)
        new = [_logits(grouter, batch) for batch in eval_batches]
        now = grouter.selection_bias
        found.maxvio_after, found.sequence_maxvio_after, found.balance_after, load = _balance(new, now, k, objective)
        found.load = (load / load.sum()).tolist()
        common = [
            (top_set(a + bias, k) & top_set(b + now, k)).sum(-1)[c] for (a, c), (b, _) in zip(raw, new, strict=True)
        ]
        found.overlap = float(torch.cat(common).double().mean() / k)
        found.tokens = sum(len(c) for c in common)
    found.seconds = before + time.perf_counter() - begin
    if report is not None:
        found.write(report)
    return found


def balance_loss(logits: Tensor, bias: Tensor, counted: Tensor, k: int, objective: str) -> Tensor:
    """sum_i f_i p_i of logits [B, S, E], the mean over sequences or of the whole batch; at about 1/E when balanced.

    Args:
        bias: [E], added for the choice.
        counted: bool [B, S]; other tokens do not take part. A sequence without any is left out.
    """
    weight = counted[..., None].float()
    slots, scores = top_set(logits.detach() + bias, k).float() * weight, logits.softmax(-1) * weight
    if objective == "global":
        slots, scores, weight = (x.flatten(0, 1)[None] for x in (slots, scores, weight))
    tokens = weight.sum(1)
    rows = (slots.sum(1) / k * scores.sum(1)).sum(-1, keepdim=True) / tokens.clamp_min(1) ** 2
    return rows.sum() / (tokens > 0).sum().clamp_min(1)


def _train(
    grouter: Grouter,
    tuned: _Tuned,
    session: Session,
    stream: Iterator[Batch],
    found: TuneReport,
    progress: bool,
) -> None:
    """All steps that are left; the Grouter changes after the last one."""
    method = _step_bias if found.settings["method"] == "bias" else _step_score

    def one(step: int) -> str:
        balance = method(grouter, tuned, next_batch(stream, step, found.steps), found, step)
        found.losses.append(grouter.num_routed * balance)
        return f"E x balance {found.losses[-1]:.3f}"

    session.run(one, progress)
    if found.steps:
        tuned.take_effect()


class _Tuned(nn.Module):
    """What tuning changes, in fp32 beside the Grouter: the score layer [E, hidden], or the selection bias [E]."""

    def __init__(self, grouter: Grouter, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.home = [grouter.score.weight if settings["method"] == "score" else grouter.selection_bias]  # no submodule
        self.before = self.home[0].detach().float().clone()
        self.now = nn.Parameter(self.before.clone())
        # A bias moves by the sign of its load: descent on a gradient of signs.
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW([self.now], lr=settings["lr"], weight_decay=settings["weight_decay"])
            if settings["method"] == "score"
            else torch.optim.SGD([self.now], lr=settings["lr"])
        )

    @torch.no_grad()
    def take_effect(self) -> None:
        """Round what was tuned once, into the Grouter."""
        self.home[0].copy_(self.now)


def _step_score(grouter: Grouter, tuned: _Tuned, batch: Batch, found: TuneReport, step: int) -> float:
    """One step of the score layer on the balance loss and the anchor. Returns the balance loss."""
    s, schedule = found.settings, WarmupCosine(found.settings["lr"], 0, found.steps, 0.0)
    ids, masks, counted = for_grouter(grouter, batch)
    require_tokens(int(counted.sum()), step)
    with torch.no_grad():
        hidden = grouter.hidden(ids, **masks)
    logits = grouter.logits(hidden, tuned.now)
    loss = balance = balance_loss(logits, grouter.selection_bias, counted, found.k, s["objective"])
    if s["anchor"]:
        with torch.no_grad():
            raw = grouter.logits(hidden, tuned.before)
        loss = loss + s["anchor"] * kl(raw[counted], logits[counted])
    if not loss.isfinite():
        raise DivergedError(f"the loss is {float(loss)} at step {step + 1}", todo="lower lr")
    tuned.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([tuned.now], s["clip"])
    tuned.optimizer.param_groups[0]["lr"] = schedule(step)
    tuned.optimizer.step()
    return float(balance.detach())


@torch.no_grad()
def _step_bias(grouter: Grouter, tuned: _Tuned, batch: Batch, found: TuneReport, step: int) -> float:
    """One step of the selection bias, lr down where an expert has more than its share. Returns the balance loss."""
    logits, counted = _logits(grouter, batch)
    require_tokens(int(counted.sum()), step)
    balance = float(balance_loss(logits, tuned.now, counted, found.k, found.settings["objective"]))
    load = top_set(logits + tuned.now, found.k)[counted].double().mean(0) / found.k
    tuned.now.grad = (load - 1 / grouter.num_routed).sign().to(tuned.now.dtype)
    tuned.optimizer.step()
    return balance


@torch.no_grad()
def _logits(grouter: Grouter, batch: Batch) -> tuple[Tensor, Tensor]:
    ids, masks, counted = for_grouter(grouter, batch)
    return grouter(ids, **masks), counted


@torch.no_grad()
def _balance(
    measured: Sequence[tuple[Tensor, Tensor]], bias: Tensor, k: int, objective: str
) -> tuple[float, float, float, Tensor]:
    """MaxVio of all, its mean within sequences, E times the balance loss, and the loads."""
    per_sequence = torch.cat([(top_set(x + bias, k) & c[..., None]).sum(1) for x, c in measured])
    per_sequence = per_sequence[per_sequence.sum(-1) > 0]
    load = per_sequence.sum(0)
    if objective == "global":
        flat = [(x.flatten(0, 1)[None], c.reshape(1, -1)) for x, c in measured]
        measured = [(torch.cat([x for x, _ in flat], 1), torch.cat([c for _, c in flat], 1))]
    losses = torch.stack([balance_loss(x, bias, c, k, objective) * len(x) for x, c in measured])
    balance = float(losses.sum() / sum(len(x) for x, _ in measured))
    return float(max_violation(load)), float(max_violation(per_sequence).mean()), len(load) * balance, load
