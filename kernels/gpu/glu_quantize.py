"""`glu_quantize` and `glu_backward_quantize`: the activation and its casts in one reading of the pre-activations.

A program takes a tile of 128 rows of one expert and 128 columns of the activation, and writes codes in blocks within
rows and within columns from the same registers; the values themselves are never stored. Bytes with bf16 operands and
both orientations, without scales (1/32 byte per code): forward (4 + 2) S I, and 2 S I more for codes of h; backward
(6 + 4) S I, 2 S I less if h comes as codes, and 2 S I more for the activation's codes.

512 threads share a tile, 32 elements each: the largest magnitudes need all of it at once, and 256 threads would spill.
Widths that 16 does not divide are moved element by element, correctly and slowly. The gradient of a row weight is
summed over 128 columns by each program, and over programs by `_sum_chunks`, both in a fixed order: no atomics. Bound by
memory; the speed on a device is not yet measured. With h as codes, dh and the activation's codes by columns are two
launches: one program of both spills.
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
    store_row_scales,
    find_tile,
    first_scale_row,
    least_scales,
    outputs,
    tiles,
)
from .codec import as_bytes, decode8, scale_value
from .launch import cdiv, launch
from .sass import Specimen
from .tiles import interleaved, segments

Tensor = torch.Tensor


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
    BLOCKS: tl.constexpr = codes.shape[1] // CAST.block
    at = column // CAST.block + tl.arange(0, BLOCKS)
    mask = wanted[:, None] & (at * CAST.block < N)[None, :]
    per_row = (N + CAST.block - 1) // CAST.block
    s = tl.load(scales + row[:, None] * per_row + at[None, :], mask=mask, other=0)
    s = scale_value(s.to(tl.int32)) if CAST.bytes else s
    blocks = tl.reshape(decode8(codes, ELEM), (codes.shape[0], BLOCKS, CAST.block)) * s[:, :, None]
    return tl.reshape(blocks, codes.shape).to(DTYPE)


@triton.jit
def _load(
    h, h_scales, w, row, rows, column, I, COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr, LAYOUT: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """Of those of the rows `row` that are below `rows`, in fp32: gate and up [.., COLUMNS], numbers of DTYPE, also
    where h is codes, and weights [.., 1], 1 without. Up is None when plain."""
    wanted = row < rows
    gate, up = load_pair(h, row, wanted, column, I, COLUMNS, LAYOUT)
    if CAST is not None:
        tl.static_assert(LAYOUT != "interleaved")
        N = I if LAYOUT == "plain" else 2 * I
        gate = _decoded(gate, h_scales, row, wanted, column, N, DTYPE, CAST)
        up = gate if LAYOUT == "plain" else _decoded(up, h_scales, row, wanted, I + column, N, DTYPE, CAST)
    weight = 1.0 if w is None else tl.load(w + row, mask=wanted, other=0).to(tl.float32)[:, None]
    return gate.to(tl.float32), None if LAYOUT == "plain" else up.to(tl.float32), weight


@triton.jit
def _part(
    da, h, h_scales, w, codes, first, row, inside, rows, live, column, I, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, H: tl.constexpr,
    VALUE: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Of the rows `row` of a tile, the first of which is `first`: VALUE ("h", "a", "dh"), one or two tensors in DTYPE,
    sums over the columns for the gradient of the weights, and fields of the scales of codes within rows, which are
    stored below `inside`. Zero from `rows` on."""
    gate, up, weight = _load(h, h_scales, w, row, rows, column, I, COLUMNS, DTYPE, LAYOUT, H)
    PAIR: tl.constexpr = VALUE != "a" and LAYOUT != "plain"
    sums = tl.zeros((row.shape[0], 1), tl.float32)
    if VALUE == "h":
        x, y = gate, up if PAIR else gate
    elif VALUE == "a":
        x = glu_value(gate, up, ACT, LIMIT, ALPHA)
        x = x if w is None else x * weight
        y = x
    else:
        d, _ = load_pair(da, row, row < rows, column, I, COLUMNS, "plain")
        d = d.to(tl.float32)
        sums = tl.sum(d * glu_value(gate, up, ACT, LIMIT, ALPHA), 1, keep_dims=True)
        x, y = glu_gradients(d if w is None else d * weight, gate, up, ACT, LIMIT, ALPHA)
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
def _unpacked(bytes):
    return interleaved(bytes & 255, bytes >> 8 & 255, bytes >> 16 & 255, bytes >> 24 & 255)


