"""`moefx train --router ...`: a teacher, a Grouter distilled from it, and two targets, one routed by the Grouter."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..errors import InputError, first_line, nearest
from ..files import json_text
from ..losses import Item, LoadBalance
from ..routing import Routing, fit_vocabulary, vocab_size_of, vocabulary_of
from .aside import CHECKPOINTS, GROUTER, LEARNED, REPORT, ROUTED, TEACHER, make_room_for_run, say
from .checkpoint import checkpoints, compare, latest
from .config import TrainConfig
from .console import LastingConsole
from .data import TokenDataset, open_dataset
from .identity import identity
from .loop import TrainResult, check_start, train
from .metrics import require_folder
from .models import leave_balance_out, load_model
from .routing import closing_rows, with_choices
from .story import baseline, check_names, check_newest, optimized, write_json

DISTILLED = "distilled"
UNROUTED = (
    "of the routed model no layer's own router is used, and the Grouter is frozen, so that they have none to train"
)
_SHOWN = {"distill": ("k", "kl", "exact"), "tune": ("maxvio_before", "maxvio_after")}  # in the closing table
TEACHER_SEED, DISTILL_SEED, TUNE_SEED = 1, 2, 3  # added to the run's: none sees the targets' batches in their order


def run_routing(
    *,
    model: str | nn.Module = "default",
    data: Sequence[str | Path] | TokenDataset = (),
    cfg: TrainConfig | None = None,
    router: str | Routing = DISTILLED,
    losses: str = "lb,z",
    distill_steps: int | None = None,
    recipe: Any = "bf16",
    resume: bool = False,
    options: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train a model twice, from the same weights on the same batches: with learned routers, and routed by a Grouter.

    Args:
        model: as `load_model` takes it, or a module (which is left unchanged, and whose weights the teacher then begins
            with as well).
        data: as `open_dataset` takes it, or a dataset.
        cfg: of the teacher and of both targets; `cfg.out` receives `teacher/`, `grouter/`, `learned/`, `routed/` and
            `report.json`.
        router: "distilled": a teacher is trained first (other weights, other order of data), and a causal Grouter
            distilled from its first MoE layer and tuned. Or the folder of a Grouter, or a `moefx.Routing` around one
            (with `causal=False` for one that sees later tokens: validation then reports prefix-only routing, too).
        losses: short names of `moefx.losses`, for the teacher and the target with learned routers, whose own balance
            loss (`output_router_logits`) "lb" switches off; the routed target has none, and gets those of them that
            need no router of a layer.
        distill_steps: None for as many as `cfg.steps`; a fifth as many for tuning.
        resume: go on with what was interrupted; model, recipe, losses and settings must be its own. Otherwise earlier
            results are moved to `previous-N` once the first model is compiled.

    Returns:
        The content of report.json: per arm the validation losses and the routing of the last validation, which losses
        the routed target does not have and why (`losses_left_out`), the Grouter's distillation and tuning reports, and
        the compiler's reports.

    Raises:
        MoefxError, TrainingInterrupted: as `run_training`.
    """
    cfg, console = cfg or TrainConfig(), console or LastingConsole()
    if resume:
        _require_begun(cfg.out, router)
    shared, wanted = {"recipe": recipe, **(options or {})}, with_choices(losses, cfg.places)
    check_names(shared)
    if isinstance(router, str) and router != DISTILLED and not Path(router).is_dir():
        todo = f"name the folder of a Grouter, or: {nearest(router, ('learned', DISTILLED))}"
        raise InputError("there is no such router", where=router, todo=todo)
    tokens = data if isinstance(data, TokenDataset) else open_dataset(data)
    target = _target(model, cfg.seed, tokens.vocab_size, wanted)
    tokens.check(seq=cfg.seq, model_vocab=vocab_size_of(target))
    require_folder(cfg.out)
    targets = {LEARNED: target, ROUTED: _routed(target)}
    left = {item.name: UNROUTED for item in wanted if item.needs_router}
    if left:
        say(console, f"{ROUTED}: without the losses {', '.join(left)}: {UNROUTED}")
    made: dict[str, Any] = {}
    if router == DISTILLED:
        grouter, made = _distilled(model, target, tokens, cfg, wanted, distill_steps, shared, resume, console)
    else:
        from ..models.grouter import Grouter

        grouter = router if isinstance(router, Routing) else Grouter.from_pretrained(router)
    network: Any = grouter.router if isinstance(grouter, Routing) else grouter
    fit_vocabulary(network, vocabulary_of(target) or tokens.vocab_size)
    asked: dict[str, dict[str, Any]] = {
        LEARNED: {**shared, "losses": wanted},
        ROUTED: {**shared, "router": grouter, "losses": _unrouted(wanted)},
    }
    # Both before either is trained: a Grouter that does not fit the model is no news for after the learned arm.
    arms = {arm: optimized(copy.deepcopy(targets[arm]), tokens, cfg, None, given) for arm, given in asked.items()}
    if router != DISTILLED:
        for opt in arms.values():
            check_start(opt, tokens, cfg)
        if not resume:
            # A Grouter that was loaded already may be the one in this folder.
            make_room_for_run(cfg.out, console, Path(router) if isinstance(router, str) else cfg.out / GROUTER)
    results, reports = {}, {}
    for arm, given in asked.items():
        opt = arms.pop(arm)  # its weights are freed when it is trained
        known = identity(targets[arm], model if isinstance(model, str) else None, given)
        results[arm] = _train(opt, tokens, cfg, arm, resume, console, known)
        reports[arm] = opt.report.to_dict()
    content = {
        "arms": {arm: _figures(r) for arm, r in results.items()},
        "losses_left_out": left,
        "grouter": made,
        "unigram_nats": baseline(tokens, cfg),
        "reports": reports,
    }
    write_json(cfg.out / REPORT, content)
    console.print(table(content))
    say(console, f"written to {cfg.out / REPORT}")
    return content


