"""CPU time of one training step: moefx against transformers' own implementations, as ratios measured in one run.

Single thread, process CPU time. Arms are interleaved, so that a machine whose speed drifts slows all alike; a ratio is
taken within each round, and its median and quartiles over rounds are printed. Raw rows go to
benchmarks/results/step_time.csv.

    python benchmarks/step_time.py                    the layer of docs/performance.md and the default model, fp32 and
    bf16 python benchmarks/step_time.py --quick            few rounds, the layer in fp32 only
"""

from __future__ import annotations

import argparse
import copy
import csv
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "step_time.csv"
SHAPE = {"H": 512, "I": 256, "E": 32, "k": 4}


class Layer(torch.nn.Module):
    """One Qwen3-MoE sparse block and a scalar output, so that a step is forward and backward of exactly that block."""

    def __init__(self) -> None:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        super().__init__()
        config = Qwen3MoeConfig(
            hidden_size=SHAPE["H"],
            moe_intermediate_size=SHAPE["I"],
            num_experts=SHAPE["E"],
            num_experts_per_tok=SHAPE["k"],
            experts_implementation="grouped_mm",
        )
        config._experts_implementation = "grouped_mm"
        self.config = config
        self.block = Qwen3MoeSparseMoeBlock(config)
        for p in self.parameters():
            torch.nn.init.normal_(p, std=0.02 if p.dim() > 2 else 0.1)

    def forward(self, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """x [1, T, H]; the inner product with g [1, T, H] gives a dense output gradient."""
        out = self.block(x)
        out = out[0] if isinstance(out, tuple) else out
        return (out * g).sum()


def layer_arm(T: int, dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Layer().to(dtype)
    x = torch.randn(1, T, SHAPE["H"], dtype=dtype, requires_grad=True)
    return model, {"x": x, "g": torch.randn(1, T, SHAPE["H"], dtype=dtype)}


def default_arm(dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from moefx.train.models import default_model

    model = default_model(seed=0).to(dtype).train()
    ids = torch.randint(0, 256, (8, 128), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "labels": ids}


def step(model: Callable[..., Any], params: list[torch.nn.Parameter], inputs: dict[str, torch.Tensor]) -> None:
    for p in params:
        p.grad = None
    out = model(**inputs)
    (out if isinstance(out, torch.Tensor) else out.loss).backward()


def implementation(model: torch.nn.Module, name: str) -> torch.nn.Module:
    model = copy.deepcopy(model)
    for m in model.modules():
        if hasattr(getattr(m, "config", None), "_experts_implementation"):
            m.config._experts_implementation = name
    return model


def measure(
    case: str, model: torch.nn.Module, inputs: dict[str, torch.Tensor], rounds: int, codegens: list[str]
) -> list[dict[str, Any]]:
    import moefx

    arms: dict[str, torch.nn.Module] = {f"hf {n}": implementation(model, n) for n in ("grouped_mm", "eager")}
    for codegen in codegens:
        arms[f"moefx {codegen}"] = moefx.optimize(implementation(model, "grouped_mm"), inputs, codegen=codegen)
    params = {a: list(m.parameters()) for a, m in arms.items()}
    for a, m in arms.items():  # warm up: compiles the backward, fills caches
        for _ in range(3):
            step(m, params[a], inputs)
    rows = []
    for r in range(rounds):
        for a, m in arms.items():
            start = time.process_time()
            step(m, params[a], inputs)
            rows.append({"case": case, "arm": a, "round": r, "cpu_ms": (time.process_time() - start) * 1e3})
    return rows


def summarise(rows: list[dict[str, Any]]) -> None:
    for case in dict.fromkeys(r["case"] for r in rows):
        times: dict[str, list[float]] = {}
        for r in rows:
            if r["case"] == case:
                times.setdefault(r["arm"], []).append(r["cpu_ms"])
        print(f"\n{case}: " + ", ".join(f"{a} {statistics.median(t):.1f} ms" for a, t in times.items()))
        for arm in [a for a in times if a.startswith("moefx")]:
            for base in [a for a in times if a.startswith("hf")]:
                ratio = [x / y for x, y in zip(times[arm], times[base], strict=True)]
                q1, q2, q3 = statistics.quantiles(ratio, n=4)
                print(f"  {arm} / {base}: {q2:.3f} (quartiles {q1:.3f} to {q3:.3f}); {1 / q2:.2f}x faster")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="run cases whose name contains this")
    parser.add_argument("--codegen", default="inductor,eager")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dtypes = [torch.float32] if args.quick else [torch.float32, torch.bfloat16]
    cases: list[tuple[str, Callable[[], Any]]] = []
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        cases += [(f"layer T={T} {name}", lambda T=T, dtype=dtype: layer_arm(T, dtype)) for T in (2048, 256)]
        if not args.quick:
            cases.append((f"default model {name}", lambda dtype=dtype: default_arm(dtype)))
    rows: list[dict[str, Any]] = []
    for name, make in cases:
        if args.only in name:
            rows += measure(name, *make(), 5 if args.quick else args.rounds, args.codegen.split(","))
    summarise(rows)
    if not args.quick and not args.only:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("w", newline="") as f:
            writer = csv.DictWriter(f, [*rows[0], "torch", "machine"])
            writer.writeheader()
            writer.writerows(
                {
                    **r,
                    "cpu_ms": f"{r['cpu_ms']:.3f}",
                    "torch": torch.__version__,
                    "machine": platform.processor() or platform.machine(),
                }
                for r in rows
            )
        print(f"\nraw rows: {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS.name}")


if __name__ == "__main__":
    main()
