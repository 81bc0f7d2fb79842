"""The settings of a training run, and the run's identity: what must be equal for two runs to give the same numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, nearest

DTYPES = ("fp32", "bf16")
OPTIMS = ("adamw", "muon", "muon-lite", "soap", "soap-lite")

SEEDS = 2**63  # torch takes no larger ones, and `moefx train --router` adds a few to its seed

# They say how often to look, where to write and how fast to go; the numbers of the training do not depend on them.
_NO_IDENTITY = ("eval_every", "eval_batches", "checkpoint_every", "keep", "out", "threads", "precision_every", "places")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run.

    The defaults train the default model in about half a minute on one CPU thread, to a validation loss of 2.7 nats per
    byte (unigram baseline: 3.1). `lr`, `eps` and `betas` are smaller, larger and longer than is usual, to keep two
    implementations comparable: a rounding error that moves one token to another expert changes that expert's gradient,
    and Adam with a small eps turns even a tiny gradient into a full step. Two runs whose initial weights differ by 1e-6
    relative stay within 1.3e-4 of each other for 200 steps (seeds 0 to 3); with lr=1e-3, eps=1e-8 and norm_topk_prob
    they are 1e-2 to 1e-1 apart after 100.

    Attributes:
        steps: optimizer steps of the whole run; the learning rate follows a cosine to `min_lr` over them.
        batch, seq: sequences per microbatch, tokens per sequence.
        grad_accum: microbatches per step; a step sees batch * grad_accum sequences.
        lr, min_lr: peak learning rate; the final one as a fraction of the peak.
        warmup: steps over which the learning rate rises linearly.
        weight_decay: decoupled, on parameters of two or more dimensions.
        betas, eps: of "adamw"; the other optimizers have their own (`make_optimizer=` of `train` sets them).
        clip: largest L2 norm of the gradient; 0 turns clipping off.
        seed: of the data order and of dropout; below 2**63.
        eval_every, eval_batches: validate after so many steps (0: only at the end), on so many batches (0: not at all).
        checkpoint_every, keep: save after so many steps (0: only at the end and when interrupted); how many to keep.
        out: directory (a path, or its text) for checkpoints and metrics.
        threads: torch's CPU threads; None leaves them.
        optim: "adamw" (torch's), or one of moefx.optim: "muon", "muon-lite", "soap", "soap-lite", with `lr` scaled to
            AdamW's update size and embeddings, norms and the head left to AdamW.
        dtype: "fp32", or "bf16": fp32 weights, computed under torch.autocast.
        precision_every: measure what precision casts lose in the first microbatch of every so-manyth step (0: never);
            each time costs one more microbatch, and about as much for comparing.
        places: measure in validation what expert parallelism over so many places would send (docs/routing.md); None
            for not at all. The model must measure its routing and return the choices
            (`moefx.losses.RoutingMetrics(choices=True)`).

    Raises:
        InputError: a value is out of range.
    """

    steps: int = 200
    batch: int = 8
    seq: int = 128
    lr: float = 3e-4
    min_lr: float = 0.1
    warmup: int = 20
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 3e-5
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 50
    eval_batches: int = 8
    checkpoint_every: int = 100
    keep: int = 2
    out: Path = Path("runs/default")
    threads: int | None = None
    dtype: str = "fp32"
    optim: str = "adamw"
    grad_accum: int = 1
    precision_every: int = 0
    places: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        least = {"steps": 1, "batch": 1, "seq": 2, "grad_accum": 1, "keep": 1}
        counts = ("warmup", "seed", "eval_every", "eval_batches", "checkpoint_every", "precision_every")
        least.update(dict.fromkeys(counts, 0))
        least.update(dict.fromkeys(("lr", "min_lr", "weight_decay", "eps", "clip"), 0))
        for name, bound in least.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= bound):
                todo = f"choose a finite number, at least {bound}"
                raise InputError(f"{name}={value!r} is out of range", where="TrainConfig", todo=todo)
        if self.seed >= SEEDS:
            raise InputError(f"seed={self.seed} is out of range", where="TrainConfig", todo="choose one below 2**63")
        for name in ("threads", "places"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value} is out of range", where="TrainConfig", todo="choose at least 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(
                f"betas={self.betas} are out of range", where="TrainConfig", todo="choose both from [0, 1)"
            )
        for name, known in (("dtype", DTYPES), ("optim", OPTIMS)):
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"unknown {name} {value!r}", where="TrainConfig", todo=nearest(str(value), known))

        fixed = [name for name in ("betas", "eps") if getattr(self, name) != getattr(type(self), name)]
        if fixed and self.optim != "adamw":
            raise InputError(
                f"{fixed[0]}={getattr(self, fixed[0])!r} is given for optim={self.optim!r}", where="TrainConfig",
                why="Muon and SOAP, and the AdamW that they leave the rest to, have constants of their own",
                todo="leave it out, or give `train` a make_optimizer",
            )  # fmt: skip

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.batch * self.grad_accum * self.seq

    def identity(self) -> dict[str, Any]:
        """The settings that the numbers of a run depend on, as JSON values; to resume, they must be equal."""
        return {k: v for k, v in asdict(self).items() if k not in _NO_IDENTITY}


def learning_rate(cfg: TrainConfig, step: int) -> float:
    """Learning rate of step `step` (counted from 0): linear warm-up, then a cosine from `lr` to `lr * min_lr`."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    progress = min(1.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
    return cfg.lr * (cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))
