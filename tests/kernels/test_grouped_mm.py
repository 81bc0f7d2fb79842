"""Grouped products, with and without gathered rows and activation, against float64 sums of the same operands.

A sum of n products in fp32 is off by at most n roundings of the sum of magnitudes, and then rounded once to the output.
Fresh memory is NaN, so is what lies beside the operands, and so are rows that nobody owns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moefx.dialect.glu import glu_reference
from moefx.kernels import registry
from moefx.kernels.gpu import grouped_mm as gpu

from .interpreter import assert_same_bits

Tensor = torch.Tensor
ops = torch.ops.moefx
SMALL = gpu.Tile(64, 64, 32)
N, K = 72, 70  # no multiples of a tile
# Rows of each expert, and of nobody.
COUNTS = {
    "tails": (70, 1, 64, 0, 9, 5),
    "empty_experts": (0, 0, 65, 0, 0, 0),
    "one_expert": (130, 0),
    "nobody_owns_any": (0, 0, 0, 70),
    "one_row": (0, 1, 0, 0),
    "no_rows": (0, 0, 0, 0),
}
each_counts = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@pytest.fixture(autouse=True)
def small_tiles_and_poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles that the interpreter multiplies quickly, and NaN in memory that was not written."""
    monkeypatch.setattr(gpu, "tile_of", lambda *_: SMALL)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Normal numbers in a larger tensor that is NaN elsewhere: the last axis is dense, the rows have gaps."""
    wide = torch.full((*shape[:-1], shape[-1] + 40), torch.nan, dtype=dtype)
    wide[..., : shape[-1]] = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return wide[..., : shape[-1]]


def ends(counts: tuple[int, ...]) -> tuple[Tensor, int]:
    """Offsets, and the number of rows with those of nobody."""
    return torch.tensor([0, *counts[:-1]]).cumsum(0).int(), sum(counts)


def routed(counts: tuple[int, ...], T: int = 33) -> tuple[Tensor, Tensor, Tensor, int]:
    """Tokens of rows, of which every fifth holds none, as those of nobody; slots that are not read; offsets; rows."""
    offsets, S = ends(counts)
    token = torch.randint(0, T, (S,), generator=torch.Generator().manual_seed(S))
    token[::5] = -1
    token[int(offsets[-1]) :] = -1
    return token, torch.zeros(T, 1, dtype=torch.int64), offsets, S


def weights(E: int, width: int, layout: str, dtype: torch.dtype) -> Tensor:
    """Weights [E, width, K] stored as they are, or [E, K, width], or one for all experts."""
    if layout == "kn":
        return rand(E, K, width, dtype=dtype, seed=1).mT
    if layout == "shared":
        return rand(width, K, dtype=dtype, seed=1).expand(E, width, K)
    return rand(E, width, K, dtype=dtype, seed=1)


def product(x: Tensor, w: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The product in float64, and the bound of its error."""
    x, w = x.double(), w.double()
    x[int(offsets[-1]) :] = 0  # rows of nobody may hold anything
    return _within(ops.grouped_mm(x, w, offsets), ops.grouped_mm(x.abs(), w.abs(), offsets), x.shape[1])


