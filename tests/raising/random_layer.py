"""Builds the layer that a `Config` describes: one small function per choice, put together by `Layer`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .random_idioms import IDIOMS
from .random_moe import ACTIVATIONS, MODULES, Config, Groups, weights

Linear = Callable[[str, Tensor], Tensor]  # (part, rows) -> rows times that part's matrix, plus its bias

PROJECTIONS = [
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "joint": "gate_up_proj"},
    {"gate": "w1", "up": "w3", "down": "w2", "joint": "w13"},
    {"gate": "w2", "up": "w1", "down": "w3", "joint": "w12"},  # the same names, other roles
    {"gate": "wi_0", "up": "wi_1", "down": "wo", "joint": "wi"},
    {"gate": "linear_g", "up": "linear_v", "down": "output_linear", "joint": "input_linear"},
    {"gate": "a", "up": "b", "down": "c", "joint": "ab"},
    {"gate": "down_proj", "up": "gate_proj", "down": "up_proj", "joint": "proj"},  # names that lie
]
ROUTERS, BANK_NAMES = ("gate", "router", "wg", "classifier", "score"), ("experts", "mlps", "ffns", "nets", "pool")


def names(config: Config) -> dict[str, str]:
    """Attribute names, drawn by the seed."""
    rng = random.Random(config.seed)
    return {**rng.choice(PROJECTIONS), "router": rng.choice(ROUTERS), "experts": rng.choice(BANK_NAMES)}


# --- one expert


def parts(config: Config) -> tuple[str, ...]:
    if not config.gated:
        return ("up", "down")
    return ("gate", "up", "down") if config.fused == "separate" else ("joint", "down")


def biased(config: Config, part: str) -> bool:
    return config.bias == "all" or (config.bias == "down" if part == "down" else config.bias == "inner")


def halves(fused: str, h: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up of a joint projection."""
    a, b = (h[..., ::2], h[..., 1::2]) if fused.startswith("interleaved") else h.chunk(2, dim=-1)
    return (b, a) if fused in ("up_gate", "interleaved_up") else (a, b)


def joined(fused: str, gate: Tensor, up: Tensor, dim: int) -> Tensor:
    """The joint matrix or bias of gate's and up's, along `dim`."""
    first, second = (up, gate) if fused in ("up_gate", "interleaved_up") else (gate, up)
    if fused.startswith("interleaved"):
        return torch.stack([first, second], dim=dim + 1).flatten(dim, dim + 1)
    return torch.cat([first, second], dim=dim)


def canonical(config: Config, W: dict[str, Tensor], part: str, prefix: str = "") -> tuple[Tensor, Tensor]:
    """Matrix [E, out, in] and bias [E, out] of a part."""
    if part != "joint":
        return W[f"{prefix}{part}"], W[f"{prefix}{part}_bias"]
    gate, up, gate_bias, up_bias = (W[f"{prefix}{n}"] for n in ("gate", "up", "gate_bias", "up_bias"))
    return joined(config.fused, gate, up, 1), joined(config.fused, gate_bias, up_bias, 1)


def activated(config: Config, x: Tensor, linear: Linear) -> Tensor:
    act = ACTIVATIONS[config.act]
    if not config.gated:
        return act(linear("up", x))
    if config.fused == "separate":
        return act(linear("gate", x)) * linear("up", x)
    gate, up = halves(config.fused, linear("joint", x))
    return act(gate) * up


def ffn(config: Config, x: Tensor, linear: Linear, w: Tensor | None = None) -> Tensor:
    """The expert's network; w multiplies the inner activation."""
    a = activated(config, x, linear)
    return linear("down", a if w is None else a * w)


def new_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        out.weight.copy_(weight)
        if bias is not None:
            out.bias.copy_(bias)
    return out


class Expert(nn.Module):
    def __init__(self, config: Config, W: dict[str, Tensor], e: int, prefix: str = "") -> None:
        super().__init__()
        self.config, self.names = config, names(config)
        for part in parts(config):
            weight, bias = canonical(config, W, part, prefix)
            self.add_module(self.names[part], new_linear(weight[e], bias[e] if biased(config, part) else None))

    def forward(self, x: Tensor, w: Tensor | None = None) -> Tensor:
        return ffn(self.config, x, lambda part, v: self.get_submodule(self.names[part])(v), w)


