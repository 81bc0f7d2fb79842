"""Quantizing a tile that is in registers: blocks along rows, along columns, or both, from one reading of the values.

A tile is TILE = 128 rows of one expert. Blocks of 1, 32 or 128 rows begin anew at each expert, as
`moefx.precision.blocks` has it, so that tiles, unlike fixed rows, hold whole blocks. Which rows a tile has is found on
the device from the experts' offsets, as in `tiles`; the grid has room for any routing. Rows of nobody get code 0 and
the smallest scale, and so do rows of scales that no expert uses.

Elements are E4M3 or E5M2, scales powers of two (fp32 or E8M0): the product with the inverse scale is exact, and the
hardware's conversion rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moefx.kernels.layout import by_columns
from moefx.precision.spec import QuantSpec

from .codec import as_bytes, constants, encode8, inverse, magnitude_bits, normal_scale, po2_field
from .launch import cdiv
from .tiles import (
    count_blocks,
    empty,
    find_segment,
    may_have_unused_block_rows,
    store_columns,
    unused_block_rows,
    within,
)

Tensor = torch.Tensor
ROWS = 128
TILE = tl.constexpr(ROWS)


class Cast(NamedTuple):
    """What a kernel knows of a spec; see `codec.constants`. `block` counts the elements of a block, all in a line."""

    block: int
    elem: str
    emax: int
    bound: int
    least: int
    eps: float
    zero_one: bool
    bytes: bool
    columns: bool  # codes lie by columns (`kernels.layout`)

    @staticmethod
    @lru_cache
    def of(spec: str, align: int = 1) -> Cast:
        """The constants of `spec`, whose blocks are 1xB or Bx1."""
        s, c = QuantSpec.parse(spec), constants(spec)
        block = (s.br or 1) * (s.bc or 1)
        known = (c[k] for k in ("ELEM", "EMAX", "BOUND", "LEAST", "EPS", "ZERO_ONE", "BYTES"))
        return Cast(block, *known, columns=by_columns(s, align))  # type: ignore[misc]


class Outputs(NamedTuple):
    """Codes and scales of one value as an op returns them, and by orientation what a kernel writes them with."""

    returned: list[Tensor]
    rows: tuple[Tensor | None, Tensor | None, Cast | None]
    columns: tuple[Tensor | None, Tensor | None, Cast | None]


def outputs(x: Tensor, shape: tuple[int, int], specs: Sequence[str], offsets: Tensor | None, align: int) -> Outputs:
    """Memory for a value of `shape` under `specs`, at most one per orientation, on the device of `x`."""
    groups = None if offsets is None else offsets.shape[0] - 1
    returned: list[Tensor] = []
    found: dict[int | None, tuple[Tensor | None, Tensor | None, Cast | None]] = {}
    for text in specs:
        spec = QuantSpec.parse(text)
        codes, scales = empty(x, text, shape, groups, align)
        returned += [codes, scales]
        found[spec.axis] = as_bytes(codes), as_bytes(scales), Cast.of(text, align)
    absent = None, None, None
    return Outputs(returned, found.get(-1, absent), found.get(-2, absent))


def tiles(S: int, offsets: Tensor | None) -> int:
    """Enough tiles for S rows of any routing: each expert, and the rows before and behind them, may end in a tile."""
    return cdiv(S, ROWS) if offsets is None else S // ROWS + offsets.shape[0] + 1


@triton.jit
def find_tile(t, offsets, S, E, SEGMENTS: tl.constexpr):
    """The rows of tile t, first and end, whether they are an expert's, its segment and its number within that.

    `end` is that of the segment; it may lie more than a tile behind `first`, or before it in a tile without rows.
    """
    if offsets is None:
        return t * TILE, S, t * 0 == 0, t * 0, t
    else:
        segment = find_segment(offsets, t, E, SEGMENTS, TILE)
        begin = tl.load(offsets + segment - 1, mask=segment > 0, other=0).to(tl.int32)
        end = tl.load(offsets + segment, mask=segment <= E, other=S).to(tl.int32)
        k = t - segment - begin // TILE
        return begin + k * TILE, end, (segment >= 1) & (segment <= E), segment, k


@triton.jit
def first_scale_row(offsets, segment, k, E, SEGMENTS: tl.constexpr, CAST: tl.constexpr):
    """The first row of scales that belongs to tile k of a segment, if CAST has blocks within columns."""
    if CAST is None:
        return 0
    elif offsets is None:
        return k * (TILE // CAST.block)
    else:
        return count_blocks(offsets, segment, E, SEGMENTS, CAST.block) + k * (TILE // CAST.block)


@triton.jit
def scale_rows(first, end, live, at, BLOCK: tl.constexpr):
    """Rows of scales, for blocks of BLOCK rows, from `at` on, that belong to a tile, and which of them exist."""
    j = tl.arange(0, TILE // BLOCK)
    return (at + j).to(tl.int64), live & (j * BLOCK < end - first)


@triton.jit
def _fields(bits, live, CAST: tl.constexpr):
    amax = bits.to(tl.float32, bitcast=True)
    field = po2_field(amax, CAST.emax, CAST.bound, CAST.least, CAST.eps, CAST.zero_one)
    # Nobody's zeros have the smallest scale anyway, if no zeros are given another.
    return tl.where(live, field, CAST.least + 127) if CAST.zero_one or CAST.eps > 0 else field


@triton.jit
def _stored(field, CAST: tl.constexpr):
    return field.to(tl.uint8) if CAST.bytes else normal_scale(field)


@triton.jit
def _row_bits(x, BLOCK: tl.constexpr):
    return tl.max(tl.reshape(magnitude_bits(x), (x.shape[0], x.shape[1] // BLOCK, BLOCK)), 2)


@triton.jit
def _row_codes(x, field, BLOCK: tl.constexpr, CAST: tl.constexpr):
    ELEM: tl.constexpr = CAST.elem  # Triton 3.6 takes no str that is part of a tuple as an argument
    blocks = tl.reshape(x, (x.shape[0], x.shape[1] // BLOCK, BLOCK))
    return tl.reshape(encode8(blocks * inverse(field)[:, :, None], ELEM), x.shape)


@triton.jit
def _store_codes(codes, out, first, row, rows, column, end_column, N):
    codes += first.to(tl.int64) * N  # within a tile, 32 bits hold the rest
    at = column + tl.arange(0, out.shape[1])
    mask = (row < rows)[:, None] & (at < end_column)[None, :]
    tl.store(codes + row[:, None] * N + at[None, :], out, mask=mask)


@triton.jit
def cast_rows(x, y, codes, first, row, rows, live, column, end_column, N, CAST: tl.constexpr):
    """Store codes of `x` fp32 [R, W], columns `column`.. of N below `end_column`, in blocks within rows, and return the
    exponent fields of their scales [R, blocks].

    The rows are `row` [R] from `first` on, of which those below `rows` are stored. With `y` the values are pairs: x the
    even, y the odd columns of 2W. Where not `live`, x and y must be zero.
    """
    if y is None:
        field = _fields(_row_bits(x, CAST.block), live, CAST)
        out = _row_codes(x, field, CAST.block, CAST)
    else:
        # A block of pairs is half a block in each: no wide value changes its place, only codes do.
        HALF: tl.constexpr = CAST.block // 2
        field = _fields(tl.maximum(_row_bits(x, HALF), _row_bits(y, HALF)), live, CAST)
        out = tl.interleave(_row_codes(x, field, HALF, CAST), _row_codes(y, field, HALF, CAST))
    _store_codes(codes, out, first, row, rows, column, end_column, N)
    return field


@triton.jit
def store_row_scales(field, scales, first, rows, column, end_column, N, CAST: tl.constexpr):
    """Store the scales of the first `rows` rows from `first` on."""
    at = column // CAST.block + tl.arange(0, field.shape[1])
    row = tl.arange(0, field.shape[0])
    mask = (row < rows)[:, None] & (at * CAST.block < end_column)[None, :]
    per_row = (N + CAST.block - 1) // CAST.block
    scales += first.to(tl.int64) * per_row
    tl.store(scales + row[:, None] * per_row + at[None, :], _stored(field, CAST), mask=mask)


@triton.jit
def _column_codes(x, live, CAST: tl.constexpr):
    W: tl.constexpr = x.shape[1]
    BLOCK: tl.constexpr = CAST.block
    ELEM: tl.constexpr = CAST.elem
    field = _fields(tl.max(tl.reshape(magnitude_bits(x), (TILE // BLOCK, BLOCK, W)), 1), live, CAST)
    blocks = tl.reshape(x, (TILE // BLOCK, BLOCK, W)) * inverse(field)[:, None, :]
    return tl.reshape(encode8(blocks, ELEM), x.shape), field


@triton.jit
def cast_columns(
    x, y, codes, scales, first, end, live, column, end_column, S, N, scale_row, CAST: tl.constexpr
):  # fmt: skip
    """Store codes and scales of `x` [TILE, W], and of `y`, as in `cast_rows`, in blocks within columns; rows to be
    stored end before `end`, and all before S; `scale_row` is that of `first_scale_row`."""
    WIDE: tl.constexpr = x.shape[1] if y is None else 2 * x.shape[1]
    out, field = _column_codes(x, live, CAST)
    if y is not None:
        odd, odd_field = _column_codes(y, live, CAST)
        out, field = tl.interleave(out, odd), tl.interleave(field, odd_field)
    if not CAST.columns:
        _store_codes(codes, out, first, tl.arange(0, TILE), end - first, column, end_column, N)
    at = column + tl.arange(0, WIDE)
    scale_at, used = scale_rows(first, end, live, scale_row, CAST.block)
    mask = used[:, None] & (at < end_column)[None, :]
    tl.store(scales + scale_at[:, None] * N + at[None, :], _stored(field, CAST), mask=mask)
    if CAST.columns:  # behind the scales, or the backward of h as codes spills on sm_90
        store_columns(out, codes, first, end, column, end_column, (S + 15) // 16 * 16, TILE, WIDE)


@triton.jit
def least_scales(
    scales, offsets, t, S, column, N, E, WIDE: tl.constexpr, SEGMENTS: tl.constexpr, CAST: tl.constexpr
):  # fmt: skip
    """Store the smallest scale in rows that nobody uses, in WIDE columns from `column` on: tile t looks after a share
    of all such rows, whatever it holds itself."""
    BLOCK: tl.constexpr = CAST.block
    if may_have_unused_block_rows(offsets, t, E, TILE, BLOCK):
        row, unused = unused_block_rows(offsets, t, S, E, SEGMENTS, TILE, BLOCK)
        field = tl.full((TILE // BLOCK, WIDE), CAST.least + 127, tl.int32)
        mask = unused[:, None] & (column + tl.arange(0, WIDE) < N)[None, :]
        at = scales + row.to(tl.int64) * N + column + within(TILE // BLOCK, WIDE, N)
        tl.store(at, _stored(field, CAST), mask=mask)
