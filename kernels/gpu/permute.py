"""Rows of tokens to rows of experts: `permute` of numbers, `permute_scaled` of codes with their scales in one launch.

Nothing is computed, so rows move as the widest integers that divide them, 16 bytes a thread: one kernel serves every
dtype. A program reads a piece of a few tokens' rows once and writes it to the k rows that `slot` names, which is the
least there is: (T + S) H elements, where a gather by `token` would read S rows instead of T (1.8 times the bytes for
k = 8, less what the L2 cache keeps). It is a scatter of whole rows, so stores coalesce as well as loads. Other programs
look for rows without a token, whose number only the device knows, and write those.

So unlike the reference, which reads `token` alone, this reads `slot` for the rows that hold one: the two are inverse.
What is in flight: 8 KiB a program, 64 bytes a thread; at 32 to 48 registers, 80 KiB and more a multiprocessor. Not yet
measured.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch
from .plan import plan
from .sass import TARGETS, Specimen

Tensor = torch.Tensor
TILE = 8192  # bytes that a program moves k times
ROWS = 64  # rows that a program searches for those without a token
FEW = 512  # programs below which each takes fewer tokens, so that all multiprocessors have some
WORDS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}


@triton.jit
def _move(x, y, slot, t, T, block, K: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    """Words `block` of tokens `t` to their rows."""
    col = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    words = tl.load(x + t.to(tl.int64)[:, None] * W + col, mask=(t < T)[:, None] & (col < W))
    for j in range(K):
        row = tl.load(slot + t.to(tl.int64) * K + j, mask=t < T, other=-1)
        tl.store(y + row[:, None] * W + col, words, mask=(row >= 0)[:, None] & (col < W))


@triton.jit
def _fill(y, row, block, value, W: tl.constexpr, BLOCK: tl.constexpr):
    """Words `block` of one row."""
    col = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + row * W + col, tl.full([BLOCK], value, y.dtype.element_ty), mask=col < W)


@triton.jit
def _permute(
    x, y, scales, y_scales, token, slot, T, S, movers,
    K: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    SCALED: tl.constexpr, SW: tl.constexpr, SBLOCK: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (W + BLOCK - 1) // BLOCK
    all_blocks: tl.constexpr = blocks + ((SW + SBLOCK - 1) // SBLOCK if SCALED else 0)
    # Blocks of one row are neighbours, so that rows are read and written from end to end at about the same time.
    pid, block = tl.program_id(0) // all_blocks, tl.program_id(0) % all_blocks
    if pid < movers:
        t = pid * TOKENS + tl.arange(0, TOKENS)
        if block < blocks:
            _move(x, y, slot, t, T, block, K, W, BLOCK)
        elif SCALED:
            _move(scales, y_scales, slot, t, T, block - blocks, K, SW, SBLOCK)
    else:
        first = (pid - movers).to(tl.int64) * ROWS
        rows = first + tl.arange(0, ROWS)
        if tl.min(tl.load(token + rows, mask=rows < S, other=0), 0) < 0:
            for row in range(first, tl.minimum(first + ROWS, S)):
                if tl.load(token + row) < 0:
                    if block < blocks:
                        _fill(y, row, block, 0, W, BLOCK)
                    elif SCALED:
                        _fill(y_scales, row, block - blocks, LEAST, SW, SBLOCK)


def _words(*tensors: Tensor) -> list[Tensor]:
    """Rows as integers, of the most bytes that divide the rows and the addresses of all."""
    row = tensors[0].shape[1] * tensors[0].element_size()
    size = next(n for n in WORDS if row % n == 0 and all(t.data_ptr() % n == 0 for t in tensors))
    return [t.view(torch.uint8).view(WORDS[size]) for t in tensors]


def _launch(x: Tensor, y: Tensor, token: Tensor, slot: Tensor, scales: Tensor, y_scales: Tensor, scaled: bool) -> None:
    T, S = x.shape[0], token.shape[0]
    x, y = _words(x.contiguous(), y)
    least = 0 if scales.element_size() == 1 else 1 << 23  # of fp32 scales, 2^-126
    scales, y_scales = _words(scales.contiguous(), y_scales)
    W, SW, size = x.shape[1], scales.shape[1], x.element_size()
    block = min(TILE // size, triton.next_power_of_2(W))
    while block > 512 // size and cdiv(W, block) * block * 8 > W * 9:
        block //= 2  # so that at most an eighth of a row's threads lie behind its end
    tokens = TILE // size // block
    while tokens > 1 and cdiv(T, tokens) < FEW:
        tokens //= 2
    sblock, movers = min(256, triton.next_power_of_2(SW)), cdiv(T, tokens)
    blocks = cdiv(W, block) + (cdiv(SW, sblock) if scaled else 0)
    launch(
        _permute, ((movers + cdiv(S, ROWS)) * blocks,),
        x, y, scales, y_scales, token.contiguous(), slot.contiguous(), T, S, movers,
        K=slot.shape[1], W=W, BLOCK=block, TOKENS=tokens, ROWS=ROWS,
        SCALED=scaled, SW=SW, SBLOCK=sblock, LEAST=least, num_warps=4,
    )  # fmt: skip


def permute(x_TH: Tensor, token_S: Tensor, slot_Tk: Tensor) -> Tensor:
    """Rows of `x` by token; rows marked -1 hold no token and become zero."""
    y_SH = x_TH.new_empty(token_S.shape[0], x_TH.shape[1])
    _launch(x_TH, y_SH, token_S, slot_Tk, x_TH, y_SH, scaled=False)
    return y_SH


def permute_scaled(codes: Tensor, scales: Tensor, token_S: Tensor, slot_Tk: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of codes and scales by token; rows without a token hold code 0 and the least scale."""
    new_codes, new_scales = (t.new_empty(token_S.shape[0], t.shape[1]) for t in (codes, scales))
    _launch(codes, new_codes, token_S, slot_Tk, scales, new_scales, scaled=True)
    return new_codes, new_scales


