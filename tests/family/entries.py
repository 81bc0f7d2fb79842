"""The table of families: one tiny configuration each, with what its model is known to contain.

`zoo` builds models from it; the reasons for the sizes stand there.
"""

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

_COMMON: dict[str, Any] = dict(
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
_GQA: dict[str, Any] = dict(num_attention_heads=4, num_key_value_heads=2)
_MLA: dict[str, Any] = dict(
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
)


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


# Sigmoid routers get smaller weights than softmax routers: at a logit standard deviation above about 2 the
# leading scores all saturate at 1 and the choice between them becomes a matter of rounding.
_SIGMOID: dict[str, Any] = dict(router_std=0.15, correction_std=0.1)

ENTRIES: tuple[Entry, ...] = (
    Entry(
        name="qwen2_moe",
        config_class="Qwen2MoeConfig",
        model_class="Qwen2MoeForCausalLM",
        kwargs=dict(
            **_COMMON,
            **_GQA,
            num_hidden_layers=2,
            intermediate_size=80,
            moe_intermediate_size=INTERMEDIATE,
            shared_expert_intermediate_size=40,
            num_experts=8,
            num_experts_per_tok=2,
            # The default leaves the weights as they are; the in-place renormalisation is the harder case
            # and Qwen3-MoE and OLMoE below cover the other one.
            norm_topk_prob=True,
        ),
        block="Qwen2MoeSparseMoeBlock",
        router="Qwen2MoeTopKRouter",
        experts="Qwen2MoeExperts",
        router_seed=131,
        router_logits=True,
        mixed="softmax in fp32, weights cast back to the model dtype",
    ),
    Entry(
        name="qwen3_moe",
        config_class="Qwen3MoeConfig",
        model_class="Qwen3MoeForCausalLM",
        kwargs=dict(
            **_COMMON,
            **_GQA,
            head_dim=16,
            num_hidden_layers=3,
            # One dense layer in the middle.
            mlp_only_layers=[1],
            intermediate_size=80,
            moe_intermediate_size=INTERMEDIATE,
            num_experts=8,
            num_experts_per_tok=2,
        ),
        block="Qwen3MoeSparseMoeBlock",
        router="Qwen3MoeTopKRouter",
        experts="Qwen3MoeExperts",
        router_seed=14,
        router_logits=True,
        mixed="softmax in fp32, weights cast back to the model dtype",
    ),
    Entry(
        name="mixtral",
        config_class="MixtralConfig",
        model_class="MixtralForCausalLM",
        kwargs=dict(
            **_COMMON,
            **_GQA,
            num_hidden_layers=2,
            intermediate_size=INTERMEDIATE,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        block="MixtralSparseMoeBlock",
        router="MixtralTopKRouter",
        experts="MixtralExperts",
        router_seed=139,
        router_logits=True,
        mixed="softmax in fp32, weights stay fp32",
    ),
    Entry(
        name="olmoe",
        config_class="OlmoeConfig",
        model_class="OlmoeForCausalLM",
        kwargs=dict(
            **_COMMON, **_GQA, num_hidden_layers=2, intermediate_size=INTERMEDIATE, num_experts=8, num_experts_per_tok=2
        ),
        block="OlmoeSparseMoeBlock",
        router="OlmoeTopKRouter",
        experts="OlmoeExperts",
        router_seed=119,
        router_logits=True,
        mixed="softmax in fp32, weights cast back to the model dtype",
    ),
    Entry(
        name="deepseek_v2",
        config_class="DeepseekV2Config",
        model_class="DeepseekV2ForCausalLM",
        kwargs=dict(
            **_COMMON,
            **_MLA,
            num_hidden_layers=3,
            first_k_dense_replace=1,
            intermediate_size=80,
            moe_intermediate_size=INTERMEDIATE,
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=2,
            # The default is plain top-k, which other families cover; this is the only family that
            # limits groups by their maximum and fills the others with zero.
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.5,
        ),
        block="DeepseekV2Moe",
        router="DeepseekV2TopkRouter",
        experts="DeepseekV2Experts",
        router_seed=93,
        mixed="router in fp32, weights stay fp32",
    ),
    Entry(
        name="deepseek_v3",
        config_class="DeepseekV3Config",
        model_class="DeepseekV3ForCausalLM",
        kwargs=dict(
            **_COMMON,
            **_MLA,
            num_hidden_layers=3,
            first_k_dense_replace=1,
            intermediate_size=80,
            moe_intermediate_size=INTERMEDIATE,
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=4,
            topk_group=2,
        ),
        block="DeepseekV3MoE",
        router="DeepseekV3TopkRouter",
        experts="DeepseekV3Experts",
        router_seed=90,
        mixed="router and correction bias in fp32, weights stay fp32",
        **_SIGMOID,
    ),
    Entry(
        name="glm4_moe",
        config_class="Glm4MoeConfig",
        model_class="Glm4MoeForCausalLM",
        kwargs=dict(
            **_COMMON,
            **_GQA,
            head_dim=16,
            num_hidden_layers=3,
            first_k_dense_replace=1,
            intermediate_size=80,
            moe_intermediate_size=INTERMEDIATE,
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=2,
            use_qk_norm=True,
        ),
        block="Glm4MoeMoE",
        router="Glm4MoeTopkRouter",
        experts="Glm4MoeExperts",
        router_seed=145,
        mixed="router and correction bias in fp32, weights stay fp32",
        **_SIGMOID,
    ),
    Entry(
        name="dots1",
        config_class="Dots1Config",
        model_class="Dots1ForCausalLM",
        kwargs=dict(
            **_COMMON,
            **_GQA,
            num_hidden_layers=3,
            first_k_dense_replace=1,
            intermediate_size=80,
            moe_intermediate_size=INTERMEDIATE,
            n_routed_experts=8,
            n_shared_experts=2,
            num_experts_per_tok=2,
            # Left at the default (False), so that the sigmoid scores reach the experts unnormalised.
            routed_scaling_factor=2.0,
        ),
        block="Dots1MoE",
        router="Dots1TopkRouter",
        experts="Dots1Experts",
        router_seed=41,
        mixed="router and correction bias in fp32, weights stay fp32",
        **_SIGMOID,
    ),
    Entry(
        name="gpt_oss",
        config_class="GptOssConfig",
        model_class="GptOssForCausalLM",
        kwargs=dict(
            **{
                **_COMMON,
                # The default position scaling is tied to this length and warns about any other.
                "max_position_embeddings": 131072,
            },
            **_GQA,
            head_dim=16,
            num_hidden_layers=2,
            # Smaller than the sequence, so that the sliding layer differs from the full one.
            sliding_window=8,
            intermediate_size=INTERMEDIATE,
            num_local_experts=8,
            num_experts_per_tok=2,
            # At the default of 7 no activation of a model this small would ever be clamped.
            swiglu_limit=1.0,
        ),
        block="GptOssMLP",
        router="GptOssTopKRouter",
        experts="GptOssExperts",
        router_seed=73,
        router_logits=True,
        # The class has no sdpa path (attention sinks).
        attn_implementation="eager",
        tuple_output=True,
        mixed="everything in the model dtype, the softmax over the chosen logits included",
    ),
    Entry(
        name="granitemoe",
        config_class="GraniteMoeConfig",
        model_class="GraniteMoeForCausalLM",
        kwargs=dict(
            **_COMMON,
            **_GQA,
            num_hidden_layers=2,
            intermediate_size=INTERMEDIATE,
            num_local_experts=8,
            num_experts_per_tok=2,
            # All four multipliers are 1 by default, which would hide a dropped one.
            embedding_multiplier=4.0,
            logits_scaling=2.0,
            residual_multiplier=0.5,
            attention_multiplier=0.25,
        ),
        block="GraniteMoeMoE",
        router="GraniteMoeTopKRouter",
        experts="GraniteMoeExperts",
        router_seed=64,
        router_logits=True,
        mixed="top-k and softmax in fp32 on logits of the model dtype, weights cast back",
    ),
    Entry(
        name="phimoe",
        config_class="PhimoeConfig",
        model_class="PhimoeForCausalLM",
        kwargs=dict(
            **_COMMON,
            **_GQA,
            num_hidden_layers=2,
            intermediate_size=INTERMEDIATE,
            num_local_experts=8,
            num_experts_per_tok=2,
            # Experts within this relative distance of the best one are sampled from. At the default of
            # 0.01 there is nearly always one candidate, its multiplier is the constant 1, and the router
            # gets no gradient.
            router_jitter_noise=0.3,
        ),
        block="PhimoeSparseMoeBlock",
        router="PhimoeTopKRouter",
        experts="PhimoeExperts",
        router_seed=119,
        router_logits=True,
        # Gumbel noise and uniform draws inside the router: needs the same seed in every run.
        stochastic=True,
        mixed="everything in the model dtype, the router's softmax included",
    ),
    Entry(
        name="jamba",
        config_class="JambaConfig",
        model_class="JambaForCausalLM",
        kwargs=dict(
            **_COMMON,
            **_GQA,
            # Layers: Mamba with MoE, Mamba with a dense MLP, attention with MoE.
            num_hidden_layers=3,
            expert_layer_period=2,
            expert_layer_offset=0,
            attn_layer_period=3,
            attn_layer_offset=2,
            intermediate_size=INTERMEDIATE,
            num_experts=8,
            num_experts_per_tok=2,
            mamba_d_state=8,
            mamba_dt_rank=8,
        ),
        block="JambaSparseMoeBlock",
        router="JambaTopKRouter",
        experts="JambaExperts",
        router_seed=142,
        router_logits=True,
        mixed="softmax in fp32, weights cast back to the model dtype",
    ),
    Entry(
        name="hunyuan_v1_moe",
        config_class="HunYuanMoEV1Config",
        model_class="HunYuanMoEV1ForCausalLM",
        kwargs=dict(
            **_COMMON,
            **_GQA,
            head_dim=16,
            num_hidden_layers=2,
            intermediate_size=INTERMEDIATE,
            num_experts=8,
            # One k per layer: the class reads a list, and a k taken from the first layer would be wrong
            # in the second.
            moe_topk=[2, 3],
        ),
        block="HunYuanMoEV1Moe",
        router="HunYuanMoEV1Gate",
        experts="HunYuanMoEV1Experts",
        router_seed=65,
        top_k=(2, 3),
        mixed="router weight kept in fp32, so softmax and weights in fp32",
    ),
    Entry(
        name="minimax",
        config_class="MiniMaxConfig",
        model_class="MiniMaxForCausalLM",
        kwargs=dict(
            **_COMMON,
            **_GQA,
            head_dim=16,
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            # Shorter than the sequence, so that the recurrence between blocks is used.
            block_size=8,
            intermediate_size=INTERMEDIATE,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        block="MiniMaxSparseMoeBlock",
        router="MiniMaxTopKRouter",
        experts="MiniMaxExperts",
        router_seed=60,
        router_logits=True,
        mixed="softmax in fp32, weights stay fp32",
    ),
    Entry(
        name="minimax_m2",
        config_class="MiniMaxM2Config",
        model_class="MiniMaxM2ForCausalLM",
        kwargs=dict(
            **_COMMON,
            **_GQA,
            head_dim=16,
            num_hidden_layers=2,
            intermediate_size=INTERMEDIATE,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        block="MiniMaxM2SparseMoeBlock",
        router="MiniMaxM2TopKRouter",
        experts="MiniMaxM2Experts",
        router_seed=123,
        router_logits=True,
        mixed="sigmoid in fp32, weights stay fp32; correction bias on the block, in the model dtype",
        **_SIGMOID,
    ),
    Entry(
        name="ernie4_5_moe",
        config_class="Ernie4_5_MoeConfig",
        model_class="Ernie4_5_MoeForCausalLM",
        kwargs=dict(
            **_COMMON,
            **_GQA,
            num_hidden_layers=3,
            moe_layer_start_index=1,
            intermediate_size=80,
            moe_intermediate_size=INTERMEDIATE,
            moe_num_experts=8,
            moe_k=2,
            moe_num_shared_experts=2,
        ),
        block="Ernie4_5_MoeSparseMoeBlock",
        router="Ernie4_5_MoeTopKRouter",
        experts="Ernie4_5_MoeExperts",
        router_seed=101,
        router_logits=True,
        # Added to softmax probabilities, which are smaller than sigmoid scores.
        correction_std=0.05,
        mixed="router weight, correction bias (a frozen parameter) and scores in fp32 with autocast off, "
        "weights cast back to the model dtype",
    ),
    Entry(
        name="nemotron_h",
        config_class="NemotronHConfig",
        model_class="NemotronHForCausalLM",
        kwargs=dict(
            **_COMMON,
            **_GQA,
            head_dim=16,
            # Every mixer, the MoE included, is a layer of its own.
            layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
            num_hidden_layers=4,
            intermediate_size=80,
            moe_intermediate_size=INTERMEDIATE,
            moe_shared_expert_intermediate_size=40,
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            routed_scaling_factor=1.5,
            ssm_state_size=8,
            mamba_num_heads=4,
            mamba_head_dim=16,
            n_groups=2,
            # Shorter than the sequence, so that the recurrence between chunks is used.
            chunk_size=8,
            # At the default step sizes (at most 0.1) the state contributes next to nothing in a model
            # this small, and the gradients of its decay are rounding noise.
            time_step_min=0.2,
            time_step_max=2.0,
        ),
        block="NemotronHMoE",
        router="NemotronHTopkRouter",
        experts="NemotronHExperts",
        router_seed=8,
        mixed="router and correction bias in fp32, weights stay fp32",
        **_SIGMOID,
    ),
    Entry(
        name="lfm2_moe",
        config_class="Lfm2MoeConfig",
        model_class="Lfm2MoeForCausalLM",
        kwargs=dict(
            **_COMMON,
            **_GQA,
            num_hidden_layers=3,
            num_dense_layers=1,
            layer_types=["conv", "full_attention", "conv"],
            intermediate_size=80,
            moe_intermediate_size=INTERMEDIATE,
            num_experts=8,
            num_experts_per_tok=2,
        ),
        block="Lfm2MoeSparseMoeBlock",
        router="Lfm2MoeTopKRouter",
        experts="Lfm2MoeExperts",
        router_seed=55,
        mixed="scores in the model dtype (a fp32 correction bias promotes the choice only)",
        **_SIGMOID,
    ),
    Entry(
        name="flex_olmo",
        config_class="FlexOlmoConfig",
        model_class="FlexOlmoForCausalLM",
        kwargs=dict(
            **_COMMON,
            **_GQA,
            num_hidden_layers=2,
            intermediate_size=INTERMEDIATE,
            # An odd number of experts, as in the released model.
            num_experts=7,
            num_experts_per_tok=2,
        ),
        block="FlexOlmoSparseMoeBlock",
        router="FlexOlmoTopKRouter",
        experts="FlexOlmoExperts",
        router_seed=96,
        router_logits=True,
        mixed="softmax in fp32, weights cast back to the model dtype",
    ),
    Entry(
        name="llama4",
        config_class="Llama4TextConfig",
        model_class="Llama4ForCausalLM",
        kwargs=dict(
            **_COMMON,
            **_GQA,
            head_dim=16,
            # A dense layer, an MoE layer with rotary embedding and chunked attention, and an MoE layer
            # with neither.
            num_hidden_layers=3,
            moe_layers=[1, 2],
            no_rope_layers=[1, 1, 0],
            attention_chunk_size=8,
            intermediate_size=INTERMEDIATE,
            intermediate_size_mlp=80,
            num_local_experts=8,
            # Released models use 1, but then the sum over a token's experts would have a single term.
            num_experts_per_tok=2,
        ),
        block="Llama4TextMoe",
        router="Llama4Router",
        experts="Llama4TextExperts",
        router_seed=17,
        # Dense experts in one batched product per projection; not part of the experts interface.
        switchable=False,
        tuple_output=True,
        # Sigmoid of the logits, but the choice is made on the logits, which do not saturate.
        router_std=0.3,
        mixed="sigmoid in fp32, scores cast back and multiplied onto the experts' input",
    ),
)
