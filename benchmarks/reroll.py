"""CPU time of `raise_idioms` on unrolled loops over experts, by number of experts and layers.

    python benchmarks/reroll.py [--experts 8,16,32,64] [--layers 1,4]

One layer is captured per number of experts, and its graph is chained to itself for more layers, each with parameters
of its own: capturing 64 unrolled experts in 4 layers takes minutes and is not what is measured. The time is that of the
pass in the pass manager, with all its checks and the proof, on one thread. Rows go to benchmarks/results/reroll.csv.
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import fx

from moefx.capture import capture
from moefx.manager import PassManager
from moefx.models.moe_lm import IDIOMS
from moefx.passes import RaiseIdioms
from moefx.report import Report

RESULTS = Path(__file__).parent / "results" / "reroll.csv"


def chained(gm: fx.GraphModule, layers: int) -> fx.GraphModule:
    """The graph of a layer, applied several times; every time with other parameters."""
    graph = fx.Graph()
    source = next(n for n in gm.graph.find_nodes(op="placeholder") if n.type is torch.Tensor)
    x: Any = graph.node_copy(source)
    tables: list[dict[fx.Node, fx.Node]] = [{} for _ in range(layers)]
    for i, table in enumerate(tables):
        for p in gm.graph.find_nodes(op="placeholder"):
            if p is not source:
                table[p] = graph.node_copy(p)
                table[p].target = f"{p.target}{i}"
    for table in tables:
        table[source] = x
        for node in gm.graph.nodes:
            if node.op not in ("placeholder", "output"):
                table[node] = graph.node_copy(node, table.__getitem__)
        x = table[gm.graph.output_node().args[0][0]]
    graph.output((x,))
    return fx.GraphModule(gm, graph)


def measure(idiom: str, experts: int, layer_counts: list[int]) -> list[dict[str, Any]]:
    """A row per number of layers."""
    torch.manual_seed(0)
    layer = IDIOMS[idiom](32, 48, experts, 2)
    start = time.process_time()
    found = capture(layer, (torch.randn(4, 64, 32),), {})
    captured = time.process_time() - start
    rows = []
    for layers in layer_counts:
        gm, report = chained(found.gm, layers), Report()
        nodes = len(gm.graph.nodes)
        start = time.process_time()
        PassManager((RaiseIdioms(),)).run("model", gm, report, found.gm.meta["fake_mode"])
        seconds = time.process_time() - start
        row = report.passes[0]
        if row.matched != layers:
            raise SystemExit(f"{row.matched} of {layers} layers were raised: {row.rejected}")
        rows.append(
            {"idiom": idiom, "experts": experts, "layers": layers, "nodes": nodes, "nodes_after": len(gm.graph.nodes)}
            | {"seconds": round(seconds, 3), "ms_per_expert": round(1e3 * seconds / experts / layers, 2)}
            | {"capture_one_layer": round(captured, 2)}
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idioms", default="A2")
    parser.add_argument("--experts", default="8,16,32,64")
    parser.add_argument("--layers", default="1,4")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    layers = [int(n) for n in args.layers.split(",")]
    rows = [
        row
        for idiom in args.idioms.split(",")
        for experts in args.experts.split(",")
        for row in measure(idiom, int(experts), layers)
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
