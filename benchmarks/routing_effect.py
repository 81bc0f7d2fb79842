"""Does a distilled, frozen router train better models? Arms of one small recipe, on text that Python carries.

    python benchmarks/routing_effect.py --seeds 0 1 [--arms learned grouter ...] [--jobs 2] [--out runs/routing_effect]
    python benchmarks/routing_effect.py --plot

Per seed: a teacher (its own weights and order of data) is trained with learned routing, a Grouter is distilled from it
and tuned. All arms of a seed begin with the same weights, see the same batches in the same order, and are validated on
the same windows. Results: benchmarks/results/routing_effect.csv (one row per measurement), and a picture of the curves;
routing_effect_again.csv are the rows of a few arms once more, on another CPU.

  learned          the layers' own routers, load-balancing loss 1e-2, z-loss 1e-3
  sp_cp, sp_cp_10  the same with the specialization and the coupling loss besides, at their defaults and ten times that
  lb, lb_sp_cp     load balance 1e-2 alone, and with the two losses at their defaults: the published set, no z-loss
  matched          `learned` with wider experts: as many multiplications per token as `grouter` with its network
  grouter, raw     routing and gates by the causal Grouter, tuned or not
  anchored         by the Grouter tuned with a KL of 0.1 to what it was
  layer_gates      indices by the tuned Grouter, gates by the layers' own routers (no balance loss)
  random           a causal Grouter with random weights, of its own initialisation (std 0.02)
  random_unit      the same with embeddings of std 1, matrices of std 1/sqrt(fan-in): more context in the routing
  random_context   the same with embeddings of std 0.02, matrices as in torch.nn.Linear: context outweighs tokens
  bidirectional    a Grouter that sees later tokens, distilled and tuned likewise: also validated on prefixes alone
  folded           8 experts, the Grouter folded from 16 by affinity; learned_8: 8 experts, learned
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import subprocess
import sys
import time
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import regex_pieces as pieces
import torch
from torch import Tensor, nn

import moefx
from moefx.train.data import TokenDataset

RESULTS = Path(__file__).parent / "results"
FIELDS = ("seed", "arm", "step", "measure", "value")
STEPS, BATCH, SEQ, LR, WARMUP = 1000, 32, 64, 2e-3, 100
EXPERTS, TOP_K, WIDTH, LAYERS, INNER = 16, 2, 64, 3, 64
MATCHED = 112  # inner width: 2 * 3 * 64 * (112 - 64) per layer = 55 k, the Grouter's; transformers takes multiples of 4
EVALUATED = (100, 300, 500, 1000)
CROSSING = tuple(range(700, STEPS, 20))  # `grouter` alone: when it has reached what `learned` ends with
VAL_WINDOWS, PREFIX_WINDOWS = 256, 32
ARMS = (
    "learned",
    "grouter",
    "random",
    "layer_gates",
    "raw",
    "folded",
    "learned_8",
    "matched",
    "bidirectional",
    "sp_cp",
    "random_unit",
    "sp_cp_10",
    "lb",
    "lb_sp_cp",
    "random_context",
    "anchored",
)
LEARNED = ("learned", "learned_8", "matched", "sp_cp", "sp_cp_10", "lb", "lb_sp_cp")
LOSSES = {
    "sp_cp": "lb,z,sp,cp,metrics",
    "sp_cp_10": "lb,z,sp=2e-2,cp=1e-2,metrics",
    "lb": "lb,metrics",
    "lb_sp_cp": "lb,sp,cp,metrics",
}
RANDOM = {"random": "own", "random_unit": "unit", "random_context": "context"}  # arm: how its weights are drawn


@lru_cache
def data() -> TokenDataset:
    """The embedded corpus in word pieces."""
    return pieces.dataset()


def config(experts: int = EXPERTS, inner: int = INNER) -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=pieces.VOCABULARY, hidden_size=WIDTH, intermediate_size=inner, moe_intermediate_size=inner,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=4, head_dim=16, num_experts=experts,
        num_experts_per_tok=TOP_K, norm_topk_prob=True, max_position_embeddings=SEQ, tie_word_embeddings=False,
        use_cache=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def build(seed: int, **sizes: int) -> nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config(**sizes), dtype=torch.float32).train()


def network(seed: int, *, causal: bool = True, weights: str = "own") -> Any:
    torch.manual_seed(1000 + seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = moefx.Grouter.from_config(
            vocab_size=pieces.VOCABULARY, num_experts=EXPERTS, hidden_size=48, num_layers=2, num_heads=4,
            intermediate_size=128, causal=causal,
        )  # fmt: skip
    with torch.no_grad():
        for p in made.parameters():
            token = p is made.embed.weight
            if weights == "unit" and p.dim() == 2:
                p.mul_(1 / made.config.init_std / (1 if token else math.sqrt(p.shape[1])))
            elif weights == "context" and p.dim() == 2 and not token:
                nn.init.uniform_(p, -1 / math.sqrt(p.shape[1]), 1 / math.sqrt(p.shape[1]))
    return made


def stream(seed: int, batch: int = BATCH) -> Any:
    return lambda step: data().batches("train", batch, SEQ, seed, step)


def windows(count: int) -> Tensor:
    return next(data().batches("val", count, SEQ, 0))


def train(model: nn.Module, seed: int, *, steps: int = STEPS, evaluate: Any = None, **options: Any) -> Any:
    """Train through `moefx.optimize`; calls `evaluate(step, opt)` after every step."""
    batches = stream(seed)(0)
    ids = next(data().batches("train", BATCH, SEQ, seed))
    opt = moefx.optimize(model, {"input_ids": ids, "labels": ids}, **options)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
    begun = time.perf_counter()
    for step in range(1, steps + 1):
        rate = LR * min(step / WARMUP, 0.5 * (1 + math.cos(math.pi * max(0, step - WARMUP) / (STEPS - WARMUP))))
        for g in optimizer.param_groups:
            g["lr"] = rate
        ids = next(batches)
        loss = opt(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if evaluate is not None:
            evaluate(step, opt)
        if step % 100 == 0:
            print(f"  step {step}: {float(loss.detach()):.3f} ({time.perf_counter() - begun:.0f} s)", flush=True)
    return opt


@torch.no_grad()
def validate(opt: Any, count: int = VAL_WINDOWS, **extra: Tensor) -> float:
    """Mean cross entropy, nats per token."""
    opt.eval()
    total = []
    for i, ids in enumerate(windows(count).split(BATCH)):
        more = {k: v[i * BATCH : (i + 1) * BATCH] for k, v in extra.items()}
        total.append(float(opt(input_ids=ids, labels=ids, **more).loss))
    opt.train()
    return math.fsum(total) / len(total)


@torch.no_grad()
def prefix_routing(router: Any, ids: Tensor) -> dict[str, Tensor]:
    """Routing of each token computed from it and those before it alone, whatever the router could see."""
    found = [router.route(ids[:, : t + 1], TOP_K) for t in range(ids.shape[1])]
    return {
        "routing_idx": torch.stack([idx[:, -1] for idx, _ in found], 1),
        "routing_gates": torch.stack([w[:, -1] for _, w in found], 1),
    }


def prefix_gap(model: nn.Module, opt: Any, router: Any) -> tuple[float, float]:
    """Validation loss with the whole window's routing, and with routing of prefixes alone."""
    ids = windows(PREFIX_WINDOWS)
    given = prefix_routing(router, ids)
    model.eval()
    with torch.no_grad():
        alone = moefx.optimize(
            model, {"input_ids": ids, "labels": ids, **given}, router=moefx.Precomputed(), codegen="eager"
        )
    model.train()
    return validate(opt, PREFIX_WINDOWS), validate(alone, PREFIX_WINDOWS, **given)


