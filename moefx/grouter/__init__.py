"""Preemptive routing: train a Grouter, check it, fit it to a target, precompute and place (docs/grouter.md).

After "Grouter: Decoupling Routing from Representation for Accelerated MoE Training" (arXiv 2603.06626).
"""

from __future__ import annotations

from ..models.grouter import FutureTokensWarning, Grouter, GrouterCache, GrouterConfig
from .affinity import AffinityResult, affinity
from .check import Consistency, assert_causal, prefix_consistency
from .distill import DistillReport, distill
from .expand import expand
from .fold import FoldReport, fold, fold_report
from .groups import group_experts, retained
from .place import Placement, PlacementReport, place
from .precompute import precompute
from .records import RoutingRecords
from .tap import Tap, tap
from .traffic import coactivation_graph, uniform_traffic
from .tune import TuneReport, tune
from .windows import routed

# `moefx.grouter.distill` is the function; its module is sys.modules["moefx.grouter.distill"].
__all__ = [
    "AffinityResult",
    "Consistency",
    "DistillReport",
    "FoldReport",
    "FutureTokensWarning",
    "Grouter",
    "GrouterCache",
    "GrouterConfig",
    "Placement",
    "PlacementReport",
    "RoutingRecords",
    "Tap",
    "TuneReport",
    "affinity",
    "assert_causal",
    "coactivation_graph",
    "distill",
    "expand",
    "fold",
    "fold_report",
    "group_experts",
    "place",
    "precompute",
    "prefix_consistency",
    "retained",
    "routed",
    "tap",
    "tune",
    "uniform_traffic",
]
