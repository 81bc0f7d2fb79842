"""The Grouter network: what a token sees, what it does not, and that every way of running it gives the same numbers."""

from __future__ import annotations

import json
import math
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import moefx
from moefx.errors import InputError
from moefx.models.grouter import FutureTokensWarning, Grouter, GrouterCache

from ..disk import full_after
from ..profile import often

KINDS = ("mha", "mla", "linear", "conv")
VOCAB, E = 50, 8
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, num_experts=E, hidden_size=32, num_heads=4, num_layers=2, q_rank=16, kv_rank=12,
    nope_head_dim=8, rope_head_dim=4, value_head_dim=6, init_std=0.3,
)  # fmt: skip


def make(seed: int = 0, **options: Any) -> Grouter:
    """A tiny frozen Grouter whose logits are of the order of one."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureTokensWarning)
        torch.manual_seed(seed)
        return Grouter.from_config(**{**SIZES, **options}).freeze()


def some_ids(B: int = 3, S: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (B, S), generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


DOCS = torch.tensor([[7, 7, 7, 7, 7, 3, 3, 3, 3, 7, 7, 7]]).expand(3, -1)  # the last document is not the first one


# -- documents, positions, padding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_window_is_its_documents_side_by_side(kind: str, causal: bool) -> None:
    g, ids = make(kind=kind, causal=causal), some_ids()
    alone = torch.cat([g(ids[:, a:b]) for a, b in ((0, 5), (5, 9), (9, 12))], 1)
    close(g(ids, document_ids=DOCS), alone)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]])
    close(g(ids, position_ids=positions), alone)
    close(g(ids, position_ids=positions, document_ids=DOCS), alone)
    if kind != "linear" or g.config.rope:
        assert (g(ids) - alone).abs().max() > 1e-2  # without the mask, documents are not apart


@pytest.mark.parametrize("kind", KINDS)
def test_changing_one_document_leaves_the_next_one(kind: str) -> None:
    g, ids = make(kind=kind), some_ids()
    other = ids.clone()
    other[:, :5] = (other[:, :5] + 1) % VOCAB
    (idx, w), (idx2, w2) = g.route(ids, 2, document_ids=DOCS), g.route(other, 2, document_ids=DOCS)
    assert torch.equal(idx[:, 5:], idx2[:, 5:])
    assert torch.equal(w[:, 5:], w2[:, 5:])
    assert not torch.equal(idx[:, :5], idx2[:, :5])
    if kind in ("mha", "mla"):
        assert not torch.equal(g.route(ids, 2)[1][:, 5:], g.route(other, 2)[1][:, 5:])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left", [True, False])
def test_padding_is_as_if_it_were_not_there(kind: str, causal: bool, left: bool) -> None:
    g, ids = make(kind=kind, causal=causal, pad_token_id=0), some_ids()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask = mask if left else mask.flip(1)
    kept = slice(4, None) if left else slice(0, -4)
    full = g(ids, attention_mask=mask)
    assert torch.isfinite(full).all()
    close(full[1:2, kept], g(ids[1:2, kept]))
    close(full[0], g(ids[:1])[0])
    assert torch.equal(full, g(ids, attention_mask=mask.bool()))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_anywhere_in_a_document_is_as_if_it_were_not_there(kind: str) -> None:
    g, ids = make(kind=kind), some_ids()
    docs = torch.tensor([[0] * 4 + [1] * 5 + [2] * 3]).expand(3, -1)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 1, 1]]).expand(3, -1)
    full = g(ids, document_ids=docs, attention_mask=mask)
    for a, b in ((0, 3), (6, 9), (10, 12)):
        close(full[:, a:b], g(ids[:, a:b]))


@pytest.mark.parametrize("kind", KINDS)
def test_positions_matter_unless_switched_off(kind: str) -> None:
    ids, shifted = some_ids(), torch.arange(12)[None] * 3
    base = torch.arange(12)[None]
    with_rope, without = make(kind=kind), make(kind=kind, rope=False)
    assert (with_rope(ids, position_ids=base) - with_rope(ids, position_ids=shifted)).abs().max() > 1e-3
    assert torch.equal(without(ids, position_ids=base), without(ids, position_ids=shifted))


def test_rotation_is_of_pairs_by_position() -> None:
    from moefx.models.grouter_blocks import rotated

    x, pos = torch.randn(2, 5, 6, dtype=torch.float64), torch.tensor([[0, 3, 7, 8, 100]]).expand(2, -1)
    got = rotated(x, pos, 1e4)
    pairs = torch.complex(x[..., :3], x[..., 3:])
    angles = pos[..., None].double() * 1e4 ** (-torch.arange(3, dtype=torch.float64) / 3)
    want = pairs * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(got, torch.cat((want.real, want.imag), -1), atol=1e-4, rtol=0)


def test_attention_is_that_of_the_formula() -> None:
    """One layer against loops in float64, without rotation."""
    g = make(num_layers=1, rope=False).double()
    ids = some_ids(1, 6)
    block: Any = g.blocks[0]
    rms = lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    x = g.embed(ids)[0]
    q, k, v = (block.attention.qkv_proj.weight @ rms(x).T).T.reshape(6, 3, 4, 8).unbind(1)
    mixed = torch.zeros(6, 4, 8, dtype=torch.float64)
    for t in range(6):
        for n in range(4):
            p = torch.softmax(k[: t + 1, n] @ q[t, n] / math.sqrt(8), 0)
            mixed[t, n] = p @ v[: t + 1, n]
    x = x + mixed.reshape(6, 32) @ block.attention.o_proj.weight.T
    gate, up = (rms(x) @ block.mlp.gate_up_proj.weight.T).chunk(2, -1)
    x = x + (gate * torch.sigmoid(gate) * up) @ block.mlp.down_proj.weight.T
    torch.testing.assert_close(g(ids)[0], (rms(x) @ g.score.weight.T).float(), atol=1e-5, rtol=1e-5)


# -- the same numbers every way --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(1, 11), min_size=1, max_size=4, unique=True), padded=st.integers(0, 4))
def test_steps_with_a_cache_are_the_whole_call(kind: str, cuts: list[int], padded: int) -> None:
    g, ids = make(kind=kind), some_ids()
    mask = torch.ones_like(ids)
    mask[1, :padded] = 0
    bounds, cache = [0, *sorted(cuts), 12], GrouterCache()
    found = [g.step(ids[:, a:b], cache, mask[:, a:b]) for a, b in pairwise(bounds)]
    assert len(cache) == 12
    close(torch.cat(found, 1)[mask.bool()], g(ids, attention_mask=mask)[mask.bool()])


def test_a_cache_is_for_causal_routers_and_one_batch() -> None:
    with pytest.raises(InputError, match="token by token"):
        make(causal=False).step(some_ids(), GrouterCache())
    g, cache = make(), GrouterCache()
    g.step(some_ids(3), cache)
    with pytest.raises(InputError, match="the cache holds 3"):
        g.step(some_ids(2), cache)


@pytest.mark.parametrize("kind", KINDS)
def test_routing_does_not_depend_on_the_rest_of_the_batch(kind: str) -> None:
    g, ids = make(kind=kind), some_ids(4)
    order = torch.tensor([2, 0, 3, 1])
    idx, w = g.route(ids, 2)
    for rows in (order, torch.tensor([1]), torch.tensor([3, 3])):
        idx2, w2 = g.route(ids[rows], 2)
        assert torch.equal(idx2, idx[rows])
        close(w2, w[rows])
    # Rows are told apart: a transposed layout of tokens would be seen.
    assert not torch.equal(idx.transpose(0, 1).reshape(-1, 2), idx.reshape(-1, 2))


@pytest.mark.parametrize("kind", often(KINDS, list(KINDS)[:2]))
def test_traces_whole_with_a_dynamic_batch(kind: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    g = make(kind=kind)
    compiled = torch.compile(g, fullgraph=True, dynamic=True, backend=counter)
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, :4] = 0
    for masks in ({}, {"document_ids": DOCS.contiguous()}, {"attention_mask": mask}):
        before = counter.frame_count
        for B, S in ((3, 12), (2, 12), (3, 9)):
            cut = {name: m[:B, :S].clone() for name, m in masks.items()}
            close(compiled(some_ids(B, S), **cut), g(some_ids(B, S), **cut))
        assert counter.frame_count == before + 1


def test_autocast_around_it_changes_nothing() -> None:
    g, ids = make(), some_ids()
    with torch.autocast("cpu", torch.bfloat16):
        inside = g(ids)
    assert torch.equal(inside, g(ids))
    low = make().to(torch.bfloat16)
    assert low(ids).dtype == torch.float32
    assert low.selection_bias.dtype == torch.float32
    # The score layer is a product in fp32, not a rounded one.
    assert torch.equal(low(ids), low.hidden(ids).float() @ low.score.weight.float().T)


# -- routing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("normalise", ["softmax", "sigmoid"])
@settings(max_examples=10, deadline=None)
@given(k=st.integers(1, E), scale=st.floats(0.5, 4.0), seed=st.integers(0, 3))
def test_gates(normalise: str, dtype: torch.dtype, within: float, k: int, scale: float, seed: int) -> None:
    """`dtype` is that of the network; its gates are fp32."""
    g, ids = make(seed).to(dtype), some_ids(seed=seed)
    idx, w = g.route(ids, k, scale=scale, normalise=normalise)
    logits = g(ids).double()
    assert idx.dtype == torch.int64
    assert w.dtype == torch.float32
    assert (w >= 0).all()
    assert float((w.double().sum(-1) / scale - 1).abs().max()) < within
    assert all(len(set(row)) == k for row in idx.reshape(-1, k).tolist())
    chosen = logits.gather(-1, idx)
    assert (chosen.diff(dim=-1) <= 0).all()
    assert (w.diff(dim=-1) <= 0).all()
    score = chosen.exp() if normalise == "softmax" else torch.sigmoid(chosen)
    torch.testing.assert_close(w.double(), scale * score / score.sum(-1, keepdim=True), atol=1e-5, rtol=0)
    outside = logits.scatter(-1, idx, -math.inf).amax(-1)
    assert (outside <= chosen[..., -1]).all()


def test_the_bias_chooses_and_does_not_weigh() -> None:
    g, ids = make(), some_ids()
    g.selection_bias[3] = 100.0
    idx, w = g.route(ids, 2)
    assert (idx[..., 0] == 3).all()
    close(w, g(ids).gather(-1, idx).softmax(-1))
    assert torch.equal(g(ids), make()(ids))


def test_very_negative_sigmoid_gates_do_not_underflow() -> None:
    logits = torch.full((1, 1, E), -200.0)
    logits[..., 1] = -199.0
    _, w = make().choose(logits, 2, normalise="sigmoid")
    close(w[0, 0], torch.tensor([1.0, 0.0]).softmax(0))


def test_folding_by_logsumexp() -> None:
    groups = ((0, 5), (1, 2, 7), (3,), (4, 6))
    g, ids = make(fold_groups=groups), some_ids()
    scores = g.hidden(ids) @ g.score.weight.T
    assert g.num_routed == 4
    assert g.selection_bias.shape == (4,)
    close(g(ids), torch.stack([scores[..., list(m)].exp().sum(-1).log() for m in groups], -1))
    for bad in (((0, 1),), ((0, 1, 2, 3), (3, 4, 5, 6, 7)), (tuple(range(8)), ())):
        with pytest.raises(InputError, match="fold_groups"):
            make(fold_groups=bad)


# -- making, saving, freezing ----------------------------------------------------------------------------------------


def test_the_default_shape_is_the_published_one() -> None:
    with torch.device("meta"):
        g = Grouter.from_config(vocab_size=151_936, num_experts=128)
    count = sum(p.numel() for p in g.parameters())
    blocks = sum(p.numel() for p in g.blocks.parameters() if p.dim() == 2)
    assert g.config.width == 2736
    assert g.embed.weight.numel() == 151_936 * 512
    assert round(blocks / 1e6, 2) == 15.75
    assert round(count / 1e6, 1) == 93.6


def test_initial_weights() -> None:
    torch.manual_seed(0)
    g = Grouter.from_config(vocab_size=500, num_experts=16, hidden_size=64, num_heads=4, pad_token_id=3)
    assert (g.embed.weight[3] == 0).all()
    for name, p in g.named_parameters():
        if "norm" in name:
            assert (p == 1).all()
        else:
            assert 0.0185 < p.std() < 0.0215, name
    g(torch.tensor([[3, 4]])).sum().backward()
    assert g.embed.weight.grad is not None
    assert (g.embed.weight.grad[3] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_read_again(kind: str, tmp_path: Path) -> None:
    g = make(kind=kind, fold_groups=((0, 1, 2, 3), (4, 5, 6, 7)), pad_token_id=2).to(torch.bfloat16)
    g.selection_bias[:] = torch.tensor([0.1, 0.2])
    state = torch.random.get_rng_state()
    again = Grouter.from_pretrained(g.save_pretrained(tmp_path / "a" / "b"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert again.config == g.config
    for (name, a), (name2, b) in zip(g.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == name2
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert torch.equal(g(some_ids()), again(some_ids()))


def test_unreadable_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no Grouter can be read"):
        Grouter.from_pretrained(tmp_path)
    folder = make().save_pretrained(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(InputError, match="size mismatch"):
        Grouter.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(InputError, match="not that of a Grouter"):
        Grouter.from_pretrained(folder)


def test_only_a_leaking_router_warns() -> None:
    with pytest.warns(FutureTokensWarning, match="reads the future"):
        Grouter.from_config(**SIZES, causal=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Grouter.from_config(**SIZES)
        Grouter.from_config(**SIZES, kind="linear", causal=False)  # a token sees itself alone


def test_wrong_arguments() -> None:
    for options, match in (
        ({"kind": "mamba"}, "unknown kind"),
        ({"hidden": 3}, "did you mean 'hidden_size'"),
        ({"hidden_size": 30}, "no multiple"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"hidden_size": 36}, "even size"),
        ({"pad_token_id": VOCAB}, "pad_token_id"),
    ):
        with pytest.raises(InputError, match=match):
            make(**options)
    g = make()
    for k in (0, E + 1):
        with pytest.raises(InputError, match="top-"):
            g.route(some_ids(), k)
    with pytest.raises(InputError, match="normalise"):
        g.route(some_ids(), 2, normalise="sum")
    with pytest.raises(InputError, match="dimensions"):
        g(some_ids()[0])
    with pytest.raises(InputError, match="attention_mask has 4 dimensions"):
        g(some_ids(), attention_mask=torch.ones(3, 1, 12, 12))
    g.check_ids(some_ids())
    for bad in (VOCAB, -1):
        with pytest.raises(InputError, match=f"token id {bad} is outside"):
            g.check_ids(torch.tensor([[0, bad]]))


def test_frozen_means_no_gradient() -> None:
    g = Grouter.from_config(**SIZES)
    assert g(some_ids()).requires_grad
    assert g.freeze() is g
    assert not g.training
    assert not g(some_ids()).requires_grad


def test_it_is_a_public_name_loaded_when_asked_for() -> None:
    assert moefx.Grouter is Grouter
    assert moefx.grouter.Grouter is Grouter
    with pytest.raises(AttributeError, match="no attribute 'groter'"):
        moefx.groter  # noqa: B018


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    folder = make().save_pretrained(tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    for damaged in (b"", b"garbage" * 9, weights[:100], weights[:-1]):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(InputError, match="no Grouter can be read") as caught:
            Grouter.from_pretrained(folder)
        assert caught.value.why


def test_a_full_disk_leaves_the_earlier_grouter(tmp_path: Path) -> None:
    earlier = make()
    earlier.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="Grouter could not be written") as caught, full_after(1000):
        make(1, num_experts=4).save_pretrained(tmp_path)
    assert caught.value.where == str(tmp_path)
    assert torch.equal(Grouter.from_pretrained(tmp_path)(some_ids()), earlier(some_ids()))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
