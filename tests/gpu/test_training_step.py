"""A whole training step on the device: as the model without moefx, captured in a CUDA graph, without a host sync."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moefx

Tensor = torch.Tensor
RECIPES = ("bf16", "fp8_flow")


def model(recipe: str) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=16, num_experts_per_tok=4,
        max_position_embeddings=512, use_cache=False, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).cuda().bfloat16().train()


def batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(0, 512, (4, 129), generator=torch.Generator().manual_seed(seed)).cuda()
    return {"input_ids": ids, "labels": ids}


def grads(m: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}


def step(m: Any, inputs: dict[str, Tensor]) -> Tensor:
    m.zero_grad(set_to_none=True)
    loss: Tensor = m(**inputs).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_loss_and_gradients_are_the_models(recipe: str, codegen: str) -> None:
    net = model(recipe)
    want = step(net, batch())
    reference = grads(net)
    opt = moefx.optimize(net, batch(), recipe=recipe, codegen=codegen)
    got = step(opt, batch())
    tolerance = 2e-2 if recipe == "bf16" else 1e-1
    assert abs(got - want) / want < tolerance / 4
    for name, g in grads(opt).items():
        error = (g.double() - reference[name].double()).norm() / reference[name].double().norm().clamp_min(1e-12)
        assert error < tolerance * 4, f"{name}: {error}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_runs_give_the_same_bits(recipe: str) -> None:
    net = model(recipe)
    opt = moefx.optimize(net, batch(), recipe=recipe, codegen="eager")
    first, one = step(opt, batch()), grads(opt)
    second, two = step(opt, batch()), grads(opt)
    assert torch.equal(first, second)
    experts = [n for n in one if "experts" in n or "gate" in n]
    assert experts
    assert all(torch.equal(one[n], two[n]) for n in experts)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_waits_for_nothing_and_is_captured_in_a_graph(recipe: str) -> None:
    net = model(recipe)
    inputs = batch()
    opt = moefx.optimize(net, inputs, recipe=recipe, codegen="eager")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            want = step(opt, inputs)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(opt, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    opt.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = opt(**inputs).loss
        loss.backward()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(loss.detach(), want)
    inputs["input_ids"].copy_(batch(1)["input_ids"])
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(loss.detach(), want)
