"""Tiny models of transformers whose experts are not behind the library's experts interface.

Their experts are loops over those that were hit, lists of products per projection, or dense products; moefx raises them
by value (`moefx.raising`). Sizes and standard deviations are chosen as in `zoo`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from .entry import BATCH, HIDDEN, IGNORED_PREFIX, INTERMEDIATE, SEQ, VOCAB, WEIGHT_STD

EXPERTS = 6
_COMMON: dict[str, Any] = dict(vocab_size=VOCAB, use_cache=False)


@dataclass(frozen=True)
class Loop:
    """One model.

    Attributes:
        name: short name, used as a test id.
        config_class, model_class: names of the transformers classes.
        kwargs: arguments of the config class.
        idioms: path of every raised block -> how it is read.
        left: paths of look-alikes that are left alone.
        masks: attention masks must be passed, for the class makes none while it is traced.
        router_std: standard deviation of the router weights.
    """

    name: str
    config_class: str
    model_class: str
    kwargs: dict[str, Any] = field(hash=False)
    idioms: dict[str, str] = field(hash=False)
    left: tuple[str, ...] = ()
    masks: bool = False
    router_std: float = 0.5


LOOPS: tuple[Loop, ...] = (
    Loop(
        name="switch",
        config_class="SwitchTransformersConfig",
        model_class="SwitchTransformersForConditionalGeneration",
        kwargs=dict(
            **_COMMON,
            d_model=HIDDEN,
            d_kv=16,
            d_ff=INTERMEDIATE,
            num_heads=4,
            num_layers=2,
            num_decoder_layers=2,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            num_experts=EXPERTS,
            expert_capacity=3,  # fewer than some experts are sent in a row of 16 tokens
            dropout_rate=0.0,
            router_jitter_noise=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            output_router_logits=True,
        ),
        idioms={
            "encoder.block.1.layer.1.mlp": "loop over experts: plain relu | nk",
            "decoder.block.1.layer.2.mlp": "loop over experts: plain relu | nk",
        },
        masks=True,
    ),
    Loop(
        name="nllb_moe",
        config_class="NllbMoeConfig",
        model_class="NllbMoeForConditionalGeneration",
        kwargs=dict(
            **_COMMON,
            d_model=HIDDEN,
            encoder_ffn_dim=INTERMEDIATE,
            decoder_ffn_dim=INTERMEDIATE,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_layers=2,
            decoder_layers=2,
            encoder_sparse_step=2,
            decoder_sparse_step=2,
            num_experts=EXPERTS,
            expert_capacity=6,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            moe_token_dropout=0.0,
            encoder_layerdrop=0.0,
            decoder_layerdrop=0.0,
            max_position_embeddings=64,
            output_router_logits=True,
        ),
        idioms={
            "model.encoder.layers.1.ffn": "loop over experts: plain relu | nk bias",
            "model.decoder.layers.1.ffn": "loop over experts: plain relu | nk bias",
        },
    ),
    Loop(
        name="dbrx",
        config_class="DbrxConfig",
        model_class="DbrxForCausalLM",
        kwargs=dict(
            **_COMMON,
            d_model=HIDDEN,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=10000.0),
            ffn_config=dict(
                hidden_size=HIDDEN,
                ffn_hidden_size=INTERMEDIATE,
                moe_num_experts=EXPERTS,
                moe_top_k=2,
                moe_loss_weight=0.05,
                moe_jitter_eps=0.05,
            ),
            output_router_logits=True,
        ),
        idioms={f"transformer.blocks.{i}.ffn": "loop over experts: silu | nk" for i in range(2)},
    ),
    Loop(
        name="longcat_flash",
        config_class="LongcatFlashConfig",
        model_class="LongcatFlashForCausalLM",
        kwargs=dict(
            **_COMMON,
            hidden_size=HIDDEN,
            num_hidden_layers=4,
            num_layers=2,
            num_attention_heads=4,
            ffn_hidden_size=96,
            q_lora_rank=32,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            head_dim=8,
            v_head_dim=16,
            moe_topk=3,
            n_routed_experts=EXPERTS,
            zero_expert_num=3,
            expert_ffn_hidden_size=INTERMEDIATE,
            routed_scaling_factor=1.5,
            max_position_embeddings=64,
        ),
        idioms={f"model.layers.{i}.mlp": "loop over experts: silu | nk" for i in range(2)},
    ),
    Loop(
        name="jetmoe",
        config_class="JetMoeConfig",
        model_class="JetMoeForCausalLM",
        kwargs=dict(
            **_COMMON,
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_key_value_heads=2,
            kv_channels=16,
            intermediate_size=INTERMEDIATE,
            max_position_embeddings=64,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
            output_router_logits=True,
            aux_loss_coef=0.01,
        ),
        idioms={f"model.layers.{i}.mlp": "sorted rows: silu | nk" for i in range(2)},
        left=("model.layers.0.self_attention.experts", "model.layers.1.self_attention.experts"),
    ),
)
NAMES: tuple[str, ...] = tuple(e.name for e in LOOPS)


def get(name: str) -> Loop:
    """The entry with this name; raises KeyError if there is none."""
    return {e.name: e for e in LOOPS}[name]


def build(entry: Loop, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> torch.nn.Module:
    """A model with random weights, in training mode, on the CPU. The values depend on the arguments alone."""
    import transformers

    if entry.name in ("switch", "nllb_moe") and torch.__version__ < "2.12":
        pytest.skip("their routers cast a module within the forward, which torch 2.11 does not trace")
    config = getattr(transformers, entry.config_class)(**{**entry.kwargs, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, entry.model_class)._from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + 1000)
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = entry.router_std if "router" in name else WEIGHT_STD
            gain = p.dim() == 1 and "norm" in name and not name.endswith("bias")
            p.copy_(torch.randn(p.shape, generator=generator) * std + (1.0 if gain else 0.0))
        for name, b in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                b.copy_(torch.randn(b.shape, generator=generator) * 0.05)
    return model.to(dtype).train()


def batch(entry: Loop, seed: int = 1, *, padded: bool = False) -> dict[str, torch.Tensor]:
    """A training batch as of `zoo.batch`; of encoder-decoder models the labels are what the decoder reads."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (BATCH, SEQ), generator=generator)
    labels = ids.clone()
    labels[:, :IGNORED_PREFIX] = -100
    out = dict(input_ids=ids, labels=labels)
    if entry.masks or padded:
        mask = torch.ones_like(ids)
        if padded:
            mask[1, SEQ - 5 :] = 0
            labels[mask == 0] = -100
        out["attention_mask"] = mask
    return out
