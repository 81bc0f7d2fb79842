"""Look-alikes that are one line away from an ordinary layer: with a state, with hidden randomness, or equal to it on
almost everything.

Those with a `trigger` have the state dict of `Ordinary` and equal it elsewhere; the trigger says where they do not.
Importing this module adds them to `ordinary.CASES`.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ordinary import FFN, E, K, Ordinary, T, Trigger, case, tokens


def many_tokens() -> Tensor:
    return tokens(2, 3 * T, seed=2)


def one_choice() -> Tensor:
    """More tokens than 16, all of which choose the same two experts."""
    return tokens(1, 1, seed=5) + 1e-3 * tokens(seed=6)


def large() -> Tensor:
    x = tokens(seed=7)
    return x / x.norm(dim=-1, keepdim=True) * 200


def alike() -> Tensor:
    """Tokens of zeros among others: all logits of a router without bias are equal."""
    x = tokens(seed=8).clone()
    x[:, ::3] = 0
    return x


# --- a state between calls


@case(
    "A1",
    r"state|buffer|call|differ.* (run|time)|repeat",
    in_form="its state is a buffer, and the raised block updates it alike",
)
class EmaLoads(Ordinary):
    """The choice is corrected by a running mean of the loads, which every call moves, in training and evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(E))

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.softmax(self.gate(x_TH), dim=-1)
        idx_TK = (scores - self.load).topk(K, dim=-1).indices
        w_TK = scores.gather(1, idx_TK)
        with torch.no_grad():
            self.load.lerp_(F.one_hot(idx_TK, E).float().mean(dim=(0, 1)), 0.5)
        return w_TK / w_TK.sum(dim=-1, keepdim=True), idx_TK


@case("A1", r"state|previous|call|differ.* (run|time)|repeat")
class PreviousChoice(Ordinary):
    """Experts that the previous call used most are barred from this one; the state is a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.barred: int | None = None

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.softmax(self.gate(x_TH), dim=-1)
        if self.barred is not None:
            scores = scores.index_fill(1, torch.tensor([self.barred]), 0.0)
        w_TK, idx_TK = scores.topk(K, dim=-1)
        if idx_TK.numel():
            self.barred = int(idx_TK.flatten().mode().values)
        return w_TK / w_TK.sum(dim=-1, keepdim=True), idx_TK


@case("A1", r"state|count|call|differ.* (run|time)|repeat")
class Counter(Ordinary):
    """The scale of the output grows with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def weight(self, e: int, w: Tensor) -> Tensor:
        return w * (1 + 0.1 * self.calls)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class CarriedRouter(Ordinary):
    """One of the layers of `CarriedState`: it writes its logits to a place that the next one reads."""

    def __init__(self, memory: dict[str, Tensor]) -> None:
        super().__init__()
        self.memory = memory

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gate(x_TH)
        before = self.memory.get("logits")
        if before is not None and before.shape == logits.shape:
            logits = logits + before
        self.memory["logits"] = logits.detach()
        w_TK, idx_TK = F.softmax(logits, dim=-1).topk(K, dim=-1)
        return w_TK / w_TK.sum(dim=-1, keepdim=True), idx_TK


