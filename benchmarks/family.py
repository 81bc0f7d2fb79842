"""Optimized against original for every family of the model zoo: loss, gradients, bf16 rounding, graph size, time.

    python benchmarks/family.py [--only mixtral,gpt_oss]

Runs on one CPU thread with eager codegen and all default passes. Rows go to benchmarks/results/family.csv, and a table
in Markdown, as in docs/models.md, to standard output. The comparisons are those of tests/family/test_family.py
and test_loops.py.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "family.csv"
sys.path.insert(0, str(ROOT))

COLUMNS = {
    "family": "family",
    "blocks": "MoE blocks raised",
    "idiom": "read as",
    "loss": "loss difference, fp32",
    "gradient": "worst gradient difference, fp32",
    "bf16_loss": "loss difference, bf16",
    "bf16_ratio": "bf16 error / original's own",
    "joint_nodes": "joint nodes",
    "seconds": "optimize, CPU s",
    "error": "error",
}


def measure(name: str) -> dict[str, Any]:
    """One row: the family in fp32 and in bf16. An exception becomes the row's error."""
    import torch

    import moefx
    from tests.family import loops, zoo
    from tests.family.compare import BF16_BATCHES, gradient_error, rounding, structure_faults, train_step

    made: Any = zoo if name in zoo.NAMES else loops
    entry = made.get(name)
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {"family": name}
    try:
        model, inputs = made.build(entry), made.batch(entry)
        start = time.process_time()
        opt = moefx.optimize(model, inputs, codegen="eager")
        row["seconds"] = round(time.process_time() - start, 1)
        blocks = opt.report.blocks
        row["blocks"] = f"{sum(b['raised'] for b in blocks)} of {len(blocks)}"
        row["idiom"] = "; ".join(sorted({b["idiom"] for b in blocks if b["raised"]}))
        row["joint_nodes"] = opt.report.stages["joint"]["nodes"]
        want, got = train_step(model, inputs), train_step(opt, inputs)
        if faults := structure_faults(got, want):
            raise AssertionError("; ".join(faults))
        row["loss"] = abs(float(got.loss - want.loss))
        row["gradient"] = gradient_error(got, want)

        narrow, exact = made.build(entry, dtype=torch.bfloat16), made.build(entry)
        exact.load_state_dict({k: v.float() for k, v in narrow.state_dict().items()})
        opt = moefx.optimize(narrow, inputs, codegen="eager")
        losses, ratios = [], []
        for seed in BF16_BATCHES:
            batch = made.batch(entry, seed)
            want, got, own = train_step(exact, batch), train_step(opt, batch), train_step(narrow, batch)
            losses.append(abs(float(got.loss - own.loss)))
            ratios.append(rounding(own, got, want).ratio)
        row["bf16_loss"], row["bf16_ratio"] = statistics.median(losses), round(statistics.median(ratios), 2)
    except Exception as e:
        row["error"] = f"{type(e).__name__}: {e}".splitlines()[0]
    return row


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table; the error column only where there is one."""
    keys = [k for k in COLUMNS if k != "error" or any(r["error"] for r in rows)]
    lines = ["| " + " | ".join(COLUMNS[k] for k in keys) + " |", "|" + "---|" * len(keys)]
    return "\n".join(lines + ["| " + " | ".join(cell(r[k]) for k in keys) + " |" for r in rows])


def cell(value: Any) -> str:
    """A value as it stands in the table."""
    if isinstance(value, float) and (value == 0 or value < 0.01):
        return "0" if value == 0 else f"{value:.0e}"
    return str(value).replace("|", "\\|") or "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated family names; the CSV file is then left as it is")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    from tests.family import loops, zoo

    names = args.only.split(",") if args.only else [*zoo.NAMES, *loops.NAMES]
    measure(names[0])  # imports and caches, so that the first row's time is like the others'
    rows = []
    for name in names:
        rows.append(measure(name))
        print(f"{name}: {rows[-1]['error'] or 'done'}", file=sys.stderr)
    if not args.only:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("w", newline="") as f:
            writer = csv.DictWriter(f, list(COLUMNS))
            writer.writeheader()
            writer.writerows(rows)
    print(markdown(rows))


if __name__ == "__main__":
    main()
