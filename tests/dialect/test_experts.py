"""The composite `experts` against a loop over tokens and choices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moefx.errors import InputError

from . import oracles
from .oracles import ARMS, KINDS, Routing, Tensor, check, each_arm, each_case, each_dtype, ops, randn, running

H, I = 6, 5


def bank(
    E: int, kind: str, layout: str, bias: bool, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Weights as the op takes them, and per projection (weight [E, out, in], bias [E, out]) for the oracle."""
    wide = I if kind.startswith("plain") else 2 * I
    up, down = randn(E, wide, H, dtype=dtype, seed=seed), randn(E, H, I, dtype=dtype, seed=seed + 1)
    up_bias, down_bias = randn(E, wide, dtype=dtype, seed=seed + 2), randn(E, H, dtype=dtype, seed=seed + 3)
    stored = [w if layout == "nk" else w.mT.contiguous() for w in (up, down)]
    if not bias:
        zeros = torch.zeros_like(up_bias), torch.zeros_like(down_bias)
        return stored, [(up, zeros[0]), (down, zeros[1])]
    return [stored[0], up_bias, stored[1], down_bias], [(up, up_bias), (down, down_bias)]


def experts(x: Tensor, r: Routing, w: Tensor, projections: list[tuple[Tensor, Tensor]], kind: str) -> Tensor:
    """Each token through each expert that it chose, one after the other."""
    (up, up_bias), (down, down_bias) = [(a.double(), b.double()) for a, b in projections]
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t, choices in enumerate(r.idx.tolist()):
        for j, e in enumerate(choices):
            if 0 <= e < r.E:
                h = up[e] @ x[t].double() + up_bias[e]
                a = torch.tensor(oracles.activate(h.tolist(), kind), dtype=torch.float64)
                y[t] += w[t, j].double() * (down[e] @ a + down_bias[e])
    return y


# Roundings of intermediates to 16 bits carry through two products; what is left is relative to the largest output.
ROUNDINGS = {torch.float32: 40.0, torch.bfloat16: 12.0, torch.float16: 12.0}


@each_arm
@each_dtype
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("layout", ["nk", "kn"])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "plain relu2", "interleaved clamp(1.25,1.702)"])
def test_against_a_token_loop(kind: str, layout: str, bias: bool, dtype: torch.dtype, arm: str) -> None:
    r = oracles.CASES["dropped"]
    x, w = randn(r.idx.shape[0], H, dtype=dtype), randn(*r.idx.shape, dtype=dtype, seed=9)
    weights, projections = bank(r.E, kind, layout, bias, dtype)
    with running(arm):
        y = ops.experts(x, r.idx, w, weights, f"{kind} | {layout}{' bias' if bias else ''}")
    assert y.dtype == dtype
    check(y, experts(x, r, w, projections, kind), roundings=ROUNDINGS[dtype])


@each_arm
@each_case
def test_every_routing(r: Routing, arm: str) -> None:
    x, w = randn(r.idx.shape[0], H), randn(*r.idx.shape, seed=9)
    kind = "interleaved silu"
    weights, projections = bank(r.E, kind, "kn", True)
    with running(arm):
        y = ops.experts(x, r.idx, w, weights, f"{kind} | kn bias")
    check(y, experts(x, r, w, projections, kind), roundings=40)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    layout=st.sampled_from(["nk", "kn"]),
    bias=st.booleans(),
    T=st.integers(0, 6),
    k=st.integers(1, 3),
    E=st.integers(1, 5),
    seed=st.integers(0, 999),
)
@example(kind="plain relu2", layout="nk", bias=False, T=4, k=1, E=1, seed=281)
def test_any_spec(kind: str, layout: str, bias: bool, T: int, k: int, E: int, seed: int) -> None:
    idx = torch.randint(-1, E + 1, (T, k), generator=torch.Generator().manual_seed(seed))
    r = oracles.routing(idx, E)
    x, w = randn(T, H, seed=seed), randn(T, k, seed=seed + 1)
    weights, projections = bank(E, kind, layout, bias, seed=seed + 2)
    want = experts(x, r, w, projections, kind)
    # What cancels keeps the roundings of its terms, which are of about that size.
    scale = want.abs().max().clamp_min(0.1) if want.numel() else None
    for arm in ARMS:
        with running(arm):
            y = ops.experts(x, idx, w, weights, f"{kind} | {layout}{' bias' if bias else ''}")
        check(y, want, roundings=60, scale=scale)


