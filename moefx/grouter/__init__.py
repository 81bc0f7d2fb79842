"""Preemptive routing: train a Grouter, check it, and fit it to a target (docs/grouter.md)."""

from __future__ import annotations

from ..models.grouter import Grouter, GrouterCache, GrouterConfig, NonCausalWarning
from .check import Consistency, assert_causal, prefix_consistency
from .distill import DistillReport, distill
from .tap import Tap, tap
from .tune import TuneReport, tune

# `moefx.grouter.distill` is the function; its module is sys.modules["moefx.grouter.distill"].
__all__ = [
    "Consistency",
    "DistillReport",
    "Grouter",
    "GrouterCache",
    "GrouterConfig",
    "NonCausalWarning",
    "Tap",
    "TuneReport",
    "assert_causal",
    "distill",
    "prefix_consistency",
    "tap",
    "tune",
]
