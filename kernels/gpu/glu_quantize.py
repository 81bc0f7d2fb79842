"""`glu_quantize` and `glu_backward_quantize`: the activation and its casts in one reading of the pre-activations.

A program takes a tile of 128 rows of one expert and 128 columns of the activation, and writes codes in blocks within
rows and within columns from the same registers; the values themselves are never stored. Bytes with bf16 operands and
both orientations, without scales (1/32 byte per code): forward (4 + 2) S I, and 2 S I more for codes of h; backward
(6 + 4) S I, 2 S I less if h comes as codes. The activation's codes in the backward are a launch of the forward kernel,
which reads h again: with dh in one program, operands would be read again from the cache, and spill on sm_90.

Instructions bound these kernels before memory does (docs/kernels.md has the counts), hence the order of things: a tile
is made of four parts (`_cast`) that share one sigmoid among all that needs it. Blocks within columns take a whole tile
at once, 512 threads with 32 elements each; 64 elements, for which each thread's share of what a tile costs is half, fit
into 128 registers where one value is cast. Rows alone take 128 threads through the tile, 16 rows at a time, in 40 to
96 registers (Triton 3.7.1).

Widths that 16 does not divide are moved element by element, correctly and slowly. The gradient of a row weight is
summed over 128 columns (64 of alternating pairs) by each program, and over programs by `_sum_chunks`, both in a fixed
order: no atomics. The speed on a device is not yet measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .activation import EXACT, constants, glu_gradients, glu_value, load_pair
from .cast_tile import (
    ROWS,
    TILE,
    Cast,
    Outputs,
    cast_columns,
    cast_rows,
    find_tile,
    first_scale_row,
    least_scales,
    outputs,
    store_row_scales,
    tiles,
)
from .codec import as_bytes, decode8, scale_value
from .launch import cdiv, launch
from .sass import Specimen
from .tiles import interleaved, segments

Tensor = torch.Tensor
_ABSENT = None, None, None
_NOTHING = Outputs([], _ABSENT, _ABSENT)
_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _unused_scales(
    scales, offsets, t, S, column, I, E, LAYOUT: tl.constexpr, SEGMENTS: tl.constexpr, CAST: tl.constexpr
):  # fmt: skip
    if CAST is not None and offsets is not None:
        if LAYOUT == "plain":
            least_scales(scales, offsets, t, S, column, I, E, TILE, SEGMENTS, CAST)
        else:
            least_scales(scales, offsets, t, S, 2 * column, 2 * I, E, 2 * TILE, SEGMENTS, CAST)


@triton.jit
def _decoded(codes, scales, row, wanted, column, N, DTYPE: tl.constexpr, CAST: tl.constexpr):
    """Numbers in DTYPE of codes [R, W] from `column` of N on, times their scales."""
    ELEM: tl.constexpr = CAST.elem
    BLOCKS: tl.constexpr = codes.shape[1] // CAST.block if codes.shape[1] > CAST.block else 1
    at = column // CAST.block + tl.arange(0, BLOCKS)
    mask = wanted[:, None] & (at * CAST.block < N)[None, :]
    per_row = (N + CAST.block - 1) // CAST.block
    s = tl.load(scales + row[:, None] * per_row + at[None, :], mask=mask, other=0)
    s = scale_value(s.to(tl.int32)) if CAST.bytes else s
    blocks = tl.reshape(decode8(codes, ELEM), (codes.shape[0], BLOCKS, codes.shape[1] // BLOCKS)) * s[:, :, None]
    return tl.reshape(blocks, codes.shape).to(DTYPE)


@triton.jit
def _load(
    h, h_scales, w, row, rows, column, I, COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr, LAYOUT: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """Of those of the rows `row` that are below `rows`, in fp32: gate and up [.., COLUMNS], numbers of DTYPE, also
    where h is codes, and weights [.., 1], 1 without. Up is gate when plain."""
    wanted = row < rows
    gate, up = load_pair(h, row, wanted, column, I, COLUMNS, LAYOUT)
    if CAST is not None:
        tl.static_assert(LAYOUT != "interleaved")
        N = I if LAYOUT == "plain" else 2 * I
        gate = _decoded(gate, h_scales, row, wanted, column, N, DTYPE, CAST)
        up = gate if LAYOUT == "plain" else _decoded(up, h_scales, row, wanted, I + column, N, DTYPE, CAST)
    weight = 1.0 if w is None else tl.load(w + row, mask=wanted, other=0).to(tl.float32)[:, None]
    return gate.to(tl.float32), up.to(tl.float32), weight


@triton.jit
def _part(
    da, h, h_scales, w, codes, first, row, inside, live, column, I, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, H: tl.constexpr,
    VALUE: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """VALUE ("h", "a" or "dh") in the rows `row` of a tile, rounded to DTYPE, in fp32: gate and up, or the same twice.

    Codes within rows are stored where `row` is below `inside`, and the fields of their scales returned, as are the sums
    over columns of which the gradient of the weights is made.
    """
    PAIR: tl.constexpr = VALUE != "a" and LAYOUT != "plain"
    rows = tl.where(live, inside, 0)
    gate, up, weight = _load(h, h_scales, w, row, rows, column, I, COLUMNS, DTYPE, LAYOUT, H)
    sums = tl.zeros((row.shape[0], 1), tl.float32)
    if VALUE == "h":
        x, y = gate, up if PAIR else gate
    elif VALUE == "a":
        x = glu_value(gate, None if LAYOUT == "plain" else up, ACT, LIMIT, ALPHA)
        x = x if w is None else x * weight
        y = x
    else:
        d, _ = load_pair(da, row, row < rows, column, I, COLUMNS, "plain")
        d = d.to(tl.float32)
        if w is not None:
            a = glu_value(gate, None if LAYOUT == "plain" else up, ACT, LIMIT, ALPHA)
            sums = tl.sum(d * a, 1, keep_dims=True)
            d *= weight
        x, y = glu_gradients(d, gate, None if LAYOUT == "plain" else up, ACT, LIMIT, ALPHA)
    x, y = x.to(DTYPE).to(tl.float32), y.to(DTYPE).to(tl.float32)
    x_field, y_field = sums.to(tl.int32), sums.to(tl.int32)
    if ROW is not None:
        if PAIR and LAYOUT == "interleaved":
            x_field = cast_rows(x, y, codes, first, row, inside, live, 2 * column, 2 * I, 2 * I, ROW)
        elif PAIR:
            x_field = cast_rows(x, None, codes, first, row, inside, live, column, I, 2 * I, ROW)
            y_field = cast_rows(y, None, codes, first, row, inside, live, I + column, 2 * I, 2 * I, ROW)
        else:
            x_field = cast_rows(x, None, codes, first, row, inside, live, column, I, I, ROW)
    return x, y, x_field, y_field, sums


@triton.jit
def _four_fields(f0, f1, f2, f3):
    """`interleaved` fields; until they are stored, four of a byte each take one register."""
    four = f0 | f1 << 8 | f2 << 16 | f3 << 24
    return interleaved(four & 255, four >> 8 & 255, four >> 16 & 255, four >> 24 & 255)


@triton.jit
def _cast(
    da, h, h_scales, w, sums, row_codes, row_scales, column_codes, column_scales,
    first, end, live, scale_row, column, S, I, R: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, H: tl.constexpr,
    VALUE: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    """Store what is wanted of VALUE in R rows: codes by ROW, by COLUMN, or both, and the rows' `sums`.

    A whole tile is made of four parts, each thread having four rows of a column: each part stores its rows before the
    next begins, which leaves no more in registers than what columns need.
    """
    inside = end - first
    if R == TILE:
        row = 4 * tl.arange(0, R // 4)
        x0, y0, xf0, yf0, sums0 = _part(
            da, h, h_scales, w, row_codes, first, row, inside, live, column, I, COLUMNS, DTYPE,
            ACT, LAYOUT, LIMIT, ALPHA, H, VALUE, ROW,
        )  # fmt: skip
        x1, y1, xf1, yf1, sums1 = _part(
            da, h, h_scales, w, row_codes, first, row + 1, inside, live, column, I, COLUMNS, DTYPE,
            ACT, LAYOUT, LIMIT, ALPHA, H, VALUE, ROW,
        )  # fmt: skip
        x2, y2, xf2, yf2, sums2 = _part(
            da, h, h_scales, w, row_codes, first, row + 2, inside, live, column, I, COLUMNS, DTYPE,
            ACT, LAYOUT, LIMIT, ALPHA, H, VALUE, ROW,
        )  # fmt: skip
        x3, y3, xf3, yf3, sums3 = _part(
            da, h, h_scales, w, row_codes, first, row + 3, inside, live, column, I, COLUMNS, DTYPE,
            ACT, LAYOUT, LIMIT, ALPHA, H, VALUE, ROW,
        )  # fmt: skip
        x, y, total = interleaved(x0, x1, x2, x3), interleaved(y0, y1, y2, y3), interleaved(sums0, sums1, sums2, sums3)
        x_field, y_field = _four_fields(xf0, xf1, xf2, xf3), _four_fields(yf0, yf1, yf2, yf3)
    else:
        x, y, x_field, y_field, total = _part(
            da, h, h_scales, w, row_codes, first, tl.arange(0, R), inside, live, column, I, COLUMNS, DTYPE,
            ACT, LAYOUT, LIMIT, ALPHA, H, VALUE, ROW,
        )  # fmt: skip
    if sums is not None:
        row = tl.arange(0, R)
        tl.store(sums + row, tl.reshape(total, (R,)), mask=live & (row < inside))
    PAIR: tl.constexpr = VALUE != "a" and LAYOUT != "plain"
    PAIRS: tl.constexpr = PAIR and LAYOUT == "interleaved"
    TWICE: tl.constexpr = PAIR and not PAIRS
    N = 2 * I if PAIR else I
    if PAIRS:
        at, end_column = 2 * column, 2 * I
    else:
        at, end_column = column, I
    if ROW is not None:
        store_row_scales(x_field, row_scales, first, inside, at, end_column, N, ROW)
        if TWICE:
            store_row_scales(y_field, row_scales, first, inside, I + at, N, N, ROW)
    if COLUMN is not None:
        cast_columns(
            x, y if PAIRS else None, column_codes, column_scales,
            first, end, live, at, end_column, S, N, scale_row, COLUMN,
        )  # fmt: skip
        if TWICE:
            cast_columns(y, None, column_codes, column_scales, first, end, live, I + at, N, S, N, scale_row, COLUMN)


@triton.jit
def _glu_quantize(
    h, h_scales, w, offsets,
    a_row_codes, a_row_scales, a_column_codes, a_column_scales,
    h_row_codes, h_row_scales, h_column_codes, h_column_scales,
    S, I, E,
    DTYPE: tl.constexpr, ACT: tl.constexpr, LAYOUT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    H: tl.constexpr, A_ROW: tl.constexpr, A_COLUMN: tl.constexpr, H_ROW: tl.constexpr, H_COLUMN: tl.constexpr,
    SEGMENTS: tl.constexpr, R: tl.constexpr, A_PARTS: tl.constexpr, H_PARTS: tl.constexpr,
):  # fmt: skip
    across = (I + TILE - 1) // TILE
    t, column = tl.program_id(0) // across, tl.program_id(0) % across * TILE
    first, end, live, segment, k = find_tile(t, offsets, S, E, SEGMENTS)
    _unused_scales(a_column_scales, offsets, t, S, column, I, E, "plain", SEGMENTS, A_COLUMN)
    _unused_scales(h_column_scales, offsets, t, S, column, I, E, LAYOUT, SEGMENTS, H_COLUMN)
    if first >= end:
        return
    N = I if LAYOUT == "plain" else 2 * I
    h += first.to(tl.int64) * N
    if H is not None:
        h_scales += first.to(tl.int64) * ((N + H.block - 1) // H.block)
    if w is not None:
        w += first
    a_at = first_scale_row(offsets, segment, k, E, SEGMENTS, A_COLUMN)
    h_at = first_scale_row(offsets, segment, k, E, SEGMENTS, H_COLUMN)
    for _ in range(0, TILE if R == TILE else tl.minimum(end - first, TILE), R):
        if H_ROW is not None or H_COLUMN is not None:
            for part in tl.static_range(H_PARTS):
                _cast(
                    None, h, None, None, None, h_row_codes, h_row_scales, h_column_codes, h_column_scales,
                    first, end, live, h_at, column + part * (TILE // H_PARTS), S, I, R, TILE // H_PARTS, DTYPE,
                    ACT, LAYOUT, LIMIT, ALPHA, None, "h", H_ROW, H_COLUMN,
                )  # fmt: skip
        if A_ROW is not None or A_COLUMN is not None:
            for part in tl.static_range(A_PARTS):
                _cast(
                    None, h, h_scales, w, None, a_row_codes, a_row_scales, a_column_codes, a_column_scales,
                    first, end, live, a_at, column + part * (TILE // A_PARTS), S, I, R, TILE // A_PARTS, DTYPE,
                    ACT, LAYOUT, LIMIT, ALPHA, H, "a", A_ROW, A_COLUMN,
                )  # fmt: skip
        first += R
        h += R * N
        if H is not None:
            h_scales += R * ((N + H.block - 1) // H.block)
        if w is not None:
            w += R


@triton.jit
def _sums_of_nobody(
    da, h, sums, rows, column, I, COLUMNS: tl.constexpr,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Rows of nobody have a gradient of their weight, as in the wide op; where h is codes, theirs read as zero."""
    row = tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    if H is None:
        for at in range(column, tl.minimum(column + COLUMNS, I), 8):
            gate, up, _ = _load(h, None, None, row, rows, at, I, 8, None, LAYOUT, None)
            d, _ = load_pair(da, row, row < rows, at, I, 8, "plain")
            a = glu_value(gate, None if LAYOUT == "plain" else up, ACT, LIMIT, ALPHA)
            total += tl.sum(d.to(tl.float32) * a, 1)
    tl.store(sums + row, total, mask=row < rows)


