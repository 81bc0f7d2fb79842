"""Masks and sequences reach the right rows: models of either order, square masks, masks that nothing reads.

The oracle is the model itself: a hook on each router gives the logits, which loops read token by token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moefx
from moefx import losses as L
from moefx.graph.tokens import CALL
from tests import reference as ref

from . import loops

pytest.importorskip("transformers")
Tensor = torch.Tensor
WORDS = 19


class LM(nn.Module):
    """A language model with one MoE block; where its rows lie, and who reads the mask, is what tests vary."""

    def __init__(self, order: str = "batch", reads: str = "before") -> None:
        super().__init__()
        self.order, self.reads = order, reads
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.emb, self.head = nn.Embedding(WORDS, ref.HIDDEN), nn.Linear(ref.HIDDEN, WORDS)
        self.block = ref.Block()
        self.config = self.block.config

    def mixed(self, h: Tensor, mask: Tensor | None, when: str) -> Tensor:
        """Causal attention; a mask of tokens [B, S] hides keys, one of positions [S, S] says which are seen."""
        S = h.shape[1]
        seen = torch.ones(S, S, dtype=torch.bool).tril()
        if mask is not None and self.reads == when:
            seen = seen & (mask[:, None].bool() if self.order != "positions" else mask.bool())
        return h + (h @ h.mT).masked_fill(~seen, -1e9).softmax(-1) @ h

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, S, WORDS]."""
        h = self.mixed(self.emb(input_ids), attention_mask, "before")
        if self.order == "sequence":
            h = self.block.moe(h.transpose(0, 1).contiguous()).transpose(0, 1)
        elif self.order == "backwards":
            h = self.block.moe(h.flip(1)).flip(1)
        else:
            h = self.block.moe(h)
        return self.head(self.mixed(h, attention_mask, "behind"))


def ids(B: int = 2, S: int = 5) -> Tensor:
    return torch.randint(0, WORDS, (B, S), generator=torch.Generator().manual_seed(0))


def padding(B: int = 2, S: int = 5) -> Tensor:
    """Sequences of different lengths, the first one short."""
    return (torch.arange(S) < torch.arange(B)[:, None] * 2 + 2).long()


def layers(model: nn.Module, inputs: dict[str, Tensor], mask: Tensor | None, *routers: nn.Module) -> list[loops.Layer]:
    """What each router says of each token in batch-major order, and which tokens count."""
    found: list[loops.Layer] = []

    def hook(router: Any, args: Any, _: Any) -> None:
        rows = args[0].reshape(-1, ref.HIDDEN)
        if getattr(model, "order", "") == "sequence":
            B, S = inputs["input_ids"].shape
            rows = torch.stack([rows[s * B + b] for b in range(B) for s in range(S)])
        logits = rows @ router.weight.T
        counted = [] if mask is None else mask.flatten().bool().tolist()
        found.append(loops.Layer(logits, logits.topk(2).indices.tolist(), counted=counted))

    handles = [r.register_forward_hook(hook) for r in routers]
    try:
        model(**inputs)
    finally:
        for h in handles:
            h.remove()
    return found


LOSSES = ["z", L.LoadBalance(form="sequence"), L.RoutingMetrics(choices=True)]


def check(model: Any, inputs: dict[str, Tensor], mask: Tensor | None, *, train: bool = False) -> moefx.OptimizedModule:
    """Metrics of the optimized model, and with `train` losses, are those of the tokens that `mask` leaves."""
    with torch.set_grad_enabled(train):  # measuring alone needs no backward, which takes most of the time
        opt = ref.optimize(model, inputs, losses=LOSSES if train else LOSSES[2:])
        torch.testing.assert_close(opt(**inputs), model(**inputs))
    (m,) = layers(model, inputs, mask, model.block.moe.gate)
    if train:
        assert float(opt.losses["z"]) == pytest.approx(loops.z(m).item(), rel=1e-5)
        assert float(opt.losses["lb"]) == pytest.approx(loops.sequence(m, len(inputs["input_ids"])).item(), rel=1e-5)
    want = [row if t in m.tokens else [-1, -1] for t, row in enumerate(m.idx)]
    assert opt.routing["choices"][0].tolist() == want
    return opt


@pytest.mark.parametrize("order", ["batch", "sequence"])
def test_a_mask_of_tokens_in_either_order(order: str) -> None:
    opt = check(LM(order), {"input_ids": ids(), "attention_mask": padding()}, padding(), train=True)
    # The trials kept nothing of the example.
    assert all(CALL not in gm.meta for gm in opt.graphs.values())


def test_sequences_in_the_other_order_without_a_mask() -> None:
    check(LM("sequence"), {"input_ids": ids(3, 4)}, None)


