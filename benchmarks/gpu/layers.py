"""Whole MoE layers for `benchmarks.gpu`, against transformers' own and those of `peers`."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn

from . import memory, peers
from .cases import DECISIVE, LAST, USUAL, Case, Found

Tensor = torch.Tensor
# T, H, I, E, k: the shapes that peers publish (SonicMoE, Liger, FP8-Flow-MoE, DeepGEMM, torchtitan). All are measured
# as a layer of Qwen3-MoE of that size: softmax router, SwiGLU, no biases.
LAYERS = {
    "Qwen3-30B T=8192": (8192, 2048, 768, 128, 8),
    "Qwen3-30B T=32768": (32768, 2048, 768, 128, 8),
    "DSv3 EP8 slice": (16384, 7168, 2048, 32, 2),
    "Mixtral T=8192": (8192, 4096, 14336, 8, 2),
    "OLMoE": (32768, 2048, 1024, 64, 8),
    "sonic-7B a": (24576, 1536, 256, 128, 8),
    "sonic-30B b": (32768, 4096, 512, 128, 8),
    "sonic-120B b": (32768, 4096, 1024, 128, 8),
    "Qwen3-235B": (32768, 4096, 1536, 128, 8),
    "Qwen3-Next": (32768, 2048, 512, 512, 10),
    "gpt-oss-20b": (32768, 2880, 2880, 32, 4),
    "gpt-oss-120b": (32768, 2880, 2880, 128, 4),
    "DSv3 full T=8192": (8192, 7168, 2048, 256, 8),
    "DSv3 EP32 slice": (32768, 7168, 2048, 8, 1),
    "DSv2-Lite": (32768, 2048, 1408, 64, 6),
    "Kimi-Linear": (32768, 2304, 1024, 256, 8),
    "sonic-1.4B a": (40960, 768, 256, 128, 8),
    "sonic-1.4B b": (40960, 768, 512, 64, 4),
    "sonic-1.4B c": (40960, 768, 1024, 32, 2),
    "sonic-7B b": (24576, 1536, 512, 64, 4),
    "sonic-7B c": (24576, 1536, 1024, 32, 2),
    "sonic-30B a": (32768, 4096, 256, 256, 16),
    "sonic-30B c": (32768, 4096, 1024, 64, 4),
    "sonic-120B a": (32768, 4096, 512, 256, 16),
    "sonic-120B c": (32768, 4096, 2048, 64, 4),
    "Llama4-Scout": (131072, 5120, 8192, 16, 1),
}
FIRST = ("Qwen3-30B T=8192", "Qwen3-30B T=32768")
SMALL = {"small": (64, 128, 128, 8, 2)}
COMPARED = ("moefx bf16", "moefx fp8_flow", "hf grouped_mm compiled")  # of all layers before the other arms of any
ARMS = (*COMPARED, "hf grouped_mm", "hf eager", *peers.LAYERS)
WAYS = ("forward", "backward", "forward inference")


def _block(shape: tuple[int, ...], device: str, experts: str) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    _, H, I, E, k = shape
    config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=k)
    config._experts_implementation = experts
    with torch.device(device):
        block = Qwen3MoeSparseMoeBlock(config).bfloat16()
    for p in block.parameters():
        nn.init.normal_(p, std=H**-0.5)
    return block.train()


def compiled(model: nn.Module) -> Any:
    """By torch, for the sizes that it is called with: shapes of earlier cases must not make these symbolic."""
    return torch.compile(model, dynamic=False)


def _arm(arm: str, shape: tuple[int, ...], device: str, x: Tensor, missing: set[str]) -> Any:
    import moefx

    if arm.startswith("moefx"):
        codegen = "inductor" if device == "cuda" else "eager"
        block = _block(shape, device, "grouped_mm")
        return moefx.optimize(block, (x,), recipe=arm.split()[1], codegen=codegen)
    if arm.startswith("hf"):
        block = _block(shape, device, arm.split()[1])
        return compiled(block) if arm.endswith("compiled") else block
    return peers.layer(arm, shape, device, lambda: _block(shape, device, "eager"), missing)


def measure(machine: Any, missing: set[str], shape: tuple[int, ...], arm: str) -> list[Found] | None:
    """Forward, forward with backward less the forward, and forward without gradients.

    Peak memory is that of forward and backward beyond weights and input, which live before and after.
    """
    if arm in peers.LAYERS and peers.imported(peers.LAYERS[arm], missing) is None:
        return None
    T, H, I, E, k = shape
    device = machine.device.type
    machine.fresh()
    gen = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, T, H, generator=gen, device=device).bfloat16().requires_grad_()
    dy = torch.randn(1, T, H, generator=gen, device=device).bfloat16()
    run: Any = _arm(arm, shape, device, x, missing)
    parameters = list(run.parameters())

    def forward() -> Tensor:
        out = run(x)
        y: Tensor = out[0] if isinstance(out, tuple) else out
        return y

    def drop() -> None:
        for t in (x, *parameters):
            t.grad = None

    def both() -> None:
        forward().backward(dy)
        drop()

    def inference() -> None:
        with torch.no_grad():
            forward()

    both()
    kept = memory.columns(memory.saved(machine, forward, x, parameters, E), parameters)
    _, peak = machine.peak_beyond(machine.allocated(), both)
    fw, fwbw = machine.times(forward), machine.times(both)
    flop, rate = 6 * T * k * H * I, "fp8" if "fp8" in arm else "bf16"
    more = {"rate": rate, "rows": T * k, **kept, "peak_mib": f"{peak / memory.MIB:.0f}"}
    backward = [t - statistics.median(fw) for t in fwbw]
    found = [{"ms": fw, "flop": flop, **more}, {"ms": backward, "flop": 2 * flop, **more}]
    inference()
    return [*found, {"ms": machine.times(inference), "flop": flop, "rate": rate, "rows": T * k}]


def cases(device: str = "cuda", small: bool = False) -> list[Case]:
    """Each arm of each layer; its rows come from one measurement. On a CPU moefx alone."""
    return [
        Case(
            "layers", tuple(f"{name}, {way}" for way in WAYS), arm,
            LAST if arm not in COMPARED else DECISIVE if name in FIRST else USUAL,
            lambda machine, missing, shape=shape, arm=arm: measure(machine, missing, shape, arm),
        )
        for name, shape in (SMALL if small else LAYERS).items()
        for arm in (ARMS if device == "cuda" else ARMS[:1])
    ]  # fmt: skip
