"""A training step with AdamW: moefx against `torch.compile` of transformers' model with grouped_mm."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn

from .cases import DECISIVE, Case, Found
from .layers import compiled
from .memory import MIB

ARMS = ("moefx bf16", "moefx fp8_flow", "hf grouped_mm compiled")
NAME = "Qwen3-MoE 1.3B, 16 x 1024 tokens"


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


def measure(machine: Any, arm: str, small: bool) -> list[Found]:
    """Time of a step, and its peak memory beyond what was there before the model: weights and optimizer count."""
    import moefx

    B, S = (2, 16) if small else (16, 1024)
    cuda = machine.device.type == "cuda"
    machine.fresh()
    baseline = machine.allocated()
    net = _model(small).to(machine.device)
    ids = torch.randint(0, 512, (B, S), device=machine.device)
    inputs = {"input_ids": ids, "labels": ids}
    model: Any
    if arm.startswith("moefx"):
        model = moefx.optimize(net, inputs, recipe=arm.split()[1], codegen="inductor" if cuda else "eager")
    else:
        model = compiled(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=cuda)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**inputs).loss.backward()
        optimizer.step()

    step()  # compiles and makes the optimizer's state
    ms, peak = machine.peak_beyond(baseline, lambda: machine.times(step, 10))
    tokens = B * S / statistics.median(ms) * 1e3
    return [{"ms": ms, "tokens_per_s": f"{tokens:.0f}", "peak_mib": f"{peak / MIB:.0f}"}]


def cases(device: str = "cuda", small: bool = False) -> list[Case]:
    """One step of each arm; on a CPU moefx alone."""
    return [
        Case(
            "step", ("small step" if small else NAME,), arm, DECISIVE,
            lambda machine, missing, arm=arm: measure(machine, arm, small),
        )
        for arm in (ARMS if device == "cuda" else ARMS[:1])
    ]  # fmt: skip