class Middle(nn.Module):
    """What stands between the two linear layers of a sequential expert."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, h: Tensor) -> Tensor:
        if not self.config.gated:
            return ACTIVATIONS[self.config.act](h)
        gate, up = halves("gate_up" if self.config.fused == "separate" else self.config.fused, h)
        return ACTIVATIONS[self.config.act](gate) * up


def sequential(config: Config, W: dict[str, Tensor], e: int) -> nn.Sequential:
    first = "up" if not config.gated else "joint"
    (up, up_bias), (down, down_bias) = canonical(config, W, first), canonical(config, W, "down")
    return nn.Sequential(
        new_linear(up[e], up_bias[e] if biased(config, first) else None),
        Middle(config),
        new_linear(down[e], down_bias[e] if biased(config, "down") else None),
    )


# --- routing


def limited(choice_TE: Tensor, groups: Groups) -> Tensor:
    grouped = choice_TE.view(choice_TE.shape[0], groups.count, -1)
    if groups.by == "max":
        value = grouped.max(dim=-1).values
    else:
        value = grouped.topk(2, dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(value).scatter_(1, value.topk(groups.kept, dim=-1, sorted=False).indices, 1.0)
    return grouped.masked_fill(~kept.bool()[..., None], groups.fill).reshape(choice_TE.shape)


def route(owner: Any, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [T, E], weights and experts [T, k]. `owner` has the router's parameters: the layer or its router."""
    config: Config = owner.config
    v = x_TH
    if owner.training and config.noise == "jitter":
        v = v * torch.empty_like(v).uniform_(0.9, 1.1)
    logits = owner.get_submodule(owner.names["router"])(v)
    if config.router_fp32:
        logits = logits.float()
    if owner.training and config.noise == "logits":
        logits = logits + 0.1 * torch.randn_like(logits)
    if config.score == "topk_softmax":
        top, idx = logits.topk(config.k, dim=-1)
        w = F.softmax(top, dim=-1)
    else:
        scores = F.softmax(logits, dim=-1) if config.score == "softmax" else logits.sigmoid()
        if config.correction == "none" and config.groups is None:
            w, idx = scores.topk(config.k, dim=-1)
        else:
            choice = scores if config.correction == "none" else scores + owner.correction
            choice = choice if config.groups is None else limited(choice, config.groups)
            idx = choice.topk(config.k, dim=-1, sorted=config.capacity is not None).indices
            w = scores.gather(1, idx)
        if config.renormalize:
            w = w / (w.sum(dim=-1, keepdim=True) + 1e-20)
    return logits, (w * config.scale).to(x_TH.dtype), idx


def add_router(owner: nn.Module, config: Config, W: dict[str, Tensor]) -> None:
    owner.add_module(names(config)["router"], new_linear(W["router"], W["router_bias"] if config.router_bias else None))
    if config.correction == "buffer":
        owner.register_buffer("correction", W["correction"].clone())
    elif config.correction == "parameter":
        owner.register_parameter("correction", nn.Parameter(W["correction"].clone(), requires_grad=False))


class Router(nn.Module):
    def __init__(self, config: Config, W: dict[str, Tensor]) -> None:
        super().__init__()
        self.config, self.names = config, names(config)
        add_router(self, config, W)

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return route(self, x_TH)


# --- the layer


