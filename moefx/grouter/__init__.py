"""Preemptive routing: train a Grouter, check it, and fit it to a target (docs/grouter.md)."""

from __future__ import annotations

from ..models.grouter import Grouter, GrouterCache, GrouterConfig, NonCausalWarning
from .check import Consistency, assert_causal, prefix_consistency
from .tap import Tap, tap

__all__ = [
    "Consistency",
    "Grouter",
    "GrouterCache",
    "GrouterConfig",
    "NonCausalWarning",
    "Tap",
    "assert_causal",
    "prefix_consistency",
    "tap",
]
