"""Tiny random-weight MoE causal language models, one per transformers family.

Every entry builds in well under a second on a CPU and exercises one routing scheme, experts layout and
block layout. The dimensions are chosen so that mistakes show:

* the experts' intermediate size is 48 with a hidden size of 64, so that no two of H, I and 2I agree and a
  transposed or unsplit weight cannot pass a shape check by accident;
* weights have a standard deviation of 0.1 rather than the usual 0.02, because with a hidden size of 64
  the usual value makes an expert's output around a thousand times smaller than the residual stream, and a
  wrong expert would then not be visible in the loss;
* router weights are larger still, so that the routing is far from uniform and the k-th and (k+1)-th
  scores are far apart compared with rounding differences between two implementations;
* parameters that are constant after the library's own initialisation (biases of zero, norm weights of
  one) and the score correction biases of bias-balanced routers get random values, because a pass which
  drops them would otherwise go unnoticed.

transformers is imported only when a model is built.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

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
            **_COMMON,
            **_GQA,
            num_hidden_layers=2,
            intermediate_size=INTERMEDIATE,
            num_experts=8,
            num_experts_per_tok=2,
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

NAMES: tuple[str, ...] = tuple(e.name for e in ENTRIES)
_BY_NAME = {e.name: e for e in ENTRIES}


def get(name: str) -> Entry:
    """Returns the entry with this name; raises KeyError if there is none."""
    return _BY_NAME[name]


def make_config(entry: Entry, **overrides: Any):
    """Returns a new transformers config of the entry, with keyword arguments replaced by `overrides`."""
    import transformers

    kwargs = dict(entry.kwargs)
    if entry.router_logits:
        kwargs["output_router_logits"] = True
    kwargs.update(overrides)
    return getattr(transformers, entry.config_class)(**kwargs)


def build(
    entry: Entry,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    experts_implementation: str | None = None,
    **overrides: Any,
) -> torch.nn.Module:
    """Builds a randomly initialised model of the family, in training mode, on the CPU.

    The values depend on the entry, the overrides and the seed alone; a lower precision model holds the
    rounded values of the fp32 one. The global random state is left as it was.

    Args:
        entry: row of the table.
        seed: seed of all weights.
        dtype: dtype of parameters and saved buffers, except for those that the class keeps in fp32 (most
            correction biases, the router weight in Ernie and Hunyuan), as when a checkpoint is loaded
            with this dtype. Unsaved buffers (rotary frequencies) stay in fp32.
        experts_implementation: name in transformers' experts interface ("eager", "grouped_mm", ...), or
            None for its default.
        overrides: config arguments that replace those of the entry.

    Returns:
        The causal language model; `model(**batch(entry))` has a scalar fp32 `loss`.
    """
    import transformers

    config = make_config(entry, **overrides)
    cls = getattr(transformers, entry.model_class)
    kwargs: dict[str, Any] = dict(dtype=torch.float32, attn_implementation=entry.attn_implementation)
    if experts_implementation is not None:
        kwargs["experts_implementation"] = experts_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls._from_config(config, **kwargs)
    _fill(model, entry, seed)
    if dtype != torch.float32:
        with torch.device("meta"):
            like = cls._from_config(make_config(entry, **overrides), **{**kwargs, "dtype": dtype})
        _cast(model, dtype, like)
    return model.train()


def batch(entry: Entry, seed: int = 1, *, padded: bool = False) -> dict[str, torch.Tensor]:
    """Makes a training batch.

    Args:
        entry: row of the table.
        seed: seed of the token ids.
        padded: whether the second sequence ends in padding, with an `attention_mask` that says so. The
            mask takes the auxiliary loss through its weighted branch.

    Returns:
        `input_ids` [2, 16] int64; `labels` [2, 16] int64, the ids with a few leading positions (and the
        padding) set to -100; with `padded` also `attention_mask` [2, 16] int64 of zeros and ones.
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, entry.kwargs["vocab_size"], (BATCH, SEQ), generator=generator)
    labels = input_ids.clone()
    labels[:, :IGNORED_PREFIX] = -100
    out = dict(input_ids=input_ids, labels=labels)
    if padded:
        mask = torch.ones_like(input_ids)
        mask[1, SEQ - 5 :] = 0
        labels[mask == 0] = -100
        out["attention_mask"] = mask
    return out