@triton.jit
def _glu_backward_quantize(
    da, h, h_scales, w, offsets, chunks, row_codes, row_scales, column_codes, column_scales, S, I, E,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, H: tl.constexpr,
    ROW: tl.constexpr, COLUMN: tl.constexpr, SEGMENTS: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = da.dtype.element_ty
    COLUMNS: tl.constexpr = TILE // PARTS
    across = (I + TILE - 1) // TILE
    t, chunk = tl.program_id(0) // across, tl.program_id(0) % across
    column = chunk * TILE
    first, end, live, segment, k = find_tile(t, offsets, S, E, SEGMENTS)
    _unused_scales(column_scales, offsets, t, S, column, I, E, LAYOUT, SEGMENTS, COLUMN)
    if first >= end:
        return
    scale_row = first_scale_row(offsets, segment, k, E, SEGMENTS, COLUMN)
    start, N = first.to(tl.int64), I if LAYOUT == "plain" else 2 * I
    da += start * I
    h += start * N
    if H is not None:
        h_scales += start * ((N + H.block - 1) // H.block)
    if w is not None:
        w += start
    if chunks is not None:
        chunks += chunk.to(tl.int64) * PARTS * S + first
        if offsets is not None:  # noqa: SIM102  the one is known to the compiler, the other on the device
            if not live:
                for part in tl.static_range(PARTS):
                    _sums_of_nobody(
                        da, h, chunks + part * S, end - first, column + part * COLUMNS, I, COLUMNS,
                        ACT, LAYOUT, LIMIT, ALPHA, H,
                    )  # fmt: skip
    for _ in range(0, TILE if R == TILE else tl.minimum(end - first, TILE), R):
        for part in tl.static_range(PARTS):
            _cast(
                da, h, h_scales, w, None if chunks is None else chunks + part * S,
                row_codes, row_scales, column_codes, column_scales,
                first, end, live, scale_row, column + part * COLUMNS, S, I, R, COLUMNS, DTYPE,
                ACT, LAYOUT, LIMIT, ALPHA, H, "dh", ROW, COLUMN,
            )  # fmt: skip
        first += R
        da += R * I
        h += R * N
        if H is not None:
            h_scales += R * ((N + H.block - 1) // H.block)
        if w is not None:
            w += R
        if chunks is not None:
            chunks += R


@triton.jit
def _sum_chunks(chunks, dw, S, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(n):
        total += tl.load(chunks + row, mask=row < S, other=0)
        chunks += S
    tl.store(dw + row, total.to(dw.dtype.element_ty), mask=row < S)


def _options(x: Outputs, wide: bool) -> dict[str, Any]:
    """Rows at a time, and Triton's options. Where no block goes across rows, 128 threads go through the tile in steps
    of 16 rows. Else 512 threads have 32 of its elements each, or 256 threads 64 of what is not `wide`."""
    if x.columns[2] is None:
        return {"R": 16, "num_warps": 4}
    few = not wide and x.columns[2].columns
    return {"R": ROWS, "num_warps": 8, "maxnreg": 128} if few else {"R": ROWS, "num_warps": 16}


def _parts(R: int, x: Outputs, pairs: bool) -> int:
    """Passes over R rows, of half the columns each where registers would not suffice: for pairs that alternate, and
    where a whole tile's parts (`_cast`) have no rows to store, which puts them in order."""
    return 2 if R == ROWS and (pairs or x.rows[2] is None) else 1


def _activation(
    h: Tensor, h_scales: Tensor | None, w: Tensor | None, offsets: Tensor | None, kind: str, h_spec: str, dtype: Any,
    a: Outputs, own: Outputs, I: int,
) -> None:  # fmt: skip
    """Casts of the activation and of h."""
    c, wide = constants(kind), dtype.itemsize > 2 or own is not _NOTHING
    options = _options(own if a.columns[2] is None else a, wide)
    E = 0 if offsets is None else offsets.shape[0] - 1
    launch(
        _glu_quantize, (tiles(h.shape[0], offsets) * cdiv(I, ROWS),), as_bytes(h.contiguous()),
        None if h_scales is None else as_bytes(h_scales.contiguous()), None if w is None else w.contiguous(), offsets,
        *a.rows[:2], *a.columns[:2], *own.rows[:2], *own.columns[:2],
        h.shape[0], I, E, **c, DTYPE=_TRITON[dtype], H=None if h_scales is None else Cast.of(h_spec),
        A_ROW=a.rows[2], A_COLUMN=a.columns[2], H_ROW=own.rows[2], H_COLUMN=own.columns[2],
        SEGMENTS=segments(offsets), A_PARTS=_parts(options["R"], a, False),
        H_PARTS=_parts(options["R"], own, c["LAYOUT"] == "interleaved"), **options, **EXACT,
    )  # fmt: skip


def glu_quantize(
    h: Tensor, w: Tensor | None, offsets: Tensor | None, kind: str, specs: Sequence[str], h_specs: Sequence[str],
    align: int = 1,
) -> list[Tensor]:  # fmt: skip
    """`moefx.glu_quantize`: h [S, 2I] (I when plain) in fp32, bf16 or fp16, w [S] or None, offsets int [E+1] or None ->
    codes and scales of the activation [S, I] for each of `specs`, then of h for each of `h_specs`.
    """
    S, width = h.shape
    I = width if kind.startswith("plain") else width // 2
    a = outputs(h, (S, I), specs, offsets, align)
    own = outputs(h, (S, width), h_specs, offsets, align) if h_specs else _NOTHING
    _activation(h, None, w, offsets, kind, "", h.dtype, a, own, I)
    return a.returned + own.returned


def glu_backward_quantize(
    da: Tensor, h: Tensor, h_scales: Tensor | None, w: Tensor | None, offsets: Tensor | None, kind: str, h_spec: str,
    specs: Sequence[str], act_specs: Sequence[str], align: int = 1,
) -> list[Tensor]:  # fmt: skip
    """`moefx.glu_backward_quantize`: da [S, I], h as for `glu_quantize` in the dtype of da, or its codes with h_scales
    under `h_spec` -> dw [S] like w, codes and scales of dh for each of `specs`, of the activation for `act_specs`.

    dw is summed in another order than by `glu_backward`: it may differ in the last places of fp32.
    """
    c = constants(kind)
    S, I = da.shape
    d, a = outputs(da, (S, h.shape[1]), specs, offsets, align), outputs(da, (S, I), act_specs, offsets, align)
    n, E = cdiv(I, ROWS), 0 if offsets is None else offsets.shape[0] - 1
    dw = da.new_empty(0) if w is None else w.new_empty(w.shape)
    if act_specs:
        _activation(h, h_scales, w, offsets, kind, h_spec, da.dtype, a, _NOTHING, I)
    # Codes of fp32 operands in both orientations are two launches: one program of both spills.
    both = (Outputs([], _ABSENT, d.columns), Outputs([], d.rows, _ABSENT))
    for x in both if da.element_size() > 2 and d.rows[2] and d.columns[2] else (d,):
        options = _options(x, True)
        parts = _parts(options["R"], x, c["LAYOUT"] == "interleaved")
        chunks = None if w is None else da.new_empty((n * parts, S), dtype=torch.float32)
        launch(
            _glu_backward_quantize, (tiles(S, offsets) * n,), da.contiguous(), as_bytes(h.contiguous()),
            None if h_scales is None else as_bytes(h_scales.contiguous()), None if w is None else w.contiguous(),
            offsets, chunks, *x.rows[:2], *x.columns[:2], S, I, E, **c,
            H=None if h_scales is None else Cast.of(h_spec), ROW=x.rows[2], COLUMN=x.columns[2],
            SEGMENTS=segments(offsets), PARTS=parts, **options, **EXACT,
        )  # fmt: skip
    if w is not None:
        launch(_sum_chunks, (cdiv(S, 256),), chunks, dw, S, n * parts, BLOCK=256, num_warps=4)
    return [dw, *d.returned, *a.returned]


def specimens() -> list[Specimen]:
    """Qwen3-30B-A3B (S = 65536, I = 768, E = 128), DeepSeek-V3 (I = 2048, E = 256) and an odd width."""
    row, column, mx = "e4m3 1x128 po2/rceil", "e4m3 128x1 po2/rceil", "e4m3 1x32 e8m0/rceil"
    S, bf16 = 65536, torch.bfloat16

    def empty(*shape: int, dtype: torch.dtype = bf16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def forward(I: int, E: int, kind: str, specs: Any, h_specs: Any, dtype: Any = bf16, align: int = 1) -> Any:
        width = I if kind.startswith("plain") else 2 * I
        args = empty(S, width, dtype=dtype), empty(S, dtype=torch.float32), empty(E + 1, dtype=torch.int32)
        return lambda: glu_quantize(*args, kind, specs, h_specs, align)

    def backward(
        I: int, E: int, kind: str, specs: Any, act: Any, codes: bool, dtype: Any = bf16, align: int = 1
    ) -> Any:
        width = I if kind.startswith("plain") else 2 * I
        h = empty(S, width, dtype=torch.float8_e4m3fn if codes else dtype)
        scales = empty(S, cdiv(width, 128), dtype=torch.float32) if codes else None
        w, offsets = empty(S, dtype=torch.float32), empty(E + 1, dtype=torch.int32)
        da = empty(S, I, dtype=dtype)
        return lambda: glu_backward_quantize(da, h, scales, w, offsets, kind, row, specs, act, align)

    has = ("LDG.E.128", "F2FP.SATFINITE", "MUFU.EX2")
    turned, mx_column = (*has, "STG.128"), "e4m3 32x1 e8m0/rceil"
    every, hopper = ("sm_90", "sm_100"), ("sm_90",)  # what spills 8 to 24 bytes on sm_100
    clamp, both = "interleaved clamp(7,1.702)", [row, column]
    return [
        Specimen("forward row I=768", forward(768, 128, "silu", [row], []), has),
        Specimen("forward both I=768", forward(768, 128, "silu", both, []), has),
        Specimen("forward both, h I=2048", forward(2048, 256, "silu", both, [row]), has),
        Specimen("forward mx I=768", forward(768, 128, "silu", [mx, "e5m2 32x1 e8m0/rceil"], []), has),
        Specimen("forward fp32 I=768", forward(768, 128, "silu", both, [], torch.float32), has),
        Specimen("forward clamp, h I=2880", forward(2880, 32, clamp, both, [row]), has),
        Specimen("forward odd I=1040", forward(1040, 60, "silu", both, []), has),
        *(Specimen(f"{name} by columns", call, turned, lacks=("STG.U8",), targets=targets) for name, call, targets in (
            ("forward both I=768", forward(768, 128, "silu", both, [], align=16), every),
            ("forward both, h I=2048", forward(2048, 256, "silu", both, [row], align=16), every),
            ("forward clamp, h I=2880", forward(2880, 32, clamp, both, [row], align=16), every),
            ("backward both, act I=768", backward(768, 128, "silu", both, [column], False, align=16), hopper),
            ("backward of codes, act I=2048", backward(2048, 256, "silu", both, [column], True, align=16), hopper),
            ("backward clamp I=2880", backward(2880, 32, clamp, both, [column], False, align=16), every),
        )),
        Specimen("forward mx by columns I=768", forward(768, 128, "silu", [mx, mx_column], [], align=32), turned),
        Specimen(
            "backward mx by columns I=768",
            backward(768, 128, "silu", [mx, mx_column], [], False, align=32),
            turned,
            targets=hopper,
        ),
        Specimen("backward both I=768", backward(768, 128, "silu", both, [], False), has),
        Specimen("backward both, act I=2048", backward(2048, 256, "silu", both, [column], False), has),
        Specimen("backward of codes, act I=2048", backward(2048, 256, "silu", both, [column], True), has),
        Specimen("backward clamp I=2880", backward(2880, 32, clamp, both, [column], False), has, targets=hopper),
        Specimen("backward fp32 I=768", backward(768, 128, "silu", both, [column], False, torch.float32), has),
        Specimen(
            "backward fp32 by columns I=768",
            backward(768, 128, "silu", both, [], False, torch.float32, align=16),
            turned,
        ),
        Specimen("backward plain relu2 I=1536", backward(1536, 128, "plain relu2", both, [column], False), has[:2]),
    ]  # fmt: skip
