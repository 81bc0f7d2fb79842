"""Wall time of `moefx.optimize` per layer, eager codegen, all default passes; per stage.

    python benchmarks/compile_time.py [--layers 8,16,32]

Each depth runs in a process of its own, so that caches and the torch import do not favour the later ones. Raw rows go
to benchmarks/results/compile_time.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "compile_time.csv"


def one(layers: int) -> dict[str, float]:
    """Stage seconds of one optimize() on a Qwen3-MoE of the given depth."""
    warnings.filterwarnings("ignore")
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    import moefx

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).train()
    ids = torch.randint(0, 256, (2, 32))
    inputs = {"input_ids": ids, "labels": ids}
    start = time.perf_counter()
    opt = moefx.optimize(model, inputs, codegen="eager")
    total = time.perf_counter() - start
    opt(**inputs).loss.backward()
    stages = {name: s["seconds"] for name, s in opt.report.stages.items()}
    return {"layers": layers, "total": total, "nodes": opt.report.stages["joint"]["nodes"], **stages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="8,16,32")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one)))
        return
    rows = []
    for layers in args.layers.split(","):
        out = subprocess.run(
            [sys.executable, __file__, "--one", layers], capture_output=True, text=True, check=True
        ).stdout
        row = json.loads(out.strip().splitlines()[-1])
        rows.append(row)
        stages = ", ".join(f"{k} {v:.2f}" for k, v in row.items() if k not in ("layers", "total", "nodes"))
        print(
            f"{layers} layers: {row['total']:.1f} s, {row['total'] / int(layers):.2f} s a layer, "
            f"{row['nodes']:.0f} joint nodes ({stages})"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: round(v, 4) for k, v in r.items()} for r in rows)


if __name__ == "__main__":
    main()
