"""Which tile of a grouped product is whose, read from the offsets on the device."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tiles_until(offsets, S, E, BE: tl.constexpr, BM: tl.constexpr):
    """int32 [BE]: tiles of BM rows up to and with each expert; rows behind the last offset count as one expert more.

    No tile holds rows of two experts. BE is a power of two above E.
    """
    at = tl.arange(0, BE)
    first = tl.load(offsets + at, mask=at <= E, other=S)
    end = tl.load(offsets + at + 1, mask=at < E, other=S)
    return tl.cumsum((end - first + BM - 1) // BM, 0)


@triton.jit
def in_bands(tile, rows, columns, BAND: tl.constexpr):
    """Tile of rows and of columns of a number: within bands of BAND tiles of rows, rows run first.

    What the programs of one moment read of both operands then stays in L2.
    """
    band = tile // (BAND * columns)
    height = tl.minimum(BAND, rows - band * BAND)
    inside = tile % (BAND * columns)
    return band * BAND + inside % height, inside // height


@triton.jit
def rows_of(m, until, offsets, S, E, BM: tl.constexpr):
    """Expert of a tile of rows (E: nobody), its first row, and the end of the expert's rows."""
    expert = tl.sum((until <= m).to(tl.int32), 0)
    before = tl.max(tl.where(until <= m, until, 0), 0)
    end = tl.load(offsets + expert + 1, mask=expert < E, other=S)
    return expert, tl.load(offsets + expert) + (m - before) * BM, end


@triton.jit
def blocks_before(offsets, expert, BE: tl.constexpr, BR: tl.constexpr):
    """Blocks of BR rows, partial ones included, of all experts before `expert`."""
    at = tl.arange(0, BE)
    first = tl.load(offsets + at, mask=at < expert, other=0)
    end = tl.load(offsets + at + 1, mask=at < expert, other=0)
    return tl.sum((end - first + BR - 1) // BR, 0)
