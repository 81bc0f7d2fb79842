"""Kernels, layers and a training step on one GPU: `make bench-gpu`.

    python benchmarks/gpu.py [--parts peaks ops layers step] [--minutes 9] [--only TEXT]
    python benchmarks/gpu.py --device cpu --small --out DIR      tries the script where there is no GPU
    python benchmarks/gpu.py --table                             the rows of docs/performance.md
    python benchmarks/gpu.py --decide                            layers as rows of kernels/decisions.csv

Every part first measures what the machine can do (copy bandwidth, GEMM rates); each figure stands beside its floor: the
larger of its bytes over the copy bandwidth and its operations over the GEMM rate. One row per case and provider goes to
results/gpu.csv as it is measured, with commit, device, driver and clocks; rows of the same commit and device are
skipped, so that a run that was stopped goes on. Operands are random numbers, not zeros. Times are medians of device
events over `REPEATS` calls with the L2 cache flushed in between, after warm-up.

What is not installed of the peers (gpu_peers.py) is left out and named at the end. FLOP convention of the layer as in
SonicMoE and Liger: 6 S H I forward, 12 S H I backward.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import gpu_layers
import gpu_ops

RESULTS = Path(__file__).parent / "results"
FIELDS = (
    "part", "case", "provider", "ms", "q1", "q3", "bytes", "flop", "floor_ms", "fraction", "saved_mib", "peak_mib",
    "tokens_per_s", "commit", "device", "driver", "clocks", "torch", "triton", "date",
)  # fmt: skip
REPEATS, WARM_UP = 30, 10
PARTS = ("peaks", "ops", "layers", "step")


class Machine:
    """What is measured on, and how time is taken there."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.peaks: dict[str, float] = {}
        self.flush = torch.empty(64 << 20, dtype=torch.int32, device=device) if device == "cuda" else None
        query = "name,driver_version,clocks.sm,clocks.mem"
        found = ["cpu", "", "", ""]
        if device == "cuda":
            line = subprocess.run(
                ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.splitlines()[0]
            found = [t.strip() for t in line.split(",")]
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        self.about = {
            "device": found[0], "driver": found[1], "clocks": f"{found[2]} / {found[3]}",
            "commit": commit.stdout.strip(), "torch": torch.__version__, "triton": _version("triton"),
            "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip

    def times(self, call: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
        """Milliseconds of each of `repeats` calls."""
        if self.device.type == "cpu":
            call()
            found = []
            for _ in range(2):
                start = time.process_time()
                call()
                found.append((time.process_time() - start) * 1e3)
            return found
        for _ in range(WARM_UP):
            call()
        events = []
        for _ in range(repeats):
            assert self.flush is not None
            self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in events]

    def floor_ms(self, nbytes: float, flop: float, rate: str) -> float:
        """The least time of an op on this machine, by what was measured here."""
        memory = nbytes / self.peaks["copy"] if nbytes else 0.0
        return 1e3 * max(memory, flop / self.peaks[rate] if flop else 0.0)


def _version(name: str) -> str:
    try:
        return str(__import__(name).__version__)
    except ImportError:
        return "not installed"


def measure_peaks(machine: Machine, small: bool) -> Iterator[dict[str, Any]]:
    """Copy bandwidth in byte/s (read plus written), bf16 and FP8 GEMM rates in FLOP/s."""
    n = (1 << 20) if small else (1 << 30)
    x, y = (torch.randn(n // 4, device=machine.device) for _ in range(2))
    ms = machine.times(lambda: y.copy_(x))
    machine.peaks["copy"] = 2 * n / statistics.median(ms) * 1e3
    yield {"case": f"copy of {n >> 20} MiB", "provider": "torch", "ms": ms, "bytes": 2 * n, "flop": 0}
    m = 256 if small else 8192
    a, b = (torch.randn(m, m, device=machine.device).bfloat16() for _ in range(2))
    ms = machine.times(lambda: a @ b)
    machine.peaks["bf16"] = 2 * m**3 / statistics.median(ms) * 1e3
    yield {"case": f"bf16 product {m}", "provider": "torch", "ms": ms, "bytes": 0, "flop": 2 * m**3}
    machine.peaks["fp8"] = 2 * machine.peaks["bf16"]
    if machine.device.type == "cuda":
        p, q = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=machine.device)
        ms = machine.times(lambda: torch._scaled_mm(p, q, one, one, out_dtype=torch.bfloat16))
        machine.peaks["fp8"] = 2 * m**3 / statistics.median(ms) * 1e3
        yield {"case": f"fp8 product {m}", "provider": "torch", "ms": ms, "bytes": 0, "flop": 2 * m**3}


def row_of(machine: Machine, part: str, found: dict[str, Any]) -> dict[str, Any]:
    """A line of the CSV."""
    ms = found.pop("ms")
    q1, q2, q3 = statistics.quantiles(ms, n=4) if len(ms) > 1 else (ms[0],) * 3
    floor = machine.floor_ms(found.get("bytes", 0), found.get("flop", 0), found.pop("rate", "bf16"))
    numbers = {"ms": q2, "q1": q1, "q3": q3, "floor_ms": floor, "fraction": floor / q2}
    return {"part": part, **machine.about, **found, **{k: f"{v:.6g}" for k, v in numbers.items()}}


def read(file: Path) -> list[dict[str, str]]:
    """Rows measured so far."""
    if not file.exists():
        return []
    with file.open(newline="") as f:
        return list(csv.DictReader(f))


def append(file: Path, row: dict[str, Any]) -> None:
    """Add one row; the file is whole after each."""
    new = not file.exists()
    with file.open("a", newline="") as f:
        writer = csv.DictWriter(f, FIELDS, restval="")
        if new:
            writer.writeheader()
        writer.writerow(row)


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: what was measured of each planned case, and "not yet measured" for the others."""
    lines = ["| case | provider | ms | of the floor | GB/s | TFLOP/s |", "|---|---|---|---|---|---|"]
    for part, case, provider in (*gpu_ops.planned(), *gpu_layers.planned()):
        found = [r for r in rows if (r["part"], r["case"], r["provider"]) == (part, case, provider)]
        if not found:
            lines.append(f"| {case} | {provider} | not yet measured | | | |")
            continue
        r = found[-1]
        ms, nbytes, flop = (float(r[k] or 0) for k in ("ms", "bytes", "flop"))
        rates = [f"{nbytes / ms / 1e6:.0f}" if nbytes else "", f"{flop / ms / 1e9:.0f}" if flop else ""]
        lines.append(
            f"| {case} | {provider} | {ms:.3f} ({r['device']}) | {float(r['fraction']):.2f} | {' | '.join(rates)} |"
        )
    return "\n".join(lines)


def decide(rows: list[dict[str, str]]) -> tuple[list[dict[str, Any]], list[str]]:
    """For each shape whose layer was measured wide and under a recipe: how many times faster the recipe is.

    Returns:
        rows of kernels/decisions.csv; the shapes that give none, with the reason.
    """
    ms: dict[tuple[str, str, str], float] = {}
    for r in rows:
        if r["part"] == "layers":
            shape, _, way = r["case"].rpartition(", ")
            ms[r["device"], shape, f"{r['provider']} {way}"] = float(r["ms"])
    found, skipped = [], []
    for device, shape in dict.fromkeys((d, s) for d, s, _ in ms):
        wide, narrow = (
            sum(ms.get((device, shape, f"moefx {recipe} {way}"), float("nan")) for way in ("forward", "backward"))
            for recipe in ("bf16", "fp8_flow")
        )
        if shape not in gpu_layers.LAYERS:
            skipped.append(f"{shape} on {device}: no layer of this name in gpu_layers.LAYERS")
        elif wide / narrow != wide / narrow:
            skipped.append(f"{shape} on {device}: not measured under bf16 and fp8_flow, forward and backward")
        else:
            sizes = dict(zip("THIEk", gpu_layers.LAYERS[shape], strict=True))
            found.append({"device": device, "recipe": "fp8_flow", **sizes, "speedup": f"{wide / narrow:.3f}"})
    return found, skipped


def record(file: Path, decisions: Path) -> None:
    """Write the table `decisions` from what `file` says was measured; without a row for it, leave it as it is."""
    from moefx.files import replacing
    from moefx.kernels.decisions import FIELDS as COLUMNS

    found, skipped = decide(read(file))
    for line in skipped:
        print(f"skipped: {line}")
    if not found:
        sys.exit(f"{file} holds no layer to record: {decisions} stays as it is")
    with replacing(decisions.parent, decisions.name) as folder, (folder / decisions.name).open("w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no case after this time")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU can do")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--decide", action="store_true", help="write kernels/decisions.csv from what was measured")
    parser.add_argument("--table", action="store_true", help="print the table and measure nothing")
    args = parser.parse_args()
    file = args.out / "gpu.csv"
    if args.table:
        print(table(read(file)))
        return
    if args.decide:
        record(file, Path(__file__).parents[1] / "kernels" / "decisions.csv")
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here: every row stays 'not yet measured' (--device cpu --small tries the script)")
    if args.device == "cpu" and args.out == RESULTS:
        sys.exit("times of a CPU do not belong into results/gpu.csv: give another folder with --out")
    end = time.monotonic() + 60 * args.minutes
    machine = Machine(args.device)
    known = {(r["case"], r["provider"], r["commit"], r["device"]) for r in read(file)}
    for found in measure_peaks(machine, args.small):
        append(file, row_of(machine, "peaks", found))
    print({k: f"{v:.3g}" for k, v in machine.peaks.items()})
    makers = {"ops": gpu_ops.cases, "layers": gpu_layers.layers, "step": gpu_layers.steps}
    missing: set[str] = set()
    for part in (p for p in args.parts if p != "peaks"):
        for case, provider, make in makers[part](args.device, args.small, missing):
            key = (case, provider, machine.about["commit"], machine.about["device"])
            if key in known or args.only not in case:
                continue
            if time.monotonic() > end:
                print(f"{args.minutes:g} minutes are over; run again to go on with {case}")
                return
            found = make(machine)
            if found is None:
                continue
            row = row_of(machine, part, {"case": case, "provider": provider, **found})
            append(file, row)
            figures = f"{float(row['ms']):9.3f} ms  {float(row['fraction']):5.2f} of the floor"
            print(f"{part:7} {case:44} {provider:22} {figures}")
            if machine.device.type == "cuda":
                torch.cuda.empty_cache()
    if missing:
        print("not installed, so not measured:", ", ".join(sorted(missing)))


if __name__ == "__main__":
    main()
