"""A precision recipe of your own: E5M2 gradients with a scale per row, everything else as in fp8_flow.

Run it with `python examples/custom_recipe.py`. It prints the ledger: what the recipe asks for on the left, what the
passes leave of it on the right. No pass knows this recipe, and yet the casts of the wire, of the gathered rows and of
the activations go by the same rules as those of the built-in ones.
"""

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moefx
from moefx.precision.recipe import get_recipe
from moefx.view.casts import cast_table

ROW, COLUMN = "e5m2 row po2/rceil", "e5m2 column po2/rceil"  # a scale per row of tokens; per column for wgrad

recipe = moefx.register_recipe(
    get_recipe("fp8_flow").replace(
        "e5m2_grads",
        "fp8_flow with E5M2 gradients, one scale per row",
        specs={"grad.wire": ROW, "grad.dgrad": ROW, "grad.wgrad": COLUMN},
        rules=[moefx.Rule("*.layers.0.*")],  # the first layer stays wide
    )
)

if __name__ == "__main__":
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=128, moe_intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).train()
    ids = torch.randint(0, 64, (2, 16))
    batch = {"input_ids": ids, "labels": ids}
    opt = moefx.optimize(model, batch, recipe="e5m2_grads", codegen="eager")
    opt(**batch).loss.backward()
    print(cast_table(opt.report.casts))
    print(f"loss {opt(**batch).loss.item():.4f}, original {model(**batch).loss.item():.4f}")