def plan_permute(x_TH: Tensor, idx_Tk: Tensor, E: int, align: int = 1) -> tuple[Tensor, ...]:
    """The plan of `idx` and the rows that it puts in order."""
    token, order, slot, offsets = plan(idx_Tk, E, align)
    return permute(x_TH, token, slot), token, order, slot, offsets


def specimens() -> list[Specimen]:
    """Rows of Qwen3-30B-A3B and DeepSeek-V3 with eight experts a token, narrow rows and odd ones."""

    def maps(T: int) -> tuple[Tensor, Tensor]:
        token = torch.empty(T * 8, dtype=torch.int64, device="meta")
        return token, token.view(T, 8)

    def wide(T: int, H: int, dtype: torch.dtype, registers: int = 56) -> Specimen:
        call = partial(permute, torch.empty(T, H, dtype=dtype, device="meta"), *maps(T))
        has = ("LDG.128", "STG.128") if H % 8 == 0 else ()
        return Specimen(f"{str(dtype)[6:]} T={T} H={H}", call, has=has, registers=registers, targets=tuple(TARGETS))

    def scaled(T: int, H: int, dtype: torch.dtype, block: int) -> Specimen:
        codes = torch.empty(T, H, dtype=torch.float8_e4m3fn, device="meta")
        scales = torch.empty(T, H // block, dtype=dtype, device="meta")
        call = partial(permute_scaled, codes, scales, *maps(T))
        return Specimen(f"e4m3 1x{block} T={T} H={H}", call, has=("LDG.128", "STG.128"), registers=56)

    return [
        wide(8192, 2048, torch.bfloat16),
        wide(8192, 7168, torch.bfloat16),
        wide(8192, 2048, torch.float32),
        wide(8191, 136, torch.float16),
        wide(8191, 333, torch.bfloat16, registers=88),
        scaled(8192, 2048, torch.float32, 128),
        scaled(8192, 7168, torch.uint8, 32),
    ]