@torch.no_grad()
def max_violation(model: nn.Module, router: Any = None) -> float:
    """(max - mean) / mean of the experts' load on the validation windows, the mean over layers."""
    ids, loads = windows(VAL_WINDOWS), []
    if router is not None:
        loads = [router.route(ids, TOP_K)[0]]
    else:
        experts = [m for m in model.modules() if type(m).__name__.endswith("Experts")]
        hooks = [m.register_forward_pre_hook(lambda _, a: loads.append(a[1])) for m in experts]
        model.eval()(input_ids=ids)
        model.train()
        for h in hooks:
            h.remove()
    E = model.config.num_experts
    counts = [torch.bincount(i.flatten(), minlength=E).double() for i in loads]
    return sum(float(c.max() / c.mean() - 1) for c in counts) / len(counts)


@torch.no_grad()
def specialization(opt: Any) -> dict[str, float]:
    """Overlap of a token's experts and entropy of its scores on the validation windows, the means over layers."""
    found: dict[str, list[float]] = {}
    opt.eval()
    for ids in windows(VAL_WINDOWS).split(BATCH):
        opt(input_ids=ids, labels=ids)
        for name in ("overlap", "token_entropy", "marginal_entropy"):
            if name in opt.routing:
                found.setdefault(name, []).append(float(opt.routing[name].mean()))
    opt.train()
    return {name: math.fsum(v) / len(v) for name, v in found.items()}


