"""What an output costs that nobody differentiates: the backward of the loss alone against one with zero tangents.

A transformers model returns logits beside the loss. A runtime that fills missing tangents with zeros makes a tensor of
tokens x vocabulary for them and adds it to the loss's own gradient; moefx runs a backward that was specialised to the
tangents that are there. Both run here in one process on one model: `backward(loss)`, and `backward(loss, other
outputs)` with explicit zeros, which is what the filling runtime does. The original model runs beside them, and the
gradients of all three are compared.

    python benchmarks/tangents.py [--vocab 32768] [--tokens 512] [--codegen eager,inductor] [--rounds 9]

Single thread, process CPU time; arms are interleaved and a ratio is taken within each round. Memory is the highest sum
of what PyTorch's allocator has given out during the backward, above what was held when the step began, as its profiler
records it. Raw rows go to benchmarks/results/tangents.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: its profiler announces itself at every use

import torch
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results" / "tangents.csv"


def peak_bytes(run: Callable[[], None]) -> int:
    """The highest net allocation while `run` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    level = peak = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        level += e.nbytes()
        peak = max(peak, level)
    return peak


def tensors(out: Any) -> list[torch.Tensor]:
    """The differentiable outputs of a model, the loss first."""
    flat, _ = torch.utils._pytree.tree_flatten(tuple(out.values()))
    return [t for t in flat if isinstance(t, torch.Tensor) and t.requires_grad]


def loss_alone(out: Any) -> None:
    """The tangents of all other outputs are missing."""
    out.loss.backward()


def zeros_for_the_rest(out: Any) -> None:
    """What a runtime does that materialises missing tangents."""
    outs = tensors(out)
    torch.autograd.backward(outs, [torch.ones_like(outs[0]), *[torch.zeros_like(t) for t in outs[1:]]])


ARMS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "loss": ("optimized", loss_alone),
    "zeros": ("optimized", zeros_for_the_rest),
    "original": ("original", loss_alone),
}


class Bench:
    """One model and its optimized form, one batch."""

    def __init__(self, vocab: int, tokens: int, codegen: str) -> None:
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        import moefx

        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            vocab_size=vocab, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
            output_router_logits=True, use_cache=False,
        )  # fmt: skip
        ids = torch.randint(0, vocab, (1, tokens))
        self.inputs = {"input_ids": ids, "labels": ids.clone()}
        model = Qwen3MoeForCausalLM(config).train()
        self.modules = {"original": model, "optimized": moefx.optimize(model, self.inputs, codegen=codegen)}

    def step(self, arm: str) -> float:
        """One step; CPU seconds of its backward."""
        name, backward = ARMS[arm]
        out = self.modules[name](**self.inputs)
        start = time.process_time()
        backward(out)
        return time.process_time() - start

    def gradients(self, arm: str) -> list[torch.Tensor]:
        """Gradients of all parameters."""
        self.clear()
        self.step(arm)
        return [p.grad.clone() for p in self.modules["original"].parameters() if p.grad is not None]

    def clear(self) -> None:
        """Drop all gradients."""
        self.modules["original"].zero_grad()

    def measure(self, arm: str) -> dict[str, float]:
        """CPU seconds of backward and step, and peak bytes of a step."""
        self.clear()
        start = time.process_time()
        backward = self.step(arm)
        total = time.process_time() - start
        self.clear()
        return {"backward_s": backward, "step_s": total, "peak_bytes": peak_bytes(lambda: self.step(arm))}


def worst(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Largest relative difference of a gradient."""
    return max(float((x - y).norm() / y.norm().clamp_min(1e-30)) for x, y in zip(a, b, strict=True))


def report(rows: list[dict[str, Any]], other: str) -> None:
    """Medians, and the ratio of `loss` to the other arm, taken within each round."""
    for key, unit, scale in (("peak_bytes", "MiB", 2**20), ("backward_s", "ms", 1e-3), ("step_s", "ms", 1e-3)):
        a, b = ([r[key] for r in rows if r["arm"] == arm] for arm in ("loss", other))
        ratios = sorted(x / y for x, y in zip(a, b, strict=True))
        low, middle, high = ratios[len(ratios) // 4], statistics.median(ratios), ratios[-1 - len(ratios) // 4]
        medians = (
            f"{statistics.median(a) / scale:8.1f} {unit:<4}{other:>9} {statistics.median(b) / scale:8.1f} {unit:<4}"
        )
        print(f"  {key:<11}{medians}ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--codegen", default="eager", help="eager, inductor or eager,inductor")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for codegen in args.codegen.split(","):
        bench = Bench(args.vocab, args.tokens, codegen)
        size = args.tokens * args.vocab * 4 / 2**20
        print(f"{codegen} codegen, torch {torch.__version__}, {platform.machine()}")
        print(f"  {args.tokens} tokens x {args.vocab} words: {size:.0f} MiB a tensor")
        kept = {arm: bench.gradients(arm) for arm in ARMS}  # also compiles both backwards
        for other in ("zeros", "original"):
            print(f"  gradients of the loss alone against {other}: {worst(kept['loss'], kept[other]):.1e}")
        kept.clear()
        mine: list[dict[str, Any]] = []
        for n in range(args.rounds):
            for arm in list(ARMS)[:: 1 if n % 2 else -1]:
                mine.append({"round": n, "arm": arm, **bench.measure(arm)})
        for other in ("zeros", "original"):
            report(mine, other)
        shared = {"torch": torch.__version__, "codegen": codegen, "tokens": args.tokens, "vocab": args.vocab}
        rows += [{**shared, **r} for r in mine]
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
