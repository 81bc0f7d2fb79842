"""What distilling and tuning share: batches, progress, figures of routing, written reports."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ..errors import InputError
from ..models.grouter import Grouter
from ..train.console import LastingConsole
from .check import top_set

Batch = Tensor | Mapping[str, Tensor]
# Batches in order, or a function from the number of a step to those from there on.
Batches = Iterable[Batch] | Callable[[int], Iterable[Batch]]
MASKS = ("position_ids", "document_ids", "attention_mask")


def batches_from(batches: Batches, start: int) -> Iterator[Batch]:
    """The batches from step `start` on; of an iterable, the first ones are passed over."""
    return iter(batches(start)) if callable(batches) else itertools.islice(iter(batches), start, None)


def next_batch(stream: Iterator[Batch], step: int, steps: int) -> Batch:
    """The next batch. Raises InputError when there is none."""
    found = next(stream, None)
    if found is None:
        raise InputError(
            f"the data ended after {step} of {steps} steps", todo=f"give {steps} batches, or an endless stream"
        )
    return found


def for_grouter(grouter: Grouter, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Ids and masks on the Grouter's device, and which tokens count, bool [B, S]. Raises InputError for wrong ids."""
    named = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    if "input_ids" not in named:
        raise InputError(
            f"a batch names {sorted(named)}, and no 'input_ids'", todo="give ids, or a dict with input_ids"
        )
    device = grouter.score.weight.device
    ids = named["input_ids"].to(device)
    grouter.check_ids(ids)
    masks = {name: named[name].to(device) for name in MASKS if name in named}
    counted = masks["attention_mask"].bool() if "attention_mask" in masks else torch.ones_like(ids, dtype=torch.bool)
    return ids, masks, counted.expand_as(ids)


def require_tokens(count: int, step: int) -> None:
    """Raise InputError where a training batch is padding alone: the mean over its tokens is not defined."""
    if not count:
        raise InputError(
            f"the batch of step {step + 1} has no token that counts",
            why="its attention_mask is 0 everywhere",
            todo="leave such batches out",
        )


def overlap(a: Tensor, b: Tensor, k: int) -> tuple[float, float]:
    """Of two logits [n, E]: the share of rows with the same top-k set, and the mean share of experts in common."""
    common = (top_set(a, k) & top_set(b, k)).sum(-1)
    return float((common == k).double().mean()), float(common.double().mean() / k)


def max_violation(load: Tensor) -> Tensor:
    """MaxVio = (max - mean) / mean of loads [.., E]; 0 is perfect balance, E/k - 1 collapse onto k experts."""
    mean = load.double().mean(-1)
    return (load.double().amax(-1) - mean) / mean


def check_figures(**figures: tuple[float, float]) -> None:
    """Raise InputError for a number below its least value, or for none."""
    for name, (given, least) in figures.items():
        if math.isnan(given):
            raise InputError(f"{name}={given} is no number", todo=f"choose a finite number, {name} >= {least:g}")
        if not given >= least:
            raise InputError(f"{name}={given} is below {least:g}", todo=f"choose {name} >= {least:g}")


@contextmanager
def bar(label: str, total: int | None, done: int, show: bool) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on a terminal, nothing elsewhere. Yields what to call after a step, with figures to show.

    `total` is None where it is not known.
    """
    console = LastingConsole(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
    off = not (show and console.is_terminal)
    with Progress(TextColumn("{task.description}"), *columns, console=console, disable=off) as progress:
        task = progress.add_task(label, total=total, completed=done, figures="")
        yield lambda step, figures: progress.update(task, completed=step, figures=figures)
