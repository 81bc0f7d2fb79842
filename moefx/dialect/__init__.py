"""The dialect: the `moefx::` ops of which graphs are made between capture and code generation.

Importing this package registers the ops. Each has a schema, a fake (shapes and dtypes without data), a readable
reference that runs on any device, and a backward written in the same dialect, so that a joint graph shows fprop, dgrad
and wgrad as nodes of one kind.
"""

from . import experts, gemm, glu, routing
from .experts import ExpertsSpec
from .glu import GluKind

OPS = (
    "plan",
    "permute",
    "unpermute",
    "unpermute_backward",
    "gather_weights",
    "scatter_weights",
    "plan_permute",
    "grouped_mm",
    "grouped_wgrad",
    "grouped_bias",
    "group_sum",
    "glu",
    "glu_backward",
    "experts",
)

__all__ = ["OPS", "ExpertsSpec", "GluKind", "experts", "gemm", "glu", "routing"]
