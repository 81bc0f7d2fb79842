"""Does LITE train better than its base? Small byte models, every arm over learning rates and momenta of its own.

    python benchmarks/optim_effect.py --model dense --seeds 0 1 [--arms muon muon-lite ...] [--part 0/2] [--dry-run]
    python benchmarks/optim_effect.py --plot

One row per run in benchmarks/results/optim_effect.csv, written as it ends; what is there is skipped, so that a sweep
can be stopped and gone on with. A comparison is fair between the best cells of two arms alone: plain Muon with a lower
momentum can beat LITE at the default one. LITE's gain is reported to grow with the batch, and to be none at a batch of
256 K tokens for language models of usual size: what a model of 0.4 M parameters far from its end shows does not carry
over. A run takes about a minute on one core.

  muon-lite:3, :4, :8   the same with so many `damping_steps`; the rows of `muon-lite` were made with 4

  dense   LLaMA of 3 layers, width 96, on 2048 tokens a step; LITE with the released schedules of dense models
  moe     Qwen3-MoE of 3 layers, width 96, 8 experts, 2 of them per token; LITE with the recipe named by --recipe:
          "dense", or "moe": damping alone in matrices, amplification 8 in embeddings and norms
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moefx.optim import AdamW, LiteConfig, Muon, Soap, WarmupCosine, param_groups
from moefx.train.data import TokenDataset, embedded_dataset

RESULTS = Path(__file__).parent / "results"
FIELDS = ("model", "recipe", "arm", "lr", "momentum", "seed", "batch", "steps", "validation", "seconds", "step_seconds")
KEY = FIELDS[:8]
STEPS, BATCH, SEQ, WARMUP, VAL_BATCHES = 400, 32, 64, 40, 16
# The centre of each arm's learning rates is the second factor.
FACTORS, MOMENTA = (0.5, 1.0, 2.0, 4.0), (0.85, 0.9, 0.95)
LRS = {"adamw": 4e-3, "muon": 1.6e-2, "soap": 6e-3}
ARMS = ("adamw", "muon", "muon-lite", "soap", "soap-lite")
DAMPED = ("muon-lite:3", "muon-lite:4", "muon-lite:8")
Setting = tuple[str, ...]


def build(model: str, seed: int) -> Any:
    """Random weights, from the seed alone."""
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": 256, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": SEQ, "use_cache": False,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(seed)
    if model == "dense":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).train()
    config = transformers.Qwen3MoeConfig(
        **shape, head_dim=24, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True,
        output_router_logits=True, router_aux_loss_coef=0.01,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config).train()


def optimizer_of(net: nn.Module, arm: str, recipe: str, momentum: float) -> torch.optim.Optimizer:
    """`momentum` is the first beta of AdamW and SOAP; embeddings, norms and the head keep AdamW's (0.9, 0.95)."""
    arm, _, damping = arm.partition(":")
    kind, _, lite = arm.partition("-")
    config = None
    if lite:
        named, more = (LiteConfig.cosine, {"chi_diagonal": 1.0}) if recipe == "dense" else (LiteConfig.wsd, {})
        config = named(warmup=WARMUP, total=STEPS, damping_steps=int(damping or 3), **more)
    groups = param_groups(net, algorithm=kind, weight_decay=0.1, verbose=False)
    if kind == "adamw":
        return AdamW(groups, betas=(momentum, 0.95))
    if kind == "soap":
        return Soap(groups, lite=config, betas=(momentum, 0.95))
    return Muon(groups, lite=config, momentum=momentum)


def run(setting: Setting, data: TokenDataset) -> tuple[float, float, float]:
    """Validation loss in nats per byte, CPU seconds of the run, CPU seconds of one optimizer step."""
    model, recipe, arm, lr, momentum, seed, batch, steps = setting
    net = build(model, int(seed))
    optimizer = optimizer_of(net, arm, recipe, float(momentum))
    rate = WarmupCosine(float(lr), WARMUP, STEPS)
    batches = data.batches("train", int(batch), SEQ, int(seed))
    begun, stepping = time.process_time(), 0.0
    for step in range(int(steps)):
        ids = next(batches).long()
        loss = net(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step + 1)
        start = time.process_time()
        optimizer.step()
        stepping += time.process_time() - start
        optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(loss.item()):
            break
    return validate(net, data), time.process_time() - begun, stepping / int(steps)


