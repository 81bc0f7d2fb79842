"""Where a layer like it was measured slower, a recipe leaves a module wide and says so."""

from __future__ import annotations

from pathlib import Path

import pytest

import moefx
from moefx.kernels import decisions
from moefx.kernels.decisions import Row, read, table, verdict
from moefx.precision.recipe import get_recipe
from tests import reference as ref
from tests.profile import often

# The layer of `ref.tiny()` with `ref.batch()`: 16 tokens.
HERE = {"T": 16, "H": 32, "I": 24, "E": 4, "k": 2}
SLOW = Row("cpu", "fp8_rowwise", **HERE, speedup=0.8)
FAST = Row("cpu", "fp8_rowwise", **HERE, speedup=1.3)


def optimized(monkeypatch: pytest.MonkeyPatch, rows: tuple[Row, ...], force: bool = False) -> moefx.OptimizedModule:
    monkeypatch.setattr(decisions, "table", lambda: rows)
    recipe = get_recipe("fp8_rowwise")
    return ref.optimize(
        ref.tiny(), recipe=recipe.replace(recipe.name, force=True) if force else recipe, codegen="eager"
    )


def test_the_table_that_comes_with_moefx_can_be_read() -> None:
    assert all(row.speedup > 0 for row in table())


def test_a_slower_module_stays_wide_and_the_report_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = optimized(monkeypatch, (SLOW,))
    casts = opt.report.casts
    assert (casts["before"], casts["weights_before"]) == (0, 0)
    (row,) = [p for p in opt.report.passes if p.name == "quantize"]
    assert len(row.rejected) == 6
    assert all("T=16 H=32 I=24 E=4 k=2 on cpu: 0.80x" in r["why"] for r in row.rejected)
    ref.assert_same(ref.step(opt, ref.batch(), lambda o: o.loss), ref.step(opt.original, ref.batch(), lambda o: o.loss))


CASES = ["faster", "forced", "other device", "other recipe", "other size"]


@pytest.mark.parametrize("case", often(CASES, ["faster", "forced"]))
def test_otherwise_it_is_quantized(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    rows = {
        "faster": FAST,
        "forced": SLOW,
        "other device": Row("NVIDIA H200", "fp8_rowwise", **HERE, speedup=0.8),
        "other recipe": Row("cpu", "fp8_flow", **HERE, speedup=0.8),
        "other size": Row("cpu", "fp8_rowwise", **{**HERE, "I": 96}, speedup=0.8),
    }
    opt = optimized(monkeypatch, (rows[case],), force=case == "forced")
    assert opt.report.casts["weights_before"] > 0


def test_the_nearest_measured_layer_decides() -> None:
    near, nearer = (Row("cpu", "mxfp8", 16, 32, I, 4, 2, speedup) for I, speedup in ((24, 0.9), (26, 1.1)))
    specs = get_recipe("mxfp8").specs
    assert verdict("cpu", specs, 32, 32, 27, 4, (near, nearer)) == nearer
    assert verdict("cpu", specs, 32, 32, 24, 4, (near, nearer)) == near
    assert verdict("cpu", specs, 32, 32, 48, 4, (near, nearer)) is None
    assert verdict("cpu", specs, 0, 32, 24, 4, (near, nearer)) is None


def test_a_table_reads_back(tmp_path: Path) -> None:
    file = tmp_path / "decisions.csv"
    file.write_text(",".join(decisions.FIELDS) + "\nNVIDIA H200,fp8_flow,8192,2048,768,128,8,1.25\n")
    assert read(file) == (Row("NVIDIA H200", "fp8_flow", 8192, 2048, 768, 128, 8, 1.25),)
