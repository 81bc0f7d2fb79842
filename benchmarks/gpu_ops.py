"""Single ops for `gpu.py`: what is moved and computed, and with which operands.

Bytes are those of performance models that count each operand once: rows read plus rows written, codes one byte, scales
1/32 of a byte per element. Shapes: FP8-Flow-MoE's (4096 tokens, H=7168, I=2048, 256 experts, top-8; arXiv 2511.02302)
and Qwen3-30B-A3B at 32768 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gpu_peers
import torch

import moefx.dialect  # noqa: F401  registers the ops

Tensor = torch.Tensor
Case = tuple[str, str, Callable[[Any], dict[str, Any] | None]]
ops = torch.ops.moefx
ROW, COLUMN, TILE = (f"e4m3 {block} po2/rceil eps=1e-10" for block in ("1x128", "128x1", "128x128"))
# T, H, I, E, k
SHAPES = {"FP8-Flow": (4096, 7168, 2048, 256, 8), "Qwen3-30B T=32768": (32768, 2048, 768, 128, 8)}
SMALL = {"small": (64, 256, 128, 8, 2)}
CODE = 1 + 1 / 32  # bytes of a code with its share of a scale


def _operands(shape: tuple[int, ...], device: str) -> dict[str, Any]:
    T, H, I, E, k = shape
    gen = torch.Generator(device).manual_seed(0)

    def rand(*size: int) -> Tensor:
        return torch.randn(size, generator=gen, device=device).bfloat16()

    idx = torch.randn(T, E, generator=gen, device=device).topk(k).indices
    token, order, slot, offsets = ops.plan(idx, E, 16)
    S = len(token)
    return {
        "T": T, "H": H, "I": I, "E": E, "k": k, "S": S, "idx": idx, "token": token, "order": order, "slot": slot,
        "offsets": offsets, "x": rand(T, H), "rows": rand(S, H), "h": rand(S, 2 * I), "da": rand(S, I),
        "w_S": rand(S, 1)[:, 0].float().abs(), "w_Tk": rand(T, k).float().abs(), "w1": rand(E, 2 * I, H),
    }  # fmt: skip


def _encoded(x: Tensor, spec: str, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    codes, scales = ops.quantize(x, offsets, [spec])
    return codes, scales


# name -> (operands -> call, bytes, flop, rate)
Made = tuple[Callable[[], Any], float, float, str]


def _plan(o: dict[str, Any]) -> Made:
    return lambda: ops.plan(o["idx"], o["E"], 16), 16 * o["S"], 0, "bf16"


def _permute(o: dict[str, Any]) -> Made:
    return lambda: ops.permute(o["x"], o["token"], o["slot"]), 2 * (o["T"] + o["S"]) * o["H"], 0, "bf16"


def _permute_scaled(o: dict[str, Any]) -> Made:
    c, s = _encoded(o["x"], ROW)
    return lambda: ops.permute_scaled(c, s, o["token"], o["slot"]), CODE * (o["T"] + o["S"]) * o["H"], 0, "bf16"


def _unpermute(o: dict[str, Any]) -> Made:
    run = lambda: ops.unpermute(o["rows"], o["token"], o["order"], o["slot"], None)  # noqa: E731
    return run, 2 * (o["T"] + o["S"]) * o["H"], 0, "bf16"


def _quantize(o: dict[str, Any]) -> Made:
    return lambda: ops.quantize(o["x"], None, [ROW]), (2 + CODE) * o["T"] * o["H"], 0, "bf16"


def _glu_quantize(o: dict[str, Any]) -> Made:
    run = lambda: ops.glu_quantize(o["h"], o["w_S"], o["offsets"], "silu", [ROW], [])  # noqa: E731
    return run, (4 + CODE) * o["S"] * o["I"], 0, "bf16"


def _glu_quantize_both(o: dict[str, Any]) -> Made:
    run = lambda: ops.glu_quantize(o["h"], o["w_S"], o["offsets"], "silu", [ROW, COLUMN], [])  # noqa: E731
    return run, (4 + 2 * CODE) * o["S"] * o["I"], 0, "bf16"


def _glu_backward_quantize(o: dict[str, Any]) -> Made:
    args = (o["da"], o["h"], None, o["w_S"], o["offsets"], "silu", "", [ROW], [])
    return lambda: ops.glu_backward_quantize(*args), (6 + 2 * CODE) * o["S"] * o["I"], 0, "bf16"


def _transpose(o: dict[str, Any]) -> Made:
    c, s = _encoded(o["rows"], ROW)
    run = lambda: ops.transpose_scaled(c, s, o["offsets"], ROW, COLUMN, "tile_max")  # noqa: E731
    return run, 2 * CODE * o["S"] * o["H"], 0, "bf16"


def _grouped_mm(o: dict[str, Any]) -> Made:
    nbytes = 2 * (o["S"] * o["H"] + o["w1"].numel() + 2 * o["S"] * o["I"])
    return lambda: ops.grouped_mm(o["rows"], o["w1"], o["offsets"]), nbytes, 4 * o["S"] * o["H"] * o["I"], "bf16"


def _grouped_wgrad(o: dict[str, Any]) -> Made:
    nbytes = 2 * (o["S"] * o["H"] + o["w1"].numel() + 2 * o["S"] * o["I"])
    return lambda: ops.grouped_wgrad(o["h"], o["rows"], o["offsets"]), nbytes, 4 * o["S"] * o["H"] * o["I"], "bf16"


def _scaled_mm(o: dict[str, Any]) -> Made:
    x, w = _encoded(o["rows"], ROW), _encoded(o["w1"], TILE)
    run = lambda: ops.scaled_grouped_mm(*x, *w, o["offsets"], ROW, TILE, torch.bfloat16)  # noqa: E731
    nbytes = CODE * (o["S"] * o["H"] + o["w1"].numel()) + 4 * o["S"] * o["I"]
    return run, nbytes, 4 * o["S"] * o["H"] * o["I"], "fp8"


def _scaled_wgrad(o: dict[str, Any]) -> Made:
    a, b = (_encoded(o[name], COLUMN, o["offsets"]) for name in ("h", "rows"))
    run = lambda: ops.scaled_grouped_wgrad(*a, *b, o["offsets"], COLUMN, COLUMN, torch.bfloat16)  # noqa: E731
    nbytes = CODE * o["S"] * (o["H"] + 2 * o["I"]) + 2 * o["w1"].numel()
    return run, nbytes, 4 * o["S"] * o["H"] * o["I"], "fp8"


def _overlap(o: dict[str, Any]) -> Made:
    return lambda: ops.overlap(o["da"], o["slot"], 1e-12), 2 * o["S"] * o["I"], 2 * o["S"] * o["k"] * o["I"], "bf16"


OPS: dict[str, Callable[[dict[str, Any]], Made]] = {
    "plan": _plan, "permute": _permute, "permute_scaled": _permute_scaled, "unpermute": _unpermute,
    "quantize T rows": _quantize, "glu_quantize row": _glu_quantize, "glu_quantize row+column": _glu_quantize_both,
    "glu_backward_quantize row": _glu_backward_quantize, "transpose_scaled": _transpose, "grouped_mm up": _grouped_mm,
    "grouped_wgrad up": _grouped_wgrad, "scaled_grouped_mm up": _scaled_mm, "scaled_grouped_wgrad up": _scaled_wgrad,
    "overlap": _overlap,
}  # fmt: skip
LIBRARY = ("grouped_mm up", "grouped_wgrad up")  # also through torch._grouped_mm


def _providers(op: str) -> tuple[str, ...]:
    peers = ("transformer_engine",) if op in gpu_peers.MOVES else ()
    return ("triton", "torch_grouped" if op in LIBRARY else "reference", *peers)


def _calls(provider: str) -> int:
    from moefx.kernels import registry

    return sum(n for runs in registry.used().values() for who, n in runs.items() if who.startswith(f"{provider}/"))


def planned() -> list[tuple[str, str, str]]:
    """Part, case and provider of every row that a full run writes."""
    return [("ops", f"{op}, {shape}", p) for shape in SHAPES for op in OPS for p in _providers(op)]


def cases(device: str, small: bool, missing: set[str]) -> Iterator[Case]:
    """Each op under each provider; operands of a shape are made once."""
    from moefx.kernels import registry

    for shape, sizes in (SMALL if small else SHAPES).items():
        o = _operands(sizes, device)
        for op, make in OPS.items():
            for provider in _providers(op) if device == "cuda" else ("reference",):

                def run(
                    machine: Any, op: str = op, make: Any = make, provider: str = provider, o: Any = o
                ) -> dict[str, Any] | None:
                    call, nbytes, flop, rate = make(o)
                    work = {"bytes": int(nbytes), "flop": int(flop), "rate": rate}
                    if provider == "transformer_engine":
                        theirs = gpu_peers.moves(op, o, missing)
                        return None if theirs is None else {"ms": machine.times(theirs), **work}
                    before = _calls(provider)
                    with registry.preferring(provider):
                        ms = machine.times(call)
                    if _calls(provider) == before:  # it does not take these operands, and another one ran
                        return None
                    return {"ms": ms, **work}

                yield f"{op}, {shape}", provider, run
