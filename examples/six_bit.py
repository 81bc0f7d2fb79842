"""A number format that moefx does not have, end to end: E3M2, six bits, in blocks of 32 with E8M0 scales.

Run it with `python examples/six_bit.py`: it trains the same small model in fp32, in FP8 and in FP6 and prints the
losses, and how well six bits hold the activations. The format is registered like a built-in one; specs and recipes name
it, and every pass treats it as what it says it is. A code takes a byte in memory here; `Format.bits` is what it needs.
"""

import copy

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moefx
from moefx.precision import Format, quality, register_format
from moefx.precision.recipe import get_recipe

E3M2 = register_format(Format("e3m2", exponent_bits=3, mantissa_bits=2, bias=3))  # all codes are numbers; max 28
ROW, COLUMN, TILE = (f"e3m2 {block} e8m0/rceil" for block in ("1x32", "32x1", "32x32"))

FP6 = moefx.register_recipe(
    moefx.Recipe(
        "fp6",
        "E3M2 in blocks of 32",
        specs={
            "input.wire": ROW, "input.fprop": ROW, "input.stored": ROW, "input.wgrad": COLUMN,
            "weight.fprop": TILE, "weight.dgrad": TILE,
            "grad.wire": ROW, "grad.dgrad": ROW, "grad.wgrad": COLUMN, "hidden.stored": ROW,
        },
    )
)  # fmt: skip


def losses(model: torch.nn.Module, recipe: str, steps: int = 15) -> list[float]:
    """Train a copy of the model on one batch."""
    model = copy.deepcopy(model)
    ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    opt = moefx.optimize(model, batch, recipe=recipe, codegen="eager")
    optim = torch.optim.AdamW(opt.parameters(), lr=3e-3)
    found = []
    for _ in range(steps):
        loss = opt(**batch).loss
        loss.backward()
        optim.step()
        optim.zero_grad()
        found.append(loss.item())
    print(f"{recipe:<9} loss {found[0]:.4f} > {found[-1]:.4f}, casts {opt.report.casts['before']} > "
          f"{opt.report.casts['after']}")  # fmt: skip
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=128, moe_intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).train()
    for name in ("bf16", "fp8_flow", "fp6"):
        losses(model, name)
    x = torch.randn(256, 512)
    for spec in (ROW, get_recipe("fp8_flow").specs["input.fprop"]):
        print(f"{spec}: {quality(x, *moefx.quantize(x, spec), spec)['sqnr_db']:.1f} dB")