def _figures(result: TrainResult) -> dict[str, Any]:
    return {name: getattr(result, name) for name in ("val", "val_prefix", "losses", "tokens_per_s", "routing")}


def table(content: Mapping[str, Any]) -> Table:
    """The closing table: validation losses of both targets by step, and how the Grouter was made."""
    view, arms = Table(title="moefx train --router"), content["arms"]
    view.add_column("validation loss, nats per token")
    for heading in ("learned routers", "routed by a Grouter", "difference"):
        view.add_column(heading, justify="right")
    for (step, learned), (_, routed) in zip(arms[LEARNED]["val"], arms[ROUTED]["val"], strict=False):
        view.add_row(f"step {step}", f"{learned:.4f}", f"{routed:.4f}", f"{routed - learned:+.4f}")
    for step, alone in arms[ROUTED].get("val_prefix", ())[-1:]:
        view.add_row(f"step {step}, prefix-only routing", "", f"{alone:.4f}")
    if content["unigram_nats"] is not None:
        view.add_row("unigram baseline", f"{content['unigram_nats']:.4f}")
    shown = [closing_rows(arms[arm].get("routing", {})) for arm in (LEARNED, ROUTED)]
    for title in {**shown[0], **shown[1]}:
        view.add_row(title, *(rows.get(title, "") for rows in shown))
    view.add_row("tokens/s", *(f"{arms[a]['tokens_per_s']:,.0f}" for a in (LEARNED, ROUTED)))
    if content["grouter"]:
        d, t = content["grouter"]["distill"], content["grouter"]["tune"]
        view.add_section()
        view.add_row("[bold]the Grouter")
        for title, value, form in (  # in the column of the arm that it routes
            ("KL to the teacher's router, nats per token", d["kl"], ".4f"),
            (f"exact top-{d['k']} set", d["exact"], ".1%"),
            ("MaxVio before tuning", t["maxvio_before"], ".2f"),
            ("MaxVio after tuning", t["maxvio_after"], ".2f"),
        ):
            view.add_row(title, "", format(math.nan if value is None else value, form))  # null in a report read again
    return view


