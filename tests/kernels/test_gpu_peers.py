"""What `benchmarks/gpu/peers.py` asks of other projects, with stand-ins for them: none is installed here."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SOURCE = Path(__file__).parents[2] / "benchmarks" / "gpu" / "peers.py"
T, H, I, E, K = 12, 32, 16, 4, 2


@pytest.fixture
def peers() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_peers", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Experts(nn.Module):
    """The interface of ScatterMoE's GLUMLP, computed token by token."""

    def __init__(self, hidden: int, inner: int, experts: int, k: int, activation: nn.Module) -> None:
        super().__init__()
        self.up, self.down = (
            nn.Parameter(torch.empty(experts, 2 * inner, hidden)),
            nn.Parameter(torch.empty(experts, hidden, inner)),
        )
        self.k, self.activation = k, activation

    def forward(self, x: Tensor, weights: Tensor, idx: Tensor) -> Tensor:
        assert idx.shape == weights.shape == (len(x), self.k)
        out = torch.zeros_like(x)
        for t in range(len(x)):
            for e, w in zip(idx[t].tolist(), weights[t], strict=True):
                gate, up = (self.up[e] @ x[t]).chunk(2)
                out[t] += w * (self.down[e] @ (self.activation(gate) * up))
        return out


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    for whole in (name.rpartition(".")[0], name):
        if whole:
            monkeypatch.setitem(sys.modules, whole, types.ModuleType(whole))
    vars(sys.modules[name]).update(members)


def test_what_is_not_installed_is_named(peers: Any) -> None:
    missing: set[str] = set()
    for name in peers.LAYERS:
        assert peers.layer(name, (T, H, I, E, K), "cpu", nn.Identity, missing) is None
    assert peers.moves("permute", {}, missing) is None
    assert missing == {"liger_kernel", "scattermoe", "sonicmoe", "transformer_engine"}


def test_scattermoe_is_given_the_routing_of_transformers(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    torch.manual_seed(0)
    stand_in(monkeypatch, "scattermoe.mlp", GLUMLP=Experts)
    made = peers.layer("scattermoe", (T, H, I, E, K), "cpu", nn.Identity, set())
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    made.float()
    config = Qwen3MoeConfig(
        hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=K, norm_topk_prob=True
    )
    block = Qwen3MoeSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(made.gate.weight)
        block.experts.gate_up_proj.copy_(made.experts.up)
        block.experts.down_proj.copy_(made.experts.down)
    x = torch.randn(2, T // 2, H)
    want = block(x)
    want = want[0] if isinstance(want, tuple) else want
    torch.testing.assert_close(made(x), want)
    block.gate.weight.data.neg_()  # the test can fail
    other = block(x)
    assert not torch.allclose(made(x), other[0] if isinstance(other, tuple) else other)


def test_transformer_engine_is_given_a_mask_of_the_same_choices(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def moe_permute(x: Tensor, mask: Tensor, num_out_tokens: int, map_type: str) -> tuple[Tensor, Tensor]:
        assert (map_type, num_out_tokens, mask.dtype) == ("mask", T * K, torch.int32)
        token = mask.t().nonzero()[:, 1]
        return x[token], token

    def moe_unpermute(rows: Tensor, token: Tensor, restore_shape: torch.Size, map_type: str) -> Tensor:
        return torch.zeros(restore_shape).index_add_(0, token, rows)

    stand_in(monkeypatch, "transformer_engine.pytorch", moe_permute=moe_permute, moe_unpermute=moe_unpermute)
    x, idx = torch.randn(T, H), torch.rand(T, E).topk(K).indices
    operands = types.SimpleNamespace(x=x, idx=idx, E=E)
    order = idx.flatten().argsort(stable=True)
    torch.testing.assert_close(peers.moves("permute", operands, set())()[0], x[order // K])
    torch.testing.assert_close(peers.moves("unpermute", operands, set())(), K * x)
