"""Single ops for `benchmarks.gpu`: with which operands, how many bytes they move, and how many operations they are.

Bytes are those of models that read each operand and write each result once: bf16 two bytes, FP8 codes one and 1/32 for
their scales, row maps eight an entry. Shapes: FP8-Flow-MoE's (4096 tokens, H=7168, I=2048, 256 experts, top-8; arXiv
2511.02302), Qwen3-30B-A3B at 32768 tokens, and, for what moves rows alone, odd token counts. Codes of operands that
are summed over rows are written by columns (`align` 16), as training on CUDA has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from moefx.kernels import registry, symmetric

from . import peers
from .cases import DECISIVE, LAST, USUAL, Case, Found
from .operands import Operands

ops = torch.ops.moefx
ROW, COLUMN, TILE = (f"e4m3 {block} po2/rceil eps=1e-10" for block in ("1x128", "128x1", "128x128"))
MXFP4 = "e2m1 1x32 po2/floor"
# T, H, I, E, k
SHAPES = {"FP8-Flow": (4096, 7168, 2048, 256, 8), "Qwen3-30B T=32768": (32768, 2048, 768, 128, 8)}
ODD = {"T=4001": (4001, 576, 128, 72, 6), "T=8001": (8001, 7168, 128, 256, 8)}  # of TileKernels' grid
SMALL = {"small": (64, 256, 128, 8, 2)}
CODE = 1 + 1 / 32  # bytes of a code with its share of a scale


@dataclass
class Call:
    """`op(*args)`, the bytes and operations that it needs, and the GEMM rate that bounds it."""

    op: Callable[..., Any]
    args: tuple[Any, ...]
    bytes: float
    flop: float = 0
    rate: str = "bf16"


@dataclass(frozen=True)
class Op:
    """How an op is measured. Besides Triton's kernel runs `against`; `routings`: also under unequal ones."""

    make: Callable[[Operands], Call]
    align: int = 1
    decisive: bool = False
    against: str = "reference"
    routings: bool = False
    odd: bool = False  # also for `ODD`


def _moved(o: Operands, size: float) -> float:
    return size * (o.T + o.P) * o.H


def _unpermute(o: Operands) -> Call:
    return Call(ops.unpermute, (o.rows, o.token, o.order, o.slot, None), _moved(o, 2) + 8 * o.P)


def _unpermute_backward(o: Operands) -> Call:
    args = (o.rand(o.T, o.H), o.rows, o.token, o.order, o.slot, o.w_pairs)
    return Call(ops.unpermute_backward, args, _moved(o, 2) + 2 * o.P * o.H + 8 * o.P)


def _permute_scaled(o: Operands) -> Call:
    return Call(ops.permute_scaled, (*o.codes(o.x, ROW), o.token, o.slot), _moved(o, CODE))


def _glu_quantize(o: Any, offsets: Any, pairs: int, specs: list[str], I: int, align: int) -> Call:
    args = (o.h, o.w_rows, offsets, "silu", specs, [], align)
    return Call(ops.glu_quantize, args, (4 + CODE * len(specs)) * pairs * I)


def _glu_backward(o: Any, offsets: Any, pairs: int, specs: list[str], I: int, align: int) -> Call:
    args = (o.da, o.h, None, o.w_rows, offsets, "silu", "", specs, [], align)
    return Call(ops.glu_backward_quantize, args, (6 + 2 * CODE * len(specs)) * pairs * I)


def _transpose(rule: str, loose: bool = False) -> Callable[[Operands], Call]:
    def make(o: Operands) -> Call:
        codes = o.codes(o.like(o.P).rows if loose else o.rows, ROW)
        args = (*codes, None if loose else o.offsets, ROW, COLUMN, rule, o.align)
        return Call(ops.transpose_scaled, args, 2 * CODE * o.P * o.H)

    return make


def _up(o: Operands, *written: int) -> tuple[float, float]:
    """Bytes of x [T, H], of the up weights and of bf16 results of such widths; operations."""
    return 2 * (o.T * o.H + o.live * 2 * o.I * o.H + o.P * sum(written)), 4 * o.P * o.H * o.I


