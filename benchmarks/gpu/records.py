"""The rows that are written: results/gpu.csv, the tables of docs/performance.md, and kernels/decisions.csv."""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import layers

FIELDS = (
    "part", "case", "provider", "ms", "q1", "q3", "rows", "bytes", "flop", "floor_ms", "fraction", "saved_mib",
    "saved_input_mib", "saved_weights_mib", "weights_mib", "peak_mib", "tokens_per_s", "error", "commit", "device",
    "driver", "clocks", "torch", "triton", "date",
)  # fmt: skip
Row = dict[str, str]


def row_of(machine: Any, part: str, found: dict[str, Any]) -> dict[str, Any]:
    """A line of the CSV of what was found: `ms` of each repeat, and what belongs to it."""
    ms = found.pop("ms")
    q1, q2, q3 = statistics.quantiles(ms, n=4) if len(ms) > 1 else (ms[0],) * 3
    floor = machine.floor_ms(found.get("bytes", 0), found.get("flop", 0), found.pop("rate", "bf16"))
    numbers = {"ms": q2, "q1": q1, "q3": q3, "floor_ms": floor, "fraction": floor / q2}
    return {"part": part, **machine.about, **found, **{k: f"{v:.6g}" for k, v in numbers.items()}}


def read(file: Path) -> list[Row]:
    """Rows measured so far."""
    if not file.exists():
        return []
    with file.open(newline="") as f:
        lines = csv.DictReader(f)
        if tuple(lines.fieldnames or ()) != FIELDS:
            sys.exit(f"{file} has other columns than this script writes: move it away")
        return list(lines)


def append(file: Path, row: dict[str, Any]) -> None:
    """Add one row; the file is whole after each."""
    new = not file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="") as f:
        writer = csv.DictWriter(f, FIELDS, restval="")
        if new:
            writer.writeheader()
        writer.writerow(row)


def done(rows: list[Row], about: dict[str, str], retry: bool) -> set[tuple[str, str]]:
    """Case and provider of what need not be run again on these sources and this device; `retry`: failures do."""
    same = (r for r in rows if (r["commit"], r["device"]) == (about["commit"], about["device"]))
    return {(r["case"], r["provider"]) for r in same if not (retry and r["error"])}


def _cell(r: Row | None) -> str:
    if r is None:
        return "not yet measured"
    if r["error"]:
        return r["error"].partition(":")[0]
    ms, nbytes, flop = (float(r[k] or 0) for k in ("ms", "bytes", "flop"))
    parts = [f"{ms:.3f} ms"]
    if float(r["fraction"]):
        parts.append(f"{float(r['fraction']):.2f}")
    if flop:
        parts.append(f"{flop / ms / 1e9:.0f} TFLOP/s")
    elif nbytes:
        parts.append(f"{nbytes / ms / 1e6:.0f} GB/s")
    if r["tokens_per_s"]:
        parts.append(f"{r['tokens_per_s']} tokens/s")
    if r["peak_mib"]:
        kept = float(r["saved_mib"] or 0) + float(r["saved_input_mib"] or 0)
        parts.append((f"kept {kept:.0f} MiB, " if r["saved_mib"] else "") + f"peak {r['peak_mib']} MiB")
    return ", ".join(parts)


def table(rows: list[Row], planned: Iterable[tuple[str, str, str]]) -> str:
    """Markdown, one table a part: each planned case with what was measured of it, and "not yet measured" elsewhere."""
    parts: dict[str, dict[str, list[str]]] = {}
    for part, case, provider in planned:
        parts.setdefault(part, {}).setdefault(case, []).append(provider)
    last = {(r["part"], r["case"], r["provider"]): r for r in rows}
    blocks = []
    for part, cases in parts.items():
        providers = list(dict.fromkeys(p for found in cases.values() for p in found))
        lines = [f"| {part} | {' | '.join(providers)} |", "|" + "---|" * (1 + len(providers))]
        for case, asked in cases.items():
            rest = [(p, last.get((part, case, p))) for p in providers]
            if not any(r for _, r in rest):
                cells = ["not yet measured"] + [""] * (len(providers) - 1)
            else:
                cells = [_cell(r) if p in asked else "" for p, r in rest]
            lines.append(f"| {case} | {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    devices = sorted({f"{r['device']}, driver {r['driver']}, {r['clocks']}, {r['commit']}" for r in rows})
    return "\n\n".join([*devices, *blocks])


def decide(rows: list[Row]) -> tuple[list[dict[str, Any]], list[str]]:
    """For each shape whose layer was measured wide and under a recipe: how many times faster the recipe is.

    Returns:
        rows of kernels/decisions.csv; the shapes that give none, with the reason.
    """
    ms: dict[tuple[str, str, str], float] = {}
    for r in rows:
        if r["part"] == "layers":
            shape, _, way = r["case"].rpartition(", ")
            ms[r["device"], shape, f"{r['provider']} {way}"] = float(r["ms"] or "nan")
    found, skipped = [], []
    for device, shape in dict.fromkeys((d, s) for d, s, _ in ms):
        wide, narrow = (
            sum(ms.get((device, shape, f"moefx {recipe} {way}"), float("nan")) for way in ("forward", "backward"))
            for recipe in ("bf16", "fp8_flow")
        )
        if shape not in layers.LAYERS:
            skipped.append(f"{shape} on {device}: no layer of this name in layers.LAYERS")
        elif wide / narrow != wide / narrow:
            skipped.append(f"{shape} on {device}: not measured under bf16 and fp8_flow, forward and backward")
        else:
            sizes = dict(zip("THIEk", layers.LAYERS[shape], strict=True))
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
