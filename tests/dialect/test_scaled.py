"""Ops on codes and scales: their definition, what commutes with moving rows, and that no gradient gets lost in them."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx.errors import InputError
from moefx.precision import QuantSpec
from moefx.precision import convert as convert_alone
from moefx.precision import transpose_scaled as turn_alone

from ..precision import oracles as exact
from . import oracles
from .calls import COLUMN, ROW, SQUARE, TRAINING, calls, each_training, encoded
from .oracles import Tensor, equal, ops, randn, routing, tensors

MXFP8, MXFP4 = "e4m3 1x32 e8m0/rceil", "e2m1 1x32 e8m0/rceil"
ROW_SPECS = (ROW, MXFP8, MXFP4, "e4m3 row f32/exact", "e5m2 1x16 po2/floor")
# Numbers of rows of an expert, around the sizes of blocks and tiles.
SIZES = (0, 1, 15, 16, 17, 127, 128, 129)


def spread(T: int, N: int, seed: int = 0) -> Tensor:
    """Rows of magnitudes 12 binades apart, every fifth of them zero."""
    x = exact.spread_rows(T, N, 12, seed)
    x[4::5] = 0
    return x


def any_map(sizes: list[int], T: int, align: int, spare: int, seed: int) -> tuple[Tensor, Tensor]:
    """`token` and `offsets`: each expert takes tokens at random, so some twice and some never, then padding rows."""
    g = torch.Generator().manual_seed(seed)
    token, ends = list[int](), [0]
    for m in sizes:
        token += torch.randint(0, T, (m,), generator=g).tolist() if T else []
        token += [-1] * (-len(token) % align)
        ends.append(len(token))
    return torch.tensor([*token, *[-1] * spare], dtype=torch.int64), torch.tensor(ends, dtype=torch.int32)


def moved(x: Tensor, token: Tensor) -> Tensor:
    """Rows of `x` by a map, one after the other; zeros where there is no token."""
    return torch.stack([x[t] if t >= 0 else torch.zeros(x.shape[1]) for t in token.tolist()] or [x[:0].sum(0)])[
        : len(token)
    ]


def least(spec: str) -> float:
    return 2.0**-127 if "e8m0" in spec else 2.0**-126


def check_commutes(x: Tensor, token: Tensor, spec: str, offsets: Tensor | None = None) -> None:
    """T6: quantize then move == move then quantize, in all bits of the codes and of the real rows' scales."""
    slot = torch.empty(x.shape[0], 0, dtype=torch.int64)
    codes, scales = ops.permute_scaled(*ops.quantize(x, None, [spec]), token, slot)
    want_codes, want_scales = ops.quantize(moved(x, token), offsets, [spec])
    assert equal(codes, want_codes)
    assert scales.shape == want_scales.shape
    real = token >= 0
    assert equal(scales[real], want_scales[real])
    assert bool((oracles.bits(codes)[~real].view(torch.uint8) == 0).all())
    assert bool((scales[~real].double() == least(spec)).all())