def _grouped_mm(o: Operands) -> Call:
    nbytes = 2 * (o.P * o.H + o.live * 2 * o.I * o.H + 2 * o.P * o.I)
    return Call(ops.grouped_mm, (o.rows, o.w1, o.offsets), nbytes, 4 * o.P * o.H * o.I)


def _wgrad_bytes(o: Operands, size: float, rows: int) -> float:
    return size * (rows * o.H + 2 * o.P * o.I) + 4 * o.E * o.I * o.H


def _scaled_mm(o: Operands, K: int, N: int, specs: tuple[str, ...] = ()) -> Call:
    x, w = o.codes(o.rows if K == o.H else o.h, ROW), o.codes(o.rand(o.E, N, K), TILE)
    nbytes = CODE * o.P * K + o.live * N * K + (2 + CODE * len(specs)) * o.P * N
    args = (*x, *w, o.offsets, ROW, TILE, torch.bfloat16)
    if specs:
        return Call(ops.scaled_grouped_mm_quantize, (*args, list(specs)), nbytes, 2 * o.P * K * N, "fp8")
    return Call(ops.scaled_grouped_mm, args, nbytes, 2 * o.P * K * N, "fp8")


def _scaled_wgrad(o: Operands) -> Call:
    a, b = (o.codes(t, COLUMN, by_expert=True) for t in (o.h, o.rows))
    args = (*a, *b, o.offsets, COLUMN, COLUMN, torch.bfloat16, o.align)
    return Call(ops.scaled_grouped_wgrad, args, _wgrad_bytes(o, CODE, o.P), 4 * o.P * o.H * o.I, "fp8")


def _topk_route(o: Operands) -> Call:
    return Call(ops.topk_route, (o.logits, None, o.k, "softmax", "scores", "sum"), 6 * o.T * o.E + 12 * o.P)