def test_as_many_sequences_as_tokens() -> None:
    """A triangle may be a mask of tokens or of positions. How the model reads it tells."""
    triangle = torch.ones(4, 4).tril().long()
    check(LM("sequence"), {"input_ids": ids(4, 4), "attention_mask": triangle}, triangle)
    check(LM("positions"), {"input_ids": ids(4, 4), "attention_mask": triangle}, None)


def test_a_mask_of_positions_beside_fewer_sequences() -> None:
    check(LM("positions"), {"input_ids": ids(2, 4), "attention_mask": torch.ones(4, 4).tril().long()}, None)


def test_a_square_mask_that_no_expert_depends_on_is_refused() -> None:
    inputs = {"input_ids": ids(4, 4), "attention_mask": padding(4, 4)}
    with pytest.raises(moefx.PassError, match=r"mask of tokens or one of positions[\s\S]*another batch size"):
        ref.optimize(LM(reads="behind"), inputs, losses="z")
    check(LM(reads="behind"), {"input_ids": ids(), "attention_mask": padding()}, padding())


def test_a_mask_that_nothing_reads_is_named() -> None:
    inputs = {"input_ids": ids(), "attention_mask": padding()}
    with pytest.warns(UserWarning, match="the forward does not read attention_mask"):
        check(LM(reads="never"), inputs, None)


def test_an_order_that_is_neither_is_refused() -> None:
    model, given = LM("backwards"), {"input_ids": ids()}
    with pytest.raises(moefx.PassError, match="not known which row of the experts is which token of attention_mask"):
        ref.optimize(model, {**given, "attention_mask": padding()}, losses="z")
    with pytest.raises(moefx.PassError, match=r"loss 'lb' is not defined[\s\S]*which of its rows are a sequence"):
        ref.optimize(model, given, losses=LOSSES[1:2])
    opt = ref.optimize(model, given, losses="z")  # a mean over all tokens needs no order
    opt(**given)
    (m,) = layers(model, given, None, model.block.moe.gate)
    assert float(opt.losses["z"]) == pytest.approx(loops.z(m).item(), rel=1e-5)


def test_masks_of_another_kind_are_named() -> None:
    """Numbers that are added to scores, and tokens that come sequence by sequence along the second axis."""

    class Other(LM):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.block.moe(
                x * (attention_mask.T if x.shape[:2] != attention_mask.shape else attention_mask)[..., None]
            )

    x = torch.randn(2, 5, ref.HIDDEN, generator=torch.Generator().manual_seed(0))
    for inputs, says in (
        ({"x": x, "attention_mask": padding().float() - 1}, "holds negative numbers"),
        ({"x": x.transpose(0, 1).contiguous(), "attention_mask": padding()}, "another shape than the tokens"),
    ):
        with pytest.warns(UserWarning, match=says), torch.no_grad():
            ref.optimize(Other(), inputs, losses="metrics")


def test_a_trial_leaves_no_autocast_behind() -> None:
    """It ends within the region that the model opens."""

    class Narrow(LM):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(input_ids, attention_mask)

    inputs = {"input_ids": ids(), "attention_mask": padding()}
    model = Narrow("sequence")
    with torch.no_grad():
        opt = ref.optimize(model, inputs, losses="metrics")
        assert not torch.is_autocast_enabled("cpu")
        opt(**inputs)
    (m,) = layers(model, inputs, padding(), model.block.moe.gate)
    load = [m.c(e) / (2 * len(m.tokens)) for e in range(m.experts)]
    assert opt.routing["load"][0].tolist() == pytest.approx(load, abs=0.15)  # numbers are rounded


class Translator(nn.Module):
    """Two stacks with as many tokens each. Each has a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = LM(), LM("sequence")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, **masks: Any) -> Tensor:
        """Logits of the decoder."""
        memory = self.encoder(input_ids, attention_mask).mean()
        mask = masks.get("decoder_attention_mask")
        return self.decoder(decoder_input_ids, mask) * memory


@pytest.mark.parametrize("own", [False, True])
def test_an_encoder_and_a_decoder(own: bool) -> None:
    model, masks = Translator(), [padding(), padding().flip(0)]
    inputs = {"input_ids": ids(), "attention_mask": masks[0], "decoder_input_ids": ids().flip(1)}
    inputs |= {"decoder_attention_mask": masks[1]} if own else {}
    opt = ref.optimize(model, inputs, losses="z")
    opt(**inputs)
    first, second = layers(model, inputs, None, model.encoder.block.moe.gate, model.decoder.block.moe.gate)
    first.counted = masks[0].flatten().bool().tolist()
    # Rows of the decoder: token by token of all sequences.
    second.counted = masks[1].T.flatten().bool().tolist() if own else []
    assert float(opt.losses["z"]) == pytest.approx((loops.z(first) + loops.z(second)).item(), rel=1e-5)