def reference_step(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], seed: int = 0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Runs one eager training step of the model as it is, without an optimizer.

    The random state is set before the forward pass, for routers and dropout that draw from it, and
    restored afterwards. Gradients already present on the model are dropped; it is left without any.

    Args:
        model: a model with a `loss` in its output, for example from `build`. Put in training mode.
        inputs: keyword arguments of its forward, for example from `batch`.
        seed: seed of the forward and backward pass.

    Returns:
        The loss, a detached scalar, and the gradients by parameter name, each with the shape and dtype of
        its parameter. Parameters that got no gradient are left out.
    """
    model.train()
    model.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        loss = model(**inputs).loss
        loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), grads


def _is_correction(name: str) -> bool:
    return name.endswith(("e_score_correction_bias", "expert_bias"))


@torch.no_grad()
def _fill(model: torch.nn.Module, entry: Entry, seed: int) -> None:
    """Replaces routers, experts, correction biases and constant parameters by random values, in place."""
    generator = torch.Generator().manual_seed(seed + 1000)
    # A stream of its own, so that the router seed changes nothing else.
    router_generator = torch.Generator().manual_seed(seed + 2000 + entry.router_seed)

    def normal(t: torch.Tensor, std: float, routing: bool = False) -> torch.Tensor:
        stream = router_generator if routing else generator
        return torch.randn(t.shape, generator=stream, dtype=torch.float32) * std

    done: set[int] = set()
    counts = {entry.router: 0, entry.experts: 0, entry.block: 0}
    for module in model.modules():
        kind = type(module).__name__
        if kind in counts:
            counts[kind] += 1
        if kind not in (entry.router, entry.experts):
            continue
        # Not left to the class: router modules hold zeros and experts uninitialised memory until the
        # model's own initialisation covers them, which differs between classes and versions.
        for name, p in module.named_parameters():
            if _is_correction(name):
                continue
            if kind == entry.router:
                p.copy_(normal(p, entry.router_std if p.dim() == 2 else 0.1, routing=True))
            else:
                p.copy_(normal(p, WEIGHT_STD if p.dim() == 3 else BIAS_STD))
            done.add(id(p))
    if set(counts.values()) != {entry.moe_layers}:
        raise AssertionError(f"{entry.name}: expected {entry.moe_layers} of each of {counts}")

    corrections = 0
    for name, t in (*model.named_buffers(), *model.named_parameters()):
        if _is_correction(name):
            t.copy_(normal(t, entry.correction_std, routing=True))
            done.add(id(t))
            corrections += 1
    if (corrections > 0) != (entry.correction_std > 0):
        raise AssertionError(f"{entry.name}: found {corrections} correction biases")

    for p in model.parameters():
        if id(p) in done:
            continue
        if not torch.isfinite(p).all():
            p.copy_(normal(p, BIAS_STD))
        elif p.numel() > 1 and p.min() == p.max():
            p.copy_(normal(p, BIAS_STD) if p.flatten()[0] == 0 else p * (1 + normal(p, NORM_SPREAD)))
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all() or (p.numel() > 1 and p.min() == p.max()):
            raise AssertionError(f"{entry.name}: parameter {name} is degenerate")


@torch.no_grad()
def _cast(model: torch.nn.Module, dtype: torch.dtype, like: torch.nn.Module) -> None:
    """Casts parameters and saved buffers the way loading a checkpoint in this dtype would, in place.

    Neither `model.to(dtype)` nor building the model in `dtype` gives that layout. The first also casts the
    rotary frequencies and what the class holds in fp32; the second, which is what `like` is, knows the
    tensors that a module creates with an explicit dtype but not the class's list of names to keep in fp32.
    """
    keep = tuple(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        keep += tuple(model._keep_in_fp32_modules or ())
    target = {name: t.dtype for name, t in like.state_dict().items()}
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if name in target and not any(f".{k}." in f".{name}." for k in keep):
            t.data = t.data.to(target[name])
    model.config.dtype = dtype
