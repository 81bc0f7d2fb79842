"""Pictures of routing: load, co-activation within a token, and paths from layer to layer, as PNG and as one HTML page.

Needs matplotlib (`pip install 'moefx[routing]'`).
"""

from __future__ import annotations

import base64
import html
import importlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moefx.errors import InputError
from moefx.packages import optional

Matrix = npt.NDArray[np.float64]
WRITTEN_UP_TO = 16  # experts; with more, cells are too small for numbers
ABSENT = "#d9d9d9"
DPI = 110
WIDEST = 16.0  # inches that the panels of a picture take side by side

# What a column of the tables is called, and how its numbers are written.
COLUMNS = {
    "experts": ("experts", "d"), "max_violation": ("MaxVio", ".2f"), "dead_experts": ("dead", ".0f"),
    "token_entropy": ("token entropy", ".3f"), "marginal_entropy": ("marginal entropy", ".3f"),
    "mass": ("top-k mass", ".3f"), "overlap": ("overlap", ".4f"),
}  # fmt: skip
STEPS = {
    "hit_rate_1": ("hit rate 1", ".3f"), "chance_1": ("chance 1", ".3f"), "hit_rate_2": ("hit rate 2", ".3f"),
    "chance_2": ("chance 2", ".3f"), "conditional_entropy": ("conditional entropy", ".3f"),
    "mutual_information": ("mutual information", ".3f"),
}  # fmt: skip
TRAFFIC = {
    "remote": ("sends per token", ".3f"), "uniform": ("if uniform", ".3f"), "max_over_mean": ("max/mean rows", ".2f"),
}  # fmt: skip
GREY = (
    " Grey rows are experts without such tokens. Where a panel has fewer pixels than cells, the title says how many "
    "cells a spot is the largest of."
)
CAPTIONS = {
    "load": "Each expert's share of the choices of its layer, divided by the mean share: 1 is perfect balance, 2 is "
    "twice the tokens. A cross is an expert that no token chose.",
    "pairs": "Row e, column v: of the other choices of the tokens that chose expert e, the share that is v. For "
    "k = 2: the share of the tokens. Dark cells are experts that work together." + GREY,
    "transitions": "Row e, column v: share of the tokens with first choice e in one layer whose first choice in the "
    "next layer is v. A dark cell is a path that tokens keep to; a dark column alone is an expert with much load."
    + GREY,
}
TITLES = {"load": "Load", "pairs": "Chosen together", "transitions": "From layer to layer"}


def conditional(counts: npt.ArrayLike) -> Matrix:
    """Rows divided by their sums; rows without a token are NaN."""
    rows = np.asarray(counts, dtype=np.float64)
    sums = rows.sum(-1, keepdims=True)
    shares: Matrix = np.divide(rows, sums, out=np.full_like(rows, np.nan), where=sums > 0)
    return shares


