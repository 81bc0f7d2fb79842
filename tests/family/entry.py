"""What is written down of a family of models, and the sizes that all of the table share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCAB = 128
HIDDEN = 64
BATCH = 2
SEQ = 16
INTERMEDIATE = 48

# Standard deviation of every randomly filled weight matrix outside the routers.
WEIGHT_STD = 0.1
# Standard deviation of values put in place of constant zeros (linear biases, expert biases).
BIAS_STD = 0.02
# Relative spread of values put in place of constant non-zero parameters (norm weights).
NORM_SPREAD = 0.05

# Labels at these leading positions are ignored by the loss, as in a prompt-completion batch.
IGNORED_PREFIX = 3

# Parts of the configurations of several families.
COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    max_position_embeddings=64,
    initializer_range=WEIGHT_STD,
    use_cache=False,
    # The defaults of several classes lie outside the tiny vocabulary, and a padding index would leave one
    # row of the embedding without a gradient.
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
GQA: dict[str, Any] = dict(num_attention_heads=4, num_key_value_heads=2)
MLA: dict[str, Any] = dict(
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
)

# Sigmoid routers get smaller weights than softmax routers: at a logit standard deviation above about 2 the
# leading scores all saturate at 1 and the choice between them becomes a matter of rounding.
SIGMOID: dict[str, Any] = dict(router_std=0.15, correction_std=0.1)


@dataclass(frozen=True)
class Entry:
    """One model family of the table.

    Attributes:
        name: short name, used as a test id.
        config_class, model_class: names of the transformers classes.
        kwargs: arguments of the config class, complete except for `output_router_logits`.
        block, router, experts: class names of the MoE block, of its router and of its stacked experts.
        moe_layers: number of MoE blocks in the built model.
        top_k: number of experts per token, for each MoE block.
        router_logits: the class adds an auxiliary load-balancing loss computed from recorded router
            logits; the config is then built with `output_router_logits=True`. Families that record
            logits but have no such loss are False.
        switchable: the experts class is registered with transformers' experts interface, that is,
            `model.set_experts_implementation(...)` has an effect.
        attn_implementation: attention implementation the model is built with.
        router_std: standard deviation of the router weights.
        router_seed: seed of the router weights and correction biases, added to that of `build`. Chosen so
            that with the default seeds of `build`, `batch` and `reference_step` no token is routed
            differently in bf16 or under bf16 autocast, nor with noise of 1.5 % on the routers' inputs.
        correction_std: standard deviation of the score correction bias, 0 if the family has none.
        stochastic: the forward pass draws random numbers in training mode, so two runs agree only with
            the same seed and the same order of draws.
        tuple_output: the MoE block returns a tuple whose first element is the hidden state.
        mixed: where dtypes other than the model's occur around the experts in low precision.
    """

    name: str
    config_class: str
    model_class: str
    kwargs: dict[str, Any] = field(hash=False)
    block: str
    router: str
    experts: str
    moe_layers: int = 2
    top_k: tuple[int, ...] = (2, 2)
    router_logits: bool = False
    switchable: bool = True
    attn_implementation: str = "sdpa"
    router_std: float = 0.3
    router_seed: int = 0
    correction_std: float = 0.0
    stochastic: bool = False
    tuple_output: bool = False
    mixed: str = ""
