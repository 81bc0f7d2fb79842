"""What raising hand-written blocks costs, and how large their joint graph is.

`moefx.optimize` of `MoELM` with 64 experts a layer (idiom A2, hidden 64, width 32, top-4), codegen "eager", one thread:
wall time per stage and process CPU time, a process for each depth. Then the nodes of the joint graph of one layer,
top-2, for several numbers of experts. Raw rows go to benchmarks/results/raise_time.csv and raise_nodes.csv.

    python benchmarks/raise_time.py [--layers 1,9,27] [--experts 4,8,16,32,64] [--idioms A1,A2,A3,A5]
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def one(layers: int, experts: int, k: int, idiom: str) -> dict[str, Any]:
    """Seconds and node counts of one optimize()."""
    import torch

    import moefx
    from moefx.models.moe_lm import MoELM

    torch.set_num_threads(1)
    model = MoELM(256, 64, 32, layers, 4, experts, k, idiom)
    ids = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(0))
    wall, cpu = time.perf_counter(), time.process_time()
    opt = moefx.optimize(model, {"input_ids": ids, "labels": ids}, codegen="eager")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert all(b["raised"] for b in opt.report.to_dict()["blocks"])
    nodes = list(opt.graphs["joint"].graph.nodes)
    return {
        "idiom": idiom,
        "layers": layers,
        "experts": experts,
        "wall": wall,
        "cpu": cpu,
        "nodes": len(nodes),
        "calls": sum(n.op == "call_function" for n in nodes),
        **{name: s["seconds"] for name, s in opt.report.stages.items()},
    }


def run(layers: int, experts: int, k: int, idiom: str) -> dict[str, Any] | None:
    command = [sys.executable, __file__, "--one", f"{layers},{experts},{k},{idiom}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{idiom}, {layers} layers, {experts} experts: failed\n{done.stderr[-500:]}", flush=True)
        return None
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def write(name: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / name).open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} for r in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="1,9,27")
    parser.add_argument("--experts", default="4,8,16,32,64")
    parser.add_argument("--idioms", default="A1,A2,A3,A5")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        layers, experts, k, idiom = args.one.split(",")
        print(json.dumps(one(int(layers), int(experts), int(k), idiom)))
        return
    rows = []
    for layers in filter(None, args.layers.split(",")):
        if (row := run(int(layers), 64, 4, "A2")) is None:
            continue
        rows.append(row)
        print(
            f"{layers} layers: raise {row['raise']:.1f} s, capture {row['capture']:.1f} s, joint {row['joint']:.1f} s, "
            f"all {row['wall']:.1f} s wall, {row['cpu']:.1f} s CPU, {row['nodes']} joint nodes",
            flush=True,
        )
    write("raise_time.csv", rows)
    tried = [run(1, int(e), 2, idiom) for idiom in args.idioms.split(",") for e in args.experts.split(",")]
    rows = [row for row in tried if row is not None]
    for row in rows:
        print(f"{row['idiom']}, {row['experts']} experts: {row['nodes']} joint nodes, {row['calls']} of them calls")
    write("raise_nodes.csv", [{k: r[k] for k in ("idiom", "layers", "experts", "nodes", "calls")} for r in rows])


if __name__ == "__main__":
    main()