def gradient(a: Tensor, b: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a weight's gradient."""
    a, b = a.double(), b.double()
    return _within(
        ops.grouped_wgrad(a, b, offsets), ops.grouped_wgrad(a.abs(), b.abs(), offsets), int(offsets.diff().max())
    )


def _within(exact: Tensor, magnitude: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    return exact, magnitude * terms * 2.0**-24


def assert_close(got: Tensor, want: tuple[Tensor, Tensor]) -> None:
    """Within the error of the sum and one rounding (of subnormal numbers, an absolute one)."""
    exact, error = want
    info = torch.finfo(got.dtype)
    assert got.shape == exact.shape
    assert got.is_contiguous()
    allowed = error + (exact.abs() + error) * info.eps / 2 + info.smallest_normal * info.eps / 2
    wrong = ~((got.double() - exact).abs() <= allowed)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} are wrong, first at {wrong.nonzero()[0].tolist()}"


def given(counts: tuple[int, ...], layout: str = "nk", dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """Operands of a product."""
    offsets, S = ends(counts)
    x = rand(S, K, dtype=dtype)
    x[int(offsets[-1]) :] = torch.nan
    return x, weights(len(counts) - 1, N, layout, dtype), offsets


# -- products --------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("layout", ["nk", "kn", "shared"])
@each_counts
def test_product(counts: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    x, w, offsets = given(counts, layout, dtype)
    y = gpu.grouped_mm(x, w, offsets)
    assert y.dtype == dtype
    assert_close(y, product(x, w, offsets))


@pytest.mark.parametrize("rows", [192, 20], ids=["128_rows", "64_rows"])
def test_product_in_its_own_tiles(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch.use_deterministic_algorithms(True)
    offsets = torch.tensor([0, rows + 10, 2 * rows], dtype=torch.int32)
    x, w = (t.contiguous() for t in (rand(2 * rows, 64), rand(2, 272, 64, seed=1)))
    seen = []
    monkeypatch.setattr(gpu, "tile_of", lambda *args, _of=gpu.tile_of: seen.append(_of(*args)) or seen[-1])
    assert_close(gpu.grouped_mm(x, w, offsets), product(x, w, offsets))
    assert (128 if rows >= 192 else 64, 256) == (seen[0].BM, seen[0].BN)


def test_rows_that_are_no_rows_of_memory() -> None:
    x, w, offsets = given(COUNTS["tails"])
    x_t = x.t().contiguous().t()
    assert_same_bits(gpu.grouped_mm(x_t, w, offsets), gpu.grouped_mm(x, w, offsets))
    inner = torch.stack([w, w], -1)[..., 0]  # neither side of a weight is dense
    assert_same_bits(gpu.grouped_mm(x, inner, offsets), gpu.grouped_mm(x, w, offsets))


def test_depth_zero() -> None:
    offsets, S = ends(COUNTS["tails"])
    y = gpu.grouped_mm(rand(S, 0), rand(5, N, 0), offsets)
    assert torch.equal(y, torch.zeros(S, N, dtype=y.dtype))


@each_dtype
@each_counts
def test_gradient(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    offsets, S = ends(counts)
    a, b = rand(S, N, dtype=dtype, seed=2), rand(S, K, dtype=dtype, seed=3)
    want = gradient(a, b, offsets)
    a[int(offsets[-1]) :] = b[int(offsets[-1]) :] = torch.nan
    assert_close(gpu.grouped_wgrad(a, b, offsets), want)


def test_an_expert_does_not_see_what_is_not_finite_in_another() -> None:
    x, w, offsets = given(COUNTS["tails"])
    clean = gpu.grouped_mm(x, w, offsets), gpu.grouped_wgrad(x, x, offsets)
    x[int(offsets[1])] = torch.nan  # the one row of the second expert
    y, g = gpu.grouped_mm(x, w, offsets), gpu.grouped_wgrad(x, x, offsets)
    assert y[int(offsets[1])].isnan().all()
    assert g[1].isnan().all()
    y[int(offsets[1])], g[1] = clean[0][int(offsets[1])], clean[1][1]
    assert_same_bits(y, clean[0])
    assert_same_bits(g, clean[1])


# -- gathered rows ---------------------------------------------------------------------------------------------------


@each_counts
def test_gathered_product_is_the_product_of_moved_rows(counts: tuple[int, ...]) -> None:
    token, slot, offsets, _ = routed(counts)
    x, w = rand(33, K), weights(len(counts) - 1, N, "nk", torch.bfloat16)
    moved = ops.permute(x, token, slot)
    assert_same_bits(gpu.permute_grouped_mm(x, token, slot, w, offsets), gpu.grouped_mm(moved, w, offsets))


@pytest.mark.parametrize("flip", [False, True])
@each_counts
def test_gathered_gradient_is_the_gradient_of_moved_rows(counts: tuple[int, ...], flip: bool) -> None:
    token, slot, offsets, S = routed(counts)
    dy, x = rand(S, N), rand(33, K, seed=1)
    moved = ops.permute(x, token, slot)
    want = gpu.grouped_wgrad(moved, dy, offsets) if flip else gpu.grouped_wgrad(dy, moved, offsets)
    assert_same_bits(gpu.permute_grouped_wgrad(dy, x, token, slot, offsets, flip), want)


def test_no_tokens() -> None:
    token, slot = torch.full((70,), -1), torch.zeros(0, 1, dtype=torch.int64)
    offsets, x = torch.tensor([0, 30, 60], dtype=torch.int32), torch.empty(0, K, dtype=torch.bfloat16)
    w, dy = weights(2, N, "nk", torch.bfloat16), rand(70, N)
    assert not gpu.permute_grouped_mm(x, token, slot, w, offsets).any()
    assert not gpu.permute_grouped_wgrad(dy, x, token, slot, offsets).any()


@each_dtype
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "relu2", "clamp(7,1.702)"])
@pytest.mark.parametrize("layout", ["nk", "kn"])
@each_counts
def test_gathered_product_and_activation(counts: tuple[int, ...], layout: str, kind: str, dtype: torch.dtype) -> None:
    token, slot, offsets, S = routed(counts)
    x, w = rand(33, K, dtype=dtype), weights(len(counts) - 1, 2 * N, layout, dtype)
    w_rows = rand(S, 1, dtype=dtype, seed=5)[:, 0] if layout == "nk" else None
    h, a = gpu.permute_grouped_mm_glu(x, token, slot, w, offsets, w_rows, kind)
    assert_close(h, product(ops.permute(x, token, slot), w, offsets))
    assert_activation(a, h, w_rows, kind)


def assert_activation(a: Tensor, h: Tensor, w_rows: Tensor | None, kind: str) -> None:
    """`a` is the activation of `h` as it is stored; ten roundings of fp32 go before the last."""
    exact = glu_reference(h.double(), w_rows, kind)
    # What is small beside 1 in the argument of the exponential is lost: an error relative to the gate and up columns.
    gate, up = h.double().chunk(2, -1)
    scale = (gate * up).abs() * (1 if w_rows is None else w_rows.double().abs()[:, None])
    assert_close(a, (exact, scale * 10 * 2.0**-24))


# -- negative controls -----------------------------------------------------------------------------------------------


def test_a_missing_mask_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, offsets = given(COUNTS["tails"])
    run: Callable[..., None] = gpu.launch
    monkeypatch.setattr(gpu, "launch", lambda *args, **kw: run(*args, **{**kw, "WHOLE_K": True}))
    with pytest.raises(AssertionError, match="are wrong"):
        assert_close(gpu.grouped_mm(x, w, offsets), product(x, w, offsets))


def test_rows_of_the_next_expert_are_seen() -> None:
    offsets, S = ends(COUNTS["tails"])
    a, b = rand(S, N, seed=2), rand(S, K, seed=3)
    late = torch.where(offsets == 70, 71, offsets)
    with pytest.raises(AssertionError, match="are wrong"):
        assert_close(gpu.grouped_wgrad(a, b, late), gradient(a, b, offsets))
    x, w, _ = given(COUNTS["tails"])
    with pytest.raises(AssertionError, match="are wrong"):
        assert_close(gpu.grouped_mm(x, w, late), product(x, w, offsets))


def test_an_activation_of_the_wrong_kind_or_before_rounding_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    token, slot, offsets, _ = routed(COUNTS["tails"])
    x, w = rand(33, K), weights(5, 2 * N, "nk", torch.bfloat16)
    h, a = gpu.permute_grouped_mm_glu(x, token, slot, w, offsets, None, "silu")
    with pytest.raises(AssertionError, match="are wrong"):
        assert_activation(a, h, None, "gelu_tanh")
    wide = ops.grouped_mm(ops.permute(x, token, slot).float(), w.float(), offsets)
    with pytest.raises(AssertionError, match="are wrong"):
        assert_activation(glu_reference(wide, None, "silu").bfloat16(), h, None, "silu")


def test_sums_in_16_bits_are_seen() -> None:
    x, w, offsets = given(COUNTS["tails"])
    half = K // 2
    parts = [gpu.grouped_mm(t[0], t[1], offsets) for t in ((x[:, :half], w[..., :half]), (x[:, half:], w[..., half:]))]
    with pytest.raises(AssertionError, match="are wrong"):
        assert_close(parts[0] + parts[1], product(x, w, offsets))


# -- providers -------------------------------------------------------------------------------------------------------


def chosen(dtype: torch.dtype, K: int = 64, E: int = 4, kind: str = "silu", device: str = "cuda") -> dict[str, str]:
    """The provider of each op for operands of a device that need not be here."""
    with FakeTensorMode():

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        x, rows, h, w = empty(8, K), empty(16, K), empty(16, 64), empty(E, 64, K)
        token, slot = empty(16, dtype=torch.int64), empty(8, 2, dtype=torch.int64)
        offsets = empty(E + 1, dtype=torch.int32)
        calls: dict[str, tuple[Any, ...]] = {
            "grouped_mm": (rows, w, offsets),
            "grouped_wgrad": (h, rows, offsets),
            "permute_grouped_mm": (x, token, slot, w, offsets),
            "permute_grouped_mm_glu": (x, token, slot, w, offsets, None, kind),
            "permute_grouped_wgrad": (h, x, token, slot, offsets),
        }
        return {op: registry.choose(op, *args).name for op, args in calls.items()}


PLAIN = ("grouped_mm", "grouped_wgrad")


def test_the_library_takes_plain_products_and_triton_the_rest() -> None:
    found = chosen(torch.bfloat16)
    assert {found.pop(op) for op in PLAIN} == {"torch_grouped"}
    assert set(found.values()) == {"triton"}
    assert set(chosen(torch.bfloat16, K=63).values()) == {"triton"}  # rows of no 16 bytes
    assert set(chosen(torch.float16).values()) == {"triton"}


def test_what_no_kernel_takes_runs_the_reference() -> None:
    assert set(chosen(torch.float32).values()) == {"reference"}
    found = chosen(torch.float16, E=1025)
    assert [op for op in found if found[op] == "triton"] == ["grouped_wgrad", "permute_grouped_wgrad"]
    assert set(chosen(torch.bfloat16, device="cpu").values()) == {"torch", "reference"}
