"""Gradients of weights from codes in the interpreter: against float64, and exactly where sums are exact.

In both layouts of the operands: by rows, where codes are decoded, and by columns, as fp8 tensor cores read them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl

from moefx.dialect.scaled_gemm import _wgrad
from moefx.errors import InputError
from moefx.kernels.gpu import scaled_grouped_wgrad as kernels
from moefx.kernels.layout import laid_out, lies_by_columns
from moefx.precision.quantize import dequantize

from .interpreter import assert_same_bits
from .products import COLUMN, ROW, TILE, Tensor, assert_close, chosen, encoded, integers, numbers, offsets_of, powers

TURNABLE = [
    (COLUMN, COLUMN),
    ("e5m2 128x1 f32/exact", "e4m3 128x1 po2/rceil"),
    ("e4m3 32x1 e8m0/rceil", "e4m3 32x1 e8m0/rceil"),
    ("e4m3 64x1 po2/rceil", "e4m3 256x1 po2/rceil"),
    ("e4m3 column f32/exact", COLUMN),
]
WGRAD = [*TURNABLE, ("e5m2 tensor f32/exact", "e4m3 tensor f32/exact"), (TILE, "e4m3 column po2/rceil")]
BY_ROWS, BY_COLUMNS = "_scaled_grouped_wgrad", "_turned_wgrad"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that ran."""
    names: list[str] = []
    launch = kernels.launch

    def spy(kernel: Any, *args: Any, **kw: Any) -> None:
        names.append(kernel.__name__)
        launch(kernel, *args, **kw)

    monkeypatch.setattr(kernels, "launch", spy)
    return names


def turned(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Operands with codes by columns."""
    a, as_, b, bs, offsets, a_spec, b_spec = args
    return laid_out(a, a_spec, 16), as_, laid_out(b, b_spec, 16), bs, offsets, a_spec, b_spec


def assert_near(g: Tensor, args: tuple[Any, ...], depth: int) -> None:
    """Gradients within the bound of float64 ones."""
    a, as_, b, bs, offsets, a_spec, b_spec = args
    wide = [dequantize(c, s, t, offsets=offsets).double() for c, s, t in ((a, as_, a_spec), (b, bs, b_spec))]
    for e in range(len(offsets) - 1):
        x, y = (t[offsets[e] : offsets[e + 1]] for t in wide)
        assert_close(g[e], x.T @ y, x.T.abs() @ y.abs(), depth=depth)


def operands(S: int, M: int, N: int, offsets: Tensor, a_spec: str, b_spec: str) -> tuple[Any, ...]:
    a, b = encoded(a_spec, numbers(S, M), offsets), encoded(b_spec, numbers(S, N, seed=1), offsets)
    return *a, *b, offsets, a_spec, b_spec


@pytest.mark.parametrize(("a_spec", "b_spec"), WGRAD)
def test_weight_gradients_are_those_of_the_dequantized_rows(a_spec: str, b_spec: str, ran: list[str]) -> None:
    args = operands(140, 48, 144, offsets_of(5, 0, 131, 1), a_spec, b_spec)  # blocks begin at 0, 5, 133 and 136
    assert_near(kernels.scaled_grouped_wgrad(*args, torch.float32), args, depth=140)
    assert ran == [BY_ROWS]


@pytest.mark.usefixtures("poisoned_bytes")
@pytest.mark.parametrize(("a_spec", "b_spec"), TURNABLE)
def test_the_same_by_columns(a_spec: str, b_spec: str, ran: list[str]) -> None:
    args = operands(355, 48, 144, offsets_of(16, 0, 272, 48), a_spec, b_spec)  # 19 rows of nobody, and NaN behind them
    by_columns = turned(args)
    for i in (0, 2):
        by_columns[i].view(torch.uint8)[336:] = 0x7F
        assert lies_by_columns(by_columns[i])
    g = kernels.scaled_grouped_wgrad(*by_columns, torch.float32, 16)
    assert_near(g, args, depth=355)
    assert not g[1].any()
    assert ran == [BY_COLUMNS]


@pytest.mark.usefixtures("poisoned_bytes")
@pytest.mark.parametrize(
    ("a_spec", "b_spec"),
    [*TURNABLE[:2], *TURNABLE[4:], ("e4m3 128x1 e8m0/rceil", "e4m3 256x1 po2/rceil"), ("e4m3 32x1 e8m0/rceil",) * 2],
)
def test_widths_of_whole_tiles(a_spec: str, b_spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of whole blocks of 128 rows are multiplied in two halves."""
    twice: list[bool] = []
    launch = kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda *args, **kw: twice.append(kw["TWICE"]) or launch(*args, **kw))
    args = operands(355, 256, 128, offsets_of(16, 0, 272, 48), a_spec, b_spec)
    assert_near(kernels.scaled_grouped_wgrad(*turned(args), torch.float32, 16), args, depth=355)
    assert twice == [True]
    if a_spec == b_spec == COLUMN:
        exact = exact_operands((16, 0, 144, 256), 419, 128, 256)
        for dtype in (torch.float32, torch.bfloat16):
            got = kernels.scaled_grouped_wgrad(*turned(exact), dtype, 16)
            assert_same_bits(got, _wgrad(*exact, dtype, 16))
        exact[1][1] *= 2  # scales of a block of the third expert
        with pytest.raises(AssertionError):
            assert_same_bits(got, _wgrad(*exact, dtype, 16))


