"""Drawings of results/gpu.csv for docs/performance.md: ops against their floors, layers in TFLOP/s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import layers

OPS_SHOWN = ("triton", "torch_grouped", "transformer_engine")


def _last(rows: list[dict[str, str]], part: str) -> dict[tuple[str, str], dict[str, str]]:
    return {(r["case"], r["provider"]): r for r in rows if r["part"] == part and r["ms"] and not r["error"]}


def _bars(axes: Any, names: list[str], series: dict[str, dict[str, float]], label: str) -> None:
    height = 0.8 / max(len(series), 1)
    for i, (provider, values) in enumerate(series.items()):
        at = [n for n, name in enumerate(names) if name in values]
        axes.barh([n + i * height for n in at], [values[names[n]] for n in at], height, label=provider)
    axes.set_yticks([n + 0.4 - height / 2 for n in range(len(names))], names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7)


def _series(
    found: dict[tuple[str, str], dict[str, str]], providers: tuple[str, ...], value: Any
) -> tuple[list[str], dict[str, dict[str, float]]]:
    names = list(dict.fromkeys(case for case, _ in found))
    series = {p: {case: value(r) for (case, who), r in found.items() if who == p} for p in providers}
    return names, {p: values for p, values in series.items() if values}


def plot(rows: list[dict[str, str]], folder: Path) -> list[Path]:
    """Write gpu_ops.png and gpu_layers.png; without a row of a GPU, none."""
    rows = [r for r in rows if r["device"] != "cpu"]
    ops = _series(_last(rows, "ops"), OPS_SHOWN, lambda r: float(r["fraction"]))
    whole = _series(
        {key: r for key, r in _last(rows, "layers").items()}, layers.ARMS,
        lambda r: float(r["flop"]) / float(r["ms"]) / 1e9,
    )  # fmt: skip
    drawn = []
    for name, (names, series), label in (
        ("gpu_ops.png", ops, "share of the floor's speed; 1: nothing is left"),
        ("gpu_layers.png", whole, "TFLOP/s (6 S H I forward, 12 S H I backward)"),
    ):
        if not names:
            continue
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.12 * len(names) * max(len(series), 2)))
        _bars(axes, names, series, label)
        axes.set_title(", ".join(sorted({f"{r['device']}, {r['commit']}" for r in rows})), fontsize=8)
        figure.tight_layout()
        figure.savefig(folder / name, dpi=110)
        pyplot.close(figure)
        drawn.append(folder / name)
    return drawn
