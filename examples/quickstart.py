"""The example of the README: optimize a transformers MoE model, look at the report, take one training step."""

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moefx

torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=256, hidden_size=128, moe_intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2, output_router_logits=True,
)  # fmt: skip
model = Qwen3MoeForCausalLM(config).train()
batch = {"input_ids": torch.randint(0, 256, (2, 64)), "labels": torch.randint(0, 256, (2, 64))}

opt = moefx.optimize(model, batch, codegen="eager", verify=True)
loss = opt(**batch).loss
loss.backward()
print(opt.report)
print(f"loss {loss.item():.6f}, original {model(**batch).loss.item():.6f}")  # loss 5.553648, original 5.553648
