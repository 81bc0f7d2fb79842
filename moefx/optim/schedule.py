"""Values that depend on the step: the schedules of LITE's amplification and damping.

A schedule is called with the number of completed steps (0 before the first update, as torch's schedulers count) and
gives a float. The frozen dataclasses here can be compared, so that a checkpoint tells when it was written under another
schedule; any other callable works too, but is saved only as "a callable was here".
Source: the schedules of the released LITE code (arXiv 2602.22681).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import InputError

Value: TypeAlias = float | Callable[[int], float]


def _check(warmup: int, total: int) -> None:
    if not 0 <= warmup < total:
        raise InputError(
            f"a schedule needs 0 <= warmup < total steps, got {warmup} and {total}",
            todo="give both in optimizer steps, the warm-up first",
        )


@dataclass(frozen=True)
class CosineCoupled:
    """Amplification under a cosine learning rate: flat and sharp directions meet at the same floor.

    With p the share of steps done after the warm-up and c = (1 + cos(pi p)) / 2, the value is
    [f + (peak - f) c] / [f + (1 - f) c] for a minimum learning rate of f times the peak one; with `ramp` it also is at
    most 1 + p (peak - 1) / ramp, and 1 during warm-up. Without (embeddings, norms) it starts at `peak` at once.
    """

    peak: float
    warmup: int
    total: int
    min_lr_fraction: float = 0.1
    ramp: float | None = 0.5

    def __post_init__(self) -> None:
        _check(self.warmup, self.total)

    def __call__(self, step: int) -> float:
        p = min(max((step - self.warmup) / (self.total - self.warmup), 0.0), 1.0)
        c, floor = 0.5 * (1 + math.cos(math.pi * p)), self.min_lr_fraction
        below = floor + (1 - floor) * c
        # With a floor of 0 both rates end at 0; their quotient is `peak` all the way there.
        quotient = (floor + (self.peak - floor) * c) / below if below > 1e-12 else self.peak
        return quotient if self.ramp is None else min(quotient, 1 + p * (self.peak - 1) / self.ramp)


@dataclass(frozen=True)
class Ramp:
    """`start` up to step `begin`, a straight line to `end` at step `until`, and `end` from there on."""

    start: float
    end: float
    begin: int
    until: int

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.until:
            raise InputError(
                f"a ramp needs 0 <= begin <= until, got {self.begin} and {self.until}", todo="give both in steps"
            )

    def __call__(self, step: int) -> float:
        if step <= self.begin:
            return self.start
        if step >= self.until:
            return self.end
        return self.start + (self.end - self.start) * (step - self.begin) / (self.until - self.begin)


@dataclass(frozen=True)
class WarmupCosine:
    """Learning rate: linear from 0 to `peak`, then a cosine to `min_lr_fraction` of it."""

    peak: float
    warmup: int
    total: int
    min_lr_fraction: float = 0.1

    def __post_init__(self) -> None:
        _check(self.warmup, self.total)

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * step / self.warmup
        p = min((step - self.warmup) / (self.total - self.warmup), 1.0)
        return self.peak * (self.min_lr_fraction + (1 - self.min_lr_fraction) * 0.5 * (1 + math.cos(math.pi * p)))


@dataclass(frozen=True)
class WarmupStableDecay:
    """Learning rate: linear from 0 to `peak`, flat until `stable` of all steps, then linear to `min_lr_fraction`."""

    peak: float
    warmup: int
    total: int
    stable: float = 0.8
    min_lr_fraction: float = 0.0

    def __post_init__(self) -> None:
        _check(self.warmup, self.total)

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * step / self.warmup
        start = self.stable * self.total
        p = min(max((step - start) / max(self.total - start, 1e-9), 0.0), 1.0)
        return self.peak * (1 + (self.min_lr_fraction - 1) * p)


def damping_ramp(beta1: float, beta2: float, warmup: int, total: int, schedule: str) -> Ramp:
    """Flat damping from beta1, as the warm-up ends, to beta2: at mid-run for "cosine", after 3 warm-ups for "wsd"."""
    _check(warmup, total)
    share = 0.5 if schedule == "cosine" else 2 * warmup / total
    return Ramp(beta1, beta2, warmup, warmup + math.floor(share * (total - warmup)))


def at(value: Value, step: int) -> float:
    """A number, or a schedule's value at `step`."""
    return float(value(step)) if callable(value) else float(value)


def describe(value: Any) -> Any:
    """`value` as plain numbers and strings: for checkpoints, and to compare two settings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    return "callable" if callable(value) else value