@torch.no_grad()
def validate(net: Any, data: TokenDataset) -> float:
    """The same windows for every run, without the router's auxiliary loss."""
    net.eval()
    if hasattr(net.config, "output_router_logits"):
        net.config.output_router_logits = False
    batches = itertools.islice(data.batches("val", 64, SEQ, 0), VAL_BATCHES)
    losses = [net(input_ids=ids.long(), labels=ids.long()).loss.item() for ids in batches]
    return math.fsum(losses) / len(losses)


def settings(args: argparse.Namespace) -> list[Setting]:
    """All cells of the sweep: seeds last, so that a stopped sweep has whole grids of the first."""
    cells = itertools.product(args.seeds, args.arms, args.momenta, args.factors)
    return [
        # Without LITE there is no recipe to tell apart.
        (args.model, args.recipe if "lite" in arm else "none", arm, f"{LRS[arm.split('-')[0]] * factor:.6g}",
         f"{momentum:g}", str(seed), str(args.batch), str(args.steps))
        for seed, arm, momentum, factor in cells
    ]  # fmt: skip


def read(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="") as f:
        return list(csv.DictReader(f))


def append(file: Path, row: dict[str, str]) -> None:
    """One write, so that rows of two processes do not mix."""
    head = "" if file.exists() else ",".join(FIELDS) + "\n"
    with file.open("a") as f:
        f.write(head + ",".join(row[name] for name in FIELDS) + "\n")


def best(rows: list[dict[str, str]], key: tuple[str, ...], arm: str) -> dict[float, float]:
    """By learning rate: the mean over seeds at the best momentum."""
    cells: dict[tuple[float, str], list[float]] = {}
    for r in rows:
        if tuple(r[k] for k in ("model", "batch", "steps")) == key and f"{r['arm']} {r['recipe']}" == arm:
            cells.setdefault((float(r["lr"]), r["momentum"]), []).append(float(r["validation"]))
    found: dict[float, float] = {}
    for (lr, _), losses in cells.items():
        found[lr] = min(found.get(lr, math.inf), math.fsum(losses) / len(losses))
    return dict(sorted(found.items()))


def plot(rows: list[dict[str, str]]) -> None:
    """Loss over learning rate, a panel for each model and batch, a line for each arm at its best momentum."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = sorted({(r["model"], r["batch"], r["steps"]) for r in rows})
    figure, axes = plt.subplots(1, len(keys), figsize=(6 * len(keys), 4), squeeze=False)
    for axis, key in zip(axes[0], keys, strict=True):
        for arm in sorted({f"{r['arm']} {r['recipe']}" for r in rows if r["arm"] in ARMS}):
            if points := best(rows, key, arm):
                axis.plot(list(points), list(points.values()), marker="o", label=arm.removesuffix(" none"))
                print(*key, arm, f"{min(points.values()):.4f}")
        title = f"{key[0]}, {int(key[1]) * SEQ} tokens a step, {key[2]} steps"
        axis.set(title=title, xlabel="learning rate", ylabel="validation loss, nats per byte", xscale="log")
        ticks = [2e-3 * 2**i for i in range(6)]
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "optim_effect.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("dense", "moe"), default="dense")
    parser.add_argument("--recipe", choices=("dense", "moe"), default="dense")
    parser.add_argument("--arms", nargs="+", choices=(*ARMS, *DAMPED), default=list(ARMS))
    parser.add_argument("--factors", nargs="+", type=float, default=list(FACTORS), help="of the arm's learning rate")
    parser.add_argument("--momenta", nargs="+", type=float, default=list(MOMENTA))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--batch", type=int, default=BATCH, help="windows of 64 bytes a step")
    parser.add_argument("--steps", type=int, default=STEPS, help="stop early: schedules stay those of 400 steps")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th run from the i-th on, for n processes")
    parser.add_argument("--out", type=Path, default=RESULTS / "optim_effect.csv")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run")
    parser.add_argument("--plot", action="store_true", help="of what was measured")
    args = parser.parse_args()
    if args.plot:
        plot(read(args.out))
        return
    torch.set_num_threads(1)
    data = embedded_dataset()
    first, every = map(int, args.part.split("/"))
    for setting in settings(args)[first::every]:
        if setting in {tuple(r[k] for k in KEY) for r in read(args.out)}:
            continue
        print(" ".join(setting), end=" ", flush=True)
        if not args.dry_run:
            values = (f"{x:.6g}" for x in run(setting, data))
            row = dict(zip(FIELDS, (*setting, *values), strict=True))
            append(args.out, row)
            print(row["validation"], row["seconds"], row["step_seconds"], end="")
        print(flush=True)


if __name__ == "__main__":
    main()
