"""The device that is measured on: who it is, what it can do, and how time and memory are taken there."""

from __future__ import annotations

import gc
import hashlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
SOURCES = ("moefx", "kernels", "passes", "models", "benchmarks")  # what a measured figure depends on
REPEATS, WARM_UP = 30, 10
SECONDS = 0.6  # of repeats of one call; a slow one is repeated less often
HIDDEN = 5e-3  # seconds of a call's launches that are hidden at most


class Machine:
    """What is measured on, and how time and memory are taken there."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.peaks: dict[str, float] = {}
        self.flush = torch.empty(64 << 20, dtype=torch.int32, device=device) if device == "cuda" else None
        name, driver = ("cpu", "") if device == "cpu" else (torch.cuda.get_device_name(), _nvidia_smi("driver_version"))
        self.about = {
            "device": name, "driver": driver, "clocks": "", "commit": source(ROOT), "torch": torch.__version__,
            "triton": _version("triton"), "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip

    def times(self, call: Callable[[], Any], repeats: int = REPEATS, *, hide_launches: bool = False) -> list[float]:
        """Milliseconds of each of up to `repeats` calls.

        Args:
            call: is called with the L2 cache flushed.
            repeats: at most so many, and fewer where a call is slow.
            hide_launches: let the device wait, before the time begins, until the host has launched all of a call.
                Otherwise a short kernel's time is that of Python and the launch, which in a model overlaps with the
                kernels before.
        """
        if self.device.type == "cpu":
            call()
            return [_cpu_ms(call) for _ in range(2)]
        first, _ = self._once(call)  # compiles
        first, host = self._once(call)
        repeats = max(5, min(repeats, int(SECONDS / first)))
        for _ in range(min(WARM_UP, repeats)):
            call()
        torch.cuda.synchronize()
        events = []
        for _ in range(repeats):
            assert self.flush is not None
            self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if hide_launches:
                torch.cuda._sleep(int(2e9 * min(2 * host + 5e-5, HIDDEN)))  # in clocks, of which there are up to 2e9/s
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in events]

    def _once(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Seconds until one call's results are there, and until the host has launched it."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        launched = time.perf_counter()
        torch.cuda.synchronize()
        return time.perf_counter() - begin, launched - begin

    def floor_ms(self, nbytes: float, flop: float, rate: str) -> float:
        """The least time of an op on this machine, by what was measured here."""
        memory = nbytes / self.peaks["copy"] if nbytes else 0.0
        return 1e3 * max(memory, flop / self.peaks[rate] if flop else 0.0)

    def fresh(self) -> None:
        """Drop what earlier cases left: reference cycles around models, compiled code, and memory kept for reuse.

        Without it, Dynamo makes the sizes of the second shape symbolic and gives up on the eighth, and a model of an
        earlier case counts in the peak of the next.
        """
        gc.collect()
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def allocated(self) -> int:
        """Bytes of live tensors on the device; 0 on a CPU, where nobody counts them."""
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def peak_beyond(self, baseline: int, call: Callable[[], Any]) -> tuple[Any, int]:
        """What `call` returns, and the most bytes alive during it beyond `baseline`."""
        if self.device.type == "cpu":
            return call(), 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        found = call()
        torch.cuda.synchronize()
        return found, torch.cuda.max_memory_allocated() - baseline


def _cpu_ms(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return (time.process_time() - start) * 1e3


def _version(name: str) -> str:
    try:
        return str(__import__(name).__version__)
    except ImportError:
        return "not installed"


def _said(*command: str) -> str | None:
    """What a command prints, or None where it is not installed or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _nvidia_smi(query: str) -> str:
    said = _said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    return "unknown" if not said else said.splitlines()[0].replace(", ", " / ")


def source(root: Path) -> str:
    """The commit of the sources under `root`; where they differ from it, or none is known, a hash of them beside it.

    Rows are skipped in a later run if their source is the same, so that it must be known without git, too.
    """
    git = ("git", "-C", str(root))
    tracked = _said(*git, "ls-files", "--error-unmatch", str(Path(__file__).relative_to(ROOT)))  # else: another's
    commit = _said(*git, "rev-parse", "--short", "HEAD") if tracked else None
    changed = _said(*git, "status", "--porcelain", "--", *SOURCES, ":(exclude)benchmarks/results") if commit else None
    if commit and changed == "":
        return commit
    digest = hashlib.sha256()
    for file in sorted(f for folder in SOURCES for f in (root / folder).rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return f"{commit}+{digest.hexdigest()[:8]}" if commit else f"sources-{digest.hexdigest()[:8]}"


def measure_peaks(machine: Machine, small: bool) -> Iterator[dict[str, Any]]:
    """Copy bandwidth in byte/s (read plus written), bf16 and FP8 GEMM rates in FLOP/s."""
    n = (1 << 20) if small else (1 << 30)
    x, y = (torch.randn(n // 4, device=machine.device) for _ in range(2))
    ms = machine.times(lambda: y.copy_(x))
    machine.peaks["copy"] = 2 * n / statistics.median(ms) * 1e3
    copied = {"case": f"copy of {n >> 20} MiB", "provider": "torch", "ms": ms, "bytes": 2 * n, "flop": 0}
    m = 256 if small else 8192
    a, b = (torch.randn(m, m, device=machine.device).bfloat16() for _ in range(2))
    ms = machine.times(lambda: a @ b)
    machine.peaks["bf16"] = 2 * m**3 / statistics.median(ms) * 1e3
    machine.peaks["fp8"] = 2 * machine.peaks["bf16"]
    if machine.device.type == "cuda":
        machine.about["clocks"] = _busy_clocks(lambda: a @ b, statistics.median(ms))
    yield copied
    yield {"case": f"bf16 product {m}", "provider": "torch", "ms": ms, "bytes": 0, "flop": 2 * m**3}
    if machine.device.type == "cuda":
        yield from _fp8_peak(machine, a, b)


def _fp8_peak(machine: Machine, a: torch.Tensor, b: torch.Tensor) -> Iterator[dict[str, Any]]:
    """Products of codes with one scale; the rate is the better one of both ways of the library to sum."""
    p, q = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    one, flop, rates = torch.ones((), device=machine.device), 2 * len(a) ** 3, []
    for fast in (True, False):
        ms = machine.times(
            lambda fast=fast: torch._scaled_mm(p, q, one, one, out_dtype=torch.bfloat16, use_fast_accum=fast)
        )
        rates.append(flop / statistics.median(ms) * 1e3)
        machine.peaks["fp8"] = max(rates)
        case = f"fp8 product {len(a)}, {'fast' if fast else 'fp32'} sums"
        yield {"case": case, "provider": "torch", "ms": ms, "bytes": 0, "flop": flop, "rate": "fp8"}


def _busy_clocks(call: Callable[[], Any], ms: float) -> str:
    """Clocks of the cores and the memory while the device works; when idle, they say nothing."""
    for _ in range(int(1000 / ms) + 1):  # a second of work, queued; nvidia-smi answers within it
        call()
    found = _nvidia_smi("clocks.sm,clocks.mem")
    torch.cuda.synchronize()
    return found
