"""`moefx grouter distill` and `moefx grouter tune`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..errors import InputError
from ..files import json_text, replacing
from ..models.grouter import Grouter
from ..routing import vocab_size_of, vocabulary_of
from ..train.aside import CHECKPOINTS
from ..train.config import SEEDS
from ..train.identity import digest_of
from ..train.metrics import require_folder
from .check import assert_causal
from .distill import DistillReport
from .distill import distill as run_distill
from .reports import require_another
from .sources import load_data, load_teacher
from .tap import tap
from .tune import TuneReport
from .tune import tune as run_tune

EVAL_BATCHES = 8
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Data = Annotated[
    list[Path] | None, typer.Option(help="Text files or folders (as bytes), or one .bin or .npy file of ids.")
]
Batch = Annotated[int, typer.Option(help="Sequences per step.", min=1)]
Seq = Annotated[int, typer.Option(help="Tokens per sequence.", min=2)]  # of one token, nothing can be seen to be causal
Every = Annotated[int, typer.Option(help="Steps between checkpoints in --out; Ctrl-C and SIGTERM save one too.", min=1)]
Resume = Annotated[bool, typer.Option(help="Go on from the last checkpoint in --out.")]
Seed = Annotated[int, typer.Option(help="Seed of the weights and of the order of data.", min=0, max=SEEDS - 1)]


def register(app: typer.Typer) -> None:
    """Add the commands to the `grouter` app."""
    app.command()(distill)
    app.command()(tune)


def distill(
    teacher: Annotated[Path, typer.Option(help="Folder of a transformers model, or of a moefx train run.")],
    out: Annotated[Path, typer.Option(help="Folder for the Grouter, report.json, report.md and checkpoints.")],
    data: Data = None,
    teacher_model: Annotated[str, typer.Option(help="For a run: the --model that it was given.")] = "default",
    grouter: Annotated[Path | None, typer.Option(help="Go on from this Grouter, instead of a new one.")] = None,
    layer: Annotated[int, typer.Option(help="MoE layer of the teacher whose router is imitated.")] = 0,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 600,
    batch: Batch = 32,
    seq: Seq = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-4,
    warmup: Annotated[int | None, typer.Option(help="Warm-up steps; 3/10 of all unless given.")] = None,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.01,
    temperature: Annotated[float, typer.Option(help="Of both softmaxes.")] = 1.0,
    score_only: Annotated[bool, typer.Option(help="Train the score layer alone.")] = False,
    hidden: Annotated[int, typer.Option(help="Width of a new Grouter.")] = 512,
    layers: Annotated[int, typer.Option(help="Blocks of a new Grouter.")] = 3,
    heads: Annotated[int, typer.Option(help="Attention heads of a new Grouter.")] = 8,
    intermediate: Annotated[int | None, typer.Option(help="MLP width of a new Grouter.")] = None,
    kind: Annotated[str, typer.Option(help="mha, mla, linear or conv.")] = "mha",
    seed: Seed = 0,
    checkpoint_every: Every = 500,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Train a causal Grouter to imitate a router of a finished model."""
    model = load_teacher(teacher, teacher_model)
    require_folder(out)
    vocab = vocab_size_of(model)
    if vocab is None:
        raise InputError("the teacher's vocabulary is not known", where=str(teacher), todo="use moefx.grouter.distill")
    tokens = load_data(data or [], vocab, seq)
    example = next(tokens.batches("train", min(batch, 2), seq, seed))
    source = tap(model, example, layer=layer)
    if grouter is not None:
        student = Grouter.from_pretrained(grouter)
    else:
        torch.manual_seed(seed)
        student = Grouter.from_config(
            vocab_size=vocabulary_of(model) or vocab, num_experts=source.num_experts,
            hidden_size=hidden, num_layers=layers, num_heads=heads,
            intermediate_size=intermediate, kind=kind,
        )  # fmt: skip
    found = run_distill(
        source,
        student,
        lambda start: tokens.batches("train", batch, seq, seed, start),
        steps=steps,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        temperature=temperature,
        score_only=score_only,
        eval_batches=list(itertools.islice(tokens.batches("val", batch, seq, seed), EVAL_BATCHES)),
        checkpoint=out / CHECKPOINTS,
        checkpoint_every=checkpoint_every,
        resume=resume,
        identity={
            "teacher": digest_of(model), "data": tokens.fingerprint, "batch": batch, "seq": seq, "seed": seed,
        },
    )  # fmt: skip
    if student.config.causal:
        assert_causal(student, example, k=found.k)
    _finish(student, out, found, as_json)


def tune(
    grouter: Annotated[Path, typer.Argument(help="Folder of the Grouter.")],
    out: Annotated[Path, typer.Option(help="Folder for the tuned Grouter, report.json, report.md and checkpoints.")],
    k: Annotated[int, typer.Option(help="Experts per token of the target.")],
    data: Data = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 400,
    batch: Batch = 32,
    seq: Seq = 64,
    lr: Annotated[float, typer.Option(help="Learning rate at the first step.")] = 1e-3,
    objective: Annotated[str, typer.Option(help="sequence or global.")] = "sequence",
    anchor: Annotated[float, typer.Option(help="Weight of KL(router before || router now).")] = 0.0,
    method: Annotated[str, typer.Option(help="score, or bias.")] = "score",
    seed: Seed = 0,
    checkpoint_every: Every = 500,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Balance a Grouter's load on the target's data."""
    student = Grouter.from_pretrained(grouter)
    require_another(out, grouter)
    require_folder(out)
    tokens = load_data(data or [], student.config.vocab_size, seq)
    found = run_tune(
        student,
        lambda start: tokens.batches("train", batch, seq, seed, start),
        k=k,
        steps=steps,
        lr=lr,
        objective=objective,
        anchor=anchor,
        method=method,
        eval_batches=list(itertools.islice(tokens.batches("val", batch, seq, seed), EVAL_BATCHES)),
        checkpoint=out / CHECKPOINTS / "tune",  # the Grouter of this folder may have checkpoints of its distillation
        checkpoint_every=checkpoint_every,
        resume=resume,
        identity={"data": tokens.fingerprint, "batch": batch, "seq": seq, "seed": seed},
    )
    _finish(student, out, found, as_json)


def _finish(student: Grouter, out: Path, found: DistillReport | TuneReport, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    with replacing(out, "the results") as new:  # both or none: a report would tell of other weights
        student.save_pretrained(new)
        found.write(new)
    if as_json:
        content: dict[str, Any] = {**found.to_dict(), "out": str(out)}
        print(json_text(content))
        return
    table = Table(show_header=False)
    for name, text in found.rows():
        table.add_row(name, text)
    Console().print(table)
    print(f"written to {out}")
