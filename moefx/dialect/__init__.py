"""The dialect: the `moefx::` ops of which graphs are made between capture and code generation.

Importing this package registers the ops. Each has a schema, a fake (shapes and dtypes without data), a readable
reference that runs on any device, and a backward written in the same dialect, so that a joint graph shows fprop, dgrad
and wgrad as nodes of one kind.
"""

from . import (
    delayed,
    experts,
    fused_gemm,
    gemm,
    glu,
    inject,
    overlap,
    route,
    routing,
    scaled,
    scaled_gemm,
    scaled_glu,
    token_route,
    topk_route,
    wires,
)
from .experts import ExpertsSpec
from .glu import GluKind
from .route import RouteSpec

OPS = (
    "plan",
    "choice_plan",
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
    "permute_grouped_mm",
    "permute_grouped_mm_glu",
    "permute_grouped_wgrad",
    "glu",
    "glu_backward",
    "glu_backward_again",
    "overlap",
    "overlap_backward",
    "inject",
    "inject_seed",
    "experts",
    "expert_choice",
    "route",
    "topk_route",
    "topk_route_backward",
    "token_route",
    "dispatch",
    "combine",
    "quantize",
    "dequantize",
    "permute_scaled",
    "transpose_scaled",
    "convert",
    "scaled_grouped_mm",
    "scaled_grouped_mm_quantize",
    "scaled_grouped_wgrad",
    "glu_quantize",
    "glu_backward_quantize",
    "quantize_delayed",
    "gather_amax",
)

__all__ = [
    "OPS",
    "ExpertsSpec",
    "GluKind",
    "RouteSpec",
    "delayed",
    "experts",
    "fused_gemm",
    "gemm",
    "glu",
    "inject",
    "overlap",
    "route",
    "routing",
    "scaled",
    "scaled_gemm",
    "scaled_glu",
    "token_route",
    "topk_route",
    "wires",
]