def test_what_lies_otherwise_is_decoded(ran: list[str]) -> None:
    rows = operands(64, 32, 16, offsets_of(16, 48), COLUMN, COLUMN)
    columns = turned(rows)
    want = kernels.scaled_grouped_wgrad(*rows, torch.float32)
    mixed = (rows[0], *columns[1:])
    for args, align in ((rows, 16), (columns, 1), (columns, 8), (mixed, 16)):
        assert_same_bits(kernels.scaled_grouped_wgrad(*args, torch.float32, align), want)
    assert set(ran) == {BY_ROWS}


def exact_operands(counts: tuple[int, ...], S: int, M: int = 48, N: int = 16) -> tuple[Any, ...]:
    offsets = offsets_of(*counts)
    blocks = S // 128 + len(counts)
    a, b = integers(S, M, seed=0), integers(S, N, seed=1)
    a.view(torch.uint8)[int(offsets[-1]) :] = 0x7F  # rows of nobody
    return a, powers(blocks, M, seed=2), b, powers(blocks, N, seed=3), offsets, COLUMN, COLUMN


@pytest.mark.usefixtures("poisoned_bytes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_weight_gradients_are_the_references_bits(dtype: torch.dtype) -> None:
    args = exact_operands((5, 0, 131), 138)
    assert_same_bits(kernels.scaled_grouped_wgrad(*args, dtype), _wgrad(*args, dtype))
    args = exact_operands((16, 0, 144, 256), 419)
    assert_same_bits(kernels.scaled_grouped_wgrad(*turned(args), dtype, 16), _wgrad(*args, dtype, 16))


@pytest.mark.parametrize(("align", "counts"), [(1, (5, 131)), (16, (16, 144))])
def test_blocks_that_begin_at_fixed_rows_are_seen(
    align: int, counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = exact_operands(counts, sum(counts))
    args = turned(args) if align == 16 else args
    want = _wgrad(*args, torch.float32)
    assert_same_bits(kernels.scaled_grouped_wgrad(*args, torch.float32, align), want)
    monkeypatch.setattr(kernels, "blocks_before", lambda at, e, BE, BR: tl.load(at + e) // 128)
    with pytest.raises(AssertionError):
        assert_same_bits(kernels.scaled_grouped_wgrad(*args, torch.float32, align), want)


def test_nan_stays_with_its_expert() -> None:
    """Of the rows that a step of 128 reaches beyond an expert's, nothing is read."""
    a, as_, b, bs, offsets, *specs = operands(64, 32, 16, offsets_of(16, 48), COLUMN, COLUMN)
    b.view(torch.uint8)[16:] = 0x7F
    g = kernels.scaled_grouped_wgrad(*turned((a, as_, b, bs, offsets, *specs)), torch.float32, 16)
    assert not g[0].isnan().any()
    assert g[1].isnan().all()


@pytest.mark.usefixtures("poisoned_bytes")
@pytest.mark.parametrize(("S", "counts"), [(0, (0, 0)), (1, (0, 1)), (3, (0, 0)), (5, (5,)), (17, (0, 16)), (16, (0,))])
def test_every_element_is_written(S: int, counts: tuple[int, ...]) -> None:
    args = operands(S, 16, 32, offsets_of(*counts), COLUMN, COLUMN)
    whole = all(n % 16 == 0 for n in counts)
    for some, align in ((args, 1), *([(turned(args), 16)] if whole else [])):
        g = kernels.scaled_grouped_wgrad(*some, torch.float32, align)
        assert not g.isnan().any()
        assert all(bool(g[e].any()) == (n > 0) for e, n in enumerate(counts))


def test_a_broken_promise_is_an_error_where_offsets_can_be_seen() -> None:
    args = operands(20, 16, 16, offsets_of(4, 16), COLUMN, COLUMN)
    with pytest.raises(InputError, match="multiples of 16"):
        torch.ops.moefx.scaled_grouped_wgrad(*args, torch.float32, 16)


@pytest.mark.parametrize("align", [1, 16])
@pytest.mark.parametrize(("a_spec", "b_spec"), WGRAD)
def test_triton_makes_the_weight_gradients_it_can(a_spec: str, b_spec: str, align: int) -> None:
    assert chosen("scaled_grouped_wgrad", (a_spec, b_spec), (align,), align=align) == "triton"


def test_the_reference_takes_the_rest() -> None:
    assert chosen("scaled_grouped_wgrad", (ROW, COLUMN)) == "reference"
    assert chosen("scaled_grouped_wgrad", (COLUMN, COLUMN), K=24) == "reference"