@each_arm
def test_gradients_are_those_of_the_dense_formula(arm: str) -> None:
    # Every expert on every token, weighted by a matrix of routing weights that is zero where a token did not choose.
    r = oracles.CASES["balanced"]
    T, k = r.idx.shape
    weights, _ = bank(r.E, "silu", "nk", True, torch.float64)
    inputs = [randn(T, H, dtype=torch.float64), randn(T, k, dtype=torch.float64, seed=9), *weights]
    ours, dense = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    seed = randn(T, H, dtype=torch.float64, seed=11)

    with running(arm):
        got = ops.experts(ours[0], r.idx, ours[1], ours[2:], "silu | nk bias")
        (got * seed).sum().backward()
    x, w, up, up_bias, down, down_bias = dense
    h = torch.einsum("th,enh->ten", x, up) + up_bias
    a = torch.nn.functional.silu(h[..., :I]) * h[..., I:]
    y = torch.einsum("tei,ehi->teh", a, down) + down_bias
    routed = torch.zeros(T, r.E, dtype=torch.float64).scatter_add(1, r.idx, w)
    want = (routed[..., None] * y).sum(1)
    (want * seed).sum().backward()

    torch.testing.assert_close(got, want)
    for mine, theirs in zip(ours, dense, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@each_arm
def test_an_expert_that_nobody_chose_gets_a_zero_gradient(arm: str) -> None:
    r = oracles.CASES["empty_experts"]
    weights, _ = bank(r.E, "silu", "kn", True)
    weights = [t.requires_grad_() for t in weights]
    x, w = randn(r.idx.shape[0], H), randn(*r.idx.shape)
    with running(arm):
        ops.experts(x, r.idx, w, weights, "silu | kn bias").sum().backward()
    chosen = r.idx.unique().tolist()
    for t in weights:
        assert t.grad is not None
        for e in range(r.E):
            assert bool((t.grad[e] != 0).any()) == (e in chosen)


@each_arm
def test_any_strides(arm: str) -> None:
    r = oracles.CASES["dropped"]
    x, w = randn(r.idx.shape[0], H), randn(*r.idx.shape)
    weights, _ = bank(r.E, "silu", "nk", False)
    with running(arm):
        want = ops.experts(x, r.idx, w, weights, "silu | nk")
        for name in oracles.layouts(x):
            mixed = [oracles.layouts(t)[name] for t in weights]
            args = [oracles.layouts(t)[name] for t in (x, r.idx, w)]
            torch.testing.assert_close(ops.experts(*args, mixed, "silu | nk"), want, rtol=1e-5, atol=1e-5)


def test_a_bank_that_does_not_fit_its_spec_is_named() -> None:
    weights, _ = bank(3, "silu", "nk", True)
    x, idx, w = randn(2, H), torch.tensor([[0], [1]]), randn(2, 1)
    with pytest.raises(InputError, match=r"got 4 weights(.|\n)*pass up, down"):
        ops.experts(x, idx, w, weights, "silu | nk")
    with pytest.raises(InputError, match=r"got 2 weights(.|\n)*up bias"):
        ops.experts(x, idx, w, weights[::2], "silu | nk bias")
    with pytest.raises(RuntimeError, match=r"grouped_mm: x \[S, K\] is \(2, 6\)"):
        ops.experts(x, idx, w, weights[::2], "silu | kn")


def test_expert_choice_is_a_loop_over_experts() -> None:
    """Each expert takes its tokens; tokens that none takes are zero, and rows of padding change nothing."""
    T, E, C, H, I = 7, 3, 4, 6, 5
    x, up, down = (randn(*s, seed=i) for i, s in enumerate([(T, H), (E, 2 * I, H), (E, H, I)]))
    token = torch.stack([torch.randperm(T - 1, generator=torch.Generator().manual_seed(e))[:C] for e in range(E)])
    w = randn(E, C, seed=3)
    want = torch.zeros_like(x)
    for e in range(E):
        for c in range(C):
            gate, inner = (up[e] @ x[token[e, c]]).chunk(2)
            want[token[e, c]] += w[e, c] * (down[e] @ (torch.nn.functional.silu(gate) * inner))
    torch.testing.assert_close(torch.ops.moefx.expert_choice(x, token, w, [up, down], "silu | nk"), want)
    assert (want[T - 1] == 0).all()
    one, aligned = (torch.ops.moefx.choice_plan(token, T, align) for align in (1, 16))
    assert aligned[0].shape[0] == E * 16
    assert sorted(aligned[1][aligned[1] >= 0].tolist()) == sorted(one[1].tolist())
    assert all(int(aligned[1][aligned[2][t, e]]) == t * E + e for e in range(E) for t in token[e].tolist())
