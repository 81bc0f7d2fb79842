"""Parity mode against numbers that the released LITE code (github SHUCHENZHU/LITE, aea46ff) printed on this problem.

The numbers are norm, fourth and last but one entry of every parameter after 25 steps in float64.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from moefx.optim import LiteConfig, Muon

SHAPES = {"attention": (12, 16), "down": (10, 24), "up": (24, 10), "embedding": (20, 8), "norm": (20,)}
ROLES = {"down": "mlp", "up": "mlp"}
RELEASED = {
    "cosine": {
        "attention": (9.353940305, 0.534633743, 0.962853650),
        "down": (10.318872289, 0.569099801, -0.888876972),
        "up": (10.274586421, 0.579095938, -0.736780734),
        "embedding": (10.049698862, -0.003070728, -0.587431622),
        "norm": (3.082927647, 0.010461304, -0.424627677),
    },
    "wsd": {
        "attention": (9.436593522, 0.613867759, 0.908444290),
        "down": (10.458439516, 0.640447697, -0.863007516),
        "up": (10.419606574, 0.639351054, -0.784266580),
        "embedding": (14.186005427, -0.750303379, -0.162077895),
        "norm": (4.873417404, -0.717568208, -0.424627677),
    },
}
RATIO = {"attention": 0.39714638127780677, "down": 0.39361853347529907, "up": 0.39361853347529907}


def wave(shape: tuple[int, ...], seed: float) -> torch.Tensor:
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(i * (1.3 + 0.7 * seed) + i * i * 0.37).view(shape)


def run(lite: LiteConfig, steps: int = 25) -> tuple[dict[str, nn.Parameter], Muon]:
    params = {name: nn.Parameter(wave(shape, 0)) for name, shape in SHAPES.items()}
    groups = [{"params": [p], "names": [name], "role": ROLES.get(name, name)} for name, p in params.items()]
    optimizer = Muon(groups, lr=0.02, lite=lite, weight_decay=0.1, betas=(0.9, 0.99))
    for t in range(steps):
        for p in params.values():
            p.grad = wave(tuple(p.shape), t + 1) + 0.5 * wave(tuple(p.shape), 0.5)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("schedule", list(RELEASED))
def test_parity_mode_gives_the_released_numbers(schedule: str) -> None:
    make = LiteConfig.cosine if schedule == "cosine" else LiteConfig.wsd
    # The released code has no guard; on these momenta there is nothing for it to do.
    for guard in (False, True):
        params, optimizer = run(make(warmup=4, total=30, mode="parity", guard=guard))
        for name, expected in RELEASED[schedule].items():
            x = params[name].detach().flatten()
            # The epsilons differ: none in the polar factor here, and AdamW's joins the corrected second moment.
            found = (x.norm().item(), x[3].item(), x[-2].item())
            assert found == pytest.approx(expected, abs=5e-5 if name in ("embedding", "norm") else 2e-8), name
        if not guard:
            for name, ratio in RATIO.items():
                assert optimizer.state[params[name]]["ratio"].item() == pytest.approx(ratio, rel=1e-9)


def test_other_settings_do_not() -> None:
    params, _ = run(LiteConfig.cosine(warmup=4, total=34, mode="parity", guard=False))
    for name, expected in RELEASED["cosine"].items():
        x = params[name].detach().flatten()
        assert (x.norm().item(), x[3].item(), x[-2].item()) != pytest.approx(expected, abs=1e-3), name
