"""`route_by_token`: which row is which token, and what precomputed routing may hold, in the example and in later calls.

The oracle is the model in eager mode, whose experts a hook hands the indices and weights of each row.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import moefx
from moefx.routing import check_choice
from tests import reference as ref

pytest.importorskip("transformers")
Tensor = torch.Tensor
WORDS, E, K = 19, 4, 2


class Table(nn.Module):
    """Logits by token id."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(WORDS, E, generator=torch.Generator().manual_seed(1)))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table[input_ids]


class Net(nn.Module):
    """One MoE block whose rows are those of the tokens in some order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.block = order, ref.Block()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.emb, self.head = nn.Embedding(WORDS, ref.HIDDEN), nn.Linear(ref.HIDDEN, WORDS)

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        """Logits [B, S, WORDS]."""
        h = self.emb(input_ids) if inputs_embeds is None else inputs_embeds
        h = h + h.cumsum(1) / 8  # tokens of one sequence meet
        if self.order == "sequence":
            return self.head(self.block.moe(h.transpose(0, 1).contiguous()).transpose(0, 1))
        if self.order == "backwards":
            return self.head(self.block.moe(h.flip(1)).flip(1))
        if self.order == "blind":
            return self.head(h + self.block.moe(torch.ones_like(h)))
        return self.head(self.block.moe(h))


def ids(B: int = 2, S: int = 5) -> Tensor:
    return torch.randint(0, WORDS, (B, S), generator=torch.Generator().manual_seed(0))


def by_hand(net: Net, inputs: dict[str, Tensor], idx: Tensor, w: Tensor) -> Tensor:
    """The model with the experts of tokens idx [B, S, K], weighted by w."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        turn = net.order == "sequence"
        return args[0], *((t.transpose(0, 1) if turn else t).flatten(0, 1) for t in (idx, w))

    handle = net.block.moe.experts.register_forward_pre_hook(hook)
    try:
        out: Tensor = net(**inputs)
        return out
    finally:
        handle.remove()


def chosen(k: int = K) -> tuple[Tensor, Tensor]:
    best, idx = Table()(ids()).topk(k)
    return idx, best.softmax(-1)


@pytest.mark.parametrize(
    "example", [torch.zeros(2, 5, dtype=torch.int64), torch.tensor([[1, 0, 0, 0, 0]] * 2)], ids=["constant", "bos"]
)
@pytest.mark.parametrize("order", ["batch", "sequence"])
@torch.no_grad()  # type: ignore[untyped-decorator]
def test_the_order_of_rows_is_found_with_examples_whose_tokens_are_alike(order: str, example: Tensor) -> None:
    net = Net(order).eval()
    opt = ref.optimize(net, {"input_ids": example}, router=Table())
    torch.testing.assert_close(opt(input_ids=ids()), by_hand(net, {"input_ids": ids()}, *chosen()))


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_the_order_of_rows_is_found_by_embeddings_where_there_are_no_ids() -> None:
    net, (idx, gates) = Net("sequence").eval(), chosen()
    inputs = {"inputs_embeds": net.emb(ids())}
    given = {**inputs, "routing_idx": idx, "routing_gates": gates}
    opt = ref.optimize(net, given, router=moefx.Precomputed())
    torch.testing.assert_close(opt(**given), by_hand(net, inputs, idx, gates))


@pytest.mark.parametrize("order", ["backwards", "blind"])
@torch.no_grad()  # type: ignore[untyped-decorator]
def test_an_order_that_is_neither_or_that_nothing_shows_is_an_error(order: str) -> None:
    with pytest.raises(moefx.InputError, match=r"order of the rows[\s\S]*2 sequences of 5 tokens[\s\S]*input_ids"):
        ref.optimize(Net(order).eval(), {"input_ids": ids()}, router=Table())


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.emb = ref.Block(), nn.Embedding(WORDS, ref.HIDDEN)

    def forward(self, ids: Tensor) -> Tensor:
        return self.block.moe(self.emb(ids))


