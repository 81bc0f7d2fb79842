"""Every loss against loops from its definition, in float64, values and gradients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx import losses as L
from moefx.errors import InputError
from moefx.losses.metrics import SCORED, SHAPES

from . import loops

Tensor = torch.Tensor
ops = torch.ops.moefx
F64 = torch.float64


def layer(
    seed: int, T: int = 6, k: int = 2, E: int = 5, score: str = "softmax", masked: bool = False, I: int = 4
) -> tuple[L.Taps, loops.Layer, list[Tensor]]:
    """One random layer as taps (rows sorted by expert) and as loops, and the leaves of both."""
    g = torch.Generator().manual_seed(seed)
    logits, z, y = (torch.randn(shape, generator=g, dtype=F64) for shape in ((T, E), (T * k, I), (T * k, I + 1)))
    leaves = [t.requires_grad_() for t in (logits, z, y)]
    idx = torch.stack([torch.randperm(E, generator=g)[:k] for _ in range(T)])
    mask = (torch.arange(T) % 3 != 1) if masked else None
    _, order, slot, _ = ops.plan(idx, E, 1)
    tap = L.Taps(
        f"layers.{seed}", k, E, idx, logits, score, z=z[order], y=y[order], slot=slot, order=order, mask=mask,
        batch=2, dtype=F64,
    )  # fmt: skip
    by_token = [[list(rows[t * k : t * k + k]) for t in range(T)] for rows in (z, y)]
    counted = [] if mask is None else mask.tolist()
    return tap, loops.Layer(logits, idx.tolist(), score, *by_token, counted), leaves


def same(got: Tensor, want: Tensor, leaves: list[Tensor], rtol: float = 1e-9) -> None:
    """The same value, and the same gradient of every leaf; one of them is not zero."""
    assert got.dim() == 0
    torch.testing.assert_close(got, want.to(got), rtol=rtol, atol=1e-12)
    mine = torch.autograd.grad(got, leaves, allow_unused=True)
    theirs = torch.autograd.grad(want, leaves, allow_unused=True)
    assert any(g is not None and bool(g.abs().max() > 1e-6) for g in mine)
    for leaf, a, b in zip(leaves, mine, theirs, strict=True):
        a, b = (torch.zeros_like(leaf) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


EPS = 1e-6
CASES: dict[str, tuple[L.Loss, Callable[[list[loops.Layer]], Any]]] = {
    "sp": (L.Specialization(), loops.specialization),
    "cp": (L.Coupling(), loops.coupling),
    "lb": (L.LoadBalance(), lambda ms: sum(loops.switch(m) for m in ms)),
    "global": (L.LoadBalance(form="global"), lambda ms: sum(loops.switch(m) for m in ms)),
    "sequence": (L.LoadBalance(form="sequence"), lambda ms: sum(loops.sequence(m, 2) for m in ms)),
    "z": (L.ZLoss(), lambda ms: sum(loops.z(m) for m in ms)),
    "var": (L.Variance(), lambda ms: sum(loops.variance(m) for m in ms)),
    "orth": (L.Orthogonality(eps=EPS), lambda ms: sum(loops.orthogonality(m, EPS) for m in ms)),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "identity"])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name: str, score: str, masked: bool) -> None:
    loss, definition = CASES[name]
    made = [layer(seed, score=score, masked=masked) for seed in range(3)]
    taps, models, leaves = [m[0] for m in made], [m[1] for m in made], [t for m in made for t in m[2]]
    same(loss(taps), definition(models), leaves)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.integers(2, 3), st.integers(4, 6), st.integers(1, 3), st.integers(0, 99))
def test_pair_losses_of_any_shape(T: int, k: int, E: int, layers: int, seed: int) -> None:
    made = [layer(seed + i, T, k, E) for i in range(layers)]
    taps, models, leaves = [m[0] for m in made], [m[1] for m in made], [t for m in made for t in m[2]]
    same(L.Specialization()(taps), loops.specialization(models), leaves)
    if layers > 1:
        same(L.Coupling()(taps), loops.coupling(models), leaves)


def test_reductions_are_what_their_names_say() -> None:
    taps = [layer(seed, k=3)[0] for seed in range(3)]
    full = L.Specialization()(taps)
    assert torch.isclose(L.Specialization(pair_reduction="mean")(taps) * 6, full)
    assert torch.isclose(L.Specialization(layer_reduction="mean")(taps) * 3, full)
    assert torch.isclose(L.Coupling(layer_reduction="mean")(taps) * 2, L.Coupling()(taps))
    assert torch.isclose(L.LoadBalance(layer_reduction="mean")(taps) * 3, L.LoadBalance()(taps))
    assert torch.isclose(L.Orthogonality(pair_reduction="mean")(taps) * 6, L.Orthogonality()(taps))


def test_the_transformers_form_is_that_of_transformers() -> None:
    moe = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    for padded in (False, True):
        made = [layer(seed, T=8, k=2, E=5)[0] for seed in range(2)]
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]) if padded else None
        # transformers takes its own top-k of the softmax.
        valid = None if mask is None else mask.flatten() > 0
        taps = [L.Taps(t.path, 2, 5, t.logits.topk(2).indices, t.logits, dtype=F64, mask=valid) for t in made]
        want = moe.load_balancing_loss_func(tuple(t.logits for t in taps), 5, 2, mask)
        # Its counts are fp32.
        same(L.LoadBalance(form="transformers")(taps), want, [t.logits for t in taps], rtol=1e-4)


# -- R_sp ------------------------------------------------------------------------------------------------------------


def taps_of(z_TkI: Tensor, **kwargs: Any) -> L.Taps:
    T, k, I = z_TkI.shape
    idx = torch.arange(k).expand(T, k)
    return L.Taps(
        "layer", k, k, idx, z=z_TkI.reshape(T * k, I), slot=torch.arange(T * k).view(T, k), dtype=F64, **kwargs
    )


@pytest.mark.parametrize("loss", [L.Specialization(eps=1e-18), L.Orthogonality(eps=1e-18)], ids=lambda x: x.name)
def test_a_row_of_zeros_is_no_nan_in_fp32(loss: L.Loss) -> None:
    tap = layer(0)[0]
    z, y = (t.detach().float().index_fill(0, torch.tensor(0), 0.0) for t in (tap.z, tap.y))
    assert loss([dataclasses.replace(tap, z=z, y=y, dtype=torch.float32)]).isfinite()


def test_orthogonal_identical_and_random_activations() -> None:
    k, I = 4, 64
    eye = torch.eye(k, I, dtype=F64).expand(5, k, I) * torch.arange(1, k + 1)[:, None]
    assert L.Specialization()([taps_of(eye)]) == 0
    same_z = torch.randn(5, 1, I, dtype=F64).expand(5, k, I)
    signs = torch.tensor([1.0, -2.0, 0.5, -1.0], dtype=F64)[:, None]
    assert torch.isclose(L.Specialization()([taps_of(same_z * signs)]), torch.tensor(k * (k - 1.0), dtype=F64))
    many = torch.randn(4000, k, I, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert float(L.Specialization()([taps_of(many)])) == pytest.approx(k * (k - 1) / I, rel=0.05)


def test_the_gradient_is_the_closed_form_and_orthogonal_to_the_row() -> None:
    z = torch.randn(3, 4, 7, dtype=F64).requires_grad_()
    ops.overlap(z.flatten(0, 1), torch.arange(12).view(3, 4), 1e-12).sum().backward()
    assert z.grad is not None
    for t in range(3):
        for e in range(4):
            u = [z[t, v].detach() / z[t, v].detach().norm() for v in range(4)]
            c = [float(u[e] @ u[v]) for v in range(4)]
            want = sum(4 * c[v] * (u[v] - c[v] * u[e]) for v in range(4) if v != e) / z[t, e].norm()
            torch.testing.assert_close(z.grad[t, e], want.detach(), rtol=1e-10, atol=1e-12)
            assert abs(float(z.grad[t, e] @ u[e])) < 1e-12


@pytest.mark.parametrize("form", ["token-major", "sorted", "padded", "capacity"])
def test_the_order_of_rows_does_not_matter(form: str) -> None:
    T, k, E, I = 7, 3, 5, 4
    g = torch.Generator().manual_seed(3)
    z = torch.randn(T * k, I, generator=g, dtype=F64)
    idx = torch.stack([torch.randperm(E, generator=g)[:k] for _ in range(T)])
    slot, rows = torch.arange(T * k).view(T, k), z
    if form in ("sorted", "padded"):
        _, order, slot, _ = ops.plan(idx, E, 1 if form == "sorted" else 4)
        rows = torch.where((order < 0)[:, None], float("nan"), z[order.clamp_min(0)])
    if form == "capacity":  # [E, C] slots, rows where nothing is are poison
        C, used = T, [0] * E
        rows = torch.full((E * C, I), float("nan"), dtype=F64)
        for t in range(T):
            for j, e in enumerate(idx[t].tolist()):
                slot[t, j], used[e] = e * C + used[e], used[e] + 1
                rows[slot[t, j]] = z[t * k + j]
    want = loops.specialization(
        [loops.Layer(torch.zeros(T, E), idx.tolist(), z=[list(z[t * k : t * k + k]) for t in range(T)])]
    )
    leaf = rows.clone().requires_grad_()
    got = ops.overlap(leaf, slot, 1e-12).mean()
    torch.testing.assert_close(got.detach(), want.to(F64), rtol=1e-10, atol=0)
    (grad,) = torch.autograd.grad(got, leaf)
    held = torch.zeros(rows.shape[0], dtype=torch.bool)
    held[slot.flatten()] = True
    assert bool(grad.isfinite().all())
    assert bool((grad[~held] == 0).all())


def test_dropped_choices_are_in_no_pair() -> None:
    z = torch.randn(4, 3, dtype=F64)
    slot = torch.tensor([[0, 1], [2, -1], [-1, -1]])
    got = ops.overlap(z, slot, 1e-12)
    want = 2 * (torch.nn.functional.cosine_similarity(z[0], z[1], dim=0) ** 2)
    torch.testing.assert_close(got, torch.stack([want, want * 0, want * 0]))


def test_the_length_of_a_row_makes_no_difference() -> None:
    z, slot = torch.randn(12, 5), torch.arange(12).view(4, 3)
    scale = torch.rand(12, 1) * 1e-4 + 1e-6
    torch.testing.assert_close(ops.overlap(z * scale, slot, 1e-12), ops.overlap(z, slot, 1e-12), rtol=1e-5, atol=1e-7)


def test_bf16_is_normalised_in_fp32() -> None:
    z = (torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    slot = torch.arange(64).view(16, 4)
    got = ops.overlap(z, slot, 1e-12)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, ops.overlap(z.double(), slot, 1e-12).float(), rtol=1e-5, atol=1e-7)
    low, high = z.clone().requires_grad_(), z.double().requires_grad_()
    ops.overlap(low, slot, 1e-12).sum().backward()
    ops.overlap(high, slot, 1e-12).sum().backward()
    assert low.grad is not None
    assert high.grad is not None
    assert low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(low.grad.double(), high.grad, rtol=2**-7, atol=1e-6)


def test_top_1_is_refused() -> None:
    tap = layer(0, k=1)[0]
    for loss in (L.Specialization(), L.Orthogonality()):
        with pytest.raises(InputError, match=r"layers\.0[\s\S]*one expert per token makes no pair"):
            loss([tap])


# -- R_cp ------------------------------------------------------------------------------------------------------------


def test_the_gradient_of_the_logits_is_the_closed_form() -> None:
    made = [layer(seed, T=5, k=2, E=6) for seed in range(3)]
    taps = [m[0] for m in made]
    L.Coupling()(taps).backward()
    m = [t.mass.detach() for t in taps]
    for l, tap in enumerate(taps):
        s = torch.softmax(tap.logits.detach(), -1)
        around = (m[l - 1] if l else 0) + (m[l + 1] if l + 1 < len(m) else 0)
        picked = torch.zeros_like(s).scatter(1, tap.idx, 1.0)
        torch.testing.assert_close(tap.logits.grad, -s * (picked - m[l][:, None]) * around[:, None] / 5)


def test_renormalised_weights_are_refused() -> None:
    """The trap: over k normalised scores the mass is 1, whatever the logits."""
    tap = layer(0, k=2, E=5)[0]
    chosen = torch.gather(tap.logits, 1, tap.idx)
    with pytest.raises(InputError, match=r"2 columns for 5 experts[\s\S]*no gradient"):
        L.Taps("layer", 2, 5, tap.idx, chosen)
    with pytest.raises(InputError, match="no gradient"):
        L.Taps("layer", 2, 5, tap.idx, tap.logits, full=torch.softmax(chosen, -1))


FORMS = ("switch", "sequence", "global", "transformers")


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "identity"])
def test_losses_of_the_choice_are_refused_where_all_experts_are_chosen(score: str) -> None:
    """The same trap with k = E: a mass of 1 and equal loads, constants with a gradient of zero."""
    made = [layer(seed, k=3, E=3, score=score) for seed in range(2)]
    taps, logits = [m[0] for m in made], [m[2][0] for m in made]
    choices = [L.Coupling(), *(L.LoadBalance(form=form) for form in FORMS)]
    for loss in choices:
        constant = loss.combine([loss.local(t) for t in taps], taps)
        grads = torch.autograd.grad(constant, logits, retain_graph=True)  # scores are shared by all losses
        assert max(float(g.abs().max()) for g in grads) < 1e-12
        with pytest.raises(InputError, match=rf"'{loss.name}' is not defined for layers\.0[\s\S]*all 3 experts"):
            loss(taps)
    with pytest.raises(InputError, match=r"all 3 experts[\s\S]*leave 'bias' out of losses"):
        L.BiasUpdate().check([dataclasses.replace(t, bias="gate.bias") for t in taps])
    # With fewer of them each loss trains the routers; what does not read the choice does with all of them.
    fewer = [layer(seed, k=2, E=5, score=score) for seed in range(2)]
    for loss, some in (*((x, fewer) for x in choices), (L.ZLoss(), made), (L.Variance(), made)):
        grads = torch.autograd.grad(loss([m[0] for m in some]), [m[2][0] for m in some], retain_graph=True)
        assert all(float(g.abs().max()) > 1e-6 for g in grads), loss
    same(L.Specialization()(taps), loops.specialization([m[1] for m in made]), [m[2][1] for m in made])


def test_variance_of_one_expert_is_refused() -> None:
    with pytest.raises(InputError, match="one expert has probability 1"):
        L.Variance()([layer(0, k=1, E=1)[0]])


def test_bounds_and_detaching() -> None:
    uniform = [L.Taps("l", 2, 8, torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 8)) for _ in range(4)]
    assert float(L.Coupling()(uniform)) == pytest.approx(-3 * (2 / 8) ** 2)
    for detach, moved in (("none", (True, True)), ("next", (True, False)), ("prev", (False, True))):
        made = [layer(seed) for seed in range(2)]
        grads = torch.autograd.grad(
            L.Coupling(detach=detach)([m[0] for m in made]), [m[0].logits for m in made], allow_unused=True
        )
        assert tuple(g is not None for g in grads) == moved


def test_layers_of_two_stacks_are_not_coupled() -> None:
    a, b = (layer(seed)[0] for seed in range(2))
    other = L.Taps("decoder", b.k, b.experts, b.idx, b.logits, dtype=F64, chain="decoder")
    with pytest.raises(InputError, match="no two that see the same tokens"):
        L.Coupling()([a, other])
    torch.testing.assert_close(L.Coupling()([a, b, other]), L.Coupling()([a, b]))


# -- the others ------------------------------------------------------------------------------------------------------


def test_balance_is_smallest_when_balanced() -> None:
    E, k = 4, 2
    even = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]])
    tap = L.Taps("l", k, E, even, torch.zeros(4, E), batch=2)
    for form, least in (("switch", 1.0), ("sequence", 1.0), ("transformers", 2.0)):
        assert float(L.LoadBalance(form=form)([tap])) == pytest.approx(least)
    peaked = torch.zeros(4, E)
    peaked[:, :2] = 5
    assert float(L.LoadBalance()([L.Taps("l", k, E, torch.tensor([[0, 1]] * 4), peaked)])) > 1.9


@pytest.mark.parametrize("a", [0.5, 1.0])
def test_erc(a: float) -> None:
    g = torch.Generator().manual_seed(0)
    router, gate = (torch.randn(s, generator=g, dtype=F64).requires_grad_() for s in ((4, 6), (4, 3, 6)))
    tap = L.Taps(
        "l", 2, 4, torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 4), router=router, gate=gate, dtype=F64
    )
    same(L.ERC(a=a, noise=False)([tap]), loops.erc(router, gate, a), [router, gate])
    torch.manual_seed(0)
    noisy = L.ERC(a=a)([tap])
    torch.manual_seed(0)
    draws = 2 * torch.rand(4, 6, dtype=F64) - 1
    rows = router.detach()
    eps = [
        min(float((rows[i] - rows[j]).norm()) for j in range(4) if j != i) / (2 * float(rows[i].norm()))
        for i in range(4)
    ]
    moved = torch.stack([router[i] * (1 + eps[i] * draws[i]) for i in range(4)])
    same(noisy, loops.erc(moved, gate, a), [router, gate])
    assert float(noisy.detach()) != float(L.ERC(a=a, noise=False)([tap]).detach())


def test_erc_of_one_expert_is_refused() -> None:
    one = L.Taps(
        "l", 1, 1, torch.zeros(5, 1).long(), torch.zeros(5, 1), router=torch.ones(1, 6), gate=torch.ones(1, 3, 6)
    )
    with pytest.raises(InputError, match="one expert makes no pair"):
        L.ERC()([one])


def test_a_sequence_of_padding_is_none() -> None:
    """Behind it, before it, and where there is nothing else."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 4, generator=g, dtype=F64).requires_grad_()
    idx, loss = logits.topk(2).indices, L.LoadBalance(form="sequence")
    for kept in (slice(0, 4), slice(4, 8)):
        mask = torch.zeros(8, dtype=torch.bool)
        mask[kept] = True
        two = L.Taps("l", 2, 4, idx, logits, batch=2, mask=mask, dtype=F64)
        same(loss([two]), loops.switch(loops.Layer(logits[kept], idx[kept].tolist())), [logits])
    none = L.Taps("l", 2, 4, idx, logits, batch=2, mask=torch.zeros(8, dtype=torch.bool), dtype=F64)
    assert float(loss([none]).detach()) == 0


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_metrics() -> None:
    made = [layer(seed, T=9, k=2, E=5, masked=True) for seed in range(2)]
    taps, models = [m[0] for m in made], [m[1] for m in made]
    metrics = L.RoutingMetrics(choices=True)
    found = metrics.combine([metrics.local(t) for t in taps], taps)
    assert found.keys() == SHAPES.keys()
    for i, m in enumerate(models):
        assert float(found["experts"][i]) == 5
        ranked = [sorted(row, key=lambda e: -float(m.s(t, e))) for t, row in enumerate(m.idx)]
        assert found["choices"][i].tolist() == [row if t in m.tokens else [-1, -1] for t, row in enumerate(ranked)]
        load = [m.c(e) / (2 * len(m.tokens)) for e in range(5)]
        assert found["load"][i].tolist() == pytest.approx(load)
        assert float(found["max_violation"][i]) == pytest.approx(max(load) / 0.2 - 1)
        assert float(found["dead_experts"][i]) == sum(x == 0 for x in load)
        scores = [[float(m.s(t, e)) for e in range(5)] for t in m.tokens]
        mean = sum(loops.entropy(s) for s in scores) / len(scores)
        assert float(found["token_entropy"][i]) == pytest.approx(mean / math.log(5))
        marginal = [sum(s[e] for s in scores) / len(scores) for e in range(5)]
        assert float(found["marginal_entropy"][i]) == pytest.approx(loops.entropy(marginal) / math.log(5))
        mass = sum(float(m.s(t, e)) for t in m.tokens for e in m.idx[t]) / len(m.tokens)
        assert float(found["mass"][i]) == pytest.approx(mass)
        assert found["mean_scores"][i].tolist() == pytest.approx(marginal)
        counts = [float(found[name][i]) for name in ("tokens", "slots", "pairs")]
        assert counts == [len(m.tokens), 2 * len(m.tokens), 2 * len(m.tokens)]
        assert float(found["overlap"][i]) == pytest.approx(float(loops.specialization([m])) / 2)
    first = [[max(m.idx[t], key=lambda e: float(m.s(t, e))) for t in range(9)] for m in models]
    want = torch.zeros(1, 5, 5, dtype=F64)
    for t in models[0].tokens:
        want[0, first[0][t], first[1][t]] += 1
    assert torch.equal(found["transitions"], want)


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_metrics_without_scores_are_those_that_can_be_had() -> None:
    """First choices go by the routing weights; a layer with scores beside one without does not bring them back."""
    made = [layer(seed, T=9, k=k, E=E)[0] for seed, (k, E) in enumerate([(2, 5), (3, 4), (2, 5)])]
    weights = [torch.rand(9, t.k, generator=torch.Generator().manual_seed(i)) for i, t in enumerate(made)]
    bare = [dataclasses.replace(t, logits=None, w=w) for t, w in zip(made, weights, strict=True)]
    metrics = L.RoutingMetrics(choices=True)
    whole = metrics.combine([metrics.local(t) for t in made], made)
    for taps in (bare, [made[0], *bare[1:]]):
        found = metrics.combine([metrics.local(t) for t in taps], taps)
        assert set(found) == set(SHAPES) - set(SCORED)
        for name in set(found) - {"transitions", "choices"}:
            assert torch.equal(found[name], whole[name]), name
    assert found["choices"].shape == (3, 9, 3)
    assert found["choices"][0, :, 2].tolist() == [-1] * 9
    want = torch.zeros(2, 5, 5, dtype=F64)
    first = [t.idx[torch.arange(9), w.argmax(1)] for t, w in zip(bare, weights, strict=True)]
    for here, there, counts in zip(first, first[1:], want, strict=False):
        for e, v in zip(here.tolist(), there.tolist(), strict=True):
            counts[e, v] += 1
    assert torch.equal(metrics.combine([metrics.local(t) for t in bare], bare)["transitions"], want)
    assert not torch.equal(whole["transitions"], want)
    other = dataclasses.replace(bare[1], chain="decoder")
    assert "choices" not in metrics.combine([metrics.local(t) for t in (bare[0], other)], [bare[0], other])


