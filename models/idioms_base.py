"""What the hand-written MoE layers share: options, routing, the experts' parameters, and one view of all layouts.

A layer computes y_t = sum_j w_tj f(x_t; expert idx_tj) with f(x) = down(act(gate(x)) * up(x)), or down(act(up(x))) when
not gated. Only the spelling and the layout of the parameters differ between the idioms. `views` shows every layout in
one way, as matrices [out, in] per expert that share the parameters' memory, so that weights can be copied from any
idiom into any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
EACH = (slice(None), None)  # bias_EI[EACH] is [E, 1, I]: one bias per block of rows


class MoELayer(nn.Module):
    """Options and router of every idiom. `forward` takes [..., H] and returns the same shape and dtype.

    `capacity` is in rows per expert; None drops nothing. Dropped choices add nothing to y and the weights of the
    others stay as they were. Raises ValueError for options the idiom cannot have.
    """

    has_capacity: ClassVar[bool] = False
    softmax_after_topk: ClassVar[bool] = False  # then the k weights add up to one in any case

    def __init__(
        self,
        hidden: int,
        width: int,
        experts: int,
        k: int,
        *,
        act: str = "silu",
        gated: bool = True,
        bias: bool = False,
        renormalize: bool = True,
        capacity: int | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if min(hidden, width, experts) < 1 or not 1 <= k <= experts:
            raise ValueError(
                f"{name}: sizes must be positive and 1 <= k <= experts; got {hidden=} {width=} {experts=} {k=}"
            )
        if act not in ACTIVATIONS:
            raise ValueError(f"{name}: unknown activation {act!r}; use one of {', '.join(ACTIVATIONS)}")
        if capacity is not None and not self.has_capacity:
            raise ValueError(f"{name} computes every choice and has no capacity; leave it None, or use A5, B or F")
        if capacity is not None and capacity < 1:
            raise ValueError(f"{name}: capacity is the number of rows per expert, at least 1; got {capacity}")
        if self.softmax_after_topk and not renormalize:
            raise ValueError(f"{name} takes the softmax of the k chosen logits, so renormalize=False is impossible")
        self.hidden, self.width, self.num_experts, self.k = hidden, width, experts, k
        self.act, self.gated, self.bias = act, gated, bias
        self.renormalize, self.capacity = renormalize, capacity
        self.gate = nn.Linear(hidden, experts, bias=False)

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts [T, k]: softmax over all experts, top-k, and division by the sum if `renormalize`."""
        w_TK, idx_TK = torch.topk(F.softmax(self.gate(x_TH), dim=-1), self.k, dim=-1)
        if self.renormalize:
            w_TK = w_TK / w_TK.sum(dim=-1, keepdim=True)
        return w_TK, idx_TK

    def glu(self, gate: Tensor | None, up: Tensor) -> Tensor:
        act = ACTIVATIONS[self.act]
        return act(up) if gate is None else act(gate) * up

    def views(self) -> dict[str, list[Tensor]]:
        """The weights as matrices [out, in] and biases [out], one per expert, on the parameters' own memory.

        Keys: router (one [E, H]), up, down, and where present gate, up_bias, down_bias, gate_bias.
        """
        per_expert = [self.expert_views(e) for e in range(self.num_experts)]
        return {"router": [self.gate.weight.detach()]} | {key: [v[key] for v in per_expert] for key in per_expert[0]}

    def expert_views(self, e: int) -> dict[str, Tensor]:
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None, std: float | None = None) -> None:
        """Normal weights and biases (std 1/sqrt(size) unless given), the same in every idiom for the same generator."""
        for _, views in sorted(self.views().items()):
            for view in views:
                # Drawn contiguous and then copied: filling a strided view in place would follow its strides.
                drawn = torch.empty(view.shape, dtype=view.dtype, device=view.device)
                view.copy_(drawn.normal_(0.0, view.shape[-1] ** -0.5 if std is None else std, generator=generator))


class Expert(nn.Module):
    """One feed-forward network with separate linear layers."""

    def __init__(self, hidden: int, width: int, act: str, gated: bool, bias: bool) -> None:
        super().__init__()
        self.act, self.gated = act, gated
        if gated:
            self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        act = ACTIVATIONS[self.act]
        if self.gated:
            out: Tensor = self.down_proj(act(self.gate_proj(x)) * self.up_proj(x))
        else:
            out = self.down_proj(act(self.up_proj(x)))
        return out