def _distilled(
    model: str | nn.Module,
    target: nn.Module,
    tokens: TokenDataset,
    cfg: TrainConfig,
    losses: Sequence[Item],
    steps: int | None,
    shared: dict[str, Any],
    resume: bool,
    console: Console,
) -> tuple[Any, dict[str, Any]]:
    """A tuned Grouter, and how it came out; what an earlier session finished is read again."""
    from ..grouter import distill, tap, tune
    from ..models.grouter import Grouter

    folder, seed = cfg.out / GROUTER, cfg.seed + TEACHER_SEED
    steps = cfg.steps if steps is None else steps
    known = identity(target, model if isinstance(model, str) else None, {**shared, "losses": losses})
    # What the Grouter depends on: its teacher was trained with this, and it was distilled on batches of this.
    origin = {**known, **cfg.identity(), "data": tokens.fingerprint, "distill_steps": steps}
    if resume and (folder / "config.json").exists():
        made = _read(folder)
        stored = made["distill"]["settings"].get("identity") if made else None
        # A report has null for an infinite option, and those of earlier versions had Infinity.
        was, now = ({"identity": json.loads(json_text(side))} for side in (stored, origin))
        if not compare(folder, {} if stored is None else was, now):
            say(console, f"{folder} does not say how it was made (an earlier version of moefx wrote it); it is used")
        return Grouter.from_pretrained(folder), made
    teacher = _target(model, seed, tokens.vocab_size, losses)
    own = replace(cfg, seed=seed)
    trained = optimized(teacher, tokens, own, None, {**shared, "losses": losses})
    _try_routing(teacher, target, tokens, cfg, losses, shared)
    check_start(trained, tokens, own)
    if not resume:
        make_room_for_run(cfg.out, console)
    _train(trained, tokens, own, TEACHER, resume, console, known)

    def batches(seed: int, first: int) -> Iterator[torch.Tensor]:
        return tokens.batches("train", cfg.batch, cfg.seq, cfg.seed + seed, first)

    cut = tap(teacher, next(batches(DISTILL_SEED, 0)))
    experts = cut(next(batches(DISTILL_SEED, 0))).shape[-1]
    torch.manual_seed(seed)
    grouter = _network(target, vocabulary_of(target) or tokens.vocab_size, experts)

    def saved(kept: Path) -> dict[str, Any]:
        return {"checkpoint": kept, "resume": resume and bool(checkpoints(kept)), "identity": origin}

    distilled = distill(
        cut, grouter, lambda step: batches(DISTILL_SEED, step), steps=steps, lr=2e-3, report=folder / "distill",
        **saved(folder / CHECKPOINTS),
    )  # fmt: skip
    tuned = tune(
        grouter, lambda step: batches(TUNE_SEED, step), steps=max(1, steps // 5), lr=1e-3, k=cut.spec.k,
        report=folder / "tune", **saved(folder / "tune" / CHECKPOINTS),
    )  # fmt: skip
    grouter.save_pretrained(folder)
    return grouter, {"distill": distilled.to_dict(), "tune": tuned.to_dict()}


def _try_routing(
    teacher: nn.Module,
    target: nn.Module,
    tokens: TokenDataset,
    cfg: TrainConfig,
    losses: Sequence[Item],
    shared: dict[str, Any],
) -> None:
    """Compile the routed target with a Grouter of the shape that is to be distilled.

    The teacher is cut, and the target routed, only after a whole training: what does not go is an error before it.
    """
    from ..grouter import tap

    ids = next(tokens.batches("train", cfg.batch, cfg.seq, cfg.seed))
    grouter = _network(target, vocabulary_of(target) or tokens.vocab_size, tap(teacher, ids)(ids).shape[-1])
    given = {**shared, "codegen": "eager", "router": grouter, "losses": _unrouted(losses)}
    optimized(_routed(target), tokens, cfg, None, given)


def _network(target: nn.Module, vocab_size: int, experts: int) -> Any:
    """A Grouter of two layers, three quarters as wide as the target."""
    from ..models.grouter import Grouter

    config = getattr(target, "config", None)
    width = max(32, int(getattr(config, "hidden_size", 64)) * 3 // 4 // 8 * 8)
    return Grouter.from_config(
        vocab_size=vocab_size, num_experts=experts, hidden_size=width, num_layers=2, num_heads=4,
        intermediate_size=8 * width // 3,
    )  # fmt: skip


def _read(folder: Path) -> dict[str, Any]:
    """The reports of a finished Grouter, by what was done; empty where an earlier version of moefx wrote none."""
    if not (folder / "tune" / "report.json").exists():
        return {}
    return {name: _report(folder / name / "report.json", figures) for name, figures in _SHOWN.items()}


def _report(file: Path, figures: Sequence[str]) -> dict[str, Any]:
    """Raises InputError where it is none, or lacks what the closing table shows."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        wrong = [name for name in figures if not isinstance(found[name], int | float | None)]
        settings = found["settings"]
        if wrong or not isinstance(settings, dict) or not isinstance(settings.get("identity", {}), dict):
            raise ValueError(f"{(*wrong, 'settings')[0]} is not what moefx writes")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            "the report of a finished Grouter cannot be read", where=str(file),
            why=f"it lacks {error}" if isinstance(error, KeyError) else first_line(error),
            todo=f"delete {file.parents[1]}, and resume to distil again from the teacher",
        ) from error  # fmt: skip
    return dict(found)


def _train(
    opt: Any, tokens: TokenDataset, cfg: TrainConfig, arm: str, resume: bool, console: Console, known: dict[str, Any]
) -> TrainResult:
    own = replace(cfg, out=cfg.out / arm)
    begun = resume and bool(checkpoints(own.out / CHECKPOINTS))
    return train(opt, tokens, own, resume=begun, label=arm, identity=known, console=console)


def _require_begun(out: Path, router: str | Routing) -> None:
    """Raise CheckpointError where nothing lies that resuming could go on from, or what does is damaged."""
    arms = (TEACHER, GROUTER, LEARNED, ROUTED) if router == DISTILLED else (LEARNED, ROUTED)
    finished = router == DISTILLED and (out / GROUTER / "config.json").exists()
    if not finished and not any(checkpoints(out / arm / CHECKPOINTS) for arm in arms):
        latest(out / arms[0] / CHECKPOINTS)
    check_newest(out / arm for arm in arms)


def _target(model: str | nn.Module, seed: int, vocab_size: int, losses: Sequence[Item]) -> nn.Module:
    """The model in train mode, a copy of a given one; with "lb" it leaves the balance of its routers to `moefx.losses`.

    Without, it keeps a balance loss of its own, as in a plain `moefx train`: nothing else would balance it.
    """
    built = load_model(model, seed, vocab_size) if isinstance(model, str) else copy.deepcopy(model).train()
    if any(isinstance(item, LoadBalance) for item in losses):
        leave_balance_out(built)
    return built


def _routed(target: nn.Module) -> nn.Module:
    """A copy of the target for the Grouter: without a balance loss, which would be of routers that it does not use."""
    copied = copy.deepcopy(target)
    leave_balance_out(copied)
    return copied


def _unrouted(losses: Sequence[Item]) -> list[Item]:
    """Those losses that need no router of a layer's own."""
    return [item for item in losses if not item.needs_router]
