"""Float64 re-derivations that share no code with the product: one matrix at a time, by SVD and plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Tensor = torch.Tensor

# Written down again, from the publication.
TRIPLES = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]


def svd_polar(x: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(x.double(), full_matrices=False)
    return U @ Vh


def scalar_polar(x: Tensor, steps: int) -> Tensor:
    """The polynomials applied to the singular values one by one."""
    U, s, Vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / (1.01 * s.square().sum().sqrt())
    for i in range(steps):
        a, b, c = TRIPLES[min(i, 7)]
        if i < 7:
            a, b, c = a / 1.01, b / 1.01**3, c / 1.01**5
        s = a * s + b * s**3 + c * s**5
    return U @ torch.diag(s) @ Vh


class ParityLoop:
    """Muon-LITE of one (out, in) matrix as the released code does it, with an identity matrix and a full projector."""

    def __init__(self, w: Tensor, lr: float, decay: float, fraction: float, theta: float = 0.95, steps: int = 6):
        self.w, self.lr, self.decay, self.theta, self.steps = w.double().clone(), lr, decay, theta, steps
        self.m = torch.zeros_like(self.w)
        self.s = min(w.shape)
        self.k = min(math.floor(fraction * self.s) + 1, self.s - 1)
        self.ratio = 1 / math.sqrt(self.s)

    def step(self, g: Tensor, chi: float, beta1: float, beta2: float) -> None:
        g, n = g.double(), self.w.shape[1]
        self.m = self.theta * self.m + (1 - self.theta) * g
        mixed = self.m + (1 - self.theta) / self.theta * g
        o = scalar_polar(mixed, self.steps)
        threshold = mixed.norm() * self.ratio + 1e-9
        s = 0.5 * (o + scalar_polar(mixed / threshold - o, self.steps))
        flat = torch.eye(n, dtype=torch.float64) - s.T @ s
        self.ratio = min(1.0, self.ratio * (1.05 if s.norm() > math.sqrt(self.k) else 0.95))
        h = scalar_polar(g, self.steps)
        u = o + beta1 * h + (beta2 - beta1) * h @ flat
        u = u + (chi - 1) * u @ flat
        old = self.w
        shrink = (1 - self.lr * self.decay) * old - self.lr * self.decay * (chi - 1) * old @ flat
        self.w = shrink - self.lr * 0.2 * math.sqrt(max(self.w.shape)) * u


class ExactLite:
    """Algorithm 1 of one (out, in) matrix with exact polar factors and the exact top-k right projector."""

    def __init__(
        self,
        w: Tensor,
        rank: int,
        *,
        theta: float = 0.95,
        nesterov: bool = True,
        shared: bool = False,
        decay: float = 0.0,
        scale: float | None = None,
        amplify: str = "flat",
    ):
        self.w, self.rank, self.theta, self.decay = w.double().clone(), rank, theta, decay
        self.nesterov, self.shared, self.amplify = nesterov, shared, amplify
        self.scale = 0.2 * math.sqrt(max(w.shape)) if scale is None else scale
        self.m = torch.zeros_like(self.w)

    def step(self, g: Tensor, lr: float, chi: float, beta1: float, beta2: float) -> None:
        g = g.double()
        self.m = self.theta * self.m + (1 - self.theta) * g
        mixed = self.m + (1 - self.theta) / self.theta * g if self.nesterov else self.m
        Vh = torch.linalg.svd(mixed, full_matrices=False).Vh[: self.rank]
        sharp = Vh.T @ Vh
        flat = torch.eye(len(sharp), dtype=torch.float64) - sharp
        if self.amplify == "sharp":
            sharp, flat = flat, sharp
        if self.shared:
            first = svd_polar(mixed + beta1 * (1 - self.theta) * g)
            second = svd_polar(mixed + beta2 * (1 - self.theta) * g)
        else:
            o, h = svd_polar(mixed), svd_polar(g)
            first, second = o + beta1 * h, o + beta2 * h
        update = self.scale * (first @ sharp + chi * second @ flat)
        self.w = self.w - lr * (update + self.decay * (self.w @ sharp + chi * self.w @ flat))


def spectrum(m: int, n: int, condition: float, seed: int = 0, gap: int | None = None) -> Tensor:
    """A random float64 matrix with singular values from 1 down to 1 / condition; `gap` keeps the first few at 3."""
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    s = torch.logspace(0, -math.log10(condition), min(m, n), dtype=torch.float64)
    if gap is not None:
        s[:gap] = torch.linspace(4, 3, gap, dtype=torch.float64)
    return U[:, : len(s)] @ torch.diag(s) @ V[:, : len(s)].T


def river(
    run: Callable[[Tensor], Callable[[Tensor, float], None]],
    *,
    lr: float,
    distance: float = 30.0,
    noise: float = 0.5,
    sharp_error: bool = False,
    seeds: int = 2,
    steps: int = 300,
) -> float:
    """Mean loss of the last 10 steps on the anisotropic quadratic 1/2 ||(W - W*) B^(1/2)||^2, W [24, 32].

    B has 3 eigenvalues 1 and 29 at 1e-3; the error lies in the flat directions (or the sharp ones). `run(w)` gives the
    function that updates w in place from a gradient and a learning rate (30 steps of warm-up, cosine to a tenth).
    """
    total = 0.0
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(100 + seed)
        Q = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64)).Q
        eigen = torch.full((32,), 1e-3, dtype=torch.float64)
        eigen[:3] = 1
        B, root = Q @ torch.diag(eigen) @ Q.T, Q @ torch.diag(eigen.sqrt()) @ Q.T
        part = Q[:, :3] if sharp_error else Q[:, 3:]
        error = distance / math.sqrt(32) * torch.randn(24, part.shape[1], generator=generator, dtype=torch.float64)
        w = error @ part.T
        update = run(w)
        losses = []
        for t in range(steps):
            losses.append(0.5 * (w @ root).square().sum().item())
            grad = w @ B + noise * torch.randn(24, 32, generator=generator, dtype=torch.float64) @ root
            p = max(0.0, (t - 30) / (steps - 30))
            factor = (t + 1) / 30 if t < 30 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * p))
            update(grad, lr * factor)
        total += sum(losses[-10:]) / 10
    return total / seeds