def load_figure(load: Sequence[Sequence[float]], names: Sequence[str]) -> bytes:
    """PNG of the load, layers x experts, of the shares of each layer's experts."""
    relative = np.full((len(load), max(map(len, load))), np.nan)
    for row, shares in zip(relative, load, strict=True):
        row[: len(shares)] = np.asarray(shares) * len(shares)
    L, E = relative.shape
    plt, colors = matplotlib(), importlib.import_module("matplotlib.colors")
    width, height = min(2.4 + 0.5 * E, 14.0), min(1.3 + 0.42 * L, 16.0)
    figure, axes = plt.subplots(figsize=(max(width, 5.0), height), layout="constrained")
    shades = plt.get_cmap("RdBu_r").with_extremes(bad=ABSENT)
    top = max(2.0, float(np.nanmax(relative)))
    norm = colors.TwoSlopeNorm(1.0, 0.0, top)
    image = axes.imshow(relative, cmap=shades, norm=norm, aspect="auto", interpolation="nearest")
    for (i, e), value in np.ndenumerate(relative):
        if value == 0:
            axes.text(e, i, "×", ha="center", va="center", color="white", weight="bold")
        elif E <= WRITTEN_UP_TO and not math.isnan(value):
            dark = abs(norm(value) - 0.5) > 0.3
            axes.text(
                e,
                i,
                "<.01" if value < 0.005 else f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
    axes.set(xlabel="expert", title="Load, relative to the mean")
    _ticks(axes.yaxis, L, names)
    _ticks(axes.xaxis, E)
    whole = range(2, math.floor(top) + 1, max(1, math.ceil(top / 5)))
    figure.colorbar(image, ax=axes, label="load / mean load", pad=0.02, ticks=[0, 0.5, 1, *whole])
    return _png(figure)


def matrices_figure(matrices: Sequence[Matrix], titles: Sequence[str], across: str, down: str, title: str) -> bytes:
    """PNG of square panels of shares between 0 and 1, on one scale; NaN is drawn grey.

    The scale is that of the square root, and ends where a thousandth of the cells is above: with many experts most
    shares are small, and rows of a few tokens have shares near 1.
    """
    plt, colors = matplotlib(), importlib.import_module("matplotlib.colors")
    columns = min(len(matrices), max(4, math.ceil(math.sqrt(len(matrices)))))
    rows = math.ceil(len(matrices) / columns)
    cells = max(max(m.shape) for m in matrices)
    side = 2.4 if len(matrices) <= 12 else 1.7
    side = max(side, min(cells / DPI + 0.6, WIDEST / columns))  # a pixel for every cell, beside the labels
    size = (max(columns * side + 1.2, 5.0), rows * (side + 0.15) + 0.9)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    shades = plt.get_cmap("YlGnBu").with_extremes(bad=ABSENT)
    shares = np.concatenate([m[~np.isnan(m)] for m in matrices])
    top = float(np.quantile(shares, 0.999)) if shares.any() else 1.0
    norm = colors.PowerNorm(0.5, 0.0, top or float(shares.max()), clip=True)
    images: dict[Any, Any] = {}
    for axes in grid.flat[len(matrices) :]:
        axes.set_axis_off()
    for axes, matrix, name in zip(grid.flat, matrices, titles, strict=False):
        image = images[axes] = axes.imshow(matrix, cmap=shades, norm=norm, interpolation="nearest")
        axes.set_title(name, fontsize=9)
        _ticks(axes.yaxis, matrix.shape[0], most=8)
        _ticks(axes.xaxis, matrix.shape[1], most=8)
    figure.supxlabel(across, fontsize=10)
    figure.supylabel(down, fontsize=10)
    above = "max" if shares.max() > norm.vmax else "neither"
    figure.colorbar(image, ax=grid, label="share of the row", pad=0.02, aspect=20 * rows, extend=above)
    heading = figure.suptitle(title)
    if cells > side * DPI / 2:
        figure.draw_without_rendering()  # only the layout knows how many pixels are left for a panel; it stays
        figure.set_layout_engine("none")
        if (block := _pool(images, DPI / figure.dpi)) > 1:
            heading.set_text(f"{title} (each spot is the largest of {block} x {block} cells)")
    return _png(figure)


def _pool(images: Mapping[Any, Any], scale: float) -> int:
    """Draw no cell smaller than a pixel: the largest of a block of them takes their place, or most would be missing.

    Args:
        images: by the axes that they are in; their layout is known.
        scale: pixels of the file per pixel of the layout.

    Returns:
        Cells along a side of a block; 1 where there is room for all.
    """
    block = 1
    for axes, image in images.items():
        box = axes.get_window_extent()
        rows, columns = image.get_array().shape
        block = max(block, *(math.ceil(n / (p * scale - 2)) for n, p in ((rows, box.height), (columns, box.width))))
    for image in images.values() if block > 1 else ():
        pooled = np.asarray(image.get_array().filled(np.nan))
        for axis in (0, 1):  # fmax: a block is absent where all of it is
            pooled = np.fmax.reduceat(pooled, range(0, pooled.shape[axis], block), axis)
        image.set_data(pooled)
        rows, columns = (n * block - 0.5 for n in pooled.shape)
        image.set_extent((-0.5, columns, rows, -0.5))
    return block


def pictures(
    found: Mapping[str, Any], transitions: Matrix | None, pairs: Sequence[npt.NDArray[Any]]
) -> dict[str, bytes]:
    """PNG files by name: "load", and where known "pairs" and "transitions".

    Args:
        found: `routing_numbers.numbers`.
        transitions: [L-1, E, E] counts of first choices.
        pairs: per layer [E, E] tokens that chose both; zero diagonal.
    """
    names = [str(row["layer"]) for row in found["layers"]]
    made = {"load": load_figure(found["load"], [f"layer {n}" for n in names])}
    if len(pairs) and any(p.any() for p in pairs):
        made["pairs"] = matrices_figure(
            [conditional(p) for p in pairs], [f"layer {n}" for n in names], "chosen, too", "expert", TITLES["pairs"]
        )
    if transitions is not None and len(found["steps"]):
        sizes = [row["experts"] for row in found["layers"]]
        chosen = [(s["from"], s["to"]) for s in found["steps"]]
        panels = [conditional(transitions[a, : sizes[a], : sizes[b]]) for a, b in chosen]
        titles = [f"layer {a} → {b}" for a, b in chosen]
        made["transitions"] = matrices_figure(
            panels, titles, "first choice, next layer", "first choice", TITLES["transitions"]
        )
    return made


def page(found: Mapping[str, Any], images: Mapping[str, bytes], title: str, about: str) -> str:
    """One self-contained HTML page: tables, and pictures embedded."""
    parts = [f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>"]
    for heading, columns, rows in tables(found):
        head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        parts.append(f"<h2>{html.escape(heading)}</h2><table><tr>{head}</tr>{body}</table>")
        if heading == "Layers":
            parts += [_embedded(name, image) for name, image in images.items()]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>{STYLE}{''.join(parts)}"
    )


def text(found: Mapping[str, Any]) -> str:
    """The tables as plain text."""
    blocks = []
    for heading, columns, rows in tables(found):
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in (columns, *rows)
        ]
        blocks.append("\n".join([heading, *(line.rstrip() for line in lines)]))
    return "\n\n".join(blocks)


