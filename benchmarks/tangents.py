"""What an output costs that nobody differentiates: the backward of the loss alone against one with zero tangents.

A transformers model returns logits beside the loss. A runtime that fills missing tangents with zeros makes a tensor of
tokens x vocabulary for them and adds it to the loss's own gradient; moefx runs a backward that was specialised to the
tangents that are there. Both run here in one process on one model: `backward(loss)`, and `backward(loss, other outputs)`
with explicit zeros, which is what the filling runtime does. Gradients are compared.

    python benchmarks/tangents.py [--vocab 32768] [--tokens 512] [--codegen eager] [--rounds 9]

Single thread, process CPU time; arms are interleaved and a ratio is taken within each round. Memory is the highest sum
of what PyTorch's allocator has given out during the backward, above what was held when the step began, as its profiler
records it. Raw rows go to benchmarks/results/tangents.csv.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


ARMS = {"loss": loss_alone, "zeros": zeros_for_the_rest}


def gradients(model: torch.nn.Module, opt: torch.nn.Module, inputs: Any, arm: str) -> list[torch.Tensor]:
    model.zero_grad()
    ARMS[arm](opt(**inputs))
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def measure(opt: torch.nn.Module, inputs: Any, arm: str) -> tuple[float, float, int]:
    """CPU seconds of the backward and of the whole step, and peak bytes of the whole step."""
    opt.zero_grad()
    start = time.process_time()
    out = opt(**inputs)
    middle = time.process_time()
    ARMS[arm](out)
    end = time.process_time()
    del out
    opt.zero_grad()
    return end - middle, end - start, peak_bytes(lambda: ARMS[arm](opt(**inputs)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--codegen", default="eager", choices=["eager", "inductor"])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    import moefx

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=args.vocab, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
        output_router_logits=True, use_cache=False,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).train()
    ids = torch.randint(0, args.vocab, (1, args.tokens))
    inputs = {"input_ids": ids, "labels": ids.clone()}
    opt = moefx.optimize(model, inputs, codegen=args.codegen)

    pairs = zip(gradients(model, opt, inputs, "loss"), gradients(model, opt, inputs, "zeros"), strict=True)
    worst = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)
    rows: list[dict[str, Any]] = []
    for n in range(args.rounds):
        for arm in ("loss", "zeros") if n % 2 else ("zeros", "loss"):
            backward, step, peak = measure(opt, inputs, arm)
            rows.append({"round": n, "arm": arm, "backward_s": backward, "step_s": step, "peak_bytes": peak})

    def of(arm: str, key: str) -> list[float]:
        return [r[key] for r in sorted(rows, key=lambda r: r["round"]) if r["arm"] == arm]

    shape = f"{args.tokens} tokens x {args.vocab} words, {args.tokens * args.vocab * 4 / 2**20:.0f} MiB a tensor"
    print(f"{shape}; {args.codegen} codegen; torch {torch.__version__}, {platform.machine()}")
    print(f"largest relative difference of a gradient: {worst:.1e}")
    for key, unit, scale in (("peak_bytes", "MiB", 2**20), ("backward_s", "ms", 1e-3), ("step_s", "ms", 1e-3)):
        a, b = of("loss", key), of("zeros", key)
        ratios = sorted(x / y for x, y in zip(a, b, strict=True))
        low, middle, high = ratios[len(ratios) // 4], statistics.median(ratios), ratios[-1 - len(ratios) // 4]
        ends = f"{statistics.median(a) / scale:8.1f} {unit} loss alone, {statistics.median(b) / scale:8.1f} {unit} zeros"
        print(f"{key:<12}{ends}   ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f})")
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as f:
        shared = {"codegen": args.codegen, "tokens": args.tokens, "vocab": args.vocab, "torch": torch.__version__}
        writer = csv.DictWriter(f, [*shared, *rows[0]])
        writer.writeheader()
        writer.writerows({**shared, **r} for r in rows)


if __name__ == "__main__":
    main()
