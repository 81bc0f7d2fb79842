"""Every idiom against a loop over tokens and choices in float64, which reads the parameters by their names itself."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from moefx.models.idioms_base import MoELayer
from moefx.models.idioms_sorted import grouped_product
from moefx.models.moe_lm import IDIOMS, copy_weights

H, I = 16, 8
SAME = [name for name in IDIOMS if name != "G"]
AFTER_TOPK = ("A1", "A5", "H")
PRIORITY = {"A5": "token", "B": "choice", "F": "token"}

# name -> (gate, up, down), or (gate and up, down); and what of [E, out, in] is swapped or alternates.
STACKED: dict[str, tuple[tuple[str, ...], str]] = {
    "B": (("w_gate", "w_in", "w_out"), "in first"),
    "C": (("w1", "w3", "w2"), ""),
    "D1": (("input_linear", "output_linear"), ""),
    "D3": (("w1", "w3", "w2"), ""),
    "E2": (("gate_up_proj", "down_proj"), "in first, alternating"),
    "F": (("w1", "v1", "w2"), "in first"),
    "G": (("gate_up", "down"), "in first"),
}


def weights(idiom: str, layer: MoELayer) -> dict[str, Tensor]:
    """Matrices [E, out, in] and biases [E, out] under one set of names, differentiable to the layer's parameters."""
    p, E = dict(layer.named_parameters()), layer.num_experts
    found = {"router": p["gate.weight"]}
    for kind in ("weight", "bias") if layer.bias else ("weight",):
        if idiom not in STACKED:
            for part in ("gate", "up", "down") if layer.gated else ("up", "down"):
                found[f"{part}.{kind}"] = torch.stack([p[f"experts.{e}.{part}_proj.{kind}"] for e in range(E)])
            continue
        names, order = STACKED[idiom]
        stored = [p.get(n if kind == "weight" else f"{n}_bias") for n in names]
        if kind == "weight" and "in first" in order:
            stored = [None if s is None else s.transpose(1, 2) for s in stored]
        if len(stored) == 2 and layer.gated:
            joint, down = stored
            assert joint is not None
            alternating = "alternating" in order
            stored = [
                joint[:, ::2] if alternating else joint[:, :I],
                joint[:, 1::2] if alternating else joint[:, I:],
                down,
            ]
        for part, tensor in zip(("gate", "up", "down")[-len(stored) :], stored, strict=True):
            if tensor is not None:
                found[f"{part}.{kind}"] = tensor
    return found


def expert(w: dict[str, Tensor], e: int, x_H: Tensor, act: str) -> Tensor:
    def linear(part: str, v: Tensor) -> Tensor:
        y = w[f"{part}.weight"][e] @ v
        return y + w[f"{part}.bias"][e] if f"{part}.bias" in w else y

    def f(v: Tensor) -> Tensor:
        if act == "silu":
            return v / (1 + torch.exp(-v))
        return v * (v > 0) if act == "relu" else v * (1 + torch.erf(v / math.sqrt(2))) / 2

    inner = linear("up", x_H)
    inner = f(linear("gate", x_H)) * inner if "gate.weight" in w else f(inner)
    return linear("down", inner)


def oracle(
    idiom: str, layer: MoELayer, x_TH: Tensor, priority: str | None = None
) -> tuple[Tensor, list[tuple[int, int]]]:
    """y [T, H] and the kept (token, expert) pairs."""
    w, T, k = weights(idiom, layer), len(x_TH), layer.k
    rows = [[torch.zeros_like(x_TH[t])] for t in range(T)]
    odds = [torch.exp(w["router"] @ x_TH[t]) for t in range(T)]
    p = [o / o.sum() for o in odds]
    kept: list[tuple[int, int]] = []
    if idiom == "G":
        for e in range(layer.num_experts):
            best = sorted(range(T), key=lambda t, e=e: -p[t][e].item())  # type: ignore[misc]
            for t in best[: max(1, T * k // layer.num_experts)]:
                rows[t].append(p[t][e] * expert(w, e, x_TH[t], layer.act))
                kept.append((t, e))
    else:
        chosen = [sorted(range(layer.num_experts), key=lambda e, t=t: -p[t][e].item())[:k] for t in range(T)]  # type: ignore[misc]
        order = [(t, j) for t in range(T) for j in range(k)]
        if (priority or PRIORITY.get(idiom)) == "choice":
            order = [(t, j) for j in range(k) for t in range(T)]
        load = Counter[int]()
        for t, j in order:
            e = chosen[t][j]
            load[e] += 1
            if layer.capacity is not None and load[e] > layer.capacity:
                continue
            weight = p[t][e] / sum(p[t][c] for c in chosen[t]) if layer.renormalize else p[t][e]
            rows[t].append(weight * expert(w, e, x_TH[t], layer.act))
            kept.append((t, e))
    return torch.stack([torch.stack(r).sum(0) for r in rows]), kept


def make(idiom: str, E: int, k: int, seed: int = 0, avoid: int | None = None, **options: Any) -> MoELayer:
    layer = IDIOMS[idiom](H, I, E, k, **options).double()
    layer.reset_parameters(torch.Generator().manual_seed(seed))
    if avoid is not None:  # inputs() has a constant first feature
        with torch.no_grad():
            layer.gate.weight[:, 0] = 0
            layer.gate.weight[avoid, 0] = -30
    return layer


def inputs(T: int, seed: int = 0) -> Tensor:
    x_TH = torch.randn(T, H, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)
    x_TH[:, 0] = 1
    return x_TH.requires_grad_()


def error(idiom: str, layer: MoELayer, x_TH: Tensor, priority: str | None = None) -> float:
    """The largest difference of the output and of all gradients, relative to the largest value of each."""
    leaves = [x_TH, *layer.parameters()]
    ys = layer(x_TH), oracle(idiom, layer, x_TH, priority)[0]
    cotangent = torch.randn(ys[0].shape, generator=torch.Generator().manual_seed(9), dtype=ys[0].dtype)
    grads = [torch.autograd.grad(y, leaves, cotangent, allow_unused=True, materialize_grads=True) for y in ys]
    pairs = [ys, *zip(*grads, strict=True)]
    return max(((got - want).abs().max() / (want.abs().max() + 1e-3)).item() for got, want in pairs)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"act": "gelu", "bias": True},
    {"act": "relu", "gated": False},
    {"gated": False, "bias": True},
    {"renormalize": False, "bias": True},
]