def tables(found: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Heading, columns and rows of text of each table: layers with their mean, adjacent layers, paths, traffic."""
    known = {n: c for n, c in COLUMNS.items() if n in found["layers"][0]}
    rows = [[_named(row), *(_figure(n, row[n], form) for n, (_, form) in known.items())] for row in found["layers"]]
    mean = [_figure(n, found["mean"][n], ".2f" if n == "dead_experts" else f) if n in found["mean"] else ""
            for n, (_, f) in known.items()]  # fmt: skip
    made = [("Layers", ["layer", *(t for t, _ in known.values())], [*rows, ["mean", *mean]])]
    if found["steps"]:
        rows = [[f"{s['from']} → {s['to']}", *(format(s[n], f) for n, (_, f) in STEPS.items())] for s in found["steps"]]
        made.append(("From layer to layer", ["layers", *(t for t, _ in STEPS.values())], rows))
    if "distinct_paths" in found:
        cells = [[str(found["seen_paths"]), str(found["distinct_paths"])]]
        made.append(("Paths through all layers", ["different paths", "cover 90 % of the tokens"], cells))
    if "traffic" in found:
        rows = [[str(t["layer"]), *(format(t[n], f) for n, (_, f) in TRAFFIC.items())] for t in found["traffic"]]
        heading = f"Expert parallelism over {found['places']} places"
        made.append((heading, ["layer", *(t for t, _ in TRAFFIC.values())], rows))
    return made


def write(folder: Path, images: Mapping[str, bytes], page_text: str) -> list[Path]:
    """Write NAME.png of each picture and routing.html into a folder; returns the files."""
    files = {folder / f"{name}.png": image for name, image in images.items()}
    files[folder / "routing.html"] = page_text.encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            path.write_bytes(content)
    except OSError as error:
        why = error.strerror or str(error)
        raise InputError("the pictures cannot be written", str(folder), why, "choose another folder") from error
    return list(files)


def _named(row: Mapping[str, Any]) -> str:
    path = "".join(c if c.isprintable() else repr(c)[1:-1] for c in row["path"])  # a line break would end the row
    return f"{row['layer']} {path}".strip()


def _figure(name: str, value: float, form: str) -> str:
    """Without a choice there is no MaxVio; any other NaN is one of the router's, and is shown."""
    return "none" if name == "max_violation" and math.isnan(value) else format(value, form)


def _embedded(name: str, image: bytes) -> str:
    data = base64.b64encode(image).decode()
    alt = html.escape(f"{TITLES[name]}: {CAPTIONS[name]}")
    shown = f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"></figure>'
    return f"<h2>{TITLES[name]}</h2><p>{CAPTIONS[name]}</p>{shown}"


def _ticks(axis: Any, count: int, names: Sequence[str] | None = None, most: int = 16) -> None:
    """A tick at each of `count` cells, or at every 2nd, 4th, ..., so that there are at most `most`."""
    every = 2 ** max(0, math.ceil(math.log2(count / most)))
    at = list(range(0, count, every))
    axis.set_ticks(at, [names[i] if names else str(i) for i in at], fontsize=8)


def matplotlib() -> Any:
    """The module matplotlib.pyplot. Raises MissingPackageError when it is not installed."""
    optional("matplotlib", "to draw routing").use("agg", force=False)
    return optional("matplotlib.pyplot", "to draw routing")


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI)
    matplotlib().close(figure)
    return out.getvalue()


STYLE = """<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
figure { margin: 0; overflow-x: auto } /* as large as drawn: a scaled picture loses single cells */
</style>"""
