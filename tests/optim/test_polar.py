"""Polar factor and orthonormal columns against the singular value decomposition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moefx.errors import InputError
from moefx.optim.lite import LiteConfig, controlled_projector, improve_basis, initial_basis
from moefx.optim.polar import cholesky_qr, coefficients, halved, matrices, orthonormal, outer, polar, slices

from .oracles import scalar_polar, spectrum, svd_polar


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x.double() - y).norm() / y.norm()).item()


@pytest.mark.parametrize(
    ("steps", "condition", "bound"), [(6, 300, 2e-3), (8, 300, 1e-5), (8, 1e3, 2e-4), (10, 1e3, 1e-5), (12, 1e4, 1e-4)]
)
def test_accuracy_by_steps_and_condition(steps: int, condition: float, bound: float) -> None:
    for shape in ((64, 64), (48, 80), (80, 48)):
        x = spectrum(*shape, condition)
        assert relative(polar(x.float(), steps), svd_polar(x)) < bound


def test_fewer_steps_or_the_quintic_are_less_accurate() -> None:
    x = spectrum(64, 64, 1e3)
    errors = [relative(polar(x, steps), svd_polar(x)) for steps in (4, 6, 8)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert 0.1 < relative(polar(x, 5, "quintic"), svd_polar(x)) < 0.4
    assert relative(polar(x.float(), 8, compute_dtype=torch.bfloat16), svd_polar(x)) < 0.1


@pytest.mark.parametrize("steps", [3, 6, 8, 11])
def test_the_polynomials_act_on_singular_values(steps: int) -> None:
    x = spectrum(20, 31, 200)
    assert relative(polar(x, steps), scalar_polar(x, steps)) < 1e-11


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (64, 96)])
def test_a_tight_bound_saves_a_step(shape: tuple[int, int]) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for steps in (4, 5, 6):
        same, more = (relative(polar(x, t), svd_polar(x)) for t in (steps, steps + 1))
        assert relative(polar(x, steps, tight=True), svd_polar(x)) < min(1.3 * more + 1e-12, same)
    # Three are more accurate than the quintic's five, which keep the scale of the update but not its singular values.
    quintic = relative(polar(x, 5, "quintic"), svd_polar(x))
    assert relative(polar(x, 4, tight=True), svd_polar(x)) < 0.6 * quintic
    assert relative(polar(x, 3, tight=True), svd_polar(x)) < 0.8 * quintic
    # The bound holds with equality where one direction has all the energy.
    one = spectrum(*shape, 1e6, gap=1)
    values = torch.linalg.svdvals(polar(one, 4, tight=True))
    assert 0.8 < values[0] < 1.2
    assert values.max() < 1.25
    assert torch.equal(polar(torch.zeros(2, 4, 5), 4, tight=True), torch.zeros(2, 4, 5))
    assert torch.allclose(polar(x * 1e-25, 4, tight=True), polar(x, 4, tight=True), atol=1e-12)


@pytest.mark.parametrize(("steps", "resolved"), [(1, 0.5), (2, 0.15), (3, 0.04), (4, 0.01)])
def test_few_steps_from_a_tight_bound_begin_late(steps: int, resolved: float) -> None:
    """What is above `resolved` of the bound ends close to 1; a step more lifts the rest further."""
    x = spectrum(48, 48, 1e3)
    u, values, vh = torch.linalg.svd(x)
    more, got = ((u.mT @ polar(x, t, tight=True) @ vh.mT).diagonal() for t in (steps + 1, steps))
    large = values / values.pow(4).sum() ** 0.25 > resolved
    assert 0 < large.sum() < 48
    assert (got[large] - 1).abs().max() < 0.13
    assert got.max() < 1.13
    assert 0 < got[-1] < 0.6 * more[-1]
    assert got[-1] < 0.8  # not resolved


@pytest.mark.parametrize("shape", [(512, 520), (611, 530)])
def test_products_by_halves_are_the_whole_ones(shape: tuple[int, int]) -> None:
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.allclose(outer(x), x @ x.mT, atol=1e-10)
    assert halved(x)
    assert not halved(x.bfloat16())
    assert not halved(x[:, :500])
    y = spectrum(*shape, 30)
    assert relative(polar(y.float(), 6), svd_polar(y)) < 2e-3


def test_scale_free_batched_transposed_and_zero() -> None:
    x = torch.randn(3, 2, 12, 7)
    assert torch.allclose(polar(x)[1, 1], polar(x[1, 1]), atol=1e-6)
    assert torch.allclose(polar(x.mT).mT, polar(x), atol=1e-6)
    assert torch.allclose(polar(x * 1e-25), polar(x), atol=1e-5)
    assert torch.equal(polar(torch.zeros(2, 4, 5)), torch.zeros(2, 4, 5))


def test_errors() -> None:
    with pytest.raises(InputError, match="polar_express"):
        coefficients("polar_expres", 8)
    with pytest.raises(InputError, match="at least one"):
        polar(torch.ones(2, 2), 0)


@pytest.mark.parametrize("orthonormal", [orthonormal, cholesky_qr])
def test_orthonormal_columns_are_those_of_qr(orthonormal: Any) -> None:
    y = torch.randn(4, 50, 6, dtype=torch.float64) @ torch.diag(torch.logspace(0, -5, 6, dtype=torch.float64))
    q, ok = orthonormal(y)
    expected = torch.linalg.qr(y).Q
    assert ok.all()
    assert torch.allclose(q.mT @ q, torch.eye(6, dtype=torch.float64).expand(4, 6, 6), atol=1e-12)
    assert torch.allclose((q * expected).sum(-2).abs(), torch.ones(4, 6, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("orthonormal", [orthonormal, cholesky_qr])
def test_nan_columns_are_reported_for_their_matrix_alone(orthonormal: Any) -> None:
    y = torch.randn(3, 10, 2)
    y[1] = torch.nan
    _, ok = orthonormal(y)
    assert ok.tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
def test_the_basis_finds_the_top_right_singular_vectors(shape: tuple[int, int]) -> None:
    x, k = spectrum(*shape, 1e4, gap=5), 5
    basis = improve_basis(x[None], initial_basis(1, shape[1], k + 2, x.dtype, x.device), 12)[0]
    Vh = torch.linalg.svd(x).Vh[:k]
    assert ((Vh @ basis[:, :k]).square().sum() / k) > 1 - 1e-9
    strength = (x @ basis).norm(dim=0)
    assert (strength.diff() <= 1e-9).all()
    assert torch.allclose(basis.T @ basis, torch.eye(k + 2, dtype=x.dtype), atol=1e-12)


def test_the_basis_survives_a_rank_one_momentum_and_recovers() -> None:
    start = initial_basis(1, 30, 6, torch.float32, torch.device("cpu"))
    thin = torch.randn(1, 20, 1) @ torch.randn(1, 1, 30)
    basis = improve_basis(thin, start, 8)
    assert torch.allclose(basis.mT @ basis, torch.eye(6), atol=1e-5)
    x = spectrum(20, 30, 10, gap=4)
    after = improve_basis(x.float()[None], basis, 12)[0, :, :4].double()
    assert (torch.linalg.svd(x).Vh[:4] @ after).square().sum() / 4 > 0.999


def run_controller(x: torch.Tensor, k: int, steps: int, moves: int = 120) -> tuple[float, float, bool]:
    """Overlap with the exact top-k subspace, the ratio, and whether an inversion was ever seen."""
    o, ratio, seen = polar(x, steps), torch.tensor([min(x.shape[-2:]) ** -0.5]), False
    for _ in range(moves):
        found = controlled_projector(x, o, ratio, k, steps)
        ratio, seen = found.ratio, seen or bool(found.inverted)
    Vh = torch.linalg.svd(x[0].double()).Vh[:k]
    projected = found.s[0].double().T @ found.s[0].double()
    return (Vh @ projected @ Vh.T).trace().item() / k, ratio.item(), seen


def test_the_controller_finds_the_sharp_directions() -> None:
    x = spectrum(128, 128, 300).float()[None]
    overlap, _, inverted = run_controller(x, 13, 6)
    # Rank moves by 5 % steps of the threshold around k, so the top k are all inside or a few are cut.
    assert overlap > 0.8
    assert not inverted


def test_the_controller_inverts_on_ill_conditioned_momenta_and_is_noticed() -> None:
    # With 6 steps the unresolved tail comes back in the difference of two polar factors.
    U, _, Vh = torch.linalg.svd(spectrum(128, 128, 10))
    x = (U @ torch.diag(torch.arange(1, 129, dtype=torch.float64) ** -2.25) @ Vh).float()[None]
    overlap, ratio, inverted = run_controller(x, 13, 6)
    assert ratio == 1.0
    assert overlap < 0.01
    assert inverted
    overlap, ratio, inverted = run_controller(x, 13, 10)
    assert overlap > 0.8
    assert not inverted


def test_the_basis_does_not_invert_where_the_controller_does() -> None:
    U, _, Vh = torch.linalg.svd(spectrum(128, 128, 10))
    x = (U @ torch.diag(torch.arange(1, 129, dtype=torch.float64) ** -2.25) @ Vh).float()[None]
    basis = improve_basis(x, initial_basis(1, 128, 15, x.dtype, x.device), 8)[0, :, :13].double()
    assert (Vh[:13] @ basis).square().sum() / 13 > 0.99


def test_without_a_gap_one_iteration_a_step_holds_almost_the_best_energy() -> None:
    generator = torch.Generator().manual_seed(5)
    m = torch.randn(1, 96, 64, generator=generator)
    basis = initial_basis(1, 64, 9, m.dtype, m.device)
    for _ in range(40):  # a momentum that drifts as an average of 20 gradients does
        m = 0.95 * m + 0.05 * 4 * torch.randn(1, 96, 64, generator=generator)
        basis = improve_basis(m, basis, 1)
    best = torch.linalg.svdvals(m[0])[:7].square().sum()
    assert (m[0] @ basis[0, :, :7]).square().sum() > 0.9 * best
    at_random = initial_basis(1, 64, 7, m.dtype, m.device)[0]
    assert (m[0] @ at_random).square().sum() < 0.6 * best


def test_invariant_3_exact_projector_and_its_approximations() -> None:
    x, k = spectrum(40, 60, 1e3, gap=4), 4
    U, s, Vh = torch.linalg.svd(x, full_matrices=False)
    exact = U[:, :k] @ Vh[:k]
    threshold = (s[k - 1] + s[k]) / 2
    found = controlled_projector(x[None], svd_polar(x)[None], (threshold / s.norm())[None], k, 10).s[0]
    values = torch.linalg.svdvals(found)
    assert torch.allclose(values, (torch.arange(len(values)) < k).double(), atol=1e-6)
    assert torch.allclose(found.T @ found, exact.T @ exact, atol=1e-6)
    assert torch.allclose((found.T @ found) @ (found.T @ found), found.T @ found, atol=1e-6)
    six = controlled_projector(
        x.float()[None], polar(x.float(), 6)[None], (threshold / s.norm()).float()[None], k, 6
    ).s[0]
    assert (six.double().T @ six.double() * (exact.T @ exact)).sum() / k > 0.99


def test_rank_and_slices() -> None:
    shapes = ((24, 32), (32, 24), (1, 9), (2, 9), (768, 2048))
    assert [LiteConfig().rank(*s) for s in shapes] == [2, 2, 1, 1, 76]
    assert [LiteConfig(mode="parity").rank(*s) for s in shapes] == [3, 3, 1, 1, 77]
    assert LiteConfig(rank_fraction=1.0).rank(8, 8) == 7
    assert [(s.start, s.stop) for s in slices(5, 10, 25)] == [(0, 2), (2, 4), (4, 5)]
    assert len(slices(3, 10, 1)) == 3
    assert matrices(torch.zeros(2, 3, 4, 5)).shape == (6, 4, 5)


def test_where_autograd_follows_no_memory_is_written_twice() -> None:
    """Products with memory to fill refuse tensors that need gradients."""
    x = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.equal(polar(x, 4), polar(x.detach(), 4))