def prepare(seed: int, out: Path) -> None:
    """Teacher, Grouters (causal, bidirectional; raw and tuned) and the folded one, in `out`; what is there is kept."""
    teacher = build(100 + seed)
    file = out / f"teacher-{seed}.pt"
    if not file.exists():
        print(f"teacher, seed {seed}", flush=True)
        train(teacher, 100 + seed, losses=[moefx.losses.LoadBalance(), moefx.losses.ZLoss()])
        torch.save(teacher.state_dict(), file)
    teacher.load_state_dict(torch.load(file))
    for kind in ("causal", "bidirectional"):
        folder = out / f"{kind}-{seed}"
        if folder.exists():
            continue
        print(f"{kind} Grouter, seed {seed}", flush=True)
        router = network(seed, causal=kind == "causal")
        held_out = list(windows(VAL_WINDOWS).split(BATCH))
        made = moefx.grouter.distill(
            teacher, router, stream(200 + seed), steps=600, lr=2e-3, warmup=60, eval_batches=held_out, progress=False
        )
        router.save_pretrained(out / f"{kind}-raw-{seed}")
        rows = [(seed, kind, 600, "distil KL", made.kl), (seed, kind, 600, "exact top-2 set", made.exact)]
        if kind == "causal":
            idx = [router.route(b, TOP_K)[0] for b, _ in zip(stream(300 + seed)(0), range(50), strict=False)]
            P = moefx.grouter.affinity(idx, EXPERTS)
            folded = moefx.grouter.fold(router, P, EXPERTS // 2)
            folded = folded[0] if isinstance(folded, tuple) else folded
            moefx.grouter.tune(folded, stream(300 + seed), steps=100, lr=1e-3, k=TOP_K, progress=False)
            folded.save_pretrained(out / f"folded-{seed}")
        tuned = moefx.grouter.tune(router, stream(300 + seed), steps=100, lr=1e-3, k=TOP_K, progress=False)
        rows += [
            (seed, kind, 100, "MaxVio raw", tuned.maxvio_before),
            (seed, kind, 100, "MaxVio tuned", tuned.maxvio_after),
        ]
        record(out, rows)
        router.save_pretrained(folder)


def load(out: Path, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return moefx.Grouter.from_pretrained(out / name)


def run(arm: str, seed: int, out: Path) -> None:
    """Train and measure one arm."""
    experts = EXPERTS // 2 if arm in ("folded", "learned_8") else EXPERTS
    inner = MATCHED if arm == "matched" else INNER
    model, router, options = build(seed, experts=experts, inner=inner), None, {}
    if arm in LEARNED:
        options["losses"] = LOSSES.get(arm, "lb,z,metrics")
    else:
        names = {"raw": "causal-raw", "anchored": "causal-raw", "folded": "folded", "bidirectional": "bidirectional"}
        router = (
            network(seed, weights=RANDOM[arm]) if arm in RANDOM else load(out, f"{names.get(arm, 'causal')}-{seed}")
        )
        if arm == "anchored":
            tune = moefx.grouter.tune
            tune(router, stream(300 + seed), steps=100, lr=1e-3, k=TOP_K, anchor=0.1, progress=False)
        gates = "layer" if arm == "layer_gates" else "router"
        options["router"] = moefx.Routing(router, gates=gates, causal=arm != "bidirectional")
    rows: list[tuple[Any, ...]] = []

    def evaluate(step: int, opt: Any) -> None:
        if step not in EVALUATED and not (arm == "grouter" and step in CROSSING):
            return
        rows.append((seed, arm, step, "validation loss", validate(opt)))
        print(f"  {arm} {seed} step {step}: {rows[-1][-1]:.4f}", flush=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = train(model, seed, evaluate=evaluate, **options)
        rows += [(seed, arm, STEPS, name, v) for name, v in specialization(opt).items()]
        rows.append((seed, arm, STEPS, "MaxVio", max_violation(model, router)))
        if router is not None and arm != "layer_gates":
            full, alone = prefix_gap(model, opt, router)
            rows += [(seed, arm, STEPS, "loss, whole windows", full), (seed, arm, STEPS, "loss, prefixes alone", alone)]
    record(out, rows)


def record(out: Path, rows: list[tuple[Any, ...]]) -> None:
    """Append rows; one write, so that two processes do not mix."""
    text = "".join(
        ",".join(f"{v:.6g}" if isinstance(v, float) else str(v).replace(",", ";") for v in r) + "\n" for r in rows
    )
    with open(out / "rows.csv", "a") as f:
        f.write(text)


def done(out: Path) -> set[tuple[int, str]]:
    file = out / "rows.csv"
    rows = [line.split(",") for line in file.read_text().splitlines()] if file.exists() else []
    return {(int(r[0]), r[1]) for r in rows if r[3] == "MaxVio"}


def plot(rows: list[dict[str, str]]) -> None:
    """Each arm's validation loss less that of learned routers with the same seed, at the same step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {
        (r["seed"], r["arm"], int(r["step"])): float(r["value"]) for r in rows if r["measure"] == "validation loss"
    }
    shown = ("matched", "grouter", "raw", "layer_gates", "bidirectional", "random", "random_unit", "random_context")
    seeds = sorted({seed for seed, arm, _ in found if arm == "grouter"})
    figure, axes = plt.subplots(1, len(seeds), figsize=(5 * len(seeds) + 1.6, 4), squeeze=False, sharey=True)
    for axis, seed in zip(axes[0], seeds, strict=True):
        for i, (arm, marker) in enumerate(zip(shown, "os^vDPX*", strict=True)):
            if (seed, arm, STEPS) not in found:
                continue  # a seed of a few arms only
            gaps = [found[seed, arm, t] - found[seed, "learned", t] for t in EVALUATED]
            axis.plot(EVALUATED, gaps, marker=marker, color=f"C{i}", label=arm)
        axis.axhline(0, color="black", linewidth=1)
        axis.set(title=f"seed {seed}", xlabel="step")
    axes[0][0].set_ylabel("validation loss less that of learned routers, nats")
    lines, names = axes[0][0].get_legend_handles_labels()  # of the first seed, which has all arms
    axes[0][-1].legend(lines, names, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / "routing_effect.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/routing_effect"))
    parser.add_argument("--prepare", action="store_true", help="teachers and Grouters only")
    parser.add_argument("--plot", action="store_true", help="gather what was measured")
    a = parser.parse_args()
    torch.set_num_threads(1)
    a.out.mkdir(parents=True, exist_ok=True)
    if a.plot:
        lines = sorted(set((a.out / "rows.csv").read_text().splitlines()))
        with open(RESULTS / "routing_effect.csv", "w", newline="") as f:
            f.write(",".join(FIELDS) + "\n" + "\n".join(lines) + "\n")
        with open(RESULTS / "routing_effect.csv", newline="") as f:
            plot(list(csv.DictReader(f)))
        return
    if a.jobs > 1:  # one process per seed; arms one after the other
        here = [sys.executable, __file__, "--out", str(a.out), "--arms", *a.arms, *(["--prepare"] if a.prepare else [])]
        groups = [a.seeds[i :: a.jobs] for i in range(a.jobs)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        jobs = [subprocess.Popen([*here, "--seeds", *map(str, g)], env=env) for g in groups if g]
        sys.exit(max(j.wait() for j in jobs))
    for seed in a.seeds if a.prepare or not set(a.arms) <= {*LEARNED, *RANDOM} else ():
        prepare(seed, a.out)
    for arm in () if a.prepare else a.arms:
        for seed in a.seeds:
            if (seed, arm) not in done(a.out):
                print(f"{arm}, seed {seed}", flush=True)
                run(arm, seed, a.out)


if __name__ == "__main__":
    main()
