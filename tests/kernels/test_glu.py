"""The Triton kernels of `glu` and its gradients against their definition.

Kinds without an exponential give the definition's bits. The others are held to the definition in float64: a result is
right if it lies between the roundings of the exact value less and plus a bound on the error of fp32 arithmetic, which
is that of a GPU (an exponential off by |x| + 2 units in the last place), not the interpreter's smaller one.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moefx.dialect.glu import GluKind, glu_backward_reference, glu_reference
from moefx.kernels import registry
from moefx.kernels.gpu import activation
from moefx.kernels.gpu import glu as kernel

from .interpreter import assert_same_bits

Tensor = torch.Tensor
SMOOTH = (
    "silu",
    "gelu",
    "gelu_tanh",
    "plain silu",
    "interleaved gelu_tanh",
    "clamp(7,1.702)",
    "interleaved clamp(2,1)",
)
EXACT = ("relu", "relu2", "plain relu", "plain relu2", "interleaved relu2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEP = 2.0**-23
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_weighting = pytest.mark.parametrize("weighted", [False, True], ids=["plain_rows", "weighted_rows"])


def inputs(
    kind: str, dtype: torch.dtype, weighted: bool, S: int = 9, I: int = 24
) -> tuple[Tensor, Tensor, Tensor | None]:
    """da, h from -16 to 16, on both sides of every clamp, and w."""
    gen = torch.Generator().manual_seed(S * 1000 + I)
    h = torch.randn(S, I if kind.startswith("plain") else 2 * I, generator=gen) * 4
    da, w = torch.randn(S, I, generator=gen), torch.randn(S, generator=gen)
    return da.to(dtype), h.to(dtype), w if weighted else None


def double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def columns(t: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Gate and up."""
    k = GluKind.parse(kind)
    if not k.gated:
        return t, torch.ones_like(t)
    return (t[:, ::2], t[:, 1::2]) if k.interleaved else tuple(t.chunk(2, -1))  # type: ignore[return-value]


def error_of_activation(gate: Tensor, act: str) -> Tensor:
    """Bound of the error of act(gate) and its derivative in fp32, per element.

    An exponential of x errs by |x| + 2 steps; of gelu_tanh's cubic argument, which itself errs, by 5 |x| + 2. An error
    function near -1 loses all but the step of 1.
    """
    g = gate.abs()
    x = {"gelu_tanh": 8 * (g + 0.045 * g**3), "clamp": 2 * g}.get(act, g)
    relative = STEP * (x + 8)
    exact = {"silu": torch.sigmoid(gate), "clamp": torch.sigmoid(gate)}.get(
        act, torch.exp(-(gate.clamp(max=0) ** 2) / 2)
    )
    lost = STEP * 4 if act in ("gelu", "gelu_tanh") else 0.0
    return (1 + g) * (exact * relative + lost)


def between(got: Tensor, exact: Tensor, bound: Tensor, what: str) -> None:
    low, high = ((exact + sign * (bound + 2.0**-126)).to(got.dtype) for sign in (-1, 1))
    wrong = ~((low <= got) & (got <= high))
    assert not bool(wrong.any()), (
        f"{what}: {int(wrong.sum())} of {got.numel()}, as {got[wrong][0]} for {exact[wrong][0]}"
    )


