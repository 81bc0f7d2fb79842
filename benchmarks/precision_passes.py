"""Wall time of the precision passes on a deep training graph of DeepSeek-V3's dimensions, built without memory.

    python benchmarks/precision_passes.py [--layers 4,16,61] [--recipe fp8_flow]

The model is a chain of MoE layers (router, 256 experts, top-8, H=7168, I=2048, residual) on the meta device: shapes and
dtypes without data. It is captured and traced like any other; timed are the passes of the recipe on the training graph.
Raw rows go to benchmarks/results/precision_passes.csv.
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results" / "precision_passes.csv"
PASSES = (
    "quantize", "propagate_scales", "fold_casts", "transpose_scales", "fuse_casts", "lower_wires",
    "store_low_precision",
)  # fmt: skip


class Chain(torch.nn.Module):
    """MoE layers with a softmax router, each behind a norm and around a residual."""

    def __init__(self, layers: int) -> None:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        super().__init__()
        self.config = Qwen3MoeConfig(
            hidden_size=7168, moe_intermediate_size=2048, num_experts=256, num_experts_per_tok=8,
            experts_implementation="grouped_mm",
        )  # fmt: skip
        self.layers = torch.nn.ModuleList(Qwen3MoeSparseMoeBlock(self.config) for _ in range(layers))
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(7168) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, T, H]."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return x.float().square().mean()


def one(layers: int, recipe: str) -> dict[str, float]:
    """Seconds of each precision pass, nodes before and casts counted."""
    import moefx
    from moefx import compat
    from moefx.capture import capture
    from moefx.graph.edit import value
    from moefx.joint import trace_joint
    from moefx.ledger import ledger
    from moefx.passes.raise_experts import raised
    from moefx.report import Report

    with torch.device("meta"):
        model = Chain(layers).bfloat16().train()
        x = torch.empty(1, 4096, 7168, dtype=torch.bfloat16, requires_grad=True)
    start = time.perf_counter()
    with raised(model):
        captured = capture(model, (x,), {})
    manager, report = moefx.pipeline(recipe, codegen="eager"), Report()
    fakes = [value(n) for n in captured.graph.find_nodes(op="placeholder")]
    manager.run("model", captured.gm, report, compat.fake_mode_of(fakes))
    joint = trace_joint(captured, grad=True, codegen="eager")
    traced = time.perf_counter() - start
    nodes = len(joint.graph.nodes)
    manager.run("training", joint.gm, report, joint.fake_mode)
    casts = ledger(report.graphs.graph("quantize"), joint.graph, report.passes)
    assert (casts["before"], casts["after"]) == (12 * layers, 2 * layers), casts
    seconds = {p.name: p.seconds for p in report.passes if p.name in PASSES}
    return {"layers": layers, "joint_nodes": nodes, "trace": traced, **seconds, "total": sum(seconds.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="4,16,61")
    parser.add_argument("--recipe", default="fp8_flow")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = []
    for layers in args.layers.split(","):
        row = one(int(layers), args.recipe)
        rows.append(row)
        print(
            f"{layers} layers: {row['joint_nodes']} nodes traced in {row['trace']:.1f} s; precision passes "
            f"{row['total']:.1f} s, {1e3 * row['total'] / int(layers):.0f} ms a layer"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: round(v, 3) for k, v in r.items()} for r in rows)


if __name__ == "__main__":
    main()