# -- definitions -----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    spare=st.integers(0, 3),
    elem=st.sampled_from(["e4m3", "e5m2"]),
    kind=st.sampled_from(["po2", "e8m0"]),
    seed=st.integers(0, 99),
)
def test_quantize_and_dequantize_in_fractions(sizes: list[int], spare: int, elem: str, kind: str, seed: int) -> None:
    N, ends = 5, [0, *accumulate(sizes)]
    x, offsets = spread(ends[-1] + spare, N, seed), torch.tensor(ends, dtype=torch.int32)
    blocks = ((1, 2), (3, 1), (2, 2))
    out = ops.quantize(x, offsets, [f"{elem} {br}x{bc} {kind}/rceil" for br, bc in blocks])
    assert len(out) == 6
    for (br, bc), codes, scales in zip(blocks, out[::2], out[1::2], strict=True):
        want, want_scales = exact.quantize(x[: ends[-1]], elem, br, bc, kind, "rceil", ends)
        assert codes.view(torch.uint8)[: ends[-1]].tolist() == want
        assert scales.double()[: len(want_scales)].tolist() == want_scales
        assert not codes.view(torch.uint8)[ends[-1] :].any()
        y = ops.dequantize(codes, scales, offsets, f"{elem} {br}x{bc} {kind}/rceil", torch.float32)
        rows = [
            r for r, end in exact.ranges(ends[-1], br, ends) for _ in range(r, end)
        ]  # first row of each one's block
        first = sorted(set(rows))
        for r, line in enumerate(want):
            s = want_scales[first.index(rows[r])]
            assert y[r].tolist() == [exact.GRIDS[elem].value(c) * s[j // bc] for j, c in enumerate(line)]
        assert not y[ends[-1] :].any()


def test_scales_from_earlier_steps_are_refused() -> None:
    spec = "e5m2 tensor f32/exact delayed"
    x, (codes, scales) = randn(4, 32), encoded(randn(4, 32), ROW)
    for device in ("cpu", "meta"):
        t, c, s = x.to(device), codes.to(device), scales.to(device)
        for call in (
            lambda t=t: ops.quantize(t, None, [ROW, spec]),
            lambda c=c, s=s: ops.convert(c, s, None, spec, ROW),
            lambda c=c, s=s: ops.transpose_scaled(c, s, None, ROW, spec),
            lambda t=t: ops.glu_quantize(t, None, None, "silu", [], [spec]),
        ):
            with pytest.raises(InputError, match="cannot carry"):
                call()


@pytest.mark.parametrize("block", ["1x16", "16x1", "16x16"])
def test_two_levels_of_scales_are_carried_as_their_product(block: str) -> None:
    spec, x = f"e2m1 {block} e4m3+f32/exact", randn(32, 64)
    codes, scales = ops.quantize(x, None, [spec])
    whole = float(x.abs().max()) / (448 * 6)
    assert scales.dtype == torch.float32
    steps = scales.double() / whole  # an E4M3 number, times rounding of the product
    assert torch.allclose(steps, steps.to(torch.float8_e4m3fn).double(), rtol=1e-6)
    y = ops.dequantize(codes, scales, None, spec, torch.float32)
    assert 0.02 < float((y - x).norm() / x.norm()) < 0.15


# -- moving rows (T6) ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ROW_SPECS)
@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize(
    "sizes", [SIZES, (0, 0, 300, 0), (129,), (0, 0, 0)], ids=["edges", "one_takes_all", "single", "none"]
)
def test_quantizing_commutes_with_moving_rows(sizes: tuple[int, ...], T: int, spec: str) -> None:
    x = spread(T, 144)
    for align, spare in ((1, 0), (16, 5)):
        token, offsets = any_map(list(sizes), T, align, spare, seed=T)
        check_commutes(x, token, spec)
        check_commutes(x, token, spec, offsets)


@pytest.mark.parametrize("spec", ROW_SPECS)
def test_of_no_tokens_all_rows_are_empty(spec: str) -> None:
    check_commutes(torch.zeros(0, 144), torch.full((7,), -1), spec)
    check_commutes(torch.zeros(0, 144), torch.empty(0, dtype=torch.int64), spec)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    T=st.integers(1, 6),
    align=st.integers(1, 4),
    spare=st.integers(0, 3),
    spec=st.sampled_from(ROW_SPECS),
    seed=st.integers(0, 99),
)
def test_commutes_for_any_map(sizes: list[int], T: int, align: int, spare: int, spec: str, seed: int) -> None:
    check_commutes(spread(T, 36, seed), any_map(sizes, T, align, spare, seed)[0], spec)


def test_a_nan_moves_with_its_row_alone() -> None:
    x = spread(6, 256)
    x[2, 3], x[3, 200] = math.nan, math.inf
    token = torch.tensor([2, 0, 3, 2, -1, 5])
    slot = torch.empty(6, 0, dtype=torch.int64)
    moved_codes = ops.permute_scaled(*ops.quantize(x, None, [ROW]), token, slot)
    y = ops.dequantize(*moved_codes, None, ROW, torch.float32)
    bad = torch.zeros(6, 256, dtype=torch.bool)
    bad[[0, 3], :128], bad[2, 128:] = True, True
    assert torch.equal(y.isnan(), bad)


def test_blocks_of_several_rows_do_not_commute() -> None:
    # The control: with a scale over rows, what else was moved changes the codes; and the op does not take such scales.
    x, token = spread(40, 144), torch.tensor([30, 5, 0])
    codes, scales = ops.quantize(x, None, [COLUMN])
    assert not equal(codes[token], ops.quantize(moved(x, token), None, [COLUMN])[0])
    for device in ("cpu", "meta"):
        args = [t.to(device) for t in (codes, scales, token, torch.empty(40, 0, dtype=torch.int64))]
        with pytest.raises(RuntimeError, match="only blocks within a row move with it"):
            ops.permute_scaled(*args)
    # Nor do scales that stay behind while their codes move.
    codes, scales = ops.quantize(x, None, [ROW])
    want, want_scales = ops.quantize(moved(x, token), None, [ROW])
    assert equal(codes[token], want)
    assert not equal(scales[: len(token)], want_scales)


# -- turning blocks --------------------------------------------------------------------------------------------------


def planned(align: int, spec: str, N: int) -> tuple[oracles.Routing, Tensor, Tensor]:
    """A routing whose experts have 0 to 140 rows and some dropped pairs; codes and scales of its rows."""
    idx = torch.tensor([e for e, m in enumerate((17, 0, 140, 1, 16, 129)) for _ in range(m)] + [-1, 6, 9])[:, None]
    idx = idx[torch.randperm(len(idx), generator=torch.Generator().manual_seed(3))]
    r = routing(idx, E=6, align=align)
    return r, *ops.permute_scaled(*ops.quantize(spread(len(idx), N), None, [spec]), r.token, r.slot)


@pytest.mark.parametrize("align", [1, 8, 16])
@pytest.mark.parametrize(
    ("op", "spec", "to_spec"),
    [("transpose_scaled", ROW, COLUMN), ("convert", MXFP4, COLUMN), ("convert", ROW, MXFP8)],
    ids=["row_to_column", "fp4_to_column", "smaller"],
)
def test_on_a_plan_it_is_one_conversion_per_expert(op: str, spec: str, to_spec: str, align: int) -> None:
    r, codes, scales = planned(align, spec, 256)
    new, new_scales = getattr(ops, op)(codes, scales, r.offsets, spec, to_spec)
    to, alone = QuantSpec.parse(to_spec), convert_alone if op == "convert" else turn_alone
    x = ops.dequantize(codes, scales, r.offsets, spec, torch.float64)
    y = ops.dequantize(new, new_scales, r.offsets, to_spec, torch.float64)
    seen = 0
    for start, end in pairwise(r.lists.offsets):
        real = sum(t >= 0 for t in r.lists.token[start:end])  # padding lies behind the rows that hold a token
        one, one_scales = alone(codes[start : start + real], scales[start : start + real], spec, to_spec)
        assert equal(new[start : start + real], one)
        rows = one_scales.shape[0]
        assert equal(new_scales[seen : seen + rows], one_scales)
        seen += rows if to.br != 1 else end - start
        # T4: nothing is lost but below the smallest normal number of its new block.
        s = one_scales.double().repeat_interleave(to.br or 1, 0)[:real].repeat_interleave(to.bc or 1, 1)
        error, big = (y - x)[start : start + real].abs(), x[start : start + real].abs() >= 2.0**-6 * s
        assert not error[big].any()
        assert bool((error <= 2.0**-10 * s).all())
    vacant = torch.tensor(r.lists.token) < 0
    assert not new.view(torch.uint8)[vacant].any()


def test_a_tile_that_crosses_experts_is_caught() -> None:
    # The control: without offsets a block of 128 rows mixes experts, and the comparison with one per expert fails.
    r, codes, scales = planned(8, ROW, 256)
    new, _ = ops.transpose_scaled(codes, scales, None, ROW, COLUMN)
    start, end = r.lists.offsets[2:4]
    assert not equal(new[start:end], turn_alone(codes[start:end], scales[start:end], ROW, COLUMN)[0])


def test_square_blocks_serve_both_orientations() -> None:
    codes, scales = encoded(randn(3, 140, 260), SQUARE)
    new, new_scales = ops.transpose_scaled(codes, scales, None, SQUARE, SQUARE)
    assert equal(new, codes)
    assert equal(new_scales, scales)
    x = ops.dequantize(codes, scales, None, SQUARE, torch.float32)
    assert torch.equal(ops.dequantize(codes.mT, scales.mT, None, SQUARE, torch.float32), x.mT)


# -- gradients -------------------------------------------------------------------------------------------------------


@each_training
def test_a_gradient_is_refused(name: str) -> None:
    """From any output to any operand, alone: an error that names the op, never zero and never a rounded gradient."""
    call = calls(oracles.CASES["padded_and_dropped"])[name]
    assert call.op in TRAINING
    for i, operand in enumerate(call.args):
        if not isinstance(operand, Tensor) or not operand.is_floating_point():
            continue
        for j, shape in enumerate(t.shape for t in tensors(call())):
            args = [*call.args]
            args[i] = operand.detach().clone().requires_grad_()
            out = tensors(call(*args))[j]
            if not out.is_floating_point():
                assert (
                    not out.requires_grad
                )  # packed bytes: whoever asks is told that there is nothing to differentiate
                continue
            if out.numel() == 0:  # dw of no row weights
                continue
            assert out.requires_grad
            seed = torch.ones(shape).to(out.dtype)
            with pytest.raises(InputError, match=rf"moefx\.{call.op} was differentiated"):
                torch.autograd.grad(out, args[i], seed)
            assert args[i].grad is None


def test_a_gradient_behind_a_round_trip_is_refused() -> None:
    for spec in (ROW, MXFP4):
        x = randn(4, 32).requires_grad_()
        y = ops.dequantize(*ops.quantize(x, None, [spec]), None, spec, torch.float32)
        with pytest.raises(InputError, match="was differentiated"):
            y.sum().backward()
        assert x.grad is None
        y = ops.dequantize(*ops.quantize(x.detach(), None, [spec]), None, spec, torch.float32)
        assert not y.requires_grad  # what does not ask is not refused