def test_a_bias_moves_towards_balance() -> None:
    bias = torch.tensor([0.0, 1.0, -1.0, 0.5])
    L.sign_update(bias, torch.tensor([10.0, 0.0, 4.0, 2.0]), 0.1)  # mean 4
    torch.testing.assert_close(bias, torch.tensor([-0.1, 1.1, -1.0, 0.6]))


def test_an_injected_loss_has_the_gradient_one() -> None:
    """Whatever the gradient of y is; and none where y has none."""
    y, w = (torch.randn(3, dtype=F64).requires_grad_() for _ in range(2))
    out = ops.inject(y, w.square().sum())
    assert torch.equal(out, y)
    (5 * out.sum()).backward()
    assert torch.equal(y.grad, torch.full((3,), 5.0, dtype=F64))
    torch.testing.assert_close(w.grad, 2 * w.detach())
    assert torch.autograd.grad(y.sum(), w, allow_unused=True) == (None,)


# -- names -----------------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert L.parse("sp, cp=1e-4,lb,bias=0.01") == (
        L.Specialization(), L.Coupling(weight=1e-4), L.LoadBalance(), L.BiasUpdate(rate=0.01),
    )  # fmt: skip
    assert L.as_losses(["z", L.ERC(noise=False)]) == (L.ZLoss(), L.ERC(noise=False))
    assert L.as_losses({"sp": 5.0, "lb": 1, "bias": 0.5}) == (
        L.Specialization(weight=5.0), L.LoadBalance(weight=1.0), L.BiasUpdate(rate=0.5),
    )  # fmt: skip
    assert {kind.name for kind in L.NAMES.values()} == set(L.NAMES)
    weights = {n: getattr(k(), "weight", None) for n, k in L.NAMES.items()}
    assert weights == {
        "sp": 2e-3, "cp": 1e-3, "lb": 1e-2, "z": 1e-3, "orth": 1e-4, "var": 1e-3, "erc": 1e-2, "metrics": None,
        "bias": None,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Nameless(L.Loss):
    """A loss of a user's own, and not all of it."""


class Total(Nameless):
    name = "total"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"spp": 1.0}, "did you mean 'sp'"),
        ({"sp": L.Coupling()}, "losses maps 'sp' to"),
        ({"sp": float("nan")}, "unreadable loss|weight=nan"),
        ({"metrics": 1.0}, "metrics has no weight"),
        ([Nameless(weight=1.0)], "Nameless has no name"),
        ([Total(weight=1.0)], "Total is called 'total'"),
        (["spp"], "did you mean 'sp'"),
        (["sp=x"], "unreadable loss"),
        (["metrics=1"], "metrics has no weight"),
        (["sp", L.Specialization(weight=1.0)], "'sp' twice"),
        ([L.Coupling], "the class Coupling, not an instance"),
        ([3], "losses holds 3"),
        (3, "give a list"),
    ],
)
def test_a_bad_item_is_named(given: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        L.as_losses(given)


@pytest.mark.parametrize(
    "make",
    [
        lambda: L.Specialization(pair_reduction="max"), lambda: L.Coupling(detach="both"),
        lambda: L.LoadBalance(form="gshard"), lambda: L.ZLoss(weight=float("nan")), lambda: L.BiasUpdate(rate=-1.0),
        lambda: L.ERC(a=-1.0), lambda: L.Coupling(layer_reduction="none"), lambda: L.ERC(a=float("nan")),
        lambda: L.ERC(a=float("inf")), lambda: L.Specialization(eps=float("nan")), lambda: L.Specialization(eps=-1.0),
        lambda: L.Orthogonality(eps=float("nan")), lambda: L.BiasUpdate(rate=float("nan")),
        lambda: L.ZLoss(weight="1e-3"), lambda: L.Specialization(eps=0.0), lambda: L.Orthogonality(eps=1e-30),
    ],
)  # fmt: skip
def test_a_bad_option_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(InputError):
        make()
