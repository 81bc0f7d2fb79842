"""Every MoE layer of a model routed by one frozen network that reads token ids."""

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moefx

torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=64,
    moe_intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=2,
)
teacher, target = Qwen3MoeForCausalLM(config).train(), Qwen3MoeForCausalLM(config).train()
batches = [torch.randint(0, 256, (4, 32)) for _ in range(20)]

router = moefx.Grouter.from_config(
    vocab_size=256, num_experts=8, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64
)
made = moefx.grouter.distill(teacher, router, batches, steps=20, lr=2e-3, progress=False)
print(f"KL to the teacher's router {made.kl_curve[0]:.3f}, then {made.kl_curve[-1]:.3f}")

ids = batches[0]
opt = moefx.optimize(target, {"input_ids": ids, "labels": ids}, router=router, codegen="eager")
opt(input_ids=ids, labels=ids).loss.backward()
nodes = [str(n.target) for n in opt.graphs["forward"].graph.nodes]
print(f"top-k nodes: {sum('topk' in n for n in nodes)}, plans: {sum('plan' in n for n in nodes)}")
gates = [p for name, p in target.named_parameters() if name.endswith("mlp.gate.weight")]
print(f"routers of the layers: {len(gates)}, trained: {sum(p.grad is not None for p in gates)}")
