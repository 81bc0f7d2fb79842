"""Affinity retained by each way of grouping experts, as a share of the affinity of all pairs.

    python benchmarks/folding.py

Matrices: planted blocks without and with noise, blocks with hubs, uniform noise, top-k routing with popularity falling
as 1/rank, and the routing of a small random router of token embeddings over the embedded corpus. The mean of `SEEDS`
seeds per row goes to benchmarks/results/folding.csv, with the CPU time of one grouping.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from moefx.grouter import affinity, group_experts, retained
from moefx.grouter.groups import METHODS
from moefx.train import embedded_corpus

RESULTS = Path(__file__).parent / "results" / "folding.csv"
SEEDS = 5
TOKENS = 1 << 16
Matrix = np.ndarray


def symmetric(rng: np.random.Generator, experts: int) -> Matrix:
    upper = np.triu(rng.random((experts, experts)), 1)
    return upper + upper.T


def planted(seed: int, experts: int, targets: int, noise: float, hubs: bool = False) -> Matrix:
    """Shuffled blocks of strength 1; other pairs up to `noise`; with hubs, one expert per block is liked by all."""
    rng = np.random.default_rng(seed)
    block = rng.permutation(experts) % targets
    P = np.where(block[:, None] == block, 0.7 + 0.3 * symmetric(rng, experts), noise * symmetric(rng, experts))
    if hubs:
        hub = [int(np.flatnonzero(block == b)[-1]) for b in range(targets)]
        P[:, hub] += 0.6
        P[hub] += 0.6
    np.fill_diagonal(P, 0)
    return P


def zipf(seed: int, experts: int, k: int) -> Matrix:
    rng = np.random.default_rng(seed)
    popularity = -np.log1p(rng.permutation(experts))
    noisy = popularity + rng.gumbel(size=(TOKENS, experts))
    return affinity(np.argpartition(-noisy, k, axis=1)[:, :k], experts).P


def random_router(seed: int, experts: int, k: int) -> Matrix:
    """Top-k of a linear layer on embeddings of the last four bytes, weights normal."""
    text = b"\0".join(document for _, document in embedded_corpus())[: 4 * TOKENS]
    tokens = torch.from_numpy(np.frombuffer(text, dtype=np.uint8)[-TOKENS:].astype(np.int64))
    generator = torch.Generator().manual_seed(seed)
    table, score = torch.randn(256, 64, generator=generator), torch.randn(64, experts, generator=generator)
    hidden = sum(0.5**lag * table[tokens.roll(lag)] for lag in range(4))
    return affinity((hidden @ score).topk(k).indices, experts).P


CASES: dict[str, tuple[int, int, Callable[[int], Matrix]]] = {
    "planted": (128, 32, lambda s: planted(s, 128, 32, 0.0)),
    "planted, noise 0.8": (128, 32, lambda s: planted(s, 128, 32, 0.8)),
    "planted, noise 1.0": (128, 32, lambda s: planted(s, 128, 32, 1.0)),
    "planted, noise 0.8, hubs": (128, 32, lambda s: planted(s, 128, 32, 0.8, hubs=True)),
    "uniform noise": (128, 32, lambda s: symmetric(np.random.default_rng(s), 128)),
    "Zipf, 128 top-8 to 32": (128, 32, lambda s: zipf(s, 128, 8)),
    "Zipf, 128 top-8 to 48": (128, 48, lambda s: zipf(s, 128, 8)),
    "random router, 32 top-4 to 8": (32, 8, lambda s: random_router(s, 32, 4)),
    "random router, 128 top-8 to 64": (128, 64, lambda s: random_router(s, 128, 8)),
    "random router, 128 top-8 to 32": (128, 32, lambda s: random_router(s, 128, 8)),
}


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name, (experts, targets, make) in CASES.items():
        row: dict[str, str | int] = {"matrix": name, "experts": experts, "targets": targets}
        matrices = [make(seed) for seed in range(SEEDS)]
        for method in METHODS:
            start = time.process_time()
            groups = [group_experts(P, targets, method=method) for P in matrices]
            row[f"{method}_seconds"] = f"{(time.process_time() - start) / SEEDS:.3f}"
            shares = [2 * retained(P, g) / P.sum() for P, g in zip(matrices, groups, strict=True)]
            row[method] = f"{np.mean(shares):.4f}"
        rows.append(row)
        print(row, flush=True)
    columns = ["matrix", "experts", "targets", *METHODS, *(f"{m}_seconds" for m in METHODS[:2])]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
