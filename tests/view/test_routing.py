"""Pictures, page and tables of routing."""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from moefx.errors import InputError, MissingPackageError
from moefx.grouter.affinity import affinity
from moefx.view import routing as view
from moefx.view.routing_numbers import numbers

from .made import choices, metrics


def drawn(sizes: list[int], k: int = 2, tokens: int = 40) -> tuple[dict, dict[str, bytes]]:
    made = metrics(choices(0, sizes, k, tokens), sizes)
    found = numbers(made, [f"layers.{i}.<mlp>" for i in range(len(sizes))])
    pairs = [affinity(idx, E).pairs for idx, E in zip(made["choices"], sizes, strict=True)]
    return found, view.pictures(found, made["transitions"].numpy(), pairs)


def pixels(png: bytes) -> np.ndarray:
    image = pytest.importorskip("matplotlib.image")
    return image.imread(io.BytesIO(png))


@pytest.mark.parametrize(
    ("sizes", "k", "names"),
    [
        ([6, 6], 2, {"load", "pairs", "transitions"}),
        ([4, 40, 6, 6, 6, 6], 2, {"load", "pairs", "transitions"}),  # experts of different numbers
        ([5], 2, {"load", "pairs"}),  # one layer
        ([6, 6], 1, {"load", "transitions"}),  # no pairs
        ([200] * 3, 3, {"load", "pairs", "transitions"}),
    ],
)
def test_pictures(sizes: list[int], k: int, names: set[str]) -> None:
    pytest.importorskip("matplotlib")
    _, images = drawn(sizes, k)
    assert set(images) == names
    for png in images.values():
        height, width, _ = pixels(png).shape
        assert 100 < height < 2000
        assert 300 < width < 2000
        assert pixels(png).std() > 0.05  # something is drawn


@pytest.mark.parametrize(("experts", "panels"), [(96, 1), (300, 1), (1100, 2)])
def test_no_dark_cell_is_lost_however_many_experts_there_are(experts: int, panels: int) -> None:
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    matrices = [np.zeros((experts, experts)) for _ in range(panels)]
    rows = np.sort(rng.permutation(experts)[::7]) // 7 * 7  # at least a block apart
    for m in matrices:
        m[rows, rng.permutation(rows)] = 1.0
    image = pixels(view.matrices_figure(matrices, ["" for _ in matrices], "a", "b", "t"))
    dark = np.abs(image[:, :-130, :3] - np.array([8, 29, 88]) / 255).sum(-1) < 0.2  # without the scale's bar
    cells = sum(int((m > 0).sum()) for m in matrices)
    assert dark.sum() >= cells
    assert max(image.shape) < 2000


def test_blocks_are_absent_only_as_a_whole_and_keep_the_place_of_their_cells() -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    figure, axes = plt.subplots(figsize=(0.1, 0.1))  # 10 pixels, of which the axes have 8
    matrix = np.full((30, 20), np.nan)
    matrix[7, 11], matrix[29, 0] = 0.25, 0.5
    matrix[6, 11] = 0.125
    image = axes.imshow(matrix)
    block = view._pool({axes: image}, 1.0)
    pooled = image.get_array().filled(np.nan)
    plt.close(figure)
    assert pooled.shape == (-(-30 // block), -(-20 // block))
    assert {(r * block, c * block): pooled[r, c] for r, c in np.argwhere(~np.isnan(pooled))} == {
        (7 // block * block, 11 // block * block): 0.25,
        (29 // block * block, 0): 0.5,
    }
    assert image.get_extent() == [-0.5, pooled.shape[1] * block - 0.5, pooled.shape[0] * block - 0.5, -0.5]


def test_a_dead_layer_looks_different() -> None:
    pytest.importorskip("matplotlib")
    even = view.load_figure([[0.25] * 4], ["0"])
    uneven = view.load_figure([[0.5, 0.5, 0.0, 0.0]], ["0"])
    blue = [float((p[..., 2] - p[..., 0] > 0.2).mean()) for p in map(pixels, (even, uneven))]
    assert blue[1] > blue[0] + 0.1  # unused experts are blue, those of the mean load are white


def test_shares_of_rows() -> None:
    shares = view.conditional([[1, 3], [0, 0]])
    np.testing.assert_array_equal(shares, [[0.25, 0.75], [np.nan, np.nan]])


def test_page_is_self_contained_and_holds_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found, images = drawn([6, 6])
    found |= {
        "places": 2,
        "traffic": [{"layer": i, "remote": 0.5, "uniform": 0.75, "max_over_mean": 1} for i in (0, 1)],
    }
    files = view.write(tmp_path / "new", images, view.page(found, images, "of <mine>", "40 tokens"))
    assert {f.name for f in files} == {"load.png", "pairs.png", "transitions.png", "routing.html"}
    page = (tmp_path / "new" / "routing.html").read_text()
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(e) for e in embedded] == list(images.values())
    assert not re.search(r"https?://|<script|<link", page)
    assert "of &lt;mine&gt;" in page
    assert "layers.0.&lt;mlp&gt;" in page
    assert f"<td>{found['layers'][0]['max_violation']:.2f}</td>" in page
    with pytest.raises(InputError, match="cannot be written"):
        view.write(tmp_path / "new" / "load.png", images, page)


def test_text_has_a_line_per_layer_and_columns_of_what_was_measured() -> None:
    sizes = [6, 6, 6]
    text = view.text(numbers(metrics(choices(0, sizes, 2, 40), sizes), ["a", "b", "c"]))
    lines = text.splitlines()
    assert lines[1].split() == ["layer", "experts", "MaxVio", "dead", "overlap"]
    assert [line.split()[:2] for line in lines[2:5]] == [["0", "a"], ["1", "b"], ["2", "c"]]
    assert lines[5].split()[0] == "mean"
    assert "0 → 1" in text
    assert "Paths through all layers" in text
    assert not any(line != line.rstrip() for line in lines)


def test_matplotlib_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"matplotlib is needed[\s\S]*moefx\[routing\]"):
        view.load_figure([[1.0]], ["0"])
