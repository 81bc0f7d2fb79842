"""Muon and Muon-LITE against float64 loops, and what must hold exactly."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from moefx.errors import InputError
from moefx.optim import LiteConfig, Muon, MuonLITE, Ramp
from moefx.optim import muon_update as product
from moefx.optim.muon_update import combine, lr_scale, nested

from .oracles import ExactLite, ParityLoop, spectrum, svd_polar

Tensor = torch.Tensor
TOY: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(steps: int, *shape: int, seed: int = 7, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """A drifting gradient: a fixed part with a spectral gap and noise."""
    fixed = torch.stack([spectrum(*shape[-2:], 30, seed=i, gap=3) for i in range(math.prod(shape[:-2]))]).view(shape)
    return [(fixed + 0.05 * random(*shape, seed=seed + t)).to(dtype) for t in range(steps)]


def run(start: Tensor, grads: list[Tensor], cls: type[Muon] = Muon, **options: Any) -> tuple[Tensor, Muon]:
    p = nn.Parameter(start.clone())
    optimizer = cls([p], **{**TOY, **options})
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach(), optimizer


# -- against re-derivations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("values", [(2.0, -0.25, 1.0), (1.0, 0.0, 1.0), (2.0, 0.0, 0.0), (1.5, 0.5, 0.5)])
def test_parity_mode_is_the_released_update(shape: tuple[int, int], values: tuple[float, float, float]) -> None:
    start, grads = random(*shape), gradients(8, *shape)
    oracle = ParityLoop(start, fraction=0.2, lr=0.02, decay=0.1)
    for g in grads:
        oracle.step(g, *values)
    lite = LiteConfig(*values, rank_fraction=0.2, mode="parity", guard=False)
    found, optimizer = run(start, grads, lite=lite)
    assert torch.allclose(found, oracle.w, atol=1e-9)
    assert next(iter(optimizer.state.values()))["ratio"].item() == pytest.approx(oracle.ratio)
    # Another damping is another result.
    other, _ = run(
        start, grads, lite=LiteConfig(values[0], values[1] + 0.1, values[2], rank_fraction=0.2, mode="parity")
    )
    assert not torch.allclose(other, oracle.w, atol=1e-4)


def test_parity_follows_a_ramp() -> None:
    start, grads = random(12, 20), gradients(10, 12, 20)
    chi, beta2 = Ramp(1.0, 2.0, 3, 8), Ramp(0.0, 1.0, 3, 6)
    oracle = ParityLoop(start, fraction=0.1, lr=0.02, decay=0.1)
    for t, g in enumerate(grads):
        oracle.step(g, chi(t), 0.0, beta2(t))
    found, _ = run(start, grads, lite=LiteConfig(chi, 0.0, beta2, mode="parity", guard=False))
    assert torch.allclose(found, oracle.w, atol=1e-9)


@pytest.mark.parametrize("damping", ["orthogonal", "shared"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_fast_mode_is_algorithm_1_with_the_exact_projector(shape: tuple[int, int], damping: str) -> None:
    start, grads = random(*shape), gradients(12, *shape)
    oracle = ExactLite(start, 3, decay=0.1, shared=damping == "shared")
    for g in grads:
        oracle.step(g, 0.02, 2.0, -0.25, 1.0)
    lite = LiteConfig(rank_fraction=0.25, damping=damping, damping_steps=12)
    found, _ = run(start, grads, lite=lite, polar_steps=12)
    assert torch.allclose(found, oracle.w, atol=1e-4)
    plain, _ = run(start, grads, polar_steps=12)
    assert not torch.allclose(plain, oracle.w, atol=1e-2)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize(("scale", "name"), [("original", "original"), ("rms", "match_rms_adamw")])
def test_plain_muon_is_torchs(shape: tuple[int, int], scale: str, name: str) -> None:
    start, grads = random(*shape, dtype=torch.float32), gradients(6, *shape, dtype=torch.float32)
    p = nn.Parameter(start.clone())
    theirs = torch.optim.Muon([p], lr=0.02, weight_decay=0.1, adjust_lr_fn=name)
    for g in grads:
        p.grad = g.clone()
        theirs.step()
    found, _ = run(start, grads, scale=scale, polar="quintic", polar_steps=5, polar_dtype="bfloat16")
    moved = (p.detach() - start).norm()
    assert (found - p).norm() / moved < 2e-2  # theirs rounds the input to bfloat16 before it is scaled
    accurate, _ = run(start, grads, scale=scale)
    assert (accurate - p).norm() / moved > 5e-2


def test_scales() -> None:
    assert [lr_scale("rms", 4, 9), lr_scale("spectral", 4, 9), lr_scale("original", 4, 9)] == [0.2 * 3, 2 / 3, 1.0]
    assert [lr_scale("spectral", 9, 4), lr_scale("original", 9, 4), lr_scale("none", 9, 4)] == [1.5, 1.5, 1.0]
    start, grads = random(12, 20), gradients(3, 12, 20)
    for scale in ("spectral", "original", "rms"):
        stored, _ = run(start.mT, [g.mT for g in grads], scale=scale, layout="in_out")
        assert torch.allclose(stored.mT, run(start, grads, scale=scale)[0], atol=1e-12)


# -- invariants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fast", "parity"])
def test_invariant_1_neutral_lite_is_muon_bitwise_and_does_no_work(mode: str) -> None:
    start, grads = random(16, 24, dtype=torch.float32), gradients(20, 16, 24, dtype=torch.float32)
    plain, _ = run(start, grads)
    for fraction in (0.05, 0.5, 1.0):
        neutral = LiteConfig(1.0, 0.0, 0.0, rank_fraction=fraction, mode=mode)
        with (
            mock.patch.object(product, "improve_basis", side_effect=AssertionError),
            mock.patch.object(product, "controlled_projector", side_effect=AssertionError),
        ):
            found, optimizer = run(start, grads, lite=neutral)
        assert torch.equal(found, plain)
        assert "basis" not in next(iter(optimizer.state.values()))
    # The settings of a schedule that is neutral so far, too.
    later, _ = run(start, grads, lite=LiteConfig(Ramp(1.0, 2.0, 50, 60), 0.0, 0.0, mode=mode), polar_steps=8)
    assert torch.equal(later, plain)
    changed, _ = run(start, grads, lite=LiteConfig(2.0, 0.0, 0.0, mode=mode))
    assert not torch.equal(changed, plain)


def test_invariant_1_equal_damping_needs_no_projector() -> None:
    start, grads = random(16, 24), gradients(6, 16, 24)
    with mock.patch.object(product, "improve_basis", side_effect=AssertionError):
        first, second = (run(start, grads, lite=LiteConfig(1.0, 0.5, 0.5, rank_fraction=f))[0] for f in (0.1, 0.9))
    assert torch.equal(first, second)
    # Parity's controller moves, towards other ranks, but has no part in the update.
    released = [LiteConfig(1.0, 0.5, 0.5, rank_fraction=f, mode="parity") for f in (0.1, 0.9)]
    (first, one), (second, two) = (run(start, grads, lite=lite) for lite in released)
    assert torch.equal(first, second)
    assert not torch.equal(*(next(iter(o.state.values()))["ratio"] for o in (one, two)))
    assert torch.equal(run(start, grads, lite=LiteConfig(rank_fraction=0.0))[0], run(start, grads)[0])


def test_invariant_2_everything_flat_or_sharp() -> None:
    w, o, h = random(5, 7), random(5, 7, seed=1), random(5, 7, seed=2)
    chi, b1, b2, lr, decay, scale = 2.0, -0.25, 1.0, 0.1, 0.3, 1.7
    nothing, everything = torch.zeros(1, 7, 0, dtype=w.dtype), torch.eye(7, dtype=w.dtype)[None]
    flat = combine(w[None], (o + b1 * h)[None], (o + b2 * h)[None], nothing, chi, lr, decay, scale)[0]
    sharp = combine(w[None], (o + b1 * h)[None], (o + b2 * h)[None], everything, chi, lr, decay, scale)[0]
    assert torch.allclose(flat, w - lr * chi * decay * w - lr * scale * chi * (o + b2 * h), atol=1e-14)
    assert torch.allclose(sharp, w - lr * decay * w - lr * scale * (o + b1 * h), atol=1e-14)


def test_one_projection_is_the_nested_form_for_an_exact_projector() -> None:
    w, o, h = random(1, 9, 7), random(1, 9, 7, seed=1), random(1, 9, 7, seed=2)
    V = torch.linalg.qr(random(7, 3, seed=3)).Q[None]
    U = torch.linalg.qr(random(9, 3, seed=4)).Q[None]
    values = product.LiteValues(2.0, -0.25, 1.0)
    merged = combine(w, o - 0.25 * h, o + h, V, 2.0, 0.1, 0.3, 1.7)
    assert torch.allclose(nested(w, o, h, U @ V.mT, values, 0.1, 0.3, 1.7), merged, atol=1e-13)


def test_invariant_5_decay_alone_is_amplified_in_flat_directions() -> None:
    w, V, zero = (
        random(1, 6, 8),
        torch.linalg.qr(random(8, 2, seed=3)).Q[None],
        torch.zeros(1, 6, 8, dtype=torch.float64),
    )
    after = w
    for _ in range(5):
        after = combine(after, zero, zero.clone(), V, 3.0, 0.1, 0.2, 1.0)
    sharp, flat = w @ V @ V.mT, w - w @ V @ V.mT
    assert torch.allclose(after, sharp * (1 - 0.02) ** 5 + flat * (1 - 0.06) ** 5, atol=1e-13)


@pytest.mark.parametrize("mode", ["fast", "parity"])
def test_invariant_4_closed_form_travel(mode: str) -> None:
    # A diagonal gradient of constant sign: the axes are the singular vectors, the first two are sharp.
    n, steps, lr = 20, 10, 0.01
    p = nn.Parameter(torch.zeros(n, n, dtype=torch.float64))
    lite = LiteConfig(
        2.0, -0.25, 1.0, rank_fraction=0.1 if mode == "fast" else 0.05, mode=mode, damping_steps=14
    )  # k = 2
    optimizer = Muon([p], lr=lr, lite=lite, weight_decay=0.0, scale="none", polar_steps=14)
    g = torch.diag(torch.tensor([10.0, 9.0] + [1.0] * (n - 2), dtype=torch.float64))
    for _ in range(steps):
        p.grad = g.clone()
        if mode == "parity":  # at the rank wanted, rather than after the controller's search
            optimizer.state[p]["ratio"].fill_(0.3)
        optimizer.step()
    moved = -p.detach().diagonal() / (lr * steps)
    assert torch.allclose(moved[:2], torch.full((2,), 0.75, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(moved[2:], torch.full((n - 2,), 4.0, dtype=torch.float64), atol=1e-5)
    assert (p - torch.diag(p.diagonal())).abs().max() < 1e-8


@pytest.mark.parametrize(
    "lite",
    [None, LiteConfig(mode="parity")]
    + [LiteConfig(rank_fraction=0.25, damping=damping) for damping in ("orthogonal", "shared")],
)
def test_invariant_6_equivariance_and_scale_freedom(lite: LiteConfig | None) -> None:
    start, grads = random(12, 20), gradients(6, 12, 20)
    A, B = torch.linalg.qr(random(12, 12, seed=8)).Q, torch.linalg.qr(random(20, 20, seed=9)).Q
    found, _ = run(start, grads, lite=lite)
    turned, _ = run(A @ start @ B.T, [A @ g @ B.T for g in grads], lite=lite)
    # The fast basis starts from fixed columns, which do not turn with the problem.
    assert torch.allclose(turned, A @ found @ B.T, atol=1e-9 if lite is None or lite.mode == "parity" else 2e-5)
    scaled, _ = run(start, [1e3 * g for g in grads], lite=lite)
    assert torch.allclose(scaled, found, atol=1e-8)


@pytest.mark.parametrize("mode", ["fast", "parity"])
@pytest.mark.parametrize("side", ["right", "left", "small"])
def test_invariant_7_transposed_storage_gives_the_transposed_result(mode: str, side: str) -> None:
    start, grads = random(3, 12, 20), gradients(5, 3, 12, 20)
    lite = LiteConfig(mode=mode, side=side)
    found, _ = run(start, grads, lite=lite)
    stored, _ = run(start.mT.contiguous(), [g.mT for g in grads], lite=lite, layout="in_out")
    assert torch.allclose(stored.mT, found, atol=1e-12)
    if side == "left":
        assert not torch.allclose(run(start, grads, lite=LiteConfig(mode=mode))[0], found, atol=1e-4)
        assert torch.allclose(run(start, grads, lite=LiteConfig(mode=mode, side="small"))[0], found, atol=1e-12)


@pytest.mark.parametrize("lite", [None, LiteConfig(), LiteConfig(mode="parity")])
def test_invariant_7_a_stack_is_its_matrices_and_chunks_do_not_matter(lite: LiteConfig | None) -> None:
    start, grads = random(5, 12, 20, dtype=torch.float32), gradients(6, 5, 12, 20, dtype=torch.float32)
    stack, _ = run(start, grads, lite=lite)
    for e in range(5):
        alone, _ = run(start[e], [g[e] for g in grads], lite=lite)
        assert torch.allclose(alone, stack[e], atol=1e-6)
    for budget in (1, 2 * 12 * 12 * 20 * 4):
        assert torch.allclose(run(start, grads, lite=lite, chunk_bytes=budget)[0], stack, atol=1e-6)


def test_parameters_of_one_shape_share_a_polar_call() -> None:
    stack, single, other = (nn.Parameter(random(*s)) for s in ((2, 2, 6, 8), (6, 8), (8, 6)))
    optimizer = MuonLITE([stack, single, other], lr=0.1, chunk_bytes=3 * 12 * 48 * 8)
    alone = [nn.Parameter(p.detach().clone()) for p in (stack, single, other)]
    for p, q in zip((stack, single, other), alone, strict=True):
        p.grad = random(*p.shape, seed=3)
        q.grad = p.grad.clone()
    with mock.patch.object(product, "polar", wraps=product.polar) as calls:
        optimizer.step()
    assert [c.args[0].shape[0] for c in calls.call_args_list] == [3, 3, 2, 2, 1, 1]  # M and G of 3 + 2, and of 1
    for p, q in zip((stack, single, other), alone, strict=True):
        MuonLITE([q], lr=0.1).step()
        assert torch.allclose(p, q, atol=1e-12)


# -- gates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lite", [None, LiteConfig(), LiteConfig(mode="parity")])
@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_experts_without_tokens_are_frozen(lite: LiteConfig | None, value: float) -> None:
    start, grads = random(4, 12, 20, dtype=torch.float32), gradients(6, 4, 12, 20, dtype=torch.float32)
    for g in grads[3:]:
        g[1] = value
    found, optimizer = run(start, grads, lite=lite)
    before, earlier = run(start, grads[:3], lite=lite)
    assert torch.equal(found[1], before[1])
    (state,), (then,) = optimizer.state.values(), earlier.state.values()
    for key in set(state) - {"skipped"}:
        assert torch.equal(state[key][1], then[key][1]), key
    assert not torch.equal(found[0], before[0])
    assert optimizer.skipped() == {}


def test_a_parameter_without_gradient_is_left_alone() -> None:
    p, q = nn.Parameter(random(4, 5)), nn.Parameter(random(4, 5, seed=1))
    optimizer, before = MuonLITE([p, q], lr=0.1), q.detach().clone()
    p.grad = random(4, 5, seed=2)
    optimizer.step()
    assert torch.equal(q, before)
    assert int(optimizer.param_groups[0]["step"]) == 1


def test_one_process_has_nobody_to_split_the_work_with() -> None:
    start, grads = random(3, 12, 20), gradients(3, 3, 12, 20)
    split, _ = run(start, grads, lite=LiteConfig(), replicas="split")
    assert torch.equal(split, run(start, grads, lite=LiteConfig())[0])


@pytest.mark.parametrize("lite", [None, LiteConfig(), LiteConfig(mode="parity")])
def test_nan_gradients_are_skipped_per_matrix_and_counted(lite: LiteConfig | None) -> None:
    start, grads = random(3, 12, 20), gradients(5, 3, 12, 20)
    clean, _ = run(start, grads, lite=lite)
    grads[2][0, 3, 4], grads[3][0, 0, 0] = torch.nan, torch.inf
    found, optimizer = run(start, grads, lite=lite)
    assert torch.isfinite(found).all()
    assert torch.equal(found[1:], clean[1:])
    assert list(optimizer.skipped().values()) == [2]


def test_nan_gradients_raise_before_anything_changes() -> None:
    p, q = nn.Parameter(random(4, 5)), nn.Parameter(random(4, 5, seed=1))
    groups = [{"params": [p, q], "names": ["first", "second"]}]
    optimizer, before = Muon(groups, lr=0.1, nonfinite="raise"), p.detach().clone()
    p.grad, q.grad = random(4, 5, seed=2), torch.full((4, 5), torch.nan, dtype=torch.float64)
    with pytest.raises(InputError, match="second"):
        optimizer.step()
    assert torch.equal(p, before)


def test_the_guard_keeps_an_inverted_matrix_sharp() -> None:
    U, _, Vh = torch.linalg.svd(spectrum(128, 128, 10))
    g = (U @ torch.diag(torch.arange(1, 129, dtype=torch.float64) ** -2.25) @ Vh).float()
    start = torch.zeros(128, 128)
    released, free = run(start, [g] * 80, lite=LiteConfig(2.0, 0.0, 0.0, mode="parity", guard=False))
    guarded, held = run(start, [g] * 80, lite=LiteConfig(2.0, 0.0, 0.0, mode="parity"))
    (state,), (free_state,) = held.state.values(), free.state.values()
    assert int(state["inversions"]) > 0
    assert int(free_state["inversions"]) == 0
    assert free_state["ratio"].item() == 1.0

    def along(w: Tensor) -> float:  # travel in the sharpest direction
        return -(U[:, 0].float() @ w @ Vh[0].float()).item()

    assert along(released) > 1.1 * along(guarded)  # the released controller ends up amplifying it


def test_bf16_weights_keep_float32_state() -> None:
    start, grads = random(12, 20).bfloat16(), [g.bfloat16() for g in gradients(4, 12, 20)]
    found, optimizer = run(start, grads, lite=LiteConfig())
    assert found.dtype == torch.bfloat16
    assert {v.dtype for v in next(iter(optimizer.state.values())).values()} == {torch.float32, torch.int64}


def test_exact_polar_of_the_momentum_is_the_update() -> None:
    start, g = random(6, 9), random(6, 9, seed=5)
    found, _ = run(start, [g], lr=1.0, weight_decay=0.0, scale="none", polar_steps=14)
    assert torch.allclose(start - found, svd_polar(g), atol=1e-9)
