"""Kernels, layers and a training step on one GPU: `make bench-gpu`.

    python -m benchmarks.gpu [--parts peaks ops layers step] [--minutes 8.5] [--only TEXT] [--retry]
    python -m benchmarks.gpu --device cpu --small --out DIR      tries the script where there is no GPU
    python -m benchmarks.gpu --table                             the tables of docs/performance.md
    python -m benchmarks.gpu --plot                              their drawings, from results/gpu.csv
    python -m benchmarks.gpu --decide                            layers as rows of kernels/decisions.csv

Every run first measures what the machine can do (copy bandwidth, GEMM rates); each figure stands beside its floor: the
larger of its bytes over the copy bandwidth and its operations over the GEMM rate. One row per case and provider goes to
results/gpu.csv as it is measured, with commit, device, driver and clocks under load. A run ends before its minutes are
over; the next one skips what is there of the same sources and device and goes on, and what decides comes first: the
kernels of training, layers of three shapes, the step; then other ops, layers and routings, and last references and
peers. A case that fails leaves a row that says with what, and is tried again with --retry.

Operands are random numbers, not zeros. Times are medians of device events over up to 30 calls with the L2 cache flushed
in between, after warm-up; those of single ops begin when the host has launched all of a call. What is not installed of
the peers (peers.py) is left out and named at the end. FLOP convention of the layer as in SonicMoE and Liger:
6 S H I forward, 12 S H I backward.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from . import layers, ops, plot, step
from .cases import Case
from .machine import Machine, measure_peaks
from .records import append, done, read, record, row_of, table

RESULTS = Path(__file__).parents[1] / "results"
PARTS = ("peaks", "ops", "layers", "step")
SECONDS = {"ops": 5.0, "layers": 60.0, "step": 90.0}  # of a case, until one of its part was longer


def every_case(device: str = "cuda", small: bool = False) -> list[Case]:
    """All cases, by part."""
    return [*ops.cases(device, small), *layers.cases(device, small), *step.cases(device, small)]


def planned() -> list[tuple[str, str, str]]:
    """Part, case and provider of every row that a full run writes."""
    return [(c.part, name, c.provider) for c in every_case() for name in c.names]


def run_case(machine: Any, case: Case, missing: set[str], file: Path) -> bool:
    """Measure one case and write its rows, also where it fails; False: the device is of no use to this process now."""
    rows, failed = [], False
    try:
        for name, found in zip(case.names, case.run(machine, missing) or (), strict=False):
            rows.append(row_of(machine, case.part, {"case": name, "provider": case.provider, **found}))
    except Exception as error:
        failed = True
        why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        about = {"part": case.part, "provider": case.provider, "error": why, **machine.about}
        rows = [{"case": name, **about} for name in case.names]
    for row in rows:
        append(file, row)
        ms, fraction = (float(row.get(k) or 0) for k in ("ms", "fraction"))
        figures = f"failed: {row['error']}" if failed else f"{ms:9.3f} ms  {fraction:5.2f} of the floor"
        print(f"{case.part:7} {row['case']:56} {case.provider:22} {figures}", flush=True)
    if not failed and (case.part == "ops" or not rows):
        return True  # nothing was left behind, or operands of the next one
    ops.release()
    try:
        machine.fresh()  # not before the error is forgotten, which holds the tensors of its frames
    except Exception as error:
        print(f"the device does not answer after {case.names[0]}: {error}; run again to go on")
        return False
    return True


def run_all(machine: Any, cases: Iterable[Case], file: Path, known: set[tuple[str, str]], end: float) -> set[str]:
    """Measure what is not known and fits before `end`; which packages are missing."""
    missing: set[str] = set()
    longest, begun = dict(SECONDS), False
    left = [c for c in cases if any((name, c.provider) not in known for name in c.names)]
    for i, case in enumerate(left):
        begin = time.monotonic()
        if begin + (longest[case.part] if begun else 0) > end:  # the first one is begun in any case, or none ever were
            print(f"time is over with {len(left) - i} cases left; run again to go on with {case.names[0]}")
            break
        if case.part != "ops":
            ops.release()
        begun = True
        if not run_case(machine, case, missing, file):
            sys.exit(1)
        longest[case.part] = max(longest[case.part], time.monotonic() - begin)
    ops.release()
    return missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8.5, help="begin no case that would end after this time")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--retry", action="store_true", help="run again what failed on these sources")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU can do")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--decide", action="store_true", help="write kernels/decisions.csv from what was measured")
    parser.add_argument("--table", action="store_true", help="print the tables and measure nothing")
    parser.add_argument("--plot", action="store_true", help="draw what was measured and measure nothing")
    args = parser.parse_args()
    file = args.out / "gpu.csv"
    if args.table:
        print(table(read(file), planned()))
        return
    if args.plot:
        drawn = plot.plot(read(file), args.out)
        print("\n".join(map(str, drawn)) or f"not yet measured: {file} has no row of a GPU, nothing is drawn")
        return
    if args.decide:
        record(file, Path(__file__).parents[2] / "kernels" / "decisions.csv")
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here: every row stays 'not yet measured' (--device cpu --small tries the script)")
    if args.device == "cpu" and args.out == RESULTS:
        sys.exit("times of a CPU do not belong into results/gpu.csv: give another folder with --out")
    end = time.monotonic() + 60 * args.minutes
    machine = Machine(args.device)
    known = done(read(file), machine.about, args.retry)
    for found in measure_peaks(machine, args.small):
        append(file, row_of(machine, "peaks", found))
    print({k: f"{v:.3g}" for k, v in machine.peaks.items()}, machine.about)
    wanted = sorted(every_case(args.device, args.small), key=lambda c: c.rank)
    wanted = [c for c in wanted if c.part in args.parts]
    wanted = [c for c in wanted if any(args.only in name for name in c.names)]
    missing = run_all(machine, wanted, file, known, end)
    if missing:
        print("not installed, so not measured:", ", ".join(sorted(missing)))


if __name__ == "__main__":
    main()
