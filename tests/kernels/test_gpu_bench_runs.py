"""How `benchmarks.gpu` runs: time, memory and provenance of a figure, and what a failing case does to the others."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import layers, memory, plot, records, step
from benchmarks.gpu import machine as machines
from benchmarks.gpu.cases import Case

ABOUT = {"commit": "abc", "device": "a GPU", "driver": "1", "clocks": "2", "torch": "", "triton": "", "date": ""}


class Machine(machines.Machine):
    """Counts as a device, but computes on the CPU; `alive` are bytes that it says are allocated, call by call."""

    def __init__(self, *alive: int, fails: bool = False) -> None:
        self.device, self.about, self.peaks = torch.device("cpu"), ABOUT, {"copy": 1e9, "bf16": 1e9, "fp8": 2e9}
        self.alive, self.fails, self.baselines = list(alive), fails, list[int]()

    def times(self, call: Any, repeats: int = 1, *, hide_launches: bool = False) -> list[float]:
        call()
        return [2.0, 2.0]

    def fresh(self) -> None:
        if self.fails:
            raise RuntimeError("an illegal memory access was encountered")

    def allocated(self) -> int:
        return self.alive.pop(0)

    def peak_beyond(self, baseline: int, call: Any) -> tuple[Any, int]:
        self.baselines.append(baseline)
        return call(), 7 * 2**20


def case(name: str, ran: list[str], error: Exception | None = None, part: str = "ops") -> Any:
    def run(machine: Any, missing: set[str]) -> list[dict[str, Any]]:
        ran.append(name)
        if error is not None:
            raise error
        return [{"ms": [1.0, 2.0], "bytes": 10, "flop": 0}]

    return Case(part, (name,), "triton", 0, run)


def test_a_case_that_fails_is_recorded_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, ran = tmp_path / "gpu.csv", list[str]()
    cases = [case("a", ran), case("b", ran, torch.cuda.OutOfMemoryError("out of memory\nmore")), case("c", ran)]

    def again(retry: bool = False, **changed: str) -> list[str]:
        ran.clear()
        known = records.done(records.read(file), {**ABOUT, **changed}, retry)
        gpu.run_all(Machine(), cases, file, known, end=float("inf"))
        return list(ran)

    assert again() == ["a", "b", "c"]
    rows = records.read(file)
    assert [r["error"] for r in rows] == ["", "OutOfMemoryError: out of memory", ""]
    assert [r["ms"] for r in rows] == ["1.5", "", "1.5"]
    assert "failed: OutOfMemoryError" in capsys.readouterr().out
    assert again() == []
    assert again(retry=True) == ["b"]
    assert again(commit="other") == ["a", "b", "c"]
    text = records.table(rows, [("ops", n, "triton") for n in "abcd"])
    assert "| b | OutOfMemoryError |" in text
    assert "| d | not yet measured |" in text
    assert records.decide([{**r, "part": "layers", "case": "x, forward"} for r in rows])[0] == []


def test_a_lost_device_ends_the_run_and_the_next_one_goes_on_behind_it(tmp_path: Path) -> None:
    file, ran = tmp_path / "gpu.csv", list[str]()
    cases = [case("a", ran, RuntimeError("an illegal memory access was encountered")), case("b", ran)]
    with pytest.raises(SystemExit):
        gpu.run_all(Machine(fails=True), cases, file, set(), end=float("inf"))
    assert ran == ["a"]
    gpu.run_all(Machine(), cases, file, records.done(records.read(file), ABOUT, False), end=float("inf"))
    assert ran == ["a", "b"]


def test_an_interrupted_case_is_not_recorded(tmp_path: Path) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpu.run_all(Machine(), [Case("ops", ("a",), "triton", 0, stop)], tmp_path / "gpu.csv", set(), float("inf"))
    assert not (tmp_path / "gpu.csv").exists()


def test_no_case_is_begun_that_would_end_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now, ran = [0.0], list[str]()
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])

    def slow(name: str, part: str) -> Any:
        def run(machine: Any, missing: set[str]) -> list[dict[str, Any]]:
            now[0] += 100
            ran.append(name)
            return [{"ms": [1.0], "flop": 1}]

        return Case(part, (name,), "moefx bf16", 0, run)

    layers = [slow(n, "layers") for n in "abcdef"]
    gpu.run_all(Machine(), layers, tmp_path / "gpu.csv", set(), end=320)
    assert ran == ["a", "b", "c"]
    assert "3 cases left; run again to go on with d" in capsys.readouterr().out
    gpu.run_all(Machine(), layers[3:], tmp_path / "gpu.csv", set(), end=now[0] + 1)  # the first is begun in any case
    assert ran == ["a", "b", "c", "d"]


def test_rows_of_other_columns_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "gpu.csv").write_text("part,case\nops,a\n")
    with pytest.raises(SystemExit, match="other columns"):
        records.read(tmp_path / "gpu.csv")


def test_a_short_call_is_timed_behind_its_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            said.append("event")

        def elapsed_time(self, other: Any) -> float:
            return 0.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda clocks: said.append(f"wait {clocks > 1e5}"), raising=False)
    machine = SimpleNamespace(device=torch.device("cuda"), flush=SimpleNamespace(zero_=lambda: said.append("flush")))
    machine._once = lambda call: machines.Machine._once(machine, call)
    for hide, between in ((True, ["wait True"]), (False, [])):
        said.clear()
        ms = machines.Machine.times(machine, lambda: said.append("call"), 5, hide_launches=hide)
        assert ms == [0.5] * 5
        assert said[7:] == ["flush", *between, "event", "call", "event"] * 5


def test_slow_calls_are_repeated_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda other: 200.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    machine = SimpleNamespace(device=torch.device("cuda"), flush=SimpleNamespace(zero_=lambda: None))
    machine._once = lambda call: (call(), (0.2, 1e-4))[1]
    assert len(machines.Machine.times(machine, lambda: calls.append(1))) == 5
    assert len(calls) == 2 + 5 + 5


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return SimpleNamespace(loss=(self.w * input_ids.float().mean()).sum())


def test_the_peak_of_a_step_counts_from_before_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(300, 900)  # what earlier cases and the flushed buffer hold; then with the model
    monkeypatch.setattr(step, "_model", lambda small: Model())
    monkeypatch.setattr(step, "compiled", lambda model: model)
    (found,) = step.measure(machine, "hf grouped_mm compiled", small=True)
    assert machine.baselines == [300]
    assert found["peak_mib"] == "7"
    assert found["tokens_per_s"] == "16000"

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000)
    device = SimpleNamespace(device=torch.device("cuda"))
    assert machines.Machine.peak_beyond(device, 300, lambda: "found") == ("found", 700)


class Narrow(torch.autograd.Function):
    """Keeps x, a copy of the weights of all experts, and an activation; one more behind autograd's back, if asked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, hidden: list[Tensor] | None) -> Tensor:
        ctx.save_for_backward(x, w, w.to(torch.int8), x[0, :, :2].clone())
        if hidden is not None:
            ctx.more = x.clone()
        return x * 1

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy, None, None


