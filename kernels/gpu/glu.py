"""`glu` and its gradients: elementwise, bound by memory, computed in fp32 and rounded once.

Bytes of b-byte elements: forward b (2 + 1) S I, backward b (3 + 2) S I, with the activation again b (3 + 3) S I; each
element is moved once. Tiles are a few rows of up to 512 columns, 2048 elements: each of 128 threads has two 16-byte
loads of every 16-bit operand in flight; where the activation is written, too, 1024, which take at most 72 registers.
The backward walks along its rows: the gradient of a row weight is one sum over the row in a fixed order, without
atomics or a second kernel, and S = 65536 rows are still thousands of programs.

The speed on a device is not yet measured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from .activation import EXACT, constants, glu_gradients, glu_value, load_pair, store_pair
from .launch import cdiv, launch
from .sass import Specimen

Tensor = torch.Tensor


@triton.jit
def _glu(
    h, w, a, S, I,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS
    inside = row < S
    gate, up = load_pair(h, row, inside, column, I, COLUMNS, LAYOUT)
    value = glu_value(gate.to(tl.float32), None if LAYOUT == "plain" else up.to(tl.float32), ACT, LIMIT, ALPHA)
    if w is not None:
        value *= tl.load(w + row, mask=inside, other=0).to(tl.float32)[:, None]
    store_pair(a, value.to(a.dtype.element_ty), None, row, inside, column, I, "plain")


@triton.jit
def _glu_backward(
    da, h, w, dh, dw, again, S, I,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < S
    terms = tl.zeros((ROWS, COLUMNS), tl.float32)
    if w is not None:
        weight = tl.load(w + row, mask=inside, other=0).to(tl.float32)[:, None]
    for column in range(0, I, COLUMNS):
        d, _ = load_pair(da, row, inside, column, I, COLUMNS, "plain")
        gate, up = load_pair(h, row, inside, column, I, COLUMNS, LAYOUT)
        d, gate = d.to(tl.float32), gate.to(tl.float32)
        up = None if LAYOUT == "plain" else up.to(tl.float32)
        if w is not None or again is not None:
            value = glu_value(gate, up, ACT, LIMIT, ALPHA)
            if w is not None:
                terms += d * value
                value *= weight
                d *= weight
            if again is not None:
                store_pair(again, value.to(again.dtype.element_ty), None, row, inside, column, I, "plain")
        dgate, dup = glu_gradients(d, gate, up, ACT, LIMIT, ALPHA)
        store_pair(dh, dgate.to(dh.dtype.element_ty), dup.to(dh.dtype.element_ty), row, inside, column, I, LAYOUT)
    if w is not None:
        tl.store(dw + row, tl.sum(terms, 1).to(dw.dtype.element_ty), mask=inside)


def _tile(I: int, elements: int = 2048) -> dict[str, int]:
    """Columns that divide I where 512, 256 or 128 do; a narrow matrix gets more rows instead."""
    columns = next((c for c in (512, 256) if I % c == 0), 128)
    columns = min(columns, max(16, triton.next_power_of_2(I)))
    return {"ROWS": elements // columns, "COLUMNS": columns, "num_warps": 4}


def _rows(h: Tensor, I: int) -> int:
    return h.numel() // h.shape[-1] if I else 0


def _width(h: Tensor, kind: str) -> int:
    return h.shape[-1] if constants(kind)["LAYOUT"] == "plain" else h.shape[-1] // 2


def glu(h: Tensor, w: Tensor | None, kind: str) -> Tensor:
    """`moefx.glu`: h [..., 2I] (I when plain) in fp32, bf16 or fp16, w [S] or None -> [..., I] of h's dtype."""
    I = _width(h, kind)
    a = h.new_empty(*h.shape[:-1], I)
    tile, S = _tile(I), _rows(h, I)
    grid = cdiv(S, tile["ROWS"]), cdiv(I, tile["COLUMNS"])
    w = None if w is None else w.contiguous()
    launch(_glu, grid, h.contiguous(), w, a, S, I, **constants(kind), **tile, **EXACT)
    return a


def glu_backward(da: Tensor, h: Tensor, w: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """`moefx.glu_backward`: da [..., I], h, w as for `glu` -> dh like h, dw like w (empty without weights)."""
    return _backward(da, h, w, kind, None)


def glu_backward_again(da: Tensor, h: Tensor, w: Tensor | None, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """`moefx.glu_backward_again`: dh and dw as of `glu_backward`, and what `glu` returns."""
    again = h.new_empty(*h.shape[:-1], _width(h, kind))
    return *_backward(da, h, w, kind, again), again


def _backward(da: Tensor, h: Tensor, w: Tensor | None, kind: str, again: Tensor | None) -> tuple[Tensor, Tensor]:
    I = _width(h, kind)
    dh = h.new_empty(h.shape)
    dw = da.new_empty(0) if w is None else w.new_empty(w.shape)
    tile, S = _tile(I, 2048 if again is None else 1024), _rows(h, I)
    if I == 0:
        return dh, dw.zero_()
    w = None if w is None else w.contiguous()
    args = da.contiguous(), h.contiguous(), w, dh, dw, again, S, I
    launch(_glu_backward, (cdiv(S, tile["ROWS"]),), *args, **constants(kind), **tile, **EXACT)
    return dh, dw


def specimens() -> list[Specimen]:
    """Qwen3-30B-A3B (S = 65536, I = 768), DeepSeek-V3 (I = 2048) and an odd width."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def forward(I: int, kind: str, dtype: torch.dtype = torch.bfloat16) -> Callable[[], Any]:
        wide = I if kind.startswith("plain") else 2 * I
        return lambda: glu(empty(65536, wide, dtype=dtype), empty(65536, dtype=torch.float32), kind)

    def backward(I: int, kind: str, dtype: torch.dtype = torch.bfloat16, fn: Any = glu_backward) -> Callable[[], Any]:
        wide = I if kind.startswith("plain") else 2 * I
        da, h, w = empty(65536, I, dtype=dtype), empty(65536, wide, dtype=dtype), empty(65536, dtype=torch.float32)
        return lambda: fn(da, h, w, kind)

    made = []
    vector, exp = ("LDG.E.128", "STG.E.128"), ("MUFU.EX2",)
    again = functools.partial(backward, fn=glu_backward_again)
    for name, call, registers in (("forward", forward, 64), ("backward", backward, 96), ("again", again, 80)):
        made += [
            Specimen(f"{name} silu bf16 I=768", call(768, "silu"), (*vector, *exp), registers=registers),
            Specimen(f"{name} silu bf16 I=2048", call(2048, "silu"), (*vector, *exp), registers=registers),
            Specimen(f"{name} silu fp32 I=768", call(768, "silu", torch.float32), (*vector, *exp), registers=160),
            Specimen(f"{name} gelu bf16 I=768", call(768, "gelu"), vector, registers=registers),
            Specimen(f"{name} gelu_tanh fp16 I=768", call(768, "gelu_tanh", torch.float16), (*vector, *exp)),
            Specimen(f"{name} interleaved clamp I=2880", call(2880, "interleaved clamp(7,1.702)"), (*vector, *exp)),
            Specimen(f"{name} plain relu2 I=1536", call(1536, "plain relu2"), vector, registers=registers),
            Specimen(f"{name} silu bf16 I=1001", call(1001, "silu"), exp),
        ]
    return made