def allowed(idiom: str, options: dict[str, Any]) -> dict[str, Any]:
    unable = (idiom in AFTER_TOPK and options.get("renormalize") is False) or (
        idiom == "G" and options.get("renormalize")
    )
    return {key: value for key, value in options.items() if not (key == "renormalize" and unable)}


@pytest.mark.parametrize("idiom", IDIOMS)
@pytest.mark.parametrize(("E", "k", "T"), [(4, 2, 7), (5, 1, 6), (3, 3, 4), (8, 2, 5), (5, 2, 1), (1, 1, 3)])
def test_output_and_gradients(idiom: str, E: int, k: int, T: int) -> None:
    for seed, options in enumerate(OPTIONS):
        assert error(idiom, make(idiom, E, k, seed, **allowed(idiom, options)), inputs(T, seed)) < 1e-9


@pytest.mark.parametrize("idiom", SAME)
@pytest.mark.parametrize("avoid", [0, 1, 3])
def test_an_expert_without_tokens(idiom: str, avoid: int) -> None:
    layer, x_TH = make(idiom, 4, 2, avoid=avoid, bias=True), inputs(6)
    _, kept = oracle(idiom, layer, x_TH)
    assert {e for _, e in kept} == {0, 1, 2, 3} - {avoid}
    assert error(idiom, layer, x_TH) < 1e-9


# -- capacity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("idiom", PRIORITY)
@pytest.mark.parametrize("capacity", [1, 2, 3, 9, 12])
def test_capacity(idiom: str, capacity: int) -> None:
    layer, x_TH = make(idiom, 4, 2, capacity=capacity, bias=True), inputs(9)
    kept = oracle(idiom, layer, x_TH)[1]
    assert (len(kept) < 18) == (capacity < 9)
    assert error(idiom, layer, x_TH) < 1e-9
    if capacity >= 9:
        y_TH = layer(x_TH)
        layer.capacity = None
        torch.testing.assert_close(layer(x_TH), y_TH, rtol=0, atol=1e-12)


@pytest.mark.parametrize("idiom", PRIORITY)
def test_the_priority_order_matters_and_is_the_documented_one(idiom: str) -> None:
    layer, x_TH = make(idiom, 4, 2, capacity=3), inputs(9)
    other = {"token": "choice", "choice": "token"}[PRIORITY[idiom]]
    assert sorted(oracle(idiom, layer, x_TH)[1]) != sorted(oracle(idiom, layer, x_TH, other)[1])
    assert error(idiom, layer, x_TH) < 1e-9 < 1e-2 < error(idiom, layer, x_TH, other)


