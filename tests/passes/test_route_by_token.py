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
from moefx.models.idioms_base import MoELayer
from moefx.models.moe_lm import MoELM
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
        if self.order == "shifted":  # to predict a token from those before it
            h = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
        h = h + h.cumsum(1) / 8  # tokens of one sequence meet
        if self.order == "sequence":
            return self.head(self.block.moe(h.transpose(0, 1).contiguous()).transpose(0, 1))
        if self.order == "backwards":
            return self.head(self.block.moe(h.flip(1)).flip(1))
        if self.order == "blind":
            return self.head(h + self.block.moe(torch.ones_like(h)))
        return self.head(self.block.moe(h))


class Flat(Net):
    """The same for one packed sequence of ids [T]."""

    def __init__(self) -> None:
        super().__init__("batch")

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        """Logits [T, WORDS]."""
        assert input_ids is not None
        return self.head(self.block.moe(self.emb(input_ids)[None])[0])


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


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_a_model_that_shifts_its_tokens_would_be_told_what_it_predicts() -> None:
    for B in (1, 2):
        with pytest.raises(moefx.InputError, match=r"shifts its tokens[\s\S]*shift the ids before the call"):
            ref.optimize(Net("shifted").eval(), {"input_ids": ids(B)}, router=Table())
    with pytest.warns(moefx.FutureTokensWarning, match="shifts its tokens"):
        opt = ref.optimize(Net("shifted").eval(), {"input_ids": ids()}, router=moefx.Routing(Table(), causal=False))
    # What is refused: another token changes its own row, where the original has not read it yet.
    other = ids()
    other[:, 3] = (other[:, 3] + 1) % WORDS
    net = Net("shifted").eval()
    moved, leaked = ((f(input_ids=ids()) - f(input_ids=other)).abs().amax((0, 2)) > 1e-6 for f in (net, opt))
    assert moved.tolist() == [False, False, False, False, True]
    assert leaked.tolist() == [False, False, False, True, True]
    # Routing that was made of shifted ids is right; whether it was, nothing here can know.
    idx, gates = chosen()
    given = {"input_ids": ids(), "routing_idx": idx, "routing_gates": gates}
    with pytest.warns(moefx.FutureTokensWarning, match="made of shifted ids"):
        ref.optimize(Net("shifted").eval(), given, router=moefx.Precomputed())


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_flat_ids_have_no_sequences_for_a_router() -> None:
    flat, net = {"input_ids": ids().flatten()}, Flat().eval()
    grouter = moefx.Grouter.from_config(
        vocab_size=WORDS, num_experts=E, hidden_size=8, num_layers=1, num_heads=1, intermediate_size=8
    )
    for router in (Table(), grouter):
        with pytest.raises(moefx.InputError, match=r"\[sequences, tokens\][\s\S]*\(10,\)[\s\S]*\[1, T, k\]"):
            ref.optimize(net, flat, router=router)
    idx, gates = (t.flatten(0, 1) for t in chosen())
    with pytest.raises(moefx.InputError, match=r"take three axes[\s\S]*\[B, S, k\]"):
        ref.optimize(net, {**flat, "routing_idx": idx, "routing_gates": gates}, router=moefx.Precomputed())
    given = {**flat, "routing_idx": idx[None], "routing_gates": gates[None]}
    opt = ref.optimize(net, given, router=moefx.Precomputed())
    torch.testing.assert_close(opt(**given), by_hand(net, flat, idx[None], gates[None]))


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


# -- outputs and parameters ------------------------------------------------------------------------------------------


def read_by(opt: moefx.OptimizedModule, call: dict[str, Tensor]) -> int:
    """Numbers in the parameters that the graphs of a call read."""
    variant, leaves = opt.prepare((), call)
    values, _ = opt._primals(variant.program, leaves)
    read = {s.key: v for s, v in zip(variant.program.inputs, values, strict=True) if s.kind == "param"}
    return sum(v.numel() for v in read.values())