@triton.jit
def _tile(
    da, h, h_scales, w, chunks, row_codes, row_scales, column_codes, column_scales, first, end, live, scale_row, column, S, I,
    R: tl.constexpr, DTYPE: tl.constexpr,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, H: tl.constexpr,
    VALUE: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    rows = tl.where(live, end - first, 0)
    if R == TILE:
        row = 4 * tl.arange(0, R // 4)
        x0, y0, xf0, yf0, s0 = _part(
            da, h, h_scales, w, row_codes, first, row, end - first, rows, live, column, I, TILE, DTYPE,
            ACT, LAYOUT, LIMIT, ALPHA, H, VALUE, ROW,
        )
        x1, y1, xf1, yf1, s1 = _part(
            da, h, h_scales, w, row_codes, first, row + 1, end - first, rows, live, column, I, TILE, DTYPE,
            ACT, LAYOUT, LIMIT, ALPHA, H, VALUE, ROW,
        )
        x2, y2, xf2, yf2, s2 = _part(
            da, h, h_scales, w, row_codes, first, row + 2, end - first, rows, live, column, I, TILE, DTYPE,
            ACT, LAYOUT, LIMIT, ALPHA, H, VALUE, ROW,
        )
        x3, y3, xf3, yf3, s3 = _part(
            da, h, h_scales, w, row_codes, first, row + 3, end - first, rows, live, column, I, TILE, DTYPE,
            ACT, LAYOUT, LIMIT, ALPHA, H, VALUE, ROW,
        )
        x, y, sums = interleaved(x0, x1, x2, x3), interleaved(y0, y1, y2, y3), interleaved(s0, s1, s2, s3)
        x_field, y_field = _unpacked(xf0 | xf1 << 8 | xf2 << 16 | xf3 << 24), _unpacked(yf0 | yf1 << 8 | yf2 << 16 | yf3 << 24)
    else:
        x, y, x_field, y_field, sums = _part(
            da, h, h_scales, w, row_codes, first, tl.arange(0, R), end - first, rows, live, column, I, TILE, DTYPE,
            ACT, LAYOUT, LIMIT, ALPHA, H, VALUE, ROW,
        )
    if chunks is not None:
        row = tl.arange(0, R)
        tl.store(chunks + row, tl.reshape(sums, (R,)), mask=row < rows)
    PAIR: tl.constexpr = VALUE != "a" and LAYOUT != "plain"
    PAIRS: tl.constexpr = VALUE != "a" and LAYOUT == "interleaved"
    N = 2 * I if PAIR else I
    if PAIRS:
        column, end_column = 2 * column, 2 * I
    else:
        end_column = I
    if ROW is not None:
        store_row_scales(x_field, row_scales, first, end - first, column, end_column, N, ROW)
        if PAIR and not PAIRS:
            store_row_scales(y_field, row_scales, first, end - first, I + column, 2 * I, N, ROW)
    if COLUMN is not None:
        cast_columns(
            x, y if PAIRS else None, column_codes, column_scales,
            first, end, live, column, end_column, S, N, scale_row, COLUMN,
        )  # fmt: skip
        if PAIR and not PAIRS:
            cast_columns(
                y, None, column_codes, column_scales, first, end, live, I + column, 2 * I, S, N, scale_row, COLUMN
            )


@triton.jit
def _glu_quantize(
    h, w, offsets,
    a_row_codes, a_row_scales, a_column_codes, a_column_scales,
    h_row_codes, h_row_scales, h_column_codes, h_column_scales,
    S, I, E,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    A_ROW: tl.constexpr, A_COLUMN: tl.constexpr, H_ROW: tl.constexpr, H_COLUMN: tl.constexpr, SEGMENTS: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = h.dtype.element_ty
    across = (I + TILE - 1) // TILE
    t, column = tl.program_id(0) // across, tl.program_id(0) % across * TILE
    first, end, live, segment, k = find_tile(t, offsets, S, E, SEGMENTS)
    _unused_scales(a_column_scales, offsets, t, S, column, I, E, "plain", SEGMENTS, A_COLUMN)
    _unused_scales(h_column_scales, offsets, t, S, column, I, E, LAYOUT, SEGMENTS, H_COLUMN)
    if first >= end:
        return
    a_at = first_scale_row(offsets, segment, k, E, SEGMENTS, A_COLUMN)
    h_at = first_scale_row(offsets, segment, k, E, SEGMENTS, H_COLUMN)
    h += first.to(tl.int64) * (I if LAYOUT == "plain" else 2 * I)
    if w is not None:
        w += first
    for _ in range(0, TILE, R):
        if H_ROW is not None or H_COLUMN is not None:
            _tile(
                None, h, None, None, None, h_row_codes, h_row_scales, h_column_codes, h_column_scales,
                first, end, live, h_at, column, S, I,
                R, DTYPE, ACT, LAYOUT, LIMIT, ALPHA, None, "h", H_ROW, H_COLUMN,
            )  # fmt: skip
        if A_ROW is not None or A_COLUMN is not None:
            _tile(
                None, h, None, w, None, a_row_codes, a_row_scales, a_column_codes, a_column_scales,
                first, end, live, a_at, column, S, I,
                R, DTYPE, ACT, LAYOUT, LIMIT, ALPHA, None, "a", A_ROW, A_COLUMN,
            )  # fmt: skip
        first += R
        h += R * (I if LAYOUT == "plain" else 2 * I)
        if w is not None:
            w += R


@triton.jit
def _sums_of_nobody(
    da, h, sums, rows, column, I,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Rows of nobody have a gradient of their weight, as in the wide op; their codes read as zero."""
    row = tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    if H is None:
        for at in range(column, tl.minimum(column + TILE, I), 8):
            gate, up, _ = _load(h, None, None, row, rows, at, I, 8, None, LAYOUT, None)
            d, _ = load_pair(da, row, row < rows, at, I, 8, "plain")
            total += tl.sum(d.to(tl.float32) * glu_value(gate, up, ACT, LIMIT, ALPHA), 1)
    tl.store(sums + row, total, mask=row < rows)


@triton.jit
def _glu_backward_quantize(
    da, h, h_scales, w, offsets, chunks,
    d_row_codes, d_row_scales, d_column_codes, d_column_scales,
    a_row_codes, a_row_scales, a_column_codes, a_column_scales,
    S, I, E,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, H: tl.constexpr,
    D_ROW: tl.constexpr, D_COLUMN: tl.constexpr, A_ROW: tl.constexpr, A_COLUMN: tl.constexpr, SEGMENTS: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = da.dtype.element_ty
    across = (I + TILE - 1) // TILE
    t, chunk = tl.program_id(0) // across, tl.program_id(0) % across
    column = chunk * TILE
    first, end, live, segment, k = find_tile(t, offsets, S, E, SEGMENTS)
    _unused_scales(d_column_scales, offsets, t, S, column, I, E, LAYOUT, SEGMENTS, D_COLUMN)
    _unused_scales(a_column_scales, offsets, t, S, column, I, E, "plain", SEGMENTS, A_COLUMN)
    if first >= end:
        return
    start, N = first.to(tl.int64), I if LAYOUT == "plain" else 2 * I
    da += start * I
    h += start * N
    if H is not None:
        h_scales += start * ((N + H.block - 1) // H.block)
    if w is not None:
        w += start
    if chunks is not None:
        chunks += chunk.to(tl.int64) * S + first
        if offsets is not None:  # noqa: SIM102  the one is known to the compiler, the other on the device
            if not live:
                _sums_of_nobody(da, h, chunks, end - first, column, I, ACT, LAYOUT, LIMIT, ALPHA, H)
    a_at = first_scale_row(offsets, segment, k, E, SEGMENTS, A_COLUMN)
    d_at = first_scale_row(offsets, segment, k, E, SEGMENTS, D_COLUMN)
    for _ in range(0, TILE, R):
        if A_ROW is not None or A_COLUMN is not None:
            _tile(
                None, h, h_scales, w, None, a_row_codes, a_row_scales, a_column_codes, a_column_scales,
                first, end, live, a_at, column, S, I,
                R, DTYPE, ACT, LAYOUT, LIMIT, ALPHA, H, "a", A_ROW, A_COLUMN,
            )  # fmt: skip
            tl.debug_barrier()
        _tile(
            da, h, h_scales, w, chunks, d_row_codes, d_row_scales, d_column_codes, d_column_scales,
            first, end, live, d_at, column, S, I,
            R, DTYPE, ACT, LAYOUT, LIMIT, ALPHA, H, "dh", D_ROW, D_COLUMN,
        )  # fmt: skip
        if chunks is not None:
            chunks += R
        first += R
        da += R * I
        h += R * N
        if H is not None:
            h_scales += R * ((N + H.block - 1) // H.block)
        if w is not None:
            w += R


@triton.jit
def _sum_chunks(chunks, dw, S, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(n):
        total += tl.load(chunks + row, mask=row < S, other=0)
        chunks += S
    tl.store(dw + row, total.to(dw.dtype.element_ty), mask=row < S)


def _options(layout: str, *written: Outputs) -> dict[str, Any]:
    """How a tile is read (`_pair`), and Triton's options. Four rows of a column in a thread take registers that pairs
    that alternate do not leave."""
    columns = [o.columns[2] for o in written if o.columns[2] is not None]
    import os
    X = eval(os.environ.get("X", "{}"))
    if not columns:
        return {"R": 16, "num_warps": 4, **X}
    return {"R": ROWS, "num_warps": 16, **X}


def glu_quantize(
    h: Tensor, w: Tensor | None, offsets: Tensor | None, kind: str, specs: Sequence[str], h_specs: Sequence[str],
    align: int = 1,
) -> list[Tensor]:  # fmt: skip
    """`moefx.glu_quantize`: h [S, 2I] (I when plain) in fp32, bf16 or fp16, w [S] or None, offsets int [E+1] or None ->
    codes and scales of the activation [S, I] for each of `specs`, then of h for each of `h_specs`.
    """
    c = constants(kind)
    S, width = h.shape
    I = width if c["LAYOUT"] == "plain" else width // 2
    a, own = outputs(h, (S, I), specs, offsets, align), outputs(h, (S, width), h_specs, offsets, align)
    E = 0 if offsets is None else offsets.shape[0] - 1
    w = None if w is None else w.contiguous()
    launch(
        _glu_quantize, (tiles(S, offsets) * cdiv(I, ROWS),), h.contiguous(), w, offsets,
        *a.rows[:2], *a.columns[:2], *own.rows[:2], *own.columns[:2],
        S, I, E, **c,
        A_ROW=a.rows[2], A_COLUMN=a.columns[2], H_ROW=own.rows[2], H_COLUMN=own.columns[2],
        SEGMENTS=segments(offsets), **_options(c["LAYOUT"], a, own), **EXACT,
    )  # fmt: skip
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
    chunks = None if w is None else da.new_empty((n, S), dtype=torch.float32)
    absent = Outputs([], (None, None, None), (None, None, None))
    apart = h_scales is not None and a.columns[2] is not None and a.columns[2].columns  # together, they spill
    for of_h, of_a, sums in ((absent, a, chunks), (d, absent, None)) if apart else ((d, a, chunks),):
        launch(
            _glu_backward_quantize, (tiles(S, offsets) * n,), da.contiguous(), as_bytes(h.contiguous()),
            None if h_scales is None else as_bytes(h_scales.contiguous()), None if w is None else w.contiguous(),
            offsets, sums, *of_h.rows[:2], *of_h.columns[:2], *of_a.rows[:2], *of_a.columns[:2],
            S, I, E, **c,
            H=None if h_scales is None else Cast.of(h_spec),
            D_ROW=of_h.rows[2], D_COLUMN=of_h.columns[2], A_ROW=of_a.rows[2], A_COLUMN=of_a.columns[2],
            SEGMENTS=segments(offsets),
            **_options(c["LAYOUT"], of_h, of_a), **EXACT,
        )  # fmt: skip
    if w is not None:
        launch(_sum_chunks, (cdiv(S, 256),), chunks, dw, S, n, BLOCK=256, num_warps=4)
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
    every, hopper = ("sm_90", "sm_100"), ("sm_90",)  # on sm_100 the backward of gated kinds spills 24 to 72 bytes
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
            ("backward clamp I=2880", backward(2880, 32, clamp, both, [column], False, align=16), hopper),
        )),
        Specimen("forward mx by columns I=768", forward(768, 128, "silu", [mx, mx_column], [], align=32), turned),
        Specimen("backward both I=768", backward(768, 128, "silu", both, [], False), has, targets=hopper),
        Specimen("backward both, act I=2048", backward(2048, 256, "silu", both, [column], False), has, targets=hopper),
        Specimen(
            "backward of codes, act I=2048", backward(2048, 256, "silu", both, [column], True), has, targets=hopper
        ),
        Specimen("backward clamp I=2880", backward(2880, 32, clamp, both, [column], False), has, targets=hopper),
        Specimen(
            "backward fp32 I=768", backward(768, 128, "silu", both, [column], False, torch.float32), has, targets=hopper
        ),
        Specimen("backward plain relu2 I=1536", backward(1536, 128, "plain relu2", both, [column], False), has[:2]),
    ]  # fmt: skip
