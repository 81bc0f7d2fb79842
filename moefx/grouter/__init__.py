"""Grouter: preemptive routing by a small frozen network that reads token ids (arXiv 2603.06626)."""

from .affinity import AffinityResult, affinity
from .expand import expand
from .fold import FoldReport, fold, fold_report
from .groups import group_experts, retained
from .place import Placement, PlacementReport, place
from .precompute import precompute
from .records import RoutingRecords
from .traffic import coactivation_graph, uniform_traffic
from .windows import routed

__all__ = [
    "AffinityResult",
    "FoldReport",
    "Placement",
    "PlacementReport",
    "RoutingRecords",
    "affinity",
    "coactivation_graph",
    "expand",
    "fold",
    "fold_report",
    "group_experts",
    "place",
    "precompute",
    "retained",
    "routed",
    "uniform_traffic",
]
