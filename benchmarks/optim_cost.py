"""What a step of the optimizers costs on a CPU, as ratios of process CPU seconds: float32, one thread.

    python benchmarks/optim_cost.py [--quick] [--only lite]

Both sides of a ratio take turns in one process and see the same gradients; a ratio is that of the medians of at least
`REPEATS` turns, for three seconds or more, after one that is left out (fewer, but at least 3, where they take over a
minute). Results: benchmarks/results/optim_cost.csv; rows of CPUs with other instructions stay.

  loop        64 equal matrices, one polar factor after the other, over all in batches
  torch       `torch.optim.Muon`, one step of all matrices, over Muon with the same polynomial and number of steps;
              torch computes in bfloat16, which this Muon can too: both dtypes are given, where the CPU has the
              instructions for it
  lite        Muon-LITE (fast mode, every option at its default) over Muon; `lite-l` has no damping
  state       extra bytes of state over the bytes of momentum: LITE's basis
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moefx.optim import LiteConfig, Muon

RESULTS = Path(__file__).parent / "results" / "optim_cost.csv"
PARTS = ("loop", "torch", "lite")
REPEATS, LEAST = 7, 3
SECONDS = (3, 60)  # so long at least, by more turns than REPEATS; so long at most, by fewer
Shape = tuple[int, ...]
Step = Callable[[], Any]
FULL, BOOST = LiteConfig(2.0, -0.25, 1.0), LiteConfig(2.0, 0.0, 0.0)
# As torch.optim.Muon: the same polynomial and scale.
LIKE_TORCH: dict[str, Any] = {"polar": "quintic", "polar_steps": 5, "scale": "original"}


def cpu() -> str:
    """The instructions that matrix products use here: vectors, and those of bfloat16 if there are any."""
    return torch.backends.cpu.get_cpu_capability() + (" bf16" if torch.cpu._is_avx512_bf16_supported() else "")


def stepper(cls: type[torch.optim.Optimizer], shapes: Sequence[Shape], **options: Any) -> Step:
    """The step of an optimizer over parameters that have gradients; the same for equal shapes."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer = cls(params, lr=1e-3, **options)
    return optimizer.step


def compare(slow: Step, fast: Step) -> tuple[float, float]:
    """Median CPU seconds of both, in turns."""
    taken: tuple[list[float], list[float]] = ([], [])
    begin, turn = time.process_time(), 0
    while turn <= LEAST or (time.process_time() - begin < SECONDS[turn <= REPEATS]):
        turn += 1
        for step, found in zip((slow, fast), taken, strict=True):
            start = time.process_time()
            step()
            found.append(time.process_time() - start)
    return statistics.median(taken[0][1:]), statistics.median(taken[1][1:])


def state_bytes(lite: LiteConfig | None, shape: Shape) -> int:
    """Bytes of all tensors that grow with a parameter."""
    p = nn.Parameter(torch.zeros(*shape))
    return sum(t.numel() * t.element_size() for t in Muon([p], lite=lite).state[p].values() if t.ndim)


def cases(quick: bool, parts: Sequence[str]) -> list[dict[str, Any]]:
    """Rows: what is compared, on which matrices, the two sides, and the target of the ratio."""
    sizes = () if "loop" not in parts else (64, 128) if quick else (32, 64, 128, 256, 512)
    rows: list[dict[str, Any]] = []

    def add(what: str, count: int, shape: Shape, slow: Step, fast: Step, target: str) -> None:
        a, b = compare(slow, fast)
        shown = " x ".join(map(str, shape))
        met = a / b >= float(target[3:]) if target.startswith(">=") else a / b <= float(target[3:])
        rows.append({
            "cpu": cpu(), "what": what, "matrices": count, "shape": shown,
            "numerator_s": f"{a:.5f}", "denominator_s": f"{b:.5f}",
            "ratio": f"{a / b:.2f}", "target": target, "met": "yes" if met else "no",
        })  # fmt: skip
        print(rows[-1], flush=True)

    for s in sizes:
        many: list[Shape] = [(s, s)] * 64
        add("loop", 64, (s, s), stepper(Muon, many, chunk_bytes=1), stepper(Muon, many), ">= 5" if s <= 256 else ">= 1")
    single = [(256, 256)] if quick else [(1024, 1024), (768, 2048), (2048, 768)]
    stacks = [(64, 64)] if quick else [(64, 64), (128, 128), (256, 256), (256, 128)]
    # Without instructions for it, bfloat16 takes 70 times as long as float32: nobody would ask for it here.
    dtypes = ("float32", "bfloat16") if "bf16" in cpu() else ("float32",)
    for dtype in dtypes if "torch" in parts else ():
        mine = {**LIKE_TORCH, "polar_dtype": dtype}
        for shape in single:
            add(f"torch, {dtype}", 1, shape, stepper(torch.optim.Muon, [shape], adjust_lr_fn="original"),
                stepper(Muon, [shape], **mine), ">= 1")  # fmt: skip
        for shape in stacks:
            # torch's takes matrices alone: 32 parameters against one stack of 32 experts.
            add(f"torch, {dtype}", 32, shape, stepper(torch.optim.Muon, [shape] * 32, adjust_lr_fn="original"),
                stepper(Muon, [(32, *shape)], **mine), ">= 3")  # fmt: skip
    shapes = [(8, 128, 128)] if quick else [(32, 64, 64), (32, 128, 128), (8, 256, 512), (8, 512, 256), (1, 1024, 1024)]
    for shape in shapes if "lite" in parts else ():
        for what, lite in (("lite", FULL), ("lite-l", BOOST)):
            add(what, shape[0], shape[1:], stepper(Muon, [shape], lite=lite), stepper(Muon, [shape]), "<= 1.6")
            extra = state_bytes(lite, shape) - state_bytes(None, shape)
            share = extra / state_bytes(None, shape)
            if what == "lite":
                rows.append({
                    "cpu": cpu(), "what": "state", "matrices": shape[0], "shape": " x ".join(map(str, shape[1:])),
                    "ratio": f"{share:.3f}", "target": "<= 0.1", "met": "yes" if share <= 0.1 else "no",
                })  # fmt: skip
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure; write the CSV unless `--quick`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few small shapes, nothing written")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="rows of the others stay")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = cases(args.quick, args.parts)
    if not args.quick:
        made = {row["what"] for row in rows}
        with RESULTS.open(newline="") as f:
            others = [row for row in csv.DictReader(f) if row["cpu"] != cpu() or row["what"] not in made]
        with RESULTS.open("w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(others + rows)


if __name__ == "__main__":
    main()