class ListedExperts(MoELayer):
    """Parameters experts.{e}.{gate_proj, up_proj, down_proj}.weight [out, in] and .bias [out]."""

    def __init__(self, hidden: int, width: int, experts: int, k: int, **options: Any) -> None:
        super().__init__(hidden, width, experts, k, **options)
        self.experts = nn.ModuleList(Expert(hidden, width, self.act, self.gated, self.bias) for _ in range(experts))
        self.reset_parameters()

    def expert_views(self, e: int) -> dict[str, Tensor]:
        found = {}
        for name, p in self.experts[e].named_parameters():
            linear, kind = name.split(".")
            found[linear.removesuffix("_proj") + ("_bias" if kind == "bias" else "")] = p.detach()
        return found


class StackedExperts(MoELayer):
    """3-D parameters over all experts, and biases `NAME_bias` [E, out].

    `names` are those of gate, up, down, or of gate and up together and down. A matrix is [E, out, in], or [E, in, out]
    where `in_first`. In a joint one the outputs are the gate's and then the up's, or alternate where `interleaved`.
    """

    names: ClassVar[tuple[str, ...]] = ("w1", "w3", "w2")
    in_first: ClassVar[bool] = False
    interleaved: ClassVar[bool] = False

    def __init__(self, hidden: int, width: int, experts: int, k: int, **options: Any) -> None:
        super().__init__(hidden, width, experts, k, **options)
        *inner, down = self.names
        if len(inner) == 2 and not self.gated:
            inner = inner[1:]
        joint = 2 if len(self.names) == 2 and self.gated else 1
        sizes = {name: (width * joint, hidden) for name in inner} | {down: (hidden, width)}
        for name, (out, into) in sizes.items():
            self.register_parameter(
                name, nn.Parameter(torch.empty((experts, into, out) if self.in_first else (experts, out, into)))
            )
            if self.bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(experts, out)))
        self.reset_parameters()

    def biased(self, y: Tensor, name: str, at: object) -> Tensor:
        """y plus the bias of `name` indexed by `at`, if the layer has biases."""
        if not self.bias:
            return y
        bias: Tensor = self.get_parameter(f"{name}_bias")[at]  # type: ignore[index]
        return y + bias

    def halves(self, gate_up: Tensor) -> Tensor:
        """The inner activation from a joint projection [..., 2I] ([..., I] if not gated)."""
        if not self.gated:
            return self.glu(None, gate_up)
        if self.interleaved:
            return self.glu(gate_up[..., ::2], gate_up[..., 1::2])
        gate, up = gate_up.chunk(2, dim=-1)
        return self.glu(gate, up)

    def expert_views(self, e: int) -> dict[str, Tensor]:
        found = {}
        for kind in ("", "_bias") if self.bias else ("",):
            if len(self.names) == 3:
                parts = dict(zip(("gate", "up", "down"), self.names, strict=True))
                for key, name in parts.items():
                    if key != "gate" or self.gated:
                        found[key + kind] = self._rows(name + kind, e)
                continue
            rows = self._rows(self.names[0] + kind, e)
            if not self.gated:
                found["up" + kind] = rows
            elif self.interleaved:
                found["gate" + kind], found["up" + kind] = rows[::2], rows[1::2]
            else:
                found["gate" + kind], found["up" + kind] = rows[: self.width], rows[self.width :]
            found["down" + kind] = self._rows(self.names[1] + kind, e)
        return found

    def _rows(self, name: str, e: int) -> Tensor:
        weight = self.get_parameter(name).detach()[e]
        return weight.t() if self.in_first and weight.dim() == 2 else weight


@torch.no_grad()
def copy_weights(src: MoELayer, dst: MoELayer) -> None:
    """Gives `dst` the weights of `src`, whatever their layouts; both then compute the same function.

    dtypes and devices may differ. Raises ValueError if the shapes, gating, biases or activations do, or if one drops or
    normalises in another way: capacity and renormalize are part of the function.
    """
    for option in ("hidden", "width", "num_experts", "k", "act", "gated", "bias", "renormalize", "capacity"):
        here, there = getattr(src, option), getattr(dst, option)
        if here != there:
            raise ValueError(
                f"copy_weights: {option} is {here!r} in {type(src).__name__} and {there!r} in {type(dst).__name__}; "
                "build both layers with the same options"
            )
    target = dst.views()
    for key, views in src.views().items():
        for view, new in zip(target[key], views, strict=True):
            view.copy_(new)