class Both(nn.Module):
    """An encoder and a decoder with tokens of its own, as many as the encoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Stack(), Stack()

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return self.decoder(decoder_input_ids) + self.encoder(input_ids)


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_a_decoder_is_not_routed_by_the_tokens_of_its_encoder() -> None:
    with pytest.raises(moefx.PassError, match=r"encoder and decoder have MoE layers[\s\S]*decoder"):
        ref.optimize(Both().eval(), {"input_ids": ids(), "decoder_input_ids": ids()}, router=Table())


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_every_call_with_precomputed_routing_is_checked() -> None:
    net, inputs, (idx, gates) = Net("batch").eval(), {"input_ids": ids()}, chosen()
    given = {**inputs, "routing_idx": idx, "routing_gates": gates}
    opt = ref.optimize(net, given, router=moefx.Precomputed())
    want = opt(**given)
    for bad, match in ((-1, "holds experts -1 to 3"), (E, f"holds experts 0 to {E}, a layer has {E}")):
        wrong = idx.clone()
        wrong[1, 2, 0] = bad
        with pytest.raises(moefx.InputError, match=match):
            opt(**{**given, "routing_idx": wrong})
    with pytest.raises(moefx.InputError, match="one expert twice"):
        opt(**{**given, "routing_idx": idx[..., :1].expand_as(idx).contiguous()})
    with pytest.raises(moefx.InputError, match=r"reads 'routing_idx'[\s\S]*with every call"):
        opt(**inputs)
    short = {"routing_idx": idx[:, :3], "routing_gates": gates[:, :3]}
    with pytest.raises(moefx.InputError, match=r"\(2, 3, 2\)[\s\S]*\(2, 5\)[\s\S]*every token"):
        opt(**inputs, **short)
    with pytest.raises(moefx.InputError, match="must be integers"):
        opt(**{**given, "routing_idx": gates})
    # More experts than the layer takes: it shares what all together have, which holds the scale of the records.
    four = Table()(ids()).topk(E)
    scaled = {"routing_idx": four.indices, "routing_gates": 2.5 * four.values.softmax(-1)}
    torch.testing.assert_close(opt(**inputs, **scaled), by_hand(net, inputs, idx, 2.5 * gates))
    torch.testing.assert_close(opt(**given), want)
    with pytest.raises(moefx.InputError, match="choices of 3 layers, the model has 1"):
        opt(**inputs, **{n: given[n].expand(3, -1, -1, -1) for n in ("routing_idx", "routing_gates")})


def test_choices_by_layer_are_those_of_each_layers_experts() -> None:
    idx = torch.tensor([[[[0, 3]]], [[[1, 0]]]])
    check_choice(idx, (4, 2))
    with pytest.raises(moefx.InputError, match="holds experts 0 to 3, a layer has 2"):
        check_choice(idx, (2, 4))
    with pytest.raises(moefx.InputError, match="a layer has 2"):
        check_choice(idx[0], (4, 2))


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_a_deep_copy_has_a_router_of_its_own() -> None:
    net, inputs = Net("batch").eval(), {"input_ids": ids()}
    opt = ref.optimize(net, inputs, router=Table())
    want, twin = opt(**inputs), copy.deepcopy(opt)
    twin.router.table.neg_()
    other = (-Table()(ids())).topk(K)
    torch.testing.assert_close(twin(**inputs), by_hand(net, inputs, other.indices, other.values.softmax(-1)))
    twin.bfloat16()
    assert {t.router.table.dtype for t in (opt, copy.copy(opt))} == {torch.float32}
    assert torch.equal(opt(**inputs), want)


class Penalised(Net):
    """Its own code adds a loss of the layer's router to the loss that it returns."""

    def __init__(self, kind: str) -> None:
        super().__init__("batch")
        self.kind = kind

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The mean cross-entropy, with the router's loss, and logits."""
        rows = self.emb(input_ids).flatten(0, 1)
        logits, w, idx = self.block.moe.gate(rows)
        out = self.head(self.block.moe.experts(rows, idx, w))
        loss = nn.functional.cross_entropy(out, labels.flatten())
        if self.kind == "z, computed again":
            logits = nn.functional.linear(rows, self.block.moe.gate.weight)
        if self.kind in ("z", "z, computed again"):
            loss = loss + 0.5 * logits.float().logsumexp(-1).square().mean()
        elif self.kind == "z in place":
            loss += 0.5 * logits.float().logsumexp(-1).square().mean()
        elif self.kind == "balance":
            counts = nn.functional.one_hot(idx, E).float().sum(1).mean(0)
            loss = loss + 0.5 * E * (counts * logits.softmax(-1).mean(0)).sum()
        return {"loss": loss, "logits": out}


@pytest.mark.parametrize("kind", ["z", "z in place", "z, computed again", "balance"])
def test_the_losses_of_the_old_routers_leave_the_models_own(kind: str) -> None:
    """No trace of them is left: neither in the value and the gradients, nor in the graph."""
    inputs = {"input_ids": ids(), "labels": ids().flip(1)}
    models = [Penalised(k) for k in (kind, "none")]
    plain = models[1]
    idx, w = (t.flatten(0, 1) for t in chosen())
    handle = plain.block.moe.experts.register_forward_pre_hook(lambda _, args: (args[0], idx, w))
    want = plain(**inputs)
    want["loss"].backward()
    handle.remove()
    opt = moefx.optimize(models[0], inputs, router=Table(), codegen="eager")
    out = opt(**inputs)
    out["loss"].backward()
    torch.testing.assert_close(out["loss"], want["loss"])
    torch.testing.assert_close(out["logits"], want["logits"])
    assert models[0].block.moe.gate.weight.grad is None
    grads = [{n: p.grad for n, p in m.named_parameters() if "gate.weight" not in n} for m in models]
    for name, grad in grads[1].items():
        torch.testing.assert_close(grads[0][name], grad, rtol=1e-4, atol=1e-6, msg=name)
    seen = {name: {str(n.target) for n in opt.graphs[name].graph.nodes} for name in ("captured", "route_by_token")}
    own = "logsumexp" if kind.startswith("z") else "one_hot"
    assert [any(own in target for target in targets) for targets in seen.values()] == [True, False]