@case("A1", r"state|carried|call|differ.* (run|time)|repeat")
class CarriedState(nn.Module):
    """Two layers; the logits of the last layer that ran go into the next one's choice, from call to call as well."""

    def __init__(self) -> None:
        super().__init__()
        memory: dict[str, Tensor] = {}
        self.layers = nn.ModuleList(CarriedRouter(memory) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@case("A1", r"random|seed|noise|differ.* (run|time)|repeat")
class PythonNoise(Ordinary):
    """Noisy routing in training, with the noise from Python's `random`: no seed of torch repeats it."""

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gate(x_TH)
        if self.training:
            noise = [[random.gauss(0, 1) for _ in range(E)] for _ in range(len(x_TH))]
            logits = logits + torch.tensor(noise, dtype=logits.dtype).reshape(logits.shape)
        w_TK, idx_TK = F.softmax(logits, dim=-1).topk(K, dim=-1)
        return w_TK / w_TK.sum(dim=-1, keepdim=True), idx_TK


# --- equal to the ordinary layer on almost everything


@case("A1", r"tokens|size|shape|40|large", trigger=Trigger(many_tokens))
class ManyTokens(Ordinary):
    """Above 40 tokens the experts' outputs are halved."""

    def after(self, y_TH: Tensor, x_TH: Tensor) -> Tensor:
        return y_TH / 2 if len(x_TH) > 40 else y_TH


@case("A1", r"skew|rows|load|16|tokens (of|per) one expert", trigger=Trigger(one_choice))
class Crowded(Ordinary):
    """An expert that gets more than 16 tokens sees them squashed."""

    def expert(self, e: int, x: Tensor, nth: Tensor, token: Tensor) -> Tensor:
        return self.experts[e](torch.tanh(x) if len(x) > 16 else x)


@case("A1", r"gradient|backward", trigger=Trigger(gradients=True))
class DetachedInput(Ordinary):
    """Expert 1 gives no gradient to the token; the outputs are ordinary."""

    def expert(self, e: int, x: Tensor, nth: Tensor, token: Tensor) -> Tensor:
        return self.experts[e](x.detach() if e == 1 else x)


class Scaled(torch.autograd.Function):
    """The identity with a tenth of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 10


@case("A1", r"gradient|backward", trigger=Trigger(gradients=True))
class ScaledGradient(Ordinary):
    """An autograd function between the experts and the sum: equal outputs, the experts learn at a tenth of the rate."""

    def expert(self, e: int, x: Tensor, nth: Tensor, token: Tensor) -> Tensor:
        return Scaled.apply(self.experts[e](x))


@case(
    "A1",
    r"evaluation|eval|mode|training",
    trigger=Trigger(training=False),
    in_form="in training it is one; in evaluation its own code runs",
)
class DenseInEvaluation(Ordinary):
    """Ordinary in training; in evaluation every expert counts."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        w = F.softmax(self.gate(x), dim=-1)
        return (torch.stack([f(x) for f in self.experts], dim=-2) * w.unsqueeze(-1)).sum(dim=-2)


@case("A1", r"bfloat16|bf16|dtype|precision", trigger=Trigger(dtype=torch.bfloat16))
class OtherInBFloat16(Ordinary):
    """In bfloat16 the experts see the token squashed."""

    def expert(self, e: int, x: Tensor, nth: Tensor, token: Tensor) -> Tensor:
        return self.experts[e](torch.tanh(x) if x.dtype == torch.bfloat16 else x)


@case("A1", r"tie|equal (scores|logits)|choices", trigger=Trigger(alike))
class AllOfATie(Ordinary):
    """A token whose scores are all equal gets every expert's mean on top."""

    def after(self, y_TH: Tensor, x_TH: Tensor) -> Tensor:
        logits = self.gate(x_TH)
        tie_T = logits.max(dim=-1).values == logits.min(dim=-1).values
        if not tie_T.any():
            return y_TH
        return torch.where(tie_T[:, None], y_TH + torch.stack([f(x_TH) for f in self.experts]).mean(dim=0), y_TH)


@case("A1", r"large|clamp|value|input|range", trigger=Trigger(large))
class ClampedTokens(Ordinary):
    """The experts see the token clamped, far outside of what normal numbers reach."""

    def expert(self, e: int, x: Tensor, nth: Tensor, token: Tensor) -> Tensor:
        return self.experts[e](x.clamp(-20, 20))


@case("A1", r"state|call|differ.* (run|time)|repeat|tenth", trigger=Trigger(calls=10))
class EveryTenthCall(Ordinary):
    """Every tenth call squashes the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def before(self, x_TH: Tensor) -> Tensor:
        self.calls += 1
        return x_TH

    def expert(self, e: int, x: Tensor, nth: Tensor, token: Tensor) -> Tensor:
        return self.experts[e](torch.tanh(x) if self.calls % 10 == 0 else x)


@case("A1", r"hook", in_form="expert 1 has another weight")
class HookedExpert(Ordinary):
    """A forward hook doubles what expert 1 returns; the code and the weights are ordinary."""

    def __init__(self) -> None:
        super().__init__()
        self.experts[1].register_forward_hook(lambda module, args, out: 2 * out)


@case("A1", r"hook|clamp|output")
class HookedAndClamped(Ordinary):
    """A forward hook clamps what expert 1 returns."""

    def __init__(self) -> None:
        super().__init__()
        self.experts[1].register_forward_hook(lambda module, args, out: out.clamp(-0.05, 0.05))


@case("A1", r"parametri[sz]|weight|norm", in_form="its matrices are functions of its parameters")
class WeightNorm(Ordinary):
    """Weight normalisation by parametrisation: what the experts multiply with is no parameter."""

    def make(self, e: int) -> nn.Module:
        ffn = FFN()
        ffn.up_proj = torch.nn.utils.parametrizations.weight_norm(ffn.up_proj)
        return ffn


@case("A1", r"expert 3|one expert|not alike|differ", in_form="a weight of zero for expert 3")
class SilentExpert(Ordinary):
    """Expert 3 returns zeros whatever it holds: it is chosen, it is run, and it counts for nothing."""

    def expert(self, e: int, x: Tensor, nth: Tensor, token: Tensor) -> Tensor:
        return self.experts[e](x) * (0.0 if e == 3 else 1.0)
