"""Fused projections and heads: a split parameter is stepped as its blocks would be, each by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moefx.errors import InputError
from moefx.optim import LiteConfig, Muon, MuonLITE, Soap, SoapLITE, param_groups
from tests.family import zoo

from .test_groups import Fused, lin, module

Tensor = torch.Tensor
LITE = LiteConfig(2.0, -0.25, 1.0)
MADE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "muon": lambda g, **o: Muon(g, lr=0.02, **o),
    "muon-lite": lambda g, **o: MuonLITE(g, lr=0.02, lite=LITE, **o),
    "muon-left": lambda g, **o: MuonLITE(g, lr=0.02, lite=LiteConfig(side="small"), **o),
    "muon-parity": lambda g, **o: MuonLITE(g, lr=0.02, lite=LiteConfig(mode="parity"), **o),
    "soap": lambda g, **o: Soap(g, frequency=2, **o),
    "soap-lite": lambda g, **o: SoapLITE(g, lite=LITE, frequency=2, **o),
}
SIZES: list[tuple[Any, list[int]]] = [((12, 12, 12), [12] * 3), ((16, 4, 4), [16, 4, 4]), (4, [4] * 6), ((24,), [24])]


def gradient(rows: int, t: int) -> Tensor:
    return torch.randn(rows, 10, generator=torch.Generator().manual_seed(t))


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize(("split", "sizes"), SIZES)
@pytest.mark.parametrize("kind", list(MADE))
def test_a_split_matrix_is_stepped_as_its_blocks(kind: str, split: Any, sizes: list[int], layout: str) -> None:
    rows = sum(sizes)
    start = gradient(rows, 99)

    def stored(x: Tensor) -> Tensor:
        return x.mT.contiguous() if layout == "in_out" else x

    fused = nn.Parameter(stored(start))
    apart = [nn.Parameter(stored(x)) for x in start.split(sizes)]
    mine = MADE[kind]([{"params": [fused], "split": split}], layout=layout)
    theirs = MADE[kind]([{"params": apart}], layout=layout)
    for t in range(5):
        g = gradient(rows, t)
        if t == 3:
            g[0] = torch.nan  # the first block alone is skipped
        if t == 4:
            g[-sizes[-1] :] = 0
        fused.grad = stored(g)
        for p, x in zip(apart, g.split(sizes), strict=True):
            p.grad = stored(x)
        mine.step()
        theirs.step()
    found = (fused.mT if layout == "in_out" else fused).detach()
    wanted = torch.cat([p.detach().mT if layout == "in_out" else p.detach() for p in apart])
    assert torch.allclose(found, wanted, atol=1e-6, rtol=0)
    assert sum(mine.skipped().values()) == sum(theirs.skipped().values()) == 1


def test_a_whole_matrix_is_another_update() -> None:
    # The negative control: without the split, the blocks share one polar factor.
    one, two = nn.Parameter(gradient(24, 99)), nn.Parameter(gradient(24, 99))
    for p, split in ((one, None), (two, (12, 12))):
        p.grad = gradient(24, 0)
        Muon([{"params": [p], "split": split}], lr=0.02).step()
    assert (one - two).abs().max() > 1e-3


@pytest.mark.parametrize("rounding", ["nearest", "master", "stochastic"])
@pytest.mark.parametrize("kind", list(MADE))
def test_resuming_is_the_uninterrupted_run_bitwise(kind: str, rounding: str) -> None:
    def made() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        p = nn.Parameter(gradient(24, 99).bfloat16())
        return p, MADE[kind]([{"params": [p], "split": (16, 4, 4)}], rounding=rounding)

    def train(p: nn.Parameter, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for t in steps:
            p.grad = gradient(24, t).bfloat16()
            optimizer.step()

    p, optimizer = made()
    train(p, optimizer, range(3))
    saved, weights = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
    train(p, optimizer, range(3, 6))
    q, again = made()
    again.load_state_dict(saved)
    q.data.copy_(weights)
    train(q, again, range(3, 6))
    assert torch.equal(p, q)
    other = MADE[kind]([{"params": [nn.Parameter(weights)], "split": 4}], rounding=rounding)
    with pytest.raises(InputError, match="split"):
        other.load_state_dict(saved)


def test_diagnostics_are_of_blocks() -> None:
    p = nn.Parameter(gradient(24, 99))
    optimizer = MuonLITE([{"params": [p], "names": ["qkv"], "split": (16, 4, 4)}])
    for t in range(2):
        p.grad = gradient(24, t)
        optimizer.step()
    found = optimizer.diagnostics()
    assert {name: len(metrics["rank"]) for name, metrics in found.items()} == {"qkv.0": 1, "qkv.1": 2}


def test_wrong_splits() -> None:
    p, stack, vector = (nn.Parameter(torch.zeros(*s)) for s in ((24, 10), (2, 24, 10), (24,)))
    cases: list[tuple[nn.Parameter, Any, str]] = [
        (p, (16, 4), r"16 \+ 4 = 20"),
        (p, 5, "divisor of 24"),
        (p, (), "no size"),
        (p, (25, -1), "no size"),
        (p, 0, "no size"),
        (p, (12.0, 12.0), "no size"),
        (stack, 12, "no matrix to split"),
        (vector, 12, "no matrix to split"),
    ]
    for parameter, split, match in cases:
        with pytest.raises(InputError, match=match):
            Muon([{"params": [parameter], "split": split}])
    with pytest.raises(InputError, match="divisor of 10"):
        Muon([{"params": [p], "split": 24, "layout": "in_out"}])
    with pytest.raises(InputError, match="element by element"):
        Muon([{"params": [p], "split": 12, "algorithm": "adamw"}])


# -- found in models
# --------------------------------------------------------------------------------------------------------------------


def found(root: nn.Module, split: Any) -> dict[str, Any]:
    groups = param_groups(root, split=split, verbose=False)
    assert sum(len(g["params"]) for g in groups) == len(list(root.parameters()))
    return {n: g["split"] for g in groups for n in g["names"] if "split" in g}


class Counted(Fused):
    """Grouped queries: four heads of four, two of keys and values; attributes that say it are given."""

    def __init__(self, **counts: int) -> None:
        super().__init__(kv=8)
        vars(self).update(counts)


@pytest.mark.parametrize(
    "counts", [{"num_heads": 4}, {"head_dim": 4}, {"n_head": 4, "n_kv_head": 2}, {"head_size": 4, "num_heads": 4}]
)
def test_fused_grouped_queries(counts: dict[str, int]) -> None:
    assert found(Counted(**counts), "qkv") == {"a.weight": (16, 8, 8)}
    assert found(Counted(**counts), "heads") == {"a.weight": 4}


def config(**values: int) -> Any:
    return type("Config", (), values)()


def test_counts_may_be_in_the_config_and_projections_one_level_down() -> None:
    fused = Fused(kv=4)
    fused.config = config(num_attention_heads=4, num_key_value_heads=1)
    assert found(fused, "qkv") == {"a.weight": (16, 4, 4)}
    nested = module(a=module(q=lin(16, 16), k=lin(16, 16), v=lin(16, 16)), b=module(dense=lin(16, 16)))
    nested.a.num_attention_heads = 4
    assert found(nested, "heads") == {f"a.{x}.weight": 4 for x in "qkv"}
    half = module(a=lin(16, 16), b=lin(16, 8), d=lin(16, 16))  # keys and values in one
    half.num_heads = 8
    assert found(half, "qkv") == {"b.weight": (4, 4)}


def test_torchs_attention() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 24)
    assert found(layer, "qkv") == {"self_attn.in_proj_weight": (16, 16, 16)}
    assert found(layer, "heads") == {"self_attn.in_proj_weight": 4}
    apart = module(x=nn.MultiheadAttention(16, 4, kdim=8, vdim=8))
    assert found(apart, "heads") == {f"x.{x}_proj_weight": 4 for x in "qkv"}


@pytest.mark.parametrize(
    "counts", [{}, {"num_heads": 3}, {"num_heads": 4, "head_dim": 8}, {"num_heads": 4, "n_kv_head": 1}]
)
def test_counts_that_do_not_fit_are_not_believed(counts: dict[str, int]) -> None:
    with pytest.raises(InputError, match="fits no matrix"):
        param_groups(Counted(**counts), split="qkv", verbose=False)


def test_an_mlp_is_not_split() -> None:
    gated = module(a=lin(16, 32), c=lin(16, 16))  # fused gate and up
    gated.intermediate = 16
    for kind in ("qkv", "heads"):
        with pytest.raises(InputError, match="fits no matrix"):
            param_groups(gated, split=kind, verbose=False)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "hunyuan_v1_moe"])
def test_heads_of_families(name: str) -> None:
    model = zoo.build(zoo.get(name))
    splits = found(model, "heads")
    head = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    assert set(splits.values()) == {head}
    heads = {"q": model.config.num_attention_heads, "k": model.config.num_key_value_heads}
    for path, p in model.named_parameters():
        for x in "qkv":
            if path.endswith(f"self_attn.{x}_proj.weight"):
                assert p.shape[0] == heads["k" if x == "v" else x] * head
                assert (path in splits) == (p.shape[0] > head)
    with pytest.raises(InputError, match=r"fits no matrix[\s\S]*may not be fused"):
        param_groups(model, split="qkv", verbose=False)


def test_latent_attention_is_left_whole() -> None:
    with pytest.raises(InputError, match="fits no matrix"):
        param_groups(zoo.build(zoo.get("deepseek_v3")), split="heads", verbose=False)


def test_by_path_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    block = Fused(kv=4)
    groups = param_groups(block, split={"a.weight": [16, 4, 4]})
    assert "16+4+4" in capsys.readouterr().err
    assert [g.get("split") for g in groups if g["role"] == "attention"] == [None, (16, 4, 4)]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"split": {"a.wieght": 4}}, "did you mean 'a.weight'"),
        ({"split": {"a.bias": 4}}, "no matrix that muon updates"),
        ({"split": "kvq"}, "unknown split"),
        ({"split": {"a.weight": 5}}, "24 output features are not blocks of 5"),
        ({"split": {"a.weight": [16, 4]}}, "the blocks do not add up to 24"),
        ({"split": {"a.weight": 0}}, "split=0 is no size"),
        ({"split": "qkv", "algorithm": "adamw"}, "element by element"),
    ]
    for options, match in cases:
        with pytest.raises(InputError, match=match):
            param_groups(block, verbose=False, **options)


def test_groups_with_a_split_train() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    optimizer = MuonLITE(param_groups(layer, split="heads", verbose=False), lr=0.01)
    x, losses = torch.randn(4, 6, 16), []
    for _ in range(8):
        loss = (layer(x) - x.roll(1, 0)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