# -- shapes and dtypes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("idiom", IDIOMS)
def test_leading_dimensions_and_no_tokens(idiom: str) -> None:
    layer, x_TH = make(idiom, 4, 2, bias=True), inputs(6)
    assert torch.equal(layer(x_TH.view(2, 3, H)), layer(x_TH).view(2, 3, H))
    for strided in (x_TH.t().contiguous().t(), x_TH.view(2, 3, H).permute(2, 1, 0).contiguous().permute(2, 1, 0)):
        torch.testing.assert_close(layer(strided).reshape(6, H), layer(x_TH), rtol=0, atol=1e-12)
    empty = torch.zeros(2, 0, H, dtype=torch.float64)
    if idiom == "B":
        with pytest.raises(RuntimeError):
            layer(empty)
        layer.capacity = 2
    y = layer(empty)
    assert y.shape == empty.shape
    if y.requires_grad:
        y.sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("idiom", IDIOMS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision(idiom: str, dtype: torch.dtype, bound: float) -> None:
    layer, x_TH = make(idiom, 4, 2, bias=True), inputs(10)
    with torch.no_grad():  # logits far apart: rounding must not choose other experts
        layer.gate.weight.mul_(4)
        for p in [*layer.parameters(), x_TH]:
            p.copy_(p.to(dtype))
    want = oracle(idiom, layer, x_TH)[0].detach()
    low = layer.to(dtype)
    got = low(x_TH.detach().to(dtype).requires_grad_())
    assert got.dtype == dtype
    assert ((got.double() - want).norm() / want.norm()).item() < bound
    (got * want.to(dtype)).sum().backward()
    grads = [p.grad for p in low.parameters()]
    assert all(g is not None and g.dtype == dtype and bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize(("dtype", "out"), [(torch.float64, 8), (torch.bfloat16, 8), (torch.bfloat16, 5)])
def test_grouped_product(dtype: torch.dtype, out: int) -> None:
    sizes = [3, 0, 4, 0]
    torch.manual_seed(0)
    x_SD, w_EDO = torch.randn(7, 16), torch.randn(4, out, 16).transpose(1, 2)
    x_SD, w_EDO = (v.to(dtype).requires_grad_() for v in (x_SD, w_EDO))
    offsets_E = torch.tensor(sizes).cumsum(0).to(torch.int32)
    want = torch.cat([x @ w for x, w in zip(x_SD.split(sizes), w_EDO, strict=True)])
    got = grouped_product(x_SD, w_EDO, offsets_E)
    torch.testing.assert_close(got, want)
    cotangent = torch.randn(7, out).to(dtype)
    for grads in zip(*(torch.autograd.grad(y, (x_SD, w_EDO), cotangent) for y in (got, want)), strict=True):
        torch.testing.assert_close(*grads)


# -- options, weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("idiom", IDIOMS)
def test_options_an_idiom_cannot_have(idiom: str) -> None:
    build = IDIOMS[idiom]
    if idiom not in PRIORITY:
        with pytest.raises(ValueError, match="no capacity"):
            build(H, I, 4, 2, capacity=3)
    else:
        with pytest.raises(ValueError, match="at least 1"):
            build(H, I, 4, 2, capacity=0)
    if idiom in (*AFTER_TOPK, "G"):
        with pytest.raises(ValueError, match="impossible"):
            build(H, I, 4, 2, renormalize=idiom == "G")
    with pytest.raises(ValueError, match="activation"):
        build(H, I, 4, 2, act="tanh")
    with pytest.raises(ValueError, match="k <= experts"):
        build(H, I, 4, 5)


@pytest.mark.parametrize("src", SAME)
@pytest.mark.parametrize("options", OPTIONS[:4])
def test_copied_weights_make_the_same_function(src: str, options: dict[str, Any]) -> None:
    source, x_TH = make(src, 4, 2, seed=3, **options), inputs(6)
    want = source(x_TH)
    for seed, dst in enumerate(SAME):
        layer = make(dst, 4, 2, seed=4 + seed, **options)
        assert not torch.allclose(layer(x_TH), want, atol=1e-3)
        copy_weights(source, layer)
        torch.testing.assert_close(layer(x_TH), want, rtol=0, atol=1e-12)


def test_weights_of_other_options_are_refused() -> None:
    source = make("A2", 4, 2)
    for options in ({"bias": True}, {"gated": False}, {"renormalize": False}, {"act": "relu"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
            copy_weights(source, make("C", 4, 2, **options))
    with pytest.raises(ValueError, match="num_experts is 4 in LoopMask and 5 in GatherWeights"):
        copy_weights(source, make("C", 5, 2))
    with pytest.raises(ValueError, match="renormalize"):
        copy_weights(source, make("G", 4, 2))


@pytest.mark.parametrize("fault", ["scaled", "swapped", "other expert"])
def test_a_wrong_combine_is_caught(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    for idiom in ("A2", "B", "C", "D3", "E3"):
        layer = make(idiom, 4, 2)
        right = layer.route

        def wrong(x_TH: Tensor, right: Any = right) -> tuple[Tensor, Tensor]:
            w_TK, idx_TK = right(x_TH)
            if fault == "scaled":
                return w_TK * (1 + 1e-6), idx_TK
            return (w_TK.flip(1), idx_TK) if fault == "swapped" else (w_TK, (idx_TK + 1) % 4)

        assert error(idiom, layer, inputs(7)) < 1e-9
        monkeypatch.setattr(layer, "route", wrong)
        assert error(idiom, layer, inputs(7)) > 1e-7