def _topk_route_groups(o: Operands) -> Call:
    """DeepSeek-V3's."""
    count, bias = min(8, o.E // 2), o.rand(o.E).float()
    rest = "sigmoid", "scores", "sum", 1e-20, 2.5, None, count, count // 2, "top2sum", -torch.inf
    return Call(ops.topk_route, (o.logits, bias, o.k, *rest), 6 * o.T * o.E + 4 * o.E + 12 * o.P)


def _topk_route_backward(o: Operands) -> Call:
    args = (o.w_pairs, None, o.logits, o.idx, "softmax", "sum")
    return Call(ops.topk_route_backward, args, 4 * o.T * o.E + 12 * o.P)


def _gram(o: Operands) -> Call:
    nbytes, flop = 2 * o.E * o.I * (o.H + o.I), o.E * o.I * (o.I + 1) * o.H  # each of two equal halves once
    return Call(symmetric.gram, (o.rand(o.E, o.I, o.H),), nbytes, flop)


def _quadratic(o: Operands) -> Call:
    a = o.rand(o.E, o.I, o.I)
    return Call(symmetric.quadratic, (a + a.mT, 0.5, 0.5), 4 * o.E * o.I**2, o.E * o.I**2 * (o.I + 1))


OPS: dict[str, Op] = {
    "permute": Op(
        lambda o: Call(ops.permute, (o.x, o.token, o.slot), _moved(o, 2)), decisive=True, routings=True, odd=True
    ),
    "unpermute": Op(_unpermute, decisive=True, routings=True, odd=True),
    "unpermute_backward": Op(_unpermute_backward, decisive=True, odd=True),
    "grouped_mm up": Op(_grouped_mm, decisive=True, against="torch_grouped", routings=True),
    "grouped_wgrad up": Op(
        lambda o: Call(
            ops.grouped_wgrad, (o.h, o.rows, o.offsets), _wgrad_bytes(o, 2, o.P), 4 * o.P * o.H * o.I
        ),
        decisive=True, against="torch_grouped", routings=True,
    ),
    "permute_grouped_mm_glu": Op(
        lambda o: Call(
            ops.permute_grouped_mm_glu, (o.x, o.token, o.slot, o.w1, o.offsets, o.w_rows, "silu"),
            *_up(o, 2 * o.I, o.I),
        ),
        decisive=True, against="torch_grouped", routings=True,
    ),
    "permute_grouped_mm": Op(
        lambda o: Call(ops.permute_grouped_mm, (o.x, o.token, o.slot, o.w1, o.offsets), *_up(o, 2 * o.I)),
        against="torch_grouped",
    ),
    "permute_grouped_wgrad": Op(
        lambda o: Call(
            ops.permute_grouped_wgrad, (o.h, o.x, o.token, o.slot, o.offsets), _wgrad_bytes(o, 2, o.T),
            4 * o.P * o.H * o.I,
        ),
        against="torch_grouped",
    ),
    "plan": Op(lambda o: Call(ops.plan, (o.idx, o.E, o.align), 32 * o.P), align=16, decisive=True, odd=True),
    "quantize T rows": Op(
        lambda o: Call(ops.quantize, (o.x, None, [ROW], 1), (2 + CODE) * o.T * o.H), align=16, decisive=True
    ),
    "permute_scaled": Op(_permute_scaled, align=16, decisive=True, routings=True),
    "glu_quantize row": Op(
        lambda o: _glu_quantize(o, o.offsets, o.P, [ROW], o.I, o.align), align=16, decisive=True
    ),
    "glu_quantize row+column": Op(
        lambda o: _glu_quantize(o, o.offsets, o.P, [ROW, COLUMN], o.I, o.align), align=16, decisive=True, routings=True
    ),
    "glu_quantize row without experts": Op(
        lambda o: _glu_quantize(o.like(o.P), None, o.P, [ROW], o.I, o.align), align=16, decisive=True
    ),
    "glu_backward_quantize row": Op(
        lambda o: _glu_backward(o, o.offsets, o.P, [ROW], o.I, o.align), align=16, decisive=True
    ),
    "glu_backward_quantize row+column": Op(
        lambda o: _glu_backward(o, o.offsets, o.P, [ROW, COLUMN], o.I, o.align), align=16, decisive=True
    ),
    "glu_backward_quantize row without experts": Op(
        lambda o: _glu_backward(o.like(o.P), None, o.P, [ROW], o.I, o.align), align=16, decisive=True
    ),
    "transpose_scaled tight": Op(_transpose("tight"), align=16, decisive=True, routings=True),
    "transpose_scaled tile_max": Op(_transpose("tile_max"), align=16, decisive=True),
    "transpose_scaled tight without experts": Op(_transpose("tight", loose=True), align=16, decisive=True),
    "scaled_grouped_mm up": Op(lambda o: _scaled_mm(o, o.H, 2 * o.I), align=16, decisive=True, routings=True),
    "scaled_grouped_mm dgrad": Op(lambda o: _scaled_mm(o, 2 * o.I, o.H), align=16, decisive=True),
    "scaled_grouped_wgrad up": Op(_scaled_wgrad, align=16, decisive=True, routings=True),
    "scaled_grouped_mm_quantize up": Op(lambda o: _scaled_mm(o, o.H, 2 * o.I, (ROW,)), align=16),
    "quantize row+column": Op(
        lambda o: Call(
            ops.quantize, (o.rows, o.offsets, [ROW, COLUMN], o.align), (2 + 2 * CODE) * o.P * o.H
        ),
        align=16,
    ),
    "dequantize": Op(
        lambda o: Call(
            ops.dequantize, (*o.codes(o.rows, ROW), None, ROW, torch.bfloat16), (2 + CODE) * o.P * o.H
        ),
        align=16,
    ),
    "convert to MXFP4": Op(
        lambda o: Call(
            ops.convert, (*o.codes(o.rows, ROW), o.offsets, ROW, MXFP4, o.align), (CODE + 5 / 8) * o.P * o.H
        ),
        align=16,
    ),
    "topk_route": Op(_topk_route, decisive=True),
    "topk_route groups": Op(_topk_route_groups),
    "topk_route_backward": Op(_topk_route_backward),
    "plan_permute": Op(lambda o: Call(ops.plan_permute, (o.x, o.idx, o.E), _moved(o, 2) + 32 * o.P), odd=True),
    "gather_weights": Op(lambda o: Call(ops.gather_weights, (o.w_pairs, o.order), 16 * o.P)),
    "scatter_weights": Op(lambda o: Call(ops.scatter_weights, (o.w_rows, o.order, o.T, o.k), 16 * o.P)),
    "glu": Op(lambda o: Call(ops.glu, (o.h, o.w_rows, "silu"), 6 * o.P * o.I)),
    "glu_backward": Op(lambda o: Call(ops.glu_backward, (o.da, o.h, o.w_rows, "silu"), 10 * o.P * o.I)),
    "glu_backward_again": Op(
        lambda o: Call(ops.glu_backward_again, (o.da, o.h, o.w_rows, "silu"), 12 * o.P * o.I), decisive=True
    ),
    "overlap": Op(lambda o: Call(ops.overlap, (o.da, o.slot, 1e-12), 2 * o.P * o.I, 2 * o.P * o.k * o.I)),
    "overlap_backward": Op(
        lambda o: Call(
            ops.overlap_backward, (o.w_pairs[:, 0], o.da, o.slot, 1e-12), 4 * o.P * o.I, 4 * o.P * o.k * o.I
        )
    ),
    "gram": Op(_gram),
    "quadratic": Op(_quadratic),
}  # fmt: skip


@lru_cache(maxsize=1)
def _operands(shape: tuple[int, ...], device: str, kind: str, align: int) -> Operands:
    """Of the last shape and routing: neighbours in the table share them."""
    return Operands(shape, device, kind, align)


def release() -> None:
    """Free the operands of the last case."""
    _operands.cache_clear()


def _calls(provider: str) -> int:
    return sum(n for runs in registry.used().values() for who, n in runs.items() if who.startswith(f"{provider}/"))


def _measure(machine: Any, missing: set[str], name: str, provider: str, *where: Any) -> list[Found] | None:
    if provider == peers.MOVER and peers.imported(peers.MOVER_MODULE, missing) is None:
        return None
    o = _operands(where[0], machine.device.type, where[1], OPS[name].align)
    call = OPS[name].make(o)
    work = {"bytes": int(call.bytes), "flop": int(call.flop), "rate": call.rate, "rows": o.S}
    if provider == peers.MOVER:
        theirs = peers.moves(name, o, missing)
        return None if theirs is None else [{"ms": machine.times(theirs, hide_launches=True), **work}]
    with registry.preferring(provider):
        before = _calls(provider)
        call.op(*call.args)
        if _calls(provider) == before:  # or another one would be measured in its name
            raise NotImplementedError(f"{provider} does not take these operands")
        return [{"ms": machine.times(lambda: call.op(*call.args), hide_launches=True), **work}]


def _providers(name: str, kind: str) -> tuple[str, ...]:
    """What is measured: everything under the usual routing; under the others, what the tables compare."""
    op = OPS[name]
    if kind != "random":
        return ("triton", op.against) if op.against != "reference" else ("triton",)
    return ("triton", op.against, *((peers.MOVER,) if name in peers.MOVES else ()))


def cases(device: str = "cuda", small: bool = False) -> list[Case]:
    """Each op under each provider; on a CPU the reference alone."""
    found = []
    shapes = SMALL if small else {**SHAPES, **ODD}
    grid = [(s, "random", n) for s in shapes for n, op in OPS.items() if s not in ODD or op.odd]
    for kind in ("balanced", "one hot expert"):
        grid += [(s, kind, n) for s in list(shapes)[:2] for n, op in OPS.items() if op.routings]
    for shape, kind, name in grid:
        for provider in _providers(name, kind) if device == "cuda" else ("reference",):
            title = f"{name}, {shape}" + (f", {kind}" if kind != "random" else "")
            ours = provider in ("triton", "torch_grouped")
            usual = OPS[name].decisive and kind == "random" and shape not in ODD
            rank = DECISIVE if ours and usual else USUAL if ours else LAST
            where = (name, provider, shapes[shape], kind)
            found.append(
                Case(
                    "ops", (title,), provider, rank,
                    lambda machine, missing, where=where: _measure(machine, missing, *where),
                )
            )  # fmt: skip
    return found