class Layer(nn.Module):
    """The MoE layer of a config. `forward` takes the config's shape and returns y, or y and the extra output."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.names = config, names(config)
        W = weights(config)
        if config.router_module:
            self.routing = Router(config, W)
        else:
            add_router(self, config, W)
        if config.layout in MODULES:
            self._add_modules(W)
        else:
            for part in parts(config):
                self._add_tensors(part, *canonical(config, W, part))
        if config.shared != "none":
            self.shared = Expert(config, W, 0, "shared_")
        if config.shared == "gated":
            self.shared_mix = new_linear(W["shared_mix"], None)
        self.to(getattr(torch, config.dtype)).train(config.training)

    def _add_modules(self, W: dict[str, Tensor]) -> None:
        c, name = self.config, self.names["experts"]
        build = sequential if c.layout == "sequential" else Expert
        modules = [build(c, W, e) for e in range(c.experts)]
        if c.layout == "dict":
            self.add_module(name, nn.ModuleDict({f"expert_{e}": m for e, m in enumerate(modules)}))
        elif c.layout == "attributes":
            for e, m in enumerate(modules):
                self.add_module(f"expert_{e}", m)
        else:
            self.add_module(name, nn.ModuleList(modules))

    def _add_tensors(self, part: str, weight: Tensor, bias: Tensor) -> None:
        c, name = self.config, self.names[part]
        if c.layout == "in_first" or (c.layout == "flat" and part == "down"):
            weight = weight.transpose(1, 2).contiguous()
        named = [(name, weight)] + ([(f"{name}_bias", bias)] if biased(c, part) else [])
        for key, value in named:
            if c.layout == "parameters":
                self.add_module(key, nn.ParameterList(nn.Parameter(v.clone()) for v in value))
            else:
                self.register_parameter(key, nn.Parameter(value.flatten(0, 1) if c.layout == "flat" else value.clone()))

    def bank(self, part: str) -> Tensor:
        """[E, out, in], for the layouts of tensors."""
        c, held = self.config, getattr(self, self.names[part])
        if c.layout == "parameters":
            return torch.stack(list(held))
        if c.layout == "flat":
            held = held.view(c.experts, -1, c.hidden)
        return held.transpose(1, 2) if c.layout == "in_first" or (c.layout == "flat" and part == "down") else held

    def bank_bias(self, part: str) -> Tensor | None:
        """[E, out]."""
        if not biased(self.config, part):
            return None
        held = getattr(self, f"{self.names[part]}_bias")
        return torch.stack(list(held)) if self.config.layout == "parameters" else held.view(self.config.experts, -1)

    def _linear(self, part: str, x: Tensor, e: int) -> Tensor:
        if self.config.layout == "parameters":
            bias = getattr(self, f"{self.names[part]}_bias")[e] if biased(self.config, part) else None
            return F.linear(x, getattr(self, self.names[part])[e], bias)
        bias = self.bank_bias(part)
        return F.linear(x, self.bank(part)[e], None if bias is None else bias[e])

    def one(self, e: int, x: Tensor, w: Tensor | None = None) -> Tensor:
        """Expert e on rows."""
        c = self.config
        if c.layout not in MODULES:
            return ffn(c, x, lambda part, v: self._linear(part, v, e), w)
        if c.layout == "attributes":
            return getattr(self, f"expert_{e}")(x, w)
        held = getattr(self, self.names["experts"])
        module = held[f"expert_{e}"] if c.layout == "dict" else held[e]
        return module(x) if c.layout == "sequential" else module(x, w)

    def weighted(self, e: int, x: Tensor, w: Tensor) -> Tensor:
        """Expert e on rows [R, H] with weights [R, 1]."""
        if self.config.place == "input":
            return self.one(e, x * w)
        return self.one(e, x) * w if self.config.place == "output" else self.one(e, x, w)

    def all_experts(self, x: Tensor, product: Callable[[Tensor, Tensor], Tensor], at: Any, w: Tensor) -> Tensor:
        """Rows of several experts; `product(rows, bank)` multiplies, `at` indexes the bias [E, out]."""

        def linear(part: str, v: Tensor) -> Tensor:
            bias, y = self.bank_bias(part), product(v, self.bank(part))
            return y if bias is None else y + bias[at]

        if self.config.place == "input":
            return ffn(self.config, x * w, linear)
        return ffn(self.config, x, linear) * w if self.config.place == "output" else ffn(self.config, x, linear, w)

    def forward(self, x: Tensor) -> Any:
        c = self.config
        if c.shape == "TBH":
            x = x.transpose(0, 1)
        x_TH = x.reshape(-1, c.hidden)
        if self.training and c.noise == "jitter_block":
            x_TH = x_TH * torch.empty_like(x_TH).uniform_(0.9, 1.1)
        logits, w_TK, idx_TK = self.routing(x_TH) if c.router_module else route(self, x_TH)
        y_TH = IDIOMS[c.idiom](self, x_TH, w_TK, idx_TK)
        if c.shared != "none":
            beside = self.shared(x_TH)
            y_TH = y_TH + (self.shared_mix(x_TH).sigmoid() * beside if c.shared == "gated" else beside)
        if c.residual:
            y_TH = y_TH + x_TH
        y = y_TH.view(x.shape)
        if c.shape == "TBH":
            y = y.transpose(0, 1)
        if c.output == "logits":
            return y, logits
        if c.output == "aux":
            load = F.one_hot(idx_TK, c.experts).to(logits.dtype).sum(dim=(0, 1)) / max(1, idx_TK.numel())
            return y, c.experts * (load * F.softmax(logits, dim=-1).sum(dim=0) / max(1, idx_TK.shape[0])).sum()
        return y


class Nested(nn.Module):
    """Norm, layer and residual; an extra output of the layer is passed on."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(layer.config.hidden, dtype=getattr(torch, layer.config.dtype))
        self.ffn = layer

    def forward(self, x: Tensor) -> Any:
        out = self.ffn(self.norm(x))
        return (x + out[0], *out[1:]) if isinstance(out, tuple) else x + out


class Deep(nn.Module):
    """A list of layers around which nothing is MoE."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        H, dtype = layer.config.hidden, getattr(torch, layer.config.dtype)
        self.embed, self.head = nn.Linear(H, H, dtype=dtype), nn.Linear(H, 5, dtype=dtype)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(H, H, dtype=dtype), nn.SiLU()), Nested(layer)])

    def forward(self, x: Tensor) -> Any:
        h = self.embed(x)
        out = self.layers[1](h + self.layers[0](h))
        return (self.head(out[0]), *out[1:]) if isinstance(out, tuple) else self.head(out)


def build(config: Config) -> tuple[nn.Module, str]:
    """The model and the layer's path in it. The global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        layer = Layer(config)
        torch.manual_seed(config.seed)  # only here: layers of one seed get the same model around them
        if config.nested == 0:
            return layer, ""
        model = Nested(layer) if config.nested == 1 else Deep(layer)
    return model.train(config.training), "ffn" if config.nested == 1 else "layers.1.ffn"


def example(config: Config, B: int = 2, T: int = 7, seed: int = 1, skewed: bool = False) -> Tensor:
    """Input of the config's shape; `skewed`: all tokens nearly the same, so that they choose the same experts."""
    generator = torch.Generator().manual_seed(seed)
    x_BTH = torch.randn(B, T, config.hidden, dtype=torch.float64, generator=generator)
    if skewed and x_BTH.numel():
        x_BTH = x_BTH[:1, :1] + 1e-3 * x_BTH
    x = {"TH": x_BTH.flatten(0, 1), "BTH": x_BTH, "TBH": x_BTH.transpose(0, 1).contiguous()}[config.shape]
    return x.to(getattr(torch, config.dtype))