def check(kind: str, da: Tensor, h: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Run both kernels and compare with the definition."""
    a = kernel.glu(h, w, kind)
    dh, dw = kernel.glu_backward(da, h, w, kind)
    weight = torch.ones(h.shape[0], 1).double() if w is None else w.double()[:, None].abs()
    gate, up = columns(h.double(), kind)
    k = GluKind.parse(kind)
    bound = error_of_activation(gate, k.act) * (up.abs() + 1)
    exact = glu_reference(h.double(), double(w), kind)
    between(a, exact, bound * weight, "a")
    want_dh, want_dw = glu_backward_reference(da.double(), h.double(), double(w), kind)
    for part, got, want in zip("gu", columns(dh, kind), columns(want_dh, kind), strict=True):
        if part == "g" or k.gated:
            size = (up.abs() + 1) if part == "g" else 1.0
            between(got, want, error_of_activation(gate, k.act) * size * da.double().abs() * weight, f"d{part}")
    if w is None:
        assert dw.shape == (0,)
        assert dw.dtype == da.dtype
    else:
        terms = (da.double() * glu_reference(h.double(), None, kind)).abs().sum(1)
        slack = (bound * da.double().abs()).sum(1)
        between(dw, want_dw, slack + STEP * (8 + h.shape[1]) * terms, "dw")
        assert dw.dtype == w.dtype
    check_again(kind, da, h, w, a, dh, dw)
    return a, dh, dw


def check_again(kind: str, da: Tensor, h: Tensor, w: Tensor | None, a: Tensor, dh: Tensor, dw: Tensor) -> None:
    """One reading of h gives the bits of both kernels, but for another order of the sum over a row."""
    *gradients, again = kernel.glu_backward_again(da, h, w, kind)
    assert_same_bits(again, a)
    assert_same_bits(gradients[0], dh)
    assert (gradients[1].dtype, gradients[1].shape) == (dw.dtype, dw.shape)
    if w is not None:
        terms = (da.double() * glu_reference(h.double(), None, kind)).abs().sum(-1)
        assert ((gradients[1] - dw).abs().double() <= STEP * h.shape[-1] * terms + 2.0**-126).all()


@pytest.mark.parametrize("kind", SMOOTH)
@each_dtype
@each_weighting
def test_against_float64(kind: str, dtype: torch.dtype, weighted: bool) -> None:
    da, h, w = inputs(kind, dtype, weighted)
    a, dh, _ = check(kind, da, h, w)
    assert (a.dtype, dh.dtype) == (dtype, dtype)
    if dtype != torch.float32:  # rounding to 16 bits hides nearly all differences between fp32 formulas
        good = columns(h, kind)[0] > -2  # below, the definition's 1 + tanh and 1 + erf lose digits in fp32
        assert float((a != glu_reference(h, w, kind))[good].float().mean()) < 0.01


@pytest.mark.parametrize("kind", EXACT)
@each_dtype
@each_weighting
def test_kinds_without_an_exponential_have_the_bits_of_the_definition(
    kind: str, dtype: torch.dtype, weighted: bool
) -> None:
    da, h, w = inputs(kind, dtype, weighted)
    h[0, :3] = 0
    assert_same_bits(kernel.glu(h, w, kind), glu_reference(h, w, kind))
    got, want = (f(da, h, w, kind) for f in (kernel.glu_backward, glu_backward_reference))
    assert_same_bits(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize(("S", "I"), [(1, 1), (1, 700), (5, 129), (130, 17), (3, 512), (40, 64)])
def test_tails(S: int, I: int) -> None:
    for kind in ("silu", "plain silu", "interleaved gelu"):
        check(kind, *inputs(kind, torch.bfloat16, True, S, I))


@pytest.mark.parametrize(("S", "I"), [(0, 8), (3, 0), (0, 0)])
def test_nothing(S: int, I: int) -> None:
    da, h, w = inputs("silu", torch.bfloat16, True, S, I)
    assert kernel.glu(h, w, "silu").shape == (S, I)
    dh, dw = kernel.glu_backward(da, h, w, "silu")
    assert dh.shape == (S, 2 * I)
    assert [t.shape for t in kernel.glu_backward_again(da, h, w, "silu")] == [(S, 2 * I), (S,), (S, I)]
    assert_same_bits(dw, glu_backward_reference(da, h, w, "silu")[1])


def test_any_strides_and_axes() -> None:
    da, h, w = inputs("silu", torch.float32, True)
    assert w is not None
    want = kernel.glu(h, w, "silu"), *kernel.glu_backward(da, h, w, "silu")
    turned = [t.t().contiguous().t() for t in (da, h)]
    spread = torch.stack([w, w], 1)[:, 0]
    got = kernel.glu(turned[1], spread, "silu"), *kernel.glu_backward(*turned, spread, "silu")
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)
    cube = h.view(3, 3, -1)
    assert_same_bits(kernel.glu(cube, None, "silu"), kernel.glu(h, None, "silu").view(3, 3, -1))
    dh, _ = kernel.glu_backward(da[:1, :1].expand(3, 3, 24), cube, None, "silu")
    assert_same_bits(dh.view(9, -1), kernel.glu_backward(da[:1, :1].expand(9, 24), h, None, "silu")[0])


@pytest.mark.parametrize("kind", [*SMOOTH, *EXACT])
def test_nan_and_infinities_are_those_of_the_definition(kind: str) -> None:
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -120.0, 120.0])
    h = torch.cartesian_prod(special, special)
    h = h[:, :1].contiguous() if kind.startswith("plain") else h
    da = torch.ones(h.shape[0], 1)
    got, want = kernel.glu(h, None, kind), glu_reference(h, None, kind)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-30, equal_nan=True)
    got, want = (f(da, h, None, kind)[0] for f in (kernel.glu_backward, glu_backward_reference))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-30, equal_nan=True)


def test_nan_stays_in_its_row_and_column() -> None:
    da, h, w = inputs("silu", torch.bfloat16, True, 6, 40)
    clean = kernel.glu(h, w, "silu"), *kernel.glu_backward(da, h, w, "silu")
    h[2, 7] = torch.nan
    a, dh, dw = kernel.glu(h, w, "silu"), *kernel.glu_backward(da, h, w, "silu")
    assert a.isnan().nonzero().tolist() == [[2, 7]]
    assert dh.isnan().nonzero().tolist() == [[2, 7], [2, 47]]
    assert dw.isnan().nonzero().tolist() == [[2]]
    assert_same_bits(dw[3:], clean[2][3:])


def test_rounding_twice_or_a_wrong_formula_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    da, h, w = inputs("silu", torch.bfloat16, True, 16, 64)
    twice = glu_reference(h, None, "silu") * w.bfloat16()[:, None]  # type: ignore[union-attr]
    a, given = kernel.glu(h, w, "silu"), kernel.glu_backward(da, h, w, "silu")
    check_again("silu", da, h, w, a, *given)
    with pytest.raises(AssertionError):
        check_again("silu", da, h, w, twice, *given)
    with pytest.raises(AssertionError):
        check_again("silu", da, h, None, a, *given)
    monkeypatch.setattr(kernel, "glu", lambda *_: twice)
    with pytest.raises(AssertionError, match=r"^a: "):
        check("silu", da, h, w)
    monkeypatch.undo()
    monkeypatch.setattr(kernel, "constants", lambda kind: activation.constants("gelu_tanh"))
    with pytest.raises(AssertionError, match=r"^a: "):
        check("gelu", da, h, w)


def test_constants_read_every_kind() -> None:
    for text in (*SMOOTH, *EXACT, "clamp(inf,1e-3)"):
        k, c = GluKind.parse(text), activation.constants(text)
        layout = "interleaved" if k.interleaved else "halves" if k.gated else "plain"
        assert c == {"ACT": k.act, "LAYOUT": layout, "LIMIT": k.limit, "ALPHA": k.alpha}


def test_who_computes_on_a_gpu() -> None:
    with FakeTensorMode():
        for dtype, name in ((torch.bfloat16, "triton"), (torch.float32, "triton"), (torch.float64, "reference")):
            h, da = torch.empty(4, 16, dtype=dtype, device="cuda"), torch.empty(4, 8, dtype=dtype, device="cuda")
            assert registry.choose("glu", h, None, "silu").name == name
            for op in ("glu_backward", "glu_backward_again"):
                assert registry.choose(op, da, h, None, "plain relu2").name == name
        w = torch.empty(4, dtype=torch.float64, device="cuda")
        assert registry.choose("glu", h.float(), w, "silu").name == "reference"
    assert registry.choose("glu", torch.empty(4, 16), None, "silu").name == "torch"
