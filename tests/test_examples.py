"""The examples run, print what they say they print, and the one of the README is the one in the file."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(name: str) -> str:
    """Standard output of an example, in a process of its own that sees moefx but not the repository's folder."""
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name],
        cwd=ROOT / "examples",
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def without_numbers(text: str) -> list[list[str]]:
    """Words of each line. Times, counts and the numbers in names vary with machines and versions."""
    return [re.sub(r"\d+(\.\d+)?(e[+-]\d+)?", "0", line).split() for line in text.splitlines()]


def test_custom_pass() -> None:
    source = (ROOT / "examples" / "custom_pass.py").read_text()
    tree = ast.parse(source)
    (made,) = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    assert made.end_lineno is not None
    assert made.end_lineno - made.lineno < 25
    printed = run("custom_pass.py")
    (row,) = [line for line in printed.splitlines() if line.startswith("numbers_second")]
    assert row.split()[1:5] == ["model", "exact", "1", "0"]
    assert row.endswith("0.0e+00")
    order = [line.split()[0] for line in printed.splitlines() if " exact " in line or " rounding " in line]
    assert order.index("numbers_second") == order.index("expand_experts") + 1
    # What the docstring shows is what is printed.
    lines = without_numbers(printed)
    shown = [line for line in (ast.get_docstring(tree) or "").splitlines() if line.startswith("    ")]
    assert len(shown) == 5
    assert all(words in lines for words in without_numbers("\n".join(shown)))


def test_quickstart() -> None:
    printed = run("quickstart.py")
    mine, original = map(float, re.findall(r"(\d+\.\d+)", printed.splitlines()[-1]))
    assert mine == pytest.approx(original, abs=2e-6)
    assert 4.0 < mine < 7.0  # near the logarithm of the vocabulary, as an untrained model is
    assert "2 raised, 0 left alone" in printed
    assert "Qwen3MoeForCausalLM" in printed.splitlines()[0]


def test_the_readme_shows_the_same_code() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [b for b in blocks if "Qwen3MoeConfig" in b]

    def calls(source: str) -> set[str]:
        tree = ast.parse(source)
        return {ast.unparse(n) for n in tree.body if not isinstance(n, ast.Import | ast.ImportFrom | ast.Expr)}

    assert calls(block) == calls((ROOT / "examples" / "quickstart.py").read_text())


def test_a_recipe_of_ones_own() -> None:
    printed = run("custom_recipe.py")
    assert "casts: 12 before, 2 after" in printed
    assert "e5m2 row" in printed
    mine, original = map(float, re.findall(r"(\d\.\d{4})", printed.splitlines()[-1]))
    assert 0 < abs(mine - original) < 0.02  # rounded, and not by much


@pytest.mark.nightly
def test_a_format_of_ones_own() -> None:
    printed = run("six_bit.py")
    rows = dict(re.findall(r"^(\w+) +loss [\d.]+ > ([\d.]+), casts (?:0 > 0|12 > 2)$", printed, re.MULTILINE))
    assert rows.keys() == {"bf16", "fp8_flow", "fp6"}
    assert all(float(loss) < 1 for loss in rows.values())
    assert len(set(rows.values())) == 3
    six, eight = map(float, re.findall(r"(\d+\.\d) dB", printed))
    assert 20 < six < eight < 35


def test_a_rewrite_of_ones_own() -> None:
    printed = run("custom_rewrite.py")
    assert printed.splitlines()[-1] == "matched 1, largest difference 0.0"
    assert [line[0] for line in printed.splitlines() if "aten.mul.Tensor(%primals" in line] == ["-"]


def test_hand_written() -> None:
    """What docs/raising.md shows is what is printed."""
    printed = run("hand_written.py")
    assert "1 raised, 0 left alone" in printed
    assert "gradients equal: True" in printed
    page = (ROOT / "docs" / "raising.md").read_text()
    assert all(words in without_numbers(page) for words in without_numbers(printed))


def test_routed() -> None:
    first, shared, routers = run("routed.py").splitlines()
    before, after = map(float, re.findall(r"\d+\.\d+", first))
    assert after < before
    assert (shared, routers) == ("top-k nodes: 1, plans: 1", "routers of the layers: 3, trained: 0")


def test_muon_in_a_plain_loop() -> None:
    source = (ROOT / "examples" / "plain_pytorch_muon.py").read_text()
    assert len(source.splitlines()) < 60
    losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)", run("plain_pytorch_muon.py"))]
    assert len(losses) == 4
    assert 4 < losses[0] < 5  # about the logarithm of the vocabulary
    assert losses[-1] < 0.5


@pytest.mark.nightly
def test_muon_in_transformers_trainer() -> None:
    pytest.importorskip("accelerate")
    curve, resumed = run("hf_trainer_muon.py").splitlines()[-2:]
    losses = [float(x) for x in re.findall(r"\d+\.\d+", curve)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5
    assert float(re.findall(r"differ by (\S+)", resumed)[0]) == 0