def test_what_is_saved_is_told_apart() -> None:
    T, H, E = 6, 8, 4
    x, w = torch.randn(1, T, H, requires_grad=True), torch.randn(E, 5, H)
    found = memory.saved(Machine(0, 0), lambda: Narrow.apply(x, w, None), x, [w], E)
    want = {"activations": T * 2 * 4, "input": T * H * 4, "weights": E * 5 * H}
    assert found == want
    columns = memory.columns({**want, "input": 300 << 20}, [w])
    assert columns["saved_input_mib"] == "300"
    assert float(columns["weights_mib"]) == pytest.approx(w.numel() * 4 / 2**20, rel=1e-3)
    assert float(columns["saved_mib"]) == pytest.approx(T * 2 * 4 / 2**20, rel=1e-3)

    # the device holds a clone of x more than autograd was told of
    held = sum(want.values()) + T * H * 4  # of these, x was there before; the output is there, too
    found = memory.saved(Machine(1000, 1000 + held), lambda: Narrow.apply(x, w, []), x, [w], E)
    assert found["activations"] == want["activations"] + T * H * 4
    none = memory.saved(Machine(0, 0), lambda: x.detach() + 1, x, [w], E)
    assert none == {"activations": 0, "input": 0, "weights": 0}


def test_compiled_layers_are_compiled_for_their_own_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    symbolic: list[bool] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        symbolic.append(any(isinstance(t, torch.SymInt) for t in inputs))
        return graph

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **given: real(model, backend=backend, **given))
    machine = machines.Machine("cpu")

    def run(compile_: Any, fresh: bool) -> list[bool]:
        symbolic.clear()
        torch.compiler.reset()
        for rows in (4, 6, 10):
            if fresh:
                machine.fresh()
            compile_(nn.ReLU())(torch.ones(rows, 3))
        return list(symbolic)

    assert run(layers.compiled, fresh=True) == [False] * 3
    assert any(run(torch.compile, fresh=False))  # what it is for


def git(root: Path, *command: str) -> None:
    who = ("-c", "user.name=n", "-c", "user.email=e@e")
    subprocess.run(["git", "-C", str(root), *who, *command], check=True, capture_output=True)


def test_where_a_figure_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = machines.source
    root = tmp_path / "copy"
    script, kernel = root / "benchmarks" / "gpu" / "machine.py", root / "kernels" / "k.py"
    for folder in (script.parent, root / "benchmarks" / "results"):
        folder.mkdir(parents=True)
    script.write_text("1\n")
    alone = source(root)
    assert alone.startswith("sources-")
    if shutil.which("git"):
        git(tmp_path, "init", "-q")
        assert source(root) == alone  # the folder of another repository says nothing of these files
        git(root, "init", "-q")
        git(root, "add", ".")
        git(root, "commit", "-qm", "c")
        commit = source(root)
        assert set(commit) <= set("0123456789abcdef")
        (root / "benchmarks" / "results" / "gpu.csv").write_text("a row\n")
        (root / "notes.md").write_text("no source\n")
        assert source(root) == commit
        kernel.parent.mkdir()
        kernel.write_text("1\n")  # not tracked
        dirty = source(root)
        assert dirty.startswith(f"{commit}+")
        kernel.write_text("2\n")
        assert source(root) not in (dirty, commit)
        assert source(root).startswith(f"{commit}+")
        kernel.unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing here"))
    assert source(root) == alone
    assert machines._nvidia_smi("driver_version") == "unknown"


def test_drawings_are_of_what_was_measured(tmp_path: Path) -> None:
    row = {"part": "ops", "case": "permute, FP8-Flow", "provider": "triton", "ms": "1", "fraction": "0.5", "error": ""}
    rows = [{**row, "device": "cpu", "commit": "a"}]
    assert plot.plot([], tmp_path) == plot.plot(rows, tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    pytest.importorskip("matplotlib")
    layer = {"part": "layers", "case": "OLMoE, forward", "provider": "moefx bf16", "flop": "1e12"}
    rows += [
        {**row, **more, "device": "a GPU", "commit": "b"} for more in ({}, layer, {**layer, "error": "no", "ms": ""})
    ]
    assert [f.name for f in plot.plot(rows, tmp_path)] == ["gpu_ops.png", "gpu_layers.png"]
    assert all(f.stat().st_size > 1000 for f in tmp_path.iterdir())
