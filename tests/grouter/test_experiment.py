"""Distillation on real text: a small trained teacher, and a Grouter that learns its first router."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moefx.grouter import Grouter, distill, prefix_consistency, tune
from moefx.grouter.running import overlap
from moefx.grouter.tap import tap
from moefx.train.corpus import embedded_corpus

VOCAB, EXPERTS, K, B, S = 512, 16, 2, 32, 64


def tokens() -> Tensor:
    """Word pieces of the embedded text: the 511 most frequent ones, and one id for all others."""
    pieces = re.findall(rb"[A-Za-z]+|[0-9]| +|\n|[^\sA-Za-z0-9]", b"\n".join(text for _, text in embedded_corpus()))
    ids = {piece: i + 1 for i, (piece, _) in enumerate(Counter(pieces).most_common(VOCAB - 1))}
    return torch.tensor([ids.get(piece, 0) for piece in pieces])


def windows(data: Tensor, seed: int) -> Iterator[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    while True:
        yield data[torch.randint(0, len(data) - S, (B, 1), generator=rng) + torch.arange(S)]


def trained_teacher(data: Tensor, steps: int) -> tuple[torch.nn.Module, float]:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, head_dim=16, num_experts=EXPERTS, num_experts_per_tok=K,
        norm_topk_prob=True, output_router_logits=True, router_aux_loss_coef=0.01, use_cache=False,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for ids, _ in zip(windows(data, 1), range(steps), strict=False):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval(), float(loss.detach())


@pytest.mark.nightly
def test_a_causal_student_learns_a_trained_router() -> None:
    data = tokens()
    cut = len(data) * 97 // 100
    train, val = data[:cut], data[cut:]
    teacher, loss = trained_teacher(train, 1000)
    held_out = [ids for ids, _ in zip(windows(val, 2), range(8), strict=False)]
    source = tap(teacher, held_out[0])
    torch.manual_seed(1)
    g = Grouter.from_config(
        vocab_size=VOCAB, num_experts=EXPERTS, hidden_size=48, num_layers=2, num_heads=4, intermediate_size=128
    )
    untrained = [overlap(g(ids).detach().flatten(0, 1), source(ids).flatten(0, 1), K)[0] for ids in held_out]
    found = distill(source, g, windows(train, 3), steps=600, lr=2e-3, warmup=60, eval_batches=held_out, progress=False)
    print(f"teacher's loss {loss:.3f}; {found.rows()}")
    assert sum(untrained) / 8 < 0.1
    assert found.kl < 0.03
    assert found.exact > 0.6
    assert prefix_consistency(g.freeze(), held_out[0], k=K).changed_sets == 0
    # The router is very uneven: without the anchor, balance is bought with more than half of the structure.
    tuned = tune(g, windows(train, 4), k=K, steps=100, anchor=0.1, eval_batches=held_out, progress=False)
    print(tuned.rows())
    assert tuned.maxvio_after < 0.7 * tuned.maxvio_before
    assert tuned.overlap > 0.5
