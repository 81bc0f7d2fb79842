"""What `moefx train` does: train the optimized model, then the original on the same data, and compare."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import nn

from ..errors import InputError
from ..files import json_text, replacing
from ..losses import LoadBalance
from ..routing import vocab_size_of
from .aside import CHECKPOINTS, OPTIMIZED, ORIGINAL, REPORT, make_room_for_run, say
from .checkpoint import check, checkpoints, latest
from .config import TrainConfig
from .console import LastingConsole
from .data import TokenDataset, open_dataset, unigram_nats
from .identity import added_losses, identity
from .loop import TrainResult, check_start, train
from .metrics import require_folder
from .models import leave_balance_out, load_model
from .parts import autocast, device_of, val_batches
from .routing import closing_rows, with_choices

Optimize = Callable[..., Any]


def run_training(
    *,
    model: str | nn.Module = "default",
    data: Sequence[str | Path] | TokenDataset = (),
    cfg: TrainConfig | None = None,
    recipe: Any = "bf16",
    compare: str | int = "all",
    resume: bool = False,
    optimize: Optimize | None = None,
    options: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train an optimized model and its original alike, from the same weights; print a table, write report.json.

    Args:
        model: as `load_model` takes it, or a module (which is left unchanged; its copies are trained).
        data: as `open_dataset` takes it, or a dataset.
        cfg: `cfg.out` receives `optimized/`, `original/` (checkpoints and metrics of each) and `report.json`.
        recipe, options: passed to `optimize`. With "lb" among the losses, the optimized model's own balance loss
            (`output_router_logits`) is switched off; the original keeps it.
        compare: "all" trains the original for as many steps, a number for so many, "none" not at all.
        resume: continue a run that was interrupted, wherever it was; model, recipe and losses must be its own.
            Otherwise earlier results, report.json too, are moved to `previous-N` once the model is compiled.
        optimize: in place of `moefx.optimize`.

    Returns:
        The content of report.json: {"train": see `summarize`, "report": the compiler's `report.to_dict()`}.

    Raises:
        MoefxError: whatever is wrong with the model, the data, a checkpoint or the compilation.
        TrainingInterrupted: after SIGINT or SIGTERM, with everything saved that resuming needs.
    """
    cfg, console = cfg or TrainConfig(), console or LastingConsole()
    steps, given = compared_steps(compare, cfg.steps), {"recipe": recipe, **(options or {})}
    if optimize is None:
        check_names(given)
    tokens = data if isinstance(data, TokenDataset) else open_dataset(data)
    original = load_model(model, cfg.seed, tokens.vocab_size) if isinstance(model, str) else copy.deepcopy(model)
    original.train()
    tokens.check(seq=cfg.seq, model_vocab=vocab_size_of(original))
    if cfg.places is not None:
        given["losses"] = with_choices(given.get("losses"), cfg.places)
    added = [item.name for item in added_losses(given)]
    outs = {name: replace(cfg, out=cfg.out / name) for name in (OPTIMIZED, ORIGINAL)}
    outs[ORIGINAL] = replace(outs[ORIGINAL], precision_every=0, places=None)  # it has no casts, and measures nothing
    # Before the compiler runs, not after.
    require_folder(cfg.out)
    if resume:
        latest(outs[OPTIMIZED].out / CHECKPOINTS)
        check_newest(own.out for own in outs.values())

    # Copied before either is trained: both start from the same bits.
    copied, spec = copy.deepcopy(original), model if isinstance(model, str) else None
    if LoadBalance.name in added and leave_balance_out(copied):
        say(console, "the balance loss of the model's own is switched off, in favour of 'lb'")
    opt = optimized(copied, tokens, cfg, optimize, given)
    check_start(opt, tokens, outs[OPTIMIZED])
    if not resume:
        make_room_for_run(cfg.out, console)
    result = train(
        opt, tokens, outs[OPTIMIZED], resume=resume, label=OPTIMIZED, console=console,
        identity=identity(copied, spec, given),
    )  # fmt: skip
    reference = None
    if steps:
        begun = resume and bool(checkpoints(outs[ORIGINAL].out / CHECKPOINTS))
        reference = train(
            original, tokens, outs[ORIGINAL], resume=begun, label=ORIGINAL, stop_after=steps, console=console,
            identity=identity(original, spec),
        )  # fmt: skip
    content = {
        "train": summarize(result, reference, cfg, tokens, baseline(tokens, cfg), added),
        "report": opt.report.to_dict(),
    }
    write_json(cfg.out / REPORT, content)
    console.print(table(content))
    say(console, f"written to {cfg.out / REPORT}")
    return content


def check_names(options: dict[str, Any]) -> None:
    """Raise what `moefx.optimize` refuses of its options by name."""
    from ..optimize import check_names as check  # not at the top: data and checkpoints work without the compiler

    check(**options)


def check_newest(runs: Iterable[Path]) -> None:
    """Raise CheckpointError where the newest checkpoint of any of these runs is damaged."""
    for run in runs:
        for path in checkpoints(run / CHECKPOINTS)[-1:]:
            check(path)


def compared_steps(compare: str | int, steps: int) -> int:
    """How many steps the original is trained: "all", "none" or a number (also as text), at most `steps`."""
    if compare in ("all", "none"):
        return steps if compare == "all" else 0
    try:
        count = int(compare)
    except ValueError:
        count = -1
    if count < 0:
        raise InputError(f"compare={compare!r} is not understood", todo="choose 'all', 'none' or a number of steps")
    return min(count, steps)


def baseline(data: TokenDataset, cfg: TrainConfig) -> float | None:
    """Unigram cross entropy, nats per token, of exactly the tokens that validation predicts; None without any."""
    windows = val_batches(data, cfg)
    if not windows:
        return None
    # The first token of a window is context only.
    return unigram_nats(data.train, np.concatenate([w[:, 1:].numpy() for w in windows]), data.vocab_size)


