"""The dispatch plan: a stable counting sort of expert indices by two launches, without atomics on global memory.

The T*k pairs are cut into as many stretches as there are multiprocessors, one for each program. `_count` writes how
often each expert occurs in each stretch, int32 [programs, E]. `_place` adds up that table, which gives each program the
first row of every expert and where its own stretch begins within, then sorts its pairs chunk by chunk and writes them
to consecutive rows. Nobody waits for the host, and rows get -1 only where they hold no pair.

A chunk is sorted as integers, expert * CHUNK + place in the chunk: all differ, so that any sort of them is stable, and
a pair's rank within its expert is its position minus the first position of that expert.

Bytes: the indices twice, 24 for each pair (slot, order and token), and the table once for each program, mostly out of
the L2 cache. For 65536 pairs these are 3 MB: what counts is latency, hence two launches, where a scan of its own
would be a third. Not yet measured.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch, processors
from .sass import TARGETS, Specimen

Tensor = torch.Tensor
CHUNK = 512  # pairs sorted at a time: 4 for each thread, so that most steps of the sort stay within a warp
TABLE = 4096  # entries of the table added up at a time, 32 for each thread


@triton.jit
def _buckets(idx, at, pairs, E):
    """The experts of pairs `at`, and whether each is one."""
    value = tl.load(idx + at, mask=at < pairs, other=-1)
    kept = (value >= 0) & (value < E)  # before narrowing: an int64 may be anything
    return tl.where(kept, value, 0).to(tl.int32), kept


@triton.jit
def _count(idx, counts, pairs, stretch, E, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    e = tl.arange(0, EXPERTS)
    first = tl.program_id(0) * stretch
    found = tl.zeros([EXPERTS], tl.int32)
    for chunk in range(first, first + stretch, CHUNK):
        bucket, kept = _buckets(idx, chunk + tl.arange(0, CHUNK), pairs, E)
        found += tl.histogram(bucket, EXPERTS, mask=kept)
    tl.store(counts + tl.program_id(0) * E + e, found, mask=e < E)


@triton.jit
def _place(
    idx, counts, token, order, slot, offsets, pairs, stretch, S, k, E, align,
    EXPERTS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pid, programs = tl.program_id(0), tl.num_programs(0)
    e = tl.arange(0, EXPERTS)
    total, before = tl.zeros([EXPERTS], tl.int32), tl.zeros([EXPERTS], tl.int32)
    for top in range(0, programs, ROWS):
        p = top + tl.arange(0, ROWS)[:, None]
        table = tl.load(counts + p * E + e[None, :], mask=(p < programs) & (e[None, :] < E), other=0)
        total += tl.sum(table, 0)
        before += tl.sum(tl.where(p < pid, table, 0), 0)
    padded = (total + align - 1) // align * align
    ends = tl.cumsum(padded, 0)
    start, end = ends - padded, tl.sum(padded, 0)
    tl.store(offsets + 1 + e, ends, mask=(pid == 0) & (e < E))
    tl.store(offsets, 0, mask=pid == 0)

    # Rows that hold nothing: the padding of each expert, one row of every expert at a time, and the tail.
    for j in range(pid, align - 1, programs):
        row = start + total + j
        tl.store(token + row, tl.full([EXPERTS], -1, tl.int64), mask=row < ends)
        tl.store(order + row, tl.full([EXPERTS], -1, tl.int64), mask=row < ends)
    for top in range(end + pid * CHUNK, S, programs * CHUNK):
        row = top + tl.arange(0, CHUNK)
        tl.store(token + row, tl.full([CHUNK], -1, tl.int64), mask=row < S)
        tl.store(order + row, tl.full([CHUNK], -1, tl.int64), mask=row < S)

    position = tl.arange(0, CHUNK)
    row_of = start + before  # the next row of each expert
    first = pid * stretch
    for chunk in range(first, first + stretch, CHUNK):
        bucket, kept = _buckets(idx, chunk + position, pairs, E)
        found = tl.histogram(bucket, EXPERTS, mask=kept)
        key = tl.sort(tl.where(kept, bucket, EXPERTS) * CHUNK + position)
        bucket, pair = key // CHUNK, chunk + key % CHUNK
        kept = bucket < EXPERTS
        to_row = row_of - (tl.cumsum(found, 0) - found)
        row = position + tl.gather(to_row, tl.where(kept, bucket, 0), 0)
        tl.store(order + row, pair.to(tl.int64), mask=kept)
        tl.store(token + row, (pair // k).to(tl.int64), mask=kept)
        tl.store(slot + pair, tl.where(kept, row, -1).to(tl.int64), mask=pair < pairs)
        row_of += found


def plan(idx_Tk: Tensor, E: int, align: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row maps and offsets; see `moefx.dialect.routing`. Fewer than 2^31 rows, and E from 1 to 2048."""
    pairs, k, device = idx_Tk.numel(), max(idx_Tk.shape[-1], 1), idx_Tk.device
    S = (pairs + E * (align - 1)) // align * align
    token, order = (torch.empty(S, dtype=torch.int64, device=device) for _ in range(2))
    slot = torch.empty(idx_Tk.shape, dtype=torch.int64, device=device)
    offsets = torch.empty(E + 1, dtype=torch.int32, device=device)

    chunks = cdiv(pairs, CHUNK)
    stretch = cdiv(chunks, processors(device)) * CHUNK
    programs = cdiv(pairs, stretch) if pairs else 1  # of no pairs, one program writes what there is
    counts = torch.empty(programs, E, dtype=torch.int32, device=device)
    experts = max(triton.next_power_of_2(E), 64)
    idx = idx_Tk.contiguous()
    # Vectors over experts are what registers go to: eight warps halve what a thread holds of them.
    sizes = {"EXPERTS": experts, "CHUNK": CHUNK, "num_warps": 4 if experts <= 512 else 8}
    launch(_count, (programs,), idx, counts, pairs, stretch, E, **sizes)
    maps = (token, order, slot, offsets)
    launch(
        _place, (programs,), idx, counts, *maps, pairs, stretch, S, k, E, align, ROWS=max(TABLE // experts, 1), **sizes
    )
    return token, order, slot, offsets


def gather_weights(w_Tk: Tensor, order_S: Tensor) -> Tensor:
    """The weight of each row; zero where the row holds no pair."""
    w_S = w_Tk.new_empty(order_S.shape)
    S = order_S.numel()
    launch(_gather, (cdiv(S, 1024),), w_Tk.contiguous(), order_S.contiguous(), w_S, S, BLOCK=1024, num_warps=4)
    return w_S


@triton.jit
def _gather(w, order, out, S, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(order + row, mask=row < S, other=-1)
    tl.store(out + row, tl.load(w + pair, mask=pair >= 0, other=0), mask=row < S)


def scatter_weights(dw_S: Tensor, order_S: Tensor, T: int, k: int) -> Tensor:
    """The weight of each pair; zero where no row holds the pair."""
    dw_Tk = dw_S.new_zeros(T, k)
    S = order_S.numel()
    launch(_scatter, (cdiv(S, 1024),), dw_S.contiguous(), order_S.contiguous(), dw_Tk, S, BLOCK=1024, num_warps=4)
    return dw_Tk


@triton.jit
def _scatter(dw, order, out, S, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(order + row, mask=row < S, other=-1)
    tl.store(out + pair, tl.load(dw + row, mask=pair >= 0), mask=pair >= 0)


def specimens() -> list[Specimen]:
    """Plans of Qwen3-30B-A3B and DeepSeek-V3, a large one, and the weights that move along one."""

    def sorts(T: int, k: int, E: int, align: int, dtype: torch.dtype, registers: int) -> Specimen:
        call = partial(plan, torch.empty(T, k, dtype=dtype, device="meta"), E, align)
        return Specimen(f"T={T} k={k} E={E} align={align}", call, registers=registers, targets=tuple(TARGETS))

    w, order = torch.empty(8192, 8, device="meta"), torch.empty(65536, dtype=torch.int64, device="meta")
    return [
        sorts(8192, 8, 128, 1, torch.int64, 144),
        sorts(8192, 8, 256, 16, torch.int32, 144),
        sorts(32767, 10, 512, 128, torch.int64, 144),
        sorts(8192, 6, 2048, 1, torch.int64, 232),
        Specimen("gather_weights", partial(gather_weights, w, order), registers=48),
        Specimen("scatter_weights", partial(scatter_weights, order.float(), order, 8192, 8), registers=48),
    ]
