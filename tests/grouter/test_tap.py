"""A teacher cut off behind a router gives what the router module gives, for HF and hand-written models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moefx.errors import CaptureError, InputError
from moefx.grouter import tap
from moefx.models.moe_lm import IDIOMS, MoELM

from ..family import zoo


def seen_by(model: nn.Module, module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The first output of a submodule in a run of the whole model in eval mode."""
    found: list[Any] = []
    hook = module.register_forward_hook(lambda _m, _a, out: found.append(out))
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(**inputs)
    finally:
        hook.remove()
        model.train(training)
    out: Tensor = found[0][0] if isinstance(found[0], tuple) else found[0]
    return out


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "layer", "padded"), [("qwen3_moe", 0, False), ("gpt_oss", 1, True)])
def test_logits_of_a_transformers_router(name: str, layer: int, padded: bool) -> None:
    entry = zoo.get(name)
    model = zoo.build(entry)
    inputs = zoo.batch(entry, padded=padded)
    inputs.pop("labels")
    routers = [m for m in model.modules() if type(m).__name__ == entry.router]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tapped = tap(model, inputs, layer=layer)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert tapped.num_experts == 8
    assert tapped.spec.k == 2
    got = tapped(inputs)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    close(got, seen_by(model, routers[layer], inputs).view(2, 16, 8))
    assert (got - seen_by(model, routers[1 - layer], inputs).view(2, 16, 8)).abs().max() > 0.1
    # Other sizes, not contiguous; one sequence alone.
    wide = {k: torch.cat((v, v.flip(0)))[:3, 2:13] for k, v in inputs.items()}
    close(tapped(wide), seen_by(model, routers[layer], wide).view(3, 11, 8))
    close(tapped({k: v[:1] for k, v in inputs.items()}), got[:1])
    # It shares the teacher's parameters.
    with torch.no_grad():
        routers[layer].weight.mul_(2.0)
    assert (tapped(inputs) - got).abs().max() > 0.1


def test_nothing_behind_the_router_is_read() -> None:
    entry = zoo.get("qwen3_moe")
    model, inputs = zoo.build(entry), {"input_ids": zoo.batch(entry)["input_ids"]}
    tapped = tap(model, inputs)
    want = tapped(inputs)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layers.1" in name or "layers.2" in name or "experts" in name or "lm_head" in name:
                p.fill_(float("nan"))
    assert torch.equal(tapped(inputs["input_ids"]), want)
    with pytest.raises(InputError, match="the batch holds"):
        tapped({**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])})


def test_a_hand_written_model() -> None:
    model = MoELM(64, 32, 48, 2, 4, 8, 2, "C").train()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5.0)
    ids = torch.randint(0, 64, (3, 10), generator=torch.Generator().manual_seed(0))
    tapped = tap(model, ids, layer=1)
    block: Any = model.layers[1]
    normed = seen_by(model, block.moe_norm, {"input_ids": ids})
    close(tapped(ids), normed @ block.moe.gate.weight.T)


class SequenceMajor(nn.Module):
    """Flattens the tokens as [S, B]: a student would learn from the rows of others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.moe = IDIOMS["C"](16, 24, 8, 2)
        self.moe.reset_parameters(torch.Generator().manual_seed(0), std=0.5)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.moe(self.embed(input_ids).transpose(0, 1)).transpose(0, 1)
        return out


def test_another_layout_of_tokens_is_an_error() -> None:
    ids = torch.randint(0, 64, (4, 4), generator=torch.Generator().manual_seed(0))  # B = S: the shape tells nothing
    with pytest.raises(CaptureError, match="changes the router logits of another"):
        tap(SequenceMajor(), ids)


def test_a_router_in_no_normal_form_is_an_error_with_the_reason() -> None:
    entry = zoo.get("phimoe")
    with pytest.raises(CaptureError, match="in no normal form") as e:
        tap(zoo.build(entry), {"input_ids": zoo.batch(entry)["input_ids"]})
    assert "router left as it is" in str(e.value.why)


def test_wrong_teachers() -> None:
    model, ids = MoELM(64, 32, 48, 1, 4, 8, 2, "C"), torch.zeros(2, 8, dtype=torch.int64)
    with pytest.raises(InputError, match="no MoE layer 1") as e:
        tap(model, ids, layer=1)
    assert "0..0" in str(e.value.todo)
    with pytest.raises(InputError, match="no 'input_ids'"):
        tap(model, ids[0])
    dense: nn.Module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    dense.forward = lambda input_ids: dense[1](dense[0](input_ids))  # type: ignore[method-assign,operator,index]
    with pytest.raises(CaptureError, match="no MoE layer that moefx can raise"):
        tap(dense, ids)
