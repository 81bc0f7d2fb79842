"""Whole MoE layers and a training step for `gpu.py`, against transformers' own and those of `gpu_peers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gpu_peers
import torch
from torch import nn

Tensor = torch.Tensor
Case = tuple[str, str, Callable[[Any], dict[str, Any] | None]]
# T, H, I, E, k: the shapes that peers publish (SonicMoE, Liger, FP8-Flow-MoE, DeepGEMM).
LAYERS = {
    "Qwen3-30B T=8192": (8192, 2048, 768, 128, 8),
    "Qwen3-30B T=32768": (32768, 2048, 768, 128, 8),
    "OLMoE": (32768, 2048, 1024, 64, 8),
    "sonic-7B a": (24576, 1536, 256, 128, 8),
    "sonic-30B b": (32768, 4096, 512, 128, 8),
    "sonic-120B b": (32768, 4096, 1024, 128, 8),
    "DSv3 EP8 slice": (16384, 7168, 2048, 32, 2),
    "Mixtral T=8192": (8192, 4096, 14336, 8, 2),
}
SMALL = {"small": (64, 128, 128, 8, 2)}
ARMS = ("moefx bf16", "moefx fp8_flow", "hf grouped_mm", "hf grouped_mm compiled", "hf eager", *gpu_peers.LAYERS)
STEP_ARMS = ("moefx bf16", "moefx fp8_flow", "hf grouped_mm compiled")


def planned() -> list[tuple[str, str, str]]:
    """Part, case and provider of every row that a full run writes."""
    layers = [("layers", f"{s}, {way}", a) for s in LAYERS for a in ARMS for way in ("forward", "backward")]
    return layers + [("step", "Qwen3-MoE 1.3B, 16 x 1024 tokens", arm) for arm in STEP_ARMS]


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


def _arm(arm: str, shape: tuple[int, ...], device: str, x: Tensor, missing: set[str]) -> Callable[[Tensor], Any] | None:
    import moefx

    if arm.startswith("moefx"):
        codegen = "inductor" if device == "cuda" else "eager"
        block = _block(shape, device, "grouped_mm")
        return moefx.optimize(block, (x,), recipe=arm.split()[1], codegen=codegen)
    if arm.startswith("hf"):
        block = _block(shape, device, arm.split()[1])
        return torch.compile(block) if arm.endswith("compiled") else block
    return gpu_peers.layer(arm, shape, device, lambda: _block(shape, device, "eager"), missing)


def _measure(machine: Any, shape: tuple[int, ...], arm: str, missing: set[str]) -> dict[str, dict[str, Any]] | None:
    """Forward, and forward with backward less the forward."""
    T, H, I, _, k = shape
    device = machine.device.type
    gen = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, T, H, generator=gen, device=device).bfloat16().requires_grad_()
    dy = torch.randn(1, T, H, generator=gen, device=device).bfloat16()
    run = _arm(arm, shape, device, x, missing)
    if run is None:
        return None

    def forward() -> Tensor:
        out = run(x)
        y: Tensor = out[0] if isinstance(out, tuple) else out
        return y

    def both() -> None:
        forward().backward(dy)
        x.grad = None
        for p in getattr(run, "parameters", list)():
            p.grad = None

    both()
    saved, peak = _memory(device, forward, both)
    fw, fwbw = machine.times(forward), machine.times(both)
    flop = 6 * T * k * H * I
    backward = [b - sorted(fw)[len(fw) // 2] for b in fwbw]
    rate = "fp8" if "fp8" in arm else "bf16"
    more = {"rate": rate, "saved_mib": f"{saved:.0f}", "peak_mib": f"{peak:.0f}"}
    return {"forward": {"ms": fw, "flop": flop, **more}, "backward": {"ms": backward, "flop": 2 * flop, **more}}


def _memory(device: str, forward: Callable[[], Tensor], both: Callable[[], None]) -> tuple[float, float]:
    """MiB that the forward keeps beyond its output, and the peak of a step beyond what was there."""
    if device == "cpu":
        return 0.0, 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = forward()
    saved = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    del y
    torch.cuda.reset_peak_memory_stats()
    both()
    return saved / 2**20, (torch.cuda.max_memory_allocated() - before) / 2**20


def layers(device: str, small: bool, missing: set[str]) -> Iterator[Case]:
    """Forward and backward of one layer; both come from one measurement."""
    for name, shape in (SMALL if small else LAYERS).items():
        for arm in ARMS:
            if device == "cpu" and arm != "moefx bf16":
                continue
            kept: dict[str, Any] = {}

            def run(
                machine: Any, way: str, shape: Any = shape, arm: str = arm, kept: Any = kept
            ) -> dict[str, Any] | None:
                if not kept:
                    kept.update(_measure(machine, shape, arm, missing) or {"forward": None, "backward": None})
                found: dict[str, Any] | None = kept[way]
                return found

            for way in ("forward", "backward"):
                yield f"{name}, {way}", arm, lambda machine, way=way, run=run: run(machine, way)


def _model(small: bool) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, int] = dict(
        hidden_size=128, moe_intermediate_size=128, num_hidden_layers=1, num_experts=8, num_experts_per_tok=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, vocab_size=512,
    ) if small else dict(
        hidden_size=1024, moe_intermediate_size=512, num_hidden_layers=12, num_experts=64, num_experts_per_tok=8,
        num_attention_heads=16, num_key_value_heads=4, head_dim=64, vocab_size=32768,
    )  # fmt: skip
    config = Qwen3MoeConfig(**sizes, intermediate_size=512, use_cache=False, pad_token_id=None)
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).bfloat16().train()


def steps(device: str, small: bool, missing: set[str]) -> Iterator[Case]:
    """A training step with AdamW: moefx against `torch.compile` of the model with grouped_mm experts."""
    import moefx

    B, S = (2, 16) if small else (16, 1024)
    for arm in STEP_ARMS:
        if device == "cpu" and arm != "moefx bf16":
            continue

        def run(machine: Any, arm: str = arm) -> dict[str, Any]:
            net = _model(small).to(device)
            ids = torch.randint(0, 512, (B, S), device=device)
            inputs = {"input_ids": ids, "labels": ids}
            recipe = arm.split()[1]
            codegen = "inductor" if device == "cuda" else "eager"
            model: Any = (
                moefx.optimize(net, inputs, recipe=recipe, codegen=codegen)
                if arm.startswith("moefx")
                else torch.compile(net)
            )
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=device == "cuda")

            def step() -> None:
                optimizer.zero_grad(set_to_none=True)
                model(**inputs).loss.backward()
                optimizer.step()

            step()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            ms = machine.times(step, 10)
            peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0
            return {
                "ms": ms,
                "tokens_per_s": f"{B * S / sorted(ms)[len(ms) // 2] * 1e3:.0f}",
                "peak_mib": f"{peak:.0f}",
            }

        yield "small step" if small else "Qwen3-MoE 1.3B, 16 x 1024 tokens", arm, run
