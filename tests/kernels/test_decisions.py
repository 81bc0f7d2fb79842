"""Where a layer like it was measured slower, a recipe leaves a module wide and says so."""

from __future__ import annotations

from pathlib import Path

import pytest

import moefx
from moefx.errors import InputError
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


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("", 1, "columns are none"),
        ("cpu,fp8_flow,64,128,128,8,2,0.5\n", 1, "columns are cpu"),
        ("device,recipe,T,H,I,E,speedup\n", 1, "T, H, I, E, speedup"),
        ("{head}{row}cpu,fp8_flow,64,128\n", 3, "not 8 values"),
        ("{head}cpu,fp8_flow,64,128,128,8,2,0.5,1\n", 2, "not 8 values"),
        ("{head}cpu,fp8_flow,64,128,128,eight,2,0.5\n", 2, "'eight'"),
        ("{head}cpu,fp8_flow,64,128,128,0,2,0.5\n", 2, "E=0"),
        ("{head}{row}cpu,fp8_flow,64,128,128,8,2,nan\n", 3, "nanx"),
        ("{head}cpu,fp8_flow,64,128,128,8,2,-1\n", 2, "-1.00x"),
        ("{head},fp8_flow,64,128,128,8,2,1\n", 2, "on : 1.00x"),
    ],
)
def test_a_malformed_table_names_the_line(tmp_path: Path, text: str, line: int, why: str) -> None:
    file = tmp_path / "decisions.csv"
    head = ",".join(decisions.FIELDS) + "\n"
    file.write_text(text.format(head=head, row="cpu,fp8_flow,64,128,128,8,2,0.5\n"))
    with pytest.raises(InputError, match=why) as error:
        read(file)
    assert error.value.where == f"{file}:{line}"


def test_what_was_measured_is_recorded_or_the_table_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.gpu import __main__ as gpu

    table, measured = tmp_path / "kernels" / "decisions.csv", tmp_path / "gpu.csv"
    table.parent.mkdir()
    table.write_text("what was decided before\n")
    with pytest.raises(SystemExit, match=r"no layer to record.*stays as it is"):
        gpu.record(measured, table)  # there is no such file
    arms = [(a, way) for a in ("moefx bf16", "moefx fp8_flow") for way in ("forward", "backward")]
    for shape in ("small", "Qwen3-30B T=8192"):  # not a layer of the table; a layer, but for one arm
        for arm, way in arms[: None if shape == "small" else 3]:
            row = {"part": "layers", "case": f"{shape}, {way}", "provider": arm, "device": "a GPU", "ms": 1}
            gpu.append(measured, row)
    with pytest.raises(SystemExit, match="no layer to record"):
        gpu.record(measured, table)
    assert table.read_text() == "what was decided before\n"
    assert {line.split(" on ")[0] for line in capsys.readouterr().out.splitlines()} == {
        "skipped: small",
        "skipped: Qwen3-30B T=8192",
    }
    for arm, way in arms:
        ms = {"moefx bf16": 3, "moefx fp8_flow": 2}[arm]
        gpu.append(measured, {"part": "layers", "case": f"OLMoE, {way}", "provider": arm, "device": "a GPU", "ms": ms})
    gpu.record(measured, table)
    assert read(table) == (Row("a GPU", "fp8_flow", 32768, 2048, 1024, 64, 8, 1.5),)
    assert [f.name for f in table.parent.iterdir()] == ["decisions.csv"]
