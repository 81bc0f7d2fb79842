"""Grouter: preemptive routing by a small frozen network that reads token ids (arXiv 2603.06626)."""

from .affinity import AffinityResult, affinity
from .expand import expand
from .fold import FoldReport, fold, fold_report
from .groups import group_experts, retained
from .windows import routed

__all__ = [
    "AffinityResult",
    "FoldReport",
    "affinity",
    "expand",
    "fold",
    "fold_report",
    "group_experts",
    "retained",
    "routed",
]