def test_a_models_own_choices_give_its_logits_and_loss_without_its_router_parameters() -> None:
    """Handed the indices and weights of its own routers, the routed model is the model, less L * E * d parameters."""
    L, H = 2, 32
    model = MoELM(WORDS, H, 48, L, 2, E, K, "F").eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.moe.gate.weight.mul_(50)  # as sure as trained ones
    call, kept = {"input_ids": ids(), "labels": ids()}, list[tuple[Tensor, Tensor]]()

    def route(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        kept.append(own(self, x))
        return kept[-1]

    own = MoELayer.route
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoELayer, "route", route)
        want = model(**call)
    w, idx = (torch.stack([each[i].view(2, 5, K) for each in kept]).detach() for i in (0, 1))
    given = {**call, "routing_idx": idx, "routing_gates": w}
    learned, routed = ref.optimize(model, call), ref.optimize(model, given, router=moefx.Precomputed())
    assert learned(**call).keys() == want.keys() == {"loss", "logits"}
    for name, value in routed(**given).items():
        torch.testing.assert_close(value, want[name], atol=1e-5, rtol=1e-5)
    other = routed(**{**given, "routing_idx": idx.flip(0)})  # the test can fail
    assert (other["logits"] - want["logits"]).norm() > 1e-2 * want["logits"].norm()
    assert read_by(learned, call) == sum(p.numel() for p in model.parameters())
    assert read_by(learned, call) - read_by(routed, given) == L * E * H


# -- packed windows --------------------------------------------------------------------------------------------------


class Packed(Net):
    """`Net` whose tokens meet those of their own document alone: one begins where `position_ids` is 0."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:  # type: ignore[override]
        document, S = (position_ids == 0).cumsum(1), input_ids.shape[1]
        causal = torch.ones(S, S, dtype=torch.bool).tril()
        seen = ((document[:, :, None] == document[:, None]) & causal).to(self.emb.weight.dtype)
        h = self.emb(input_ids)
        return self.head(self.block.moe(h + seen @ h / 8))


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_the_documents_of_a_packed_window_are_routed_apart() -> None:
    """The router gets the position ids of the call: its choices are those of the window's documents by themselves."""
    torch.manual_seed(0)
    grouter = moefx.Grouter.from_config(
        vocab_size=WORDS, num_experts=E, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48, init_std=0.3
    ).freeze()
    net, cut = Packed("batch").eval(), 4
    positions = torch.tensor([[*range(cut), *range(9 - cut)]]).expand(2, -1).contiguous()
    packed = {"input_ids": ids(2, 9), "position_ids": positions}
    opt = ref.optimize(net, packed, router=grouter)
    want = grouter.route(packed["input_ids"], K, position_ids=positions)
    torch.testing.assert_close(opt(**packed), by_hand(net, packed, *want))
    alone = [grouter.route(part, K)[0] for part in (packed["input_ids"][:, :cut], packed["input_ids"][:, cut:])]
    assert torch.equal(want[0], torch.cat(alone, 1))
    assert not torch.equal(want[0], grouter.route(packed["input_ids"], K)[0])  # as one document: the test can fail
    # Another first document changes nothing behind it, and something in it; also with documents of other lengths.
    changed = packed["input_ids"].clone()
    changed[:, :cut] = (changed[:, :cut] + 1) % WORDS
    before, after = opt(**packed), opt(**{**packed, "input_ids": changed})
    torch.testing.assert_close(after[:, cut:], before[:, cut:], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(after[:, :cut], before[:, :cut])
    moved = {**packed, "position_ids": torch.tensor([[*range(6), *range(3)]] * 2)}
    route = grouter.route(packed["input_ids"], K, position_ids=moved["position_ids"])
    torch.testing.assert_close(opt(**moved), by_hand(net, moved, *route))


# -- losses of the old routers ---------------------------------------------------------------------------------------


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