def summarize(
    optimized: TrainResult,
    original: TrainResult | None,
    cfg: TrainConfig,
    data: TokenDataset,
    unigram: float | None,
    losses_added: Sequence[str] = (),
) -> dict[str, Any]:
    """The figures of a comparison, as JSON values.

    Returns:
        `optimized` and `original` (None when it was not trained): {final_loss, val_loss, val, val_prefix, losses,
        tokens_per_s, seconds, routing (of the last validation; empty where it was not measured)}; `max_difference`:
        {loss, step, steps}: the largest |difference| of the training losses, the step (from 1) where it is, and the
        number of steps compared (None when nothing was, or when losses were added: the two then train for different
        things, and their difference says nothing of the compiler); `losses_added`, short names; `unigram_nats`;
        `config`; `data`.
    """
    comparable = original is not None and not losses_added
    return {
        OPTIMIZED: _figures(optimized),
        ORIGINAL: None if original is None else _figures(original),
        "max_difference": max_difference(optimized.losses, original.losses) if original and comparable else None,
        "losses_added": list(losses_added),
        "unigram_nats": unigram,
        "config": {**asdict(cfg), "out": str(cfg.out), "betas": list(cfg.betas)},
        "data": data.describe(),
    }


def max_difference(a: Sequence[float], b: Sequence[float]) -> dict[str, Any] | None:
    """Where two loss curves differ most, over their common steps: {loss, step (from 1), steps}; None without any."""
    gaps = [abs(x - y) for x, y in zip(a, b, strict=False)]
    if not gaps:
        return None
    worst = max(range(len(gaps)), key=gaps.__getitem__)
    return {"loss": gaps[worst], "step": worst + 1, "steps": len(gaps)}


def table(content: Mapping[str, Any]) -> Table:
    """The closing table of a run, from the content of report.json."""
    figures, report = content["train"], content["report"]
    opt, ref = figures[OPTIMIZED], figures[ORIGINAL] or {}
    view = Table(title="moefx train")
    view.add_column("")
    for heading in (OPTIMIZED, ORIGINAL, "difference"):
        view.add_column(heading, justify="right")

    # Final losses are comparable only where both runs went equally far, for the same.
    added = figures.get("losses_added", ())
    same_length = bool(ref) and len(ref["losses"]) == len(opt["losses"]) and not added
    if added and ref:
        view.caption = f"no differences: {', '.join(added)} changes what the optimized model is trained for"
    for title, key in (("final training loss", "final_loss"), ("validation loss", "val_loss")):
        gap = abs(opt[key] - ref[key]) if same_length and None not in (opt[key], ref[key]) else None
        view.add_row(title, _text(opt[key], ".4f"), _text(ref.get(key), ".4f"), _text(gap, ".1e"))
    if alone := opt.get("val_prefix"):
        view.add_row("the same with prefix-only routing", _text(alone[-1][1], ".4f"))
    worst = figures["max_difference"]
    if worst:
        title = f"largest loss difference in {worst['steps']} steps"
        view.add_row(title, "", f"at step {worst['step']}", _text(worst["loss"], ".1e"))
    view.add_row("unigram baseline of validation", _text(figures["unigram_nats"], ".4f"))
    ratio = opt["tokens_per_s"] / ref["tokens_per_s"] if ref.get("tokens_per_s") else None
    view.add_row(
        "tokens/s", _text(opt["tokens_per_s"], ",.0f"), _text(ref.get("tokens_per_s"), ",.0f"), _text(ratio, ".2f", "x")
    )
    casts = report.get("casts") or {}
    if "before" in casts:
        written = f", of {casts['before']} as written" if casts["before"] else ""
        view.add_row(f"precision casts per step{written}", str(casts.get("after")), "0" if ref else "")
    for title, text in closing_rows(opt["routing"]).items():
        view.add_row(title, text)
    stages = report.get("stages") or {}
    if stages:
        view.add_section()
        view.add_row("[bold]compiler stage", "[bold]graph nodes", "[bold]seconds")
        for name, stage in stages.items():
            view.add_row(name, str(stage["nodes"] or ""), _text(stage["seconds"], ".2f"))
        view.add_row("all stages", "", _text(math.fsum(s["seconds"] for s in stages.values()), ".2f"))
    return view


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that the file is either the old or the new one, never a part. Raises InputError when it cannot."""
    with replacing(path.parent, "the report") as new:
        (new / path.name).write_text(json_text(content, indent=1, default=str) + "\n", encoding="utf-8")


def optimized(
    model: nn.Module, data: TokenDataset, cfg: TrainConfig, optimize: Optimize | None, options: dict[str, Any]
) -> Any:
    """The model through `optimize` (None: moefx's own) with the options, on the first training batch."""
    if optimize is None:
        from ..optimize import optimize as compiler  # not at the top: data and checkpoints work without the compiler
    else:
        compiler = optimize
    ids = next(data.batches("train", cfg.batch, cfg.seq, cfg.seed))
    ids = ids.to(device_of(model))
    # In the context that training will run in: what is compiled now is what the first step calls.
    with autocast(model, cfg):
        return compiler(model, {"input_ids": ids, "labels": ids}, **options)


def _figures(result: TrainResult) -> dict[str, Any]:
    return {
        "final_loss": result.losses[-1] if result.losses else None,
        "val_loss": result.val[-1][1] if result.val else None,
        "val": [list(pair) for pair in result.val],
        "val_prefix": [list(pair) for pair in result.val_prefix],
        "losses": result.losses,
        "tokens_per_s": result.tokens_per_s,
        "seconds": result.seconds,
        "routing": result.routing,
    }


def _text(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit
