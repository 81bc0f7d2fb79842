"""AdamW against torch's, and diagonal LITE against a loop over elements."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moefx.errors import InputError
from moefx.optim import AdamW, LiteConfig, Muon, MuonLITE
from moefx.optim import adamw as product

Tensor = torch.Tensor


def gradients(steps: int, *shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    size = torch.logspace(0, -2, shape[-1]).double()
    return [(torch.randn(*shape, generator=generator, dtype=torch.float64) * size).to(dtype) for _ in range(steps)]


def run(grads: list[Tensor], optimizer: type[torch.optim.Optimizer] = AdamW, **options: object) -> Tensor:
    p = nn.Parameter(torch.linspace(-1, 1, grads[0].numel()).to(grads[0].dtype).view(grads[0].shape))
    made = optimizer([p], **{"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95), **options})
    for g in grads:
        p.grad = g.clone()
        made.step()
    return p.detach()


@pytest.mark.parametrize("shape", [(6, 9), (11,), (2, 3, 4)])
def test_plain_is_torchs(shape: tuple[int, ...]) -> None:
    grads = gradients(10, *shape)
    assert torch.allclose(run(grads), run(grads, torch.optim.AdamW), atol=1e-12)
    assert not torch.allclose(run(grads, betas=(0.8, 0.95)), run(grads, torch.optim.AdamW), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e18, 1.9e19, 2e19, 1e20, 3e38])  # a square overflows from 1.8e19 on, v from 8e19
def test_a_large_finite_gradient_is_torchs(size: float, dtype: torch.dtype) -> None:
    grads = gradients(5, 6, 9, dtype=dtype)
    grads[2][3, 4] = size
    states, found = [], []
    for make in (AdamW, torch.optim.AdamW):
        # torch rounds its moments to bfloat16; given the same numbers in float32, it does not.
        p = nn.Parameter(torch.linspace(-1, 1, 54).view(6, 9).to(dtype if make is AdamW else torch.float32))
        optimizer = make([p], lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))
        for g in grads:
            p.grad = g.to(p.dtype)
            optimizer.step()
        states.append(optimizer.state[p])
        found.append(p.detach())
        assert make is torch.optim.AdamW or optimizer.skipped() == {}
    assert torch.equal(states[0]["exp_avg_sq"], states[1]["exp_avg_sq"])
    assert states[0]["exp_avg_sq"][3, 4].isinf() == (size >= 1e20)
    assert torch.allclose(found[0].float(), found[1], atol=1e-6 if dtype == torch.float32 else 2e-2)


def test_an_infinite_second_moment_is_sharp_for_lite() -> None:
    grads = gradients(12, 40, dtype=torch.float32)
    p = nn.Parameter(torch.ones(40))
    optimizer = AdamW([p], lr=0.01, weight_decay=0.1, lite=LiteConfig(4.0))
    for t, g in enumerate(grads):
        p.grad = torch.where(torch.arange(40) == 7, 1e20, g) if t == 2 else g
        before = p.detach().clone()
        optimizer.step()
        if t >= 2:
            assert torch.isfinite(p).all()
            assert p[7] == before[7] * torch.tensor(1 - 0.001)  # the decay of sharp elements and no update
            assert (p != before).all()
    assert 0.3 < optimizer.state[p]["high"] < 3  # beside an infinite mean nothing else would be sharp


def element_loop(grads: list[Tensor], share: float, chi: float) -> Tensor:
    """Diagonal LITE one element at a time."""
    w = torch.linspace(-1, 1, grads[0].numel()).double().tolist()
    m, v, high, low = [0.0] * len(w), [0.0] * len(w), 1.0, 0.5
    for t, g in enumerate(grads, 1):
        for i, x in enumerate(g.flatten().tolist()):
            m[i], v[i] = 0.9 * m[i] + 0.1 * x, 0.95 * v[i] + 0.05 * x * x
        mean = sum(v) / len(v)
        for i in range(len(w)):
            mask = 1.0 if v[i] >= high * mean else 0.0 if v[i] < low * mean else (v[i] / mean - low) / (high - low)
            step = m[i] / (1 - 0.9**t) / ((v[i] / (1 - 0.95**t)) ** 0.5 + 1e-8)
            boost = (chi - 1) * (1 - mask)
            w[i] -= 0.01 * 0.1 * w[i] * (1 + boost) + 0.01 * (1 + boost) * step
        above_high = sum(x >= high * mean for x in v) / len(v)
        above_low = sum(x >= low * mean for x in v) / len(v)
        high *= 1.05 if above_high > share else 0.95
        low = min(low * (1.05 if above_low > share + min(1 - share, 0.1) else 0.95), 0.95 * high)
    return torch.tensor(w, dtype=torch.float64).view(grads[0].shape)


@pytest.mark.parametrize("shape", [(4, 15), (40,)])
def test_diagonal_lite_is_the_element_loop(shape: tuple[int, ...]) -> None:
    grads = gradients(25, *shape)
    found = run(grads, lite=LiteConfig(4.0, rank_fraction=0.1))
    assert torch.allclose(found, element_loop(grads, 0.1, 4.0), atol=1e-12)
    assert not torch.allclose(found, element_loop(grads, 0.3, 4.0), atol=1e-3)


def test_invariant_2_all_sharp_is_adamw_and_all_flat_is_scaled_adamw() -> None:
    grads = gradients(20, 5, 8, dtype=torch.float32)
    plain = run(grads)
    assert torch.equal(run(grads, lite=LiteConfig(4.0, rank_fraction=1.0)), plain)
    assert torch.equal(run(grads, lite=LiteConfig(1.0, rank_fraction=0.1)), plain)
    assert torch.equal(run(grads, lite=LiteConfig(4.0, chi_diagonal=1.0)), plain)
    flat = run(grads, lite=LiteConfig(4.0, rank_fraction=0.0))
    assert torch.allclose(flat, run(grads, lr=0.04), atol=1e-6)


def test_the_mask_settles_near_its_share() -> None:
    p = nn.Parameter(torch.zeros(50, 40))
    optimizer = AdamW([p], lr=0.01, lite=LiteConfig(4.0))
    for g in gradients(150, 50, 40, dtype=torch.float32):
        p.grad = g
        optimizer.step()
    state = optimizer.state[p]
    scaled = state["exp_avg_sq"] / state["exp_avg_sq"].mean()
    assert 0.06 < (scaled >= state["high"]).float().mean() < 0.14
    assert 0.16 < (scaled >= state["low"]).float().mean() < 0.24


def test_nan_is_skipped_and_counted() -> None:
    grads = gradients(8, 6)
    p = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer = AdamW([p], lr=0.1, lite=LiteConfig(4.0))
    for t, g in enumerate(grads):
        p.grad = torch.full_like(g, torch.nan) if t in (0, 4) else g
        before = p.detach().clone()
        optimizer.step()
        assert torch.equal(p, before) == (t in (0, 4))
    assert list(optimizer.skipped().values()) == [2]
    q = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    other = AdamW([q], lr=0.1, lite=LiteConfig(4.0))
    for t, g in enumerate(grads):
        if t not in (0, 4):
            q.grad = g
            other.step()
    assert torch.equal(p, q)


def test_bad_betas() -> None:
    with pytest.raises(InputError, match="betas"):
        AdamW([nn.Parameter(torch.zeros(2))], betas=(0.9, 1.0))


def test_one_optimizer_runs_both_algorithms_by_group() -> None:
    roles = {"attention": "muon", "router": "muon", "embedding": "adamw", "norm": "adamw", "head": "adamw"}
    params = {role: nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(0))) for role in roles}
    groups = [
        {"params": [params[role]], "names": [role], "role": role, "algorithm": name} for role, name in roles.items()
    ]
    optimizer = MuonLITE(groups, lr=0.1, lite=LiteConfig(chi_diagonal=4.0))
    has_lite = {g["role"]: g["lite"] is not None for g in optimizer.param_groups}
    assert has_lite == {"attention": True, "router": False, "embedding": True, "norm": True, "head": False}
    alone = {
        role: (Muon if name == "muon" else AdamW)(
            [nn.Parameter(params[role].detach().clone())],
            lr=0.1,
            lite=LiteConfig(chi_diagonal=4.0) if has_lite[role] else None,
        )
        for role, name in roles.items()
    }
    for g in gradients(4, 6, 8, dtype=torch.float32):
        for role, made in alone.items():
            params[role].grad = made.param_groups[0]["params"][0].grad = g
            made.step()
        optimizer.step()
    for role, made in alone.items():
        assert torch.equal(params[role], made.param_groups[0]["params"][0]), role


@pytest.mark.parametrize("lite", [None, LiteConfig(4.0)])
@pytest.mark.parametrize("rounding", ["nearest", "master", "stochastic"])
def test_batches_of_tensors_are_the_loop_bitwise(
    lite: LiteConfig | None, rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(6, 9), (11,), (2, 3, 4), (), (0,), (5, 40), (7,)]
    dtypes = [
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
        torch.float32,
        torch.bfloat16,
        torch.float64,
    ]
    results = []
    for size in (1, 16 << 20):
        monkeypatch.setattr(product, "BATCH_BYTES", size)
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(s, generator=generator).to(d)) for s, d in zip(shapes, dtypes, strict=True)]
        optimizer = AdamW(params, lr=0.01, lite=lite, rounding=rounding)
        for t in range(5):
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
                if p.grad.numel() and (t, i) in ((0, 2), (3, 0), (3, 5)):
                    p.grad.view(-1)[0] = torch.inf
            optimizer.step()
        results.append([*params, *(x for p in params for x in optimizer.state[p].values())])
        assert sum(optimizer.skipped().values()) == 3
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_skipped_first_gradient_leaves_weights_without_eps() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([p], eps=0.0)
    p.grad = torch.tensor([1.0, torch.nan, 3e38])
    optimizer.step()
    assert torch.equal(p, torch.ones(3))
