"""Random MoE layers, each raised or refused with a reason, and nothing different: the property test at length.

    python benchmarks/random_layers.py --examples 500        goes on where benchmarks/results/random_layers.csv ends

The layers and the check are those of tests/raising/test_random.py (which tries 50 in every run): number of experts,
top-k, widths, biases, activation, gating order, normalisation, shared experts, capacity, dtype, layout, idiom. A row
per layer, drawn in chunks of 25 by hypothesis with the chunk's number as its seed. Ends with status 1 after a
difference or a crash, which is in the row.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.raising.random_moe import Config, configs, describe
from tests.raising.test_random import check_raising

RESULTS = Path(__file__).parent / "results" / "random_layers.csv"
FIELDS = ("chunk", "layer", "outcome", "reason", "seconds")
CHUNK = 25


def chunk(number: int) -> list[dict[str, Any]]:
    """The rows of one chunk."""
    torch.set_num_threads(1)
    drawn: list[Config] = []
    quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

    @seed(number)
    @settings(max_examples=CHUNK, phases=[Phase.generate], **quiet)
    @given(config=configs())
    def draw(config: Config) -> None:
        drawn.append(config)

    draw()
    return [row(number, config) for config in drawn]


def row(number: int, config: Config) -> dict[str, Any]:
    """One layer: raised, refused and why, or what went wrong."""
    begun = time.process_time()
    try:
        blocks = check_raising(config)
        raised = any(b.raised for b in blocks)
        why = "" if raised else next(str(b.reason) for b in blocks)
        outcome = "raised" if raised else "refused"
    except Exception as e:
        outcome, why = "failed", f"{type(e).__name__}: {e}"
    found = {"chunk": number, "layer": describe(config), "outcome": outcome, "reason": " ".join(why.split())[:300]}
    return {**found, "seconds": f"{time.process_time() - begun:.1f}"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if RESULTS.exists():
        with RESULTS.open(newline="") as f:
            rows = list(csv.DictReader(f))
    done = {int(r["chunk"]) for r in rows}
    numbers = [n for n in range(-(-options.examples // CHUNK)) if n not in done]
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for found in pool.imap_unordered(chunk, numbers):
            rows += found
            with RESULTS.open("w", newline="") as f:
                writer = csv.DictWriter(f, FIELDS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(sorted(rows, key=lambda r: int(r["chunk"])))
            tally = {o: sum(r["outcome"] == o for r in rows) for o in ("raised", "refused", "failed")}
            print(f"{len(rows)} layers: {tally}", flush=True)
    sys.exit(any(r["outcome"] == "failed" for r in rows))


if __name__ == "__main__":
    main()
