"""The recipes that come with moefx, each with the paper or library it follows; docs/precision.md compares them."""

from __future__ import annotations

from .recipe import BF16, Recipe, register_recipe

# FP8-Flow-MoE (arXiv 2511.02302): E4M3 with power-of-two scales everywhere, so that no format changes a value twice.
_ROW, _COL, _TILE = (f"e4m3 {block} po2/rceil eps=1e-10" for block in ("1x128", "128x1", "128x128"))
FP8_FLOW = register_recipe(
    Recipe(
        "fp8_flow",
        "FP8 1x128 with power-of-two scales on the wire, in products and in memory; casts propagated: 12 become 2",
        specs={
            "input.wire": _ROW, "input.fprop": _ROW, "input.stored": _ROW, "input.wgrad": _COL,
            "weight.fprop": _TILE, "weight.dgrad": _TILE,
            "grad.wire": _ROW, "grad.dgrad": _ROW, "grad.wgrad": _COL,
            "hidden.stored": _ROW,
        },
        accumulate={"fprop": "promote128", "dgrad": "promote128", "wgrad": "promote128"},
    )
)  # fmt: skip
FP8_NAIVE = register_recipe(
    FP8_FLOW.replace(
        "fp8_naive", "the formats of fp8_flow with every cast where a library would make it: 12", propagate=False,
        fuse=False,
    )
)  # fmt: skip

# TransformerEngine's Float8BlockScaling: both orientations from the wide tensor, nothing narrow on the wire.
FP8_BLOCKWISE = register_recipe(
    FP8_FLOW.replace(
        "fp8_blockwise",
        "FP8 blocks as TransformerEngine computes them: both orientations from the wide tensor, wide wires",
        specs={"input.wire": None, "grad.wire": None, "input.stored": _COL, "hidden.stored": None},
    )
)

# DeepSeek-V3 (arXiv 2412.19437): exact fp32 scales, power-of-two ones for dispatched activations and their gradient.
_EXACT, _EXACT_COL, _EXACT_TILE = (f"e4m3 {block} f32/exact" for block in ("1x128", "128x1", "128x128"))
DEEPSEEK_V3 = register_recipe(
    FP8_FLOW.replace(
        "deepseek_v3",
        "FP8 with exact scales for down inputs and up gradients, power-of-two scales for what is dispatched",
        specs={
            "weight.fprop": _EXACT_TILE, "weight.dgrad": _EXACT_TILE,
            "down.input.fprop": _EXACT, "down.input.stored": _EXACT, "down.input.wgrad": _EXACT_COL,
            "up.grad.dgrad": _EXACT, "up.grad.wgrad": _EXACT_COL,
            "hidden.stored": _EXACT,
        },
    )
)  # fmt: skip

# torchao's row-wise FP8 grouped training: a scale per row (or column), wide memory and wires.
_BY_ROW, _BY_COL = "e4m3 row po2/rceil eps=1e-12", "e4m3 column po2/rceil eps=1e-12"
FP8_ROWWISE = register_recipe(
    Recipe(
        "fp8_rowwise",
        "FP8 with one power-of-two scale per row or column of each operand",
        specs={
            "input.fprop": _BY_ROW, "input.wgrad": _BY_COL, "weight.fprop": _BY_ROW, "weight.dgrad": _BY_ROW,
            "grad.dgrad": _BY_ROW, "grad.wgrad": _BY_COL,
        },
        align=16,
    )
)  # fmt: skip

# Current (not delayed) per-tensor scaling as in TransformerEngine and torchao: gradients in E5M2.
_TENSOR, _GRAD_TENSOR = "e4m3 tensor f32/exact eps=1e-12", "e5m2 tensor f32/exact eps=1e-12"
FP8_TENSORWISE = register_recipe(
    Recipe(
        "fp8_tensorwise",
        "FP8 with one current scale per tensor; E5M2 gradients",
        specs={
            "input.fprop": _TENSOR, "input.stored": _TENSOR, "input.wgrad": _TENSOR,
            "weight.fprop": _TENSOR, "weight.dgrad": _TENSOR, "grad.dgrad": _GRAD_TENSOR, "grad.wgrad": _GRAD_TENSOR,
        },
        align=16,
    )
)  # fmt: skip

# TransformerEngine's DelayedScaling: scales from the largest magnitude of the last 1024 steps, HYBRID formats.
FP8_DELAYED = register_recipe(
    FP8_TENSORWISE.replace(
        "fp8_delayed",
        "FP8 with one scale per tensor from the largest magnitudes of earlier steps; E5M2 gradients",
        specs={k: f"{s.removesuffix(' eps=1e-12')} delayed" for k, s in FP8_TENSORWISE.specs.items()},
        amax_history=1024,
    )
)

# OCP MX v1.0 blocks of 32 with E8M0 scales, RCEIL as TransformerEngine and cuBLAS round them.
_MX, _MX_COL = "e4m3 1x32 e8m0/rceil", "e4m3 32x1 e8m0/rceil"
MXFP8 = register_recipe(
    Recipe(
        "mxfp8",
        "MXFP8: E4M3 in blocks of 32 with E8M0 scales on the wire, in products and in memory",
        specs={
            "input.wire": _MX, "input.fprop": _MX, "input.stored": _MX, "input.wgrad": _MX_COL,
            "weight.fprop": _MX, "weight.dgrad": _MX,
            "grad.wire": _MX, "grad.dgrad": _MX, "grad.wgrad": _MX_COL,
            "hidden.stored": _MX,
        },
        align=32,
    )
)  # fmt: skip

# Practical FP4 training on Hopper (arXiv 2603.02731): FP4 travels and is stored in the forward, products are FP8.
_FP4 = "e2m1 1x32 e8m0/rceil"
MXFP4_HOPPER = register_recipe(
    FP8_FLOW.replace(
        "mxfp4_hopper",
        "MXFP4 on the forward wire and in memory, FP8 products and an FP8 backward",
        specs={"input.wire": _FP4, "input.stored": _FP4, "hidden.stored": _FP4},
        align=32,
    )
)

# TransformerEngine's NVFP4BlockScaling without its random Hadamard transform: E4M3 block scales under one fp32 scale.
_NV, _NV_COL, _NV_TILE = (f"e2m1 {block} e4m3+f32/exact" for block in ("1x16", "16x1", "16x16"))
NVFP4 = register_recipe(
    Recipe(
        "nvfp4",
        "NVFP4: E2M1 in blocks of 16 with two-level scales, gradients rounded stochastically",
        specs={
            "input.fprop": _NV, "input.stored": _NV_COL, "input.wgrad": _NV_COL,
            "weight.fprop": _NV_TILE, "weight.dgrad": _NV_TILE,
            "grad.dgrad": f"{_NV} sr", "grad.wgrad": f"{_NV_COL} sr",
        },
        align=16,
    )
)  # fmt: skip

BUILT_IN = {
    r.name: r
    for r in (
        BF16, FP8_NAIVE, FP8_FLOW, FP8_BLOCKWISE, DEEPSEEK_V3, FP8_ROWWISE, FP8_TENSORWISE, FP8_DELAYED, MXFP8,
        MXFP4_HOPPER, NVFP4,
    )
}  # fmt: skip
