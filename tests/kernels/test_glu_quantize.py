"""The Triton kernels of `glu_quantize` and `glu_backward_quantize`.

Codes and scales have the bits of what the wide kernels give, rounded and then quantized by the definition. Against the
definition alone, whose exponential is another, some values round to the next number of their dtype: kinds without an
exponential agree in all bits, the others in nearly all.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

import moefx.dialect  # noqa: F401  registers the ops
from moefx.dialect.glu import glu_backward_reference, glu_reference
from moefx.dialect.scaled import encode
from moefx.kernels import registry
from moefx.kernels.gpu import cast_tile, glu
from moefx.kernels.gpu import glu_quantize as kernel
from moefx.precision.quantize import dequantize

from .interpreter import assert_same_bits

Tensor = torch.Tensor
ROW, COLUMN = "e4m3 1x128 po2/rceil", "e4m3 128x1 po2/rceil"
MX_ROW, MX_COLUMN = "e5m2 1x32 e8m0/floor", "e4m3 32x1 e8m0/rceil zero=one"
KINDS = ("silu", "interleaved clamp(7,1.702)", "plain gelu")
SIZES, BEFORE, BEHIND = (37, 0, 140, 0), 3, 9
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]


def offsets_of(sizes: tuple[int, ...], before: int = 0) -> Tensor:
    return torch.tensor([before, *accumulate(sizes, initial=before)][1:], dtype=torch.int32)


def inputs(
    kind: str, dtype: torch.dtype, S: int, I: int, weighted: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """da and h, rows and columns of different magnitudes and some of zeros, and w."""
    gen = torch.Generator().manual_seed(S + I)
    width = I if kind.startswith("plain") else 2 * I
    h = torch.randn(S, width, generator=gen) * torch.exp2(torch.randn(S, 1, generator=gen) * 2)
    h = h * torch.exp2(torch.randn(width, generator=gen))
    da = torch.randn(S, I, generator=gen) * torch.exp2(torch.randn(S, 1, generator=gen) * 3)
    if S:
        h[S // 2], da[-1] = 0, 0
    w = torch.randn(S, generator=gen)
    return da.to(dtype), h.to(dtype), w if weighted else None


def same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same_bits(a, b, f"output {i}:")


def forward(h: Tensor, w: Tensor | None, offsets: Tensor | None, kind: str, specs: list[str], own: list[str]) -> None:
    """The kernel gives what the wide kernel and the definition of a cast do."""
    want = encode(glu.glu(h, w, kind), specs, offsets) + encode(h, own, offsets)
    same(kernel.glu_quantize(h, w, offsets, kind, specs, own), want)


def backward(
    da: Tensor, h: Tensor, w: Tensor | None, offsets: Tensor | None, kind: str, specs: list[str], act: list[str],
    h_spec: str = "",
) -> None:  # fmt: skip
    """Likewise; with `h_spec` the kernel reads codes."""
    scales, wide = None, h
    if h_spec:
        h, scales = encode(h, [h_spec], offsets)
        wide = dequantize(h, scales, h_spec, dtype=da.dtype, offsets=offsets)
    dh, dw = glu.glu_backward(da, wide, w, kind)
    want = encode(dh, specs, offsets) + encode(glu.glu(wide, w, kind), act, offsets)
    got = kernel.glu_backward_quantize(da, h, scales, w, offsets, kind, h_spec, specs, act)
    same(got[1:], want)
    assert (got[0].shape, got[0].dtype) == (dw.shape, dw.dtype)
    if w is not None:  # another order of one sum
        terms = (da.double() * glu_reference(wide.double(), None, kind)).abs().sum(1)
        assert bool(((got[0] - dw).abs().double() <= 2.0**-20 * terms).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_forward(kind: str, dtype: torch.dtype) -> None:
    S = BEFORE + sum(SIZES) + BEHIND
    _, h, w = inputs(kind, dtype, S, 128)
    forward(h, w, offsets_of(SIZES, BEFORE), kind, [ROW, COLUMN], [COLUMN, ROW])


@pytest.mark.parametrize("kind", KINDS)
def test_backward(kind: str) -> None:
    S = BEFORE + sum(SIZES) + BEHIND
    da, h, w = inputs(kind, torch.bfloat16, S, 128)
    backward(da, h, w, offsets_of(SIZES, BEFORE), kind, [ROW, COLUMN], [COLUMN])


@pytest.mark.parametrize("kind", ["silu", "plain gelu"])
@pytest.mark.parametrize("h_spec", [ROW, "e4m3 1x32 e8m0/rceil"])
def test_backward_of_codes(kind: str, h_spec: str) -> None:
    da, h, w = inputs(kind, torch.bfloat16, BEFORE + sum(SIZES) + BEHIND, 128)
    backward(da, h, w, offsets_of(SIZES, BEFORE), kind, [COLUMN], [ROW], h_spec)


@pytest.mark.parametrize("kind", KINDS)
def test_small_blocks(kind: str) -> None:
    da, h, w = inputs(kind, torch.bfloat16, 84, 160)
    offsets = offsets_of((41, 0, 35), 3)
    forward(h, w, offsets, kind, [MX_ROW, MX_COLUMN], [MX_COLUMN])
    backward(da, h, w, offsets, kind, [MX_COLUMN, MX_ROW], [MX_ROW])


@pytest.mark.parametrize("I", [1, 17, 130])
def test_odd_widths(I: int) -> None:
    for kind, row in (("silu", []), ("plain relu2", [ROW]), ("interleaved relu", [MX_ROW])):
        da, h, w = inputs(kind, torch.bfloat16, 45, I)
        offsets = offsets_of((45,))
        forward(h, w, offsets, kind, [ROW, COLUMN], [*row, COLUMN])
        backward(da, h, w, offsets, kind, [COLUMN, *row], [ROW])


@pytest.mark.parametrize(
    ("S", "sizes"), [(0, (0, 0, 0)), (1, (0, 1)), (150, (0, 0)), (128, (128,)), (170, (0, 129, 40))]
)
def test_any_routing(S: int, sizes: tuple[int, ...]) -> None:
    da, h, w = inputs("silu", torch.bfloat16, S, 32)
    forward(h, w, offsets_of(sizes), "silu", [COLUMN], [MX_COLUMN])
    backward(da, h, w, offsets_of(sizes), "silu", ["e4m3 1x32 po2/even", MX_COLUMN], [COLUMN, ROW])


@pytest.mark.parametrize("S", [0, 5, 200])
def test_without_experts_and_weights(S: int) -> None:
    da, h, _ = inputs("silu", torch.bfloat16, S, 128)
    forward(h, None, None, "silu", [COLUMN, ROW], [ROW])
    backward(da, h, None, None, "silu", [ROW, MX_COLUMN], [])


def test_a_width_of_nothing_and_any_strides() -> None:
    da, h, w = inputs("silu", torch.bfloat16, 4, 0)
    backward(da, h, w, offsets_of((4,)), "silu", [COLUMN], [ROW])
    da, h, w = inputs("silu", torch.bfloat16, 40, 32)
    assert w is not None
    turned = h.t().contiguous().t()
    forward(turned, w[:1].expand(40), offsets_of((40,)), "silu", [ROW], [])
    backward(da[:1].expand(40, 32), turned, w, offsets_of((40,)), "silu", [COLUMN], [])


def test_nan_and_infinity_stay_in_their_block() -> None:
    da, h, w = inputs("silu", torch.bfloat16, 150, 128)
    h[3, 5], h[100, 140], da[20, 7] = torch.nan, torch.inf, torch.nan
    offsets = offsets_of((130, 15))
    forward(h, w, offsets, "silu", [ROW, MX_COLUMN], [MX_ROW, COLUMN])
    dh, _ = glu.glu_backward(da, h, w, "silu")
    got = kernel.glu_backward_quantize(da, h, None, w, offsets, "silu", "", [ROW, MX_COLUMN], [COLUMN])
    same(got[1:5], encode(dh, [ROW, MX_COLUMN], offsets))
    assert got[0].isnan().nonzero()[:, 0].tolist() == [3, 20]
    h[:3], da[:3] = torch.nan, torch.nan  # nobody's rows, whatever they hold
    after = kernel.glu_quantize(h, w, offsets_of((130, 15), 3), "silu", [ROW, COLUMN], [])
    clean = h.clone()
    clean[:3] = 0
    same(after, kernel.glu_quantize(clean, w, offsets_of((130, 15), 3), "silu", [ROW, COLUMN], []))


@pytest.mark.parametrize("kind", ["relu2", "silu"])
def test_against_the_definition_alone(kind: str) -> None:
    da, h, w = inputs(kind, torch.bfloat16, 200, 128)
    offsets, specs = offsets_of((70, 130)), [ROW, COLUMN]
    dh, _ = glu_backward_reference(da, h, w, kind)
    want = encode(glu_reference(h, w, kind), specs, offsets) + encode(dh, specs, offsets)
    got = kernel.glu_quantize(h, w, offsets, kind, specs, [])
    got += kernel.glu_backward_quantize(da, h, None, w, offsets, kind, "", specs, [])[1:]
    if kind == "relu2":
        return same(got, want)
    for (codes, scales), (want_codes, want_scales) in zip(
        zip(got[::2], got[1::2], strict=True), zip(want[::2], want[1::2], strict=True), strict=True
    ):
        assert_same_bits(scales, want_scales)
        steps = (codes.view(torch.uint8).int() - want_codes.view(torch.uint8).int()).abs()
        # bf16 keeps 4 bits more than a code: one value in 16 of those that differ in bf16 lies at a step of codes.
        assert int(steps.max()) <= 1
        assert float((steps > 0).float().mean()) < 1e-3


@triton.jit
def _rows_of_scales_of_another_tile(first, end, live, at, BLOCK: tl.constexpr):
    row = first // BLOCK + tl.arange(0, cast_tile.TILE // BLOCK)
    return row.to(tl.int64), row < 1


def test_blocks_that_cross_experts_or_a_product_not_rounded_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    _, h, w = inputs("silu", torch.bfloat16, 50, 128)
    with monkeypatch.context() as m:
        m.setattr(cast_tile, "scale_rows", _rows_of_scales_of_another_tile)
        with pytest.raises(AssertionError, match="output 1"):
            forward(h, w, offsets_of((20, 30)), "silu", [COLUMN], [])
    with pytest.raises(AssertionError, match="output 0"):
        same(
            kernel.glu_quantize(h, w, None, "silu", [ROW], []), encode(glu.glu(h.float(), w, "silu"), [ROW], None)
        )  # fmt: skip


def test_who_computes_on_a_gpu() -> None:
    def provider(kind: str, specs: list[str], own: list[str], I: int = 256, dtype: torch.dtype = torch.bfloat16) -> str:
        h = torch.empty(4, I if kind.startswith("plain") else 2 * I, dtype=dtype, device="cuda")
        return registry.choose("glu_quantize", h, None, None, kind, specs, own).name

    def backward(kind: str, specs: list[str], act: list[str], h_spec: str = "", dtype: Any = torch.bfloat16) -> str:
        da = torch.empty(4, 256, dtype=torch.bfloat16, device="cuda")
        h = torch.empty(4, 512, dtype=torch.float8_e4m3fn if h_spec else dtype, device="cuda")
        scales = torch.empty(4, 4, device="cuda") if h_spec else None
        args = da, h, scales, None, None, kind, h_spec, specs, act
        return registry.choose("glu_backward_quantize", *args).name

    with FakeTensorMode():
        assert provider("silu", [ROW, COLUMN], [ROW]) == "triton"
        assert provider("silu", [MX_ROW, MX_COLUMN], [MX_COLUMN]) == "triton"
        assert provider("interleaved gelu", [ROW], [ROW], I=129) == "triton"
        assert provider("silu", [COLUMN], [ROW], I=160) == "reference"  # a block would hold gate and up
        assert provider("silu", [ROW, MX_ROW], []) == "reference"
        assert provider("silu", [ROW], [], dtype=torch.float64) == "reference"
        for other in ("e2m1 1x32 e8m0/rceil", "e4m3 128x128 po2/rceil", "e4m3 row f32/exact", ROW + " sr"):
            assert provider("silu", [other], []) == "reference"
            assert provider("silu", [ROW], [other]) == "reference"
        assert backward("silu", [ROW, COLUMN], [COLUMN]) == "triton"
        assert backward("silu", [ROW, COLUMN], [COLUMN], ROW) == "triton"
        assert backward("silu", [ROW], [], COLUMN) == "reference"
        assert backward("interleaved silu", [ROW], [], ROW) == "reference"
        assert backward("silu", [ROW], [], dtype=torch.float32) == "reference"  # not the dtype of da
