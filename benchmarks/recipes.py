"""What a precision recipe costs in loss: the default model trained on the same text under each recipe.

    python benchmarks/recipes.py [--recipes fp8_flow,mxfp4_hopper] [--steps 500] [--seeds 0,1]

Every arm starts from the same weights and sees the same batches as `bf16`, which here computes in fp32, the dtype of
the model's parameters: what is compared is the recipe's rounding and nothing else. Products run in emulation (docs/
precision.md), so that the losses mean something on a CPU and the times mean nothing. The gap is that of losses smoothed
over 50 steps, relative to `bf16`: at the end, and the largest after the first 100 steps. Raw losses go to
benchmarks/results/recipes.csv, a picture beside it where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import copy
import csv
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

RESULTS = Path(__file__).parent / "results"
WINDOW, SETTLED = 50, 100


def run(recipe: str, seed: int, steps: int) -> dict[str, Any]:
    """Losses of every step and the validation loss of one arm."""
    import moefx
    from moefx.train.config import TrainConfig
    from moefx.train.data import open_dataset
    from moefx.train.loop import train
    from moefx.train.models import default_model

    data = open_dataset(())
    model = copy.deepcopy(default_model(seed)).train()
    with tempfile.TemporaryDirectory() as out:
        cfg = TrainConfig(steps=steps, out=Path(out), seed=seed, eval_every=0, checkpoint_every=0)
        ids = next(data.batches("train", cfg.batch, cfg.seq, cfg.seed))
        opt = moefx.optimize(model, {"input_ids": ids, "labels": ids}, recipe=recipe, codegen="eager")
        start = time.process_time()
        result = train(opt, data, cfg, label=recipe, console=Console(quiet=True))
    casts = opt.report.casts
    print(
        f"{recipe} seed {seed}: loss {result.losses[-1]:.4f}, validation {result.val[-1][1]:.4f}, "
        f"casts {casts['before']} > {casts['after']}, {time.process_time() - start:.0f} s CPU",
        flush=True,
    )
    return {"recipe": recipe, "seed": seed, "losses": result.losses, "val": result.val[-1][1]}


def smoothed(losses: list[float]) -> np.ndarray:
    """Moving average over `WINDOW` steps."""
    return np.convolve(losses, np.ones(WINDOW) / WINDOW, "valid")


def summarise(arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Gaps to bf16 of the same seed, in percent."""
    base = {a["seed"]: a for a in arms if a["recipe"] == "bf16"}
    rows = []
    for a in arms:
        ref = smoothed(base[a["seed"]]["losses"])
        gap = (smoothed(a["losses"]) / ref - 1) * 100
        late = gap[max(0, SETTLED - WINDOW) :]
        rows.append(
            {
                "recipe": a["recipe"],
                "seed": a["seed"],
                "validation": a["val"],
                "gap_at_end_percent": float(gap[-1]),
                "largest_gap_percent": float(late[np.abs(late).argmax()]),
            }
        )
    return rows


def picture(arms: list[dict[str, Any]], path: Path) -> None:
    """Smoothed losses and their gap to bf16."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no picture")
        return
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    base = {a["seed"]: smoothed(a["losses"]) for a in arms if a["recipe"] == "bf16"}
    for i, recipe in enumerate(dict.fromkeys(a["recipe"] for a in arms)):
        for a in (a for a in arms if a["recipe"] == recipe):
            curve = smoothed(a["losses"])
            steps = np.arange(len(curve)) + WINDOW
            label = recipe if a["seed"] == min(base) else None
            left.plot(steps, curve, color=f"C{i}", lw=1, label=label)
            right.plot(steps, (curve / base[a["seed"]] - 1) * 100, color=f"C{i}", lw=1, label=label)
    left.set(xlabel="step", ylabel=f"loss, mean of {WINDOW} steps (nats per byte)")
    right.set(xlabel="step", ylabel="gap to bf16 (percent)")
    right.axhline(0.25, color="grey", ls=":", lw=1)
    right.axhline(-0.25, color="grey", ls=":", lw=1)
    left.legend(frameon=False)
    fig.savefig(path, dpi=120)


def stored() -> list[dict[str, Any]]:
    """The arms in the raw rows of an earlier run."""
    arms: dict[tuple[str, int], dict[str, Any]] = {}
    with (RESULTS / "recipes.csv").open(newline="") as f:
        for row in csv.DictReader(f):
            key = (row["recipe"], int(row["seed"]))
            new = {"recipe": key[0], "seed": key[1], "losses": [], "val": float(row["validation"])}
            arms.setdefault(key, new)["losses"].append(float(row["loss"]))
    return list(arms.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="fp8_naive,fp8_flow,mxfp8,mxfp4_hopper")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--redraw", action="store_true", help="draw the stored losses again, train nothing")
    args = parser.parse_args()
    if args.redraw:
        picture(stored(), RESULTS / "recipes.png")
        return
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    arms = [
        run(recipe, int(seed), args.steps)
        for seed in args.seeds.split(",")
        for recipe in ["bf16", *args.recipes.split(",")]
    ]
    for row in summarise(arms):
        print(
            f"{row['recipe']:<16} seed {row['seed']}: validation {row['validation']:.4f}, gap at the end "
            f"{row['gap_at_end_percent']:+.3f} %, largest {row['largest_gap_percent']:+.3f} %"
        )
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "recipes.csv").open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["recipe", "seed", "step", "loss", "validation"])
        for a in arms:
            for step, loss in enumerate(a["losses"], 1):
                writer.writerow([a["recipe"], a["seed"], step, f"{loss:.6f}", f"{a['val']:.6f}"])
    picture(arms, RESULTS / "recipes.png")


if __name__ == "__main__":
    main()
