"""Random ordinary MoE layers: their options, a hypothesis strategy, their weights, and a reference computed by loops.

An ordinary layer computes y_t = sum_j w_tj f(x_t; expert idx_tj), plus what stands beside the experts (shared expert,
residual). `Config` says which one; `random_layer.py` spells it in code. The reference shares no code with that: it goes
from the config and the seed to the outputs, one token at a time in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

KNOWN = ("silu", "gelu", "gelu_tanh", "relu", "relu2")  # the dialect has these; the others must be refused
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda v: F.relu(v).square(),
    "tanh": torch.tanh,
    "mish": F.mish,
}
MODULES = ("list", "dict", "attributes", "sequential")  # layouts with one module per expert
TENSORS = ("parameters", "stacked", "in_first", "flat")
LOOPS = ("A1", "A2", "A3", "A4", "A5", "A6", "A6p")
ANY_LAYOUT = (*LOOPS, "D1", "D2", "E1", "E3", "H")
BANKS = ("B", "C", "D3", "E2", "F")  # these need the weights of all experts as one tensor
FUSED = ("separate", "gate_up", "up_gate", "interleaved", "interleaved_up")


@dataclass(frozen=True)
class Groups:
    """Group-limited choice: `kept` of `count` groups stay, ranked by their best score or the sum of their best two."""

    count: int
    kept: int
    by: str = "max"  # max, top2
    fill: float = float("-inf")


@dataclass(frozen=True)
class Config:
    """One layer. The defaults are the most ordinary choice of each option."""

    seed: int = 0  # of weights, names and inputs
    experts: int = 4
    k: int = 2
    hidden: int = 16
    width: int = 24
    act: str = "silu"
    gated: bool = True
    bias: str = "none"  # none, all, inner (gate and up), down
    fused: str = "separate"
    layout: str = "list"
    idiom: str = "A2"
    score: str = "softmax"  # softmax, sigmoid, topk_softmax
    router_module: bool = False
    router_bias: bool = False
    router_fp32: bool = False
    correction: str = "none"  # none, buffer, parameter
    groups: Groups | None = None
    renormalize: bool = True
    scale: float = 1.0
    noise: str = "none"  # in training: none, jitter (the router's input), jitter_block (all of it), logits
    place: str = "output"  # where the weight goes: output, input, inner
    shared: str = "none"  # none, plain, gated
    residual: bool = False
    capacity: int | float | None = None  # rows per expert, or the capacity factor
    priority: str = "token"  # who is served first: token, choice
    output: str = "y"  # y, logits (y, router logits), aux (y, balance loss)
    shape: str = "BTH"  # TH, BTH, TBH
    dtype: str = "float32"
    nested: int = 0  # 0: the layer is the model; 1: norm and residual around it; 2: that in a list of layers
    training: bool = True

    def rows(self, T: int) -> int:
        """Rows per expert for T tokens."""
        if self.capacity is None:
            return T
        if isinstance(self.capacity, int):
            return self.capacity
        return max(1, int(self.capacity * T * self.k / self.experts))


def sensible(idiom: str, place: str, bias: str, layout: str, capacity: object) -> bool:
    """Whether the idiom can say this: dense idioms compute f of a zero row, padded buffers carry no weight."""
    if place != "output":
        if idiom in ("B", "E3", "F", "H") or capacity is not None:
            return False
        if idiom in ("E1", "E2") and bias != "none":
            return False
    return not (layout == "sequential" and place == "inner")


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Layers in which every option varies; what an idiom cannot say falls back to the default of that option."""

    def one(*options: object) -> object:
        return draw(st.sampled_from(options))

    E = draw(st.integers(2, 9))
    k = draw(st.integers(1, min(3, E)))
    H = one(16, 8, 12, 24, 32)
    gated = one(True, True, False)
    layout = one("list", "stacked", *MODULES, *TENSORS)
    idiom = one(*ANY_LAYOUT) if layout in MODULES else one(*BANKS, *BANKS, *ANY_LAYOUT)
    score = one("softmax", "topk_softmax", "sigmoid")
    correction, groups = "none", None
    if score != "topk_softmax":
        correction = one("none", "none", "buffer", "parameter")
        limits = [
            Groups(G, kept, by, fill)
            for G in range(2, E)
            for kept in range(1, G + 1)
            for by in ("max", "top2")
            for fill in (float("-inf"), 0.0)
            if E % G == 0
            and kept * (E // G) >= k
            and not (by == "top2" and E // G < 2)
            # A score of zero beats a corrected score below zero: only scores that are positive are filled with it.
            and (fill != 0 or correction == "none")
        ]
        groups = one(None, None, *limits)
    bias, place = one("none", "none", "all", "inner", "down"), one("output", "output", "output", "input", "inner")
    capacity = one(None, None, None, draw(st.integers(1, 8)), 1.0, 1.25, 0.5)
    dtype = one("float32", "float32", "float64", "bfloat16")
    if not sensible(idiom, place, bias, layout, capacity):
        place = "output"
    return Config(
        seed=draw(st.integers(0, 2**16)),
        experts=E,
        k=k,
        hidden=H,
        width=one(24, 8, 16, 12, H),
        act=one(*KNOWN, *KNOWN, "tanh", "mish"),
        gated=gated,
        bias=bias,
        fused=one(*FUSED) if gated else "separate",
        layout=layout,
        idiom=idiom,
        score=score,
        router_module=draw(st.booleans()),
        router_bias=one(False, False, True),
        router_fp32=one(False, False, True) and dtype != "float64",
        correction=correction,
        groups=groups,
        renormalize=draw(st.booleans()) or score == "topk_softmax",
        scale=one(1.0, 1.0, 2.5, 0.5),
        noise=one("none", "none", "none", "jitter", "jitter_block", "logits"),
        place=place,
        shared=one("none", "none", "plain", "gated"),
        residual=one(False, False, True),
        capacity=capacity,
        priority=one("token", "choice"),
        output=one("y", "y", "logits", "aux"),
        shape=one("BTH", "TH", "TBH"),
        dtype=dtype,
        nested=draw(st.integers(0, 2)),
        training=draw(st.booleans()),
    )


def one_change() -> list[Config]:
    """The default layer and every layer that differs from it in one option."""
    changes: list[dict[str, object]] = [{}]
    changes += [{"act": a} for a in (*KNOWN[1:], "tanh", "mish")] + [{"fused": f} for f in FUSED[1:]]
    changes += [{"layout": n} for n in (*MODULES[1:], *TENSORS)]
    changes += [{"idiom": n} for n in ANY_LAYOUT if n != Config.idiom] + [
        {"idiom": n, "layout": "stacked"} for n in BANKS
    ]
    changes += [{"bias": b} for b in ("all", "inner", "down")] + [{"score": s} for s in ("sigmoid", "topk_softmax")]
    changes += [{"correction": c} for c in ("buffer", "parameter")]
    changes += [{"groups": Groups(2, 1, by, fill)} for by in ("max", "top2") for fill in (float("-inf"), 0.0)]
    changes += [{"noise": n} for n in ("jitter", "jitter_block", "logits")] + [{"place": p} for p in ("input", "inner")]
    changes += [{"shared": s} for s in ("plain", "gated")] + [{"output": o} for o in ("logits", "aux")]
    changes += [{"capacity": c, "priority": p} for c in (5, 1.0) for p in ("token", "choice")]
    changes += [{"shape": s} for s in ("TH", "TBH")] + [{"dtype": d} for d in ("float64", "bfloat16")]
    changes += [{"nested": n} for n in (1, 2)] + [{"experts": 9, "k": 3}, {"experts": 2, "k": 1}, {"width": 16}]
    changes += [{n: True} for n in ("router_module", "router_bias", "router_fp32", "residual")]
    changes += [{n: False} for n in ("gated", "renormalize", "training")] + [{"scale": 2.5}]
    return [Config(**change) for change in changes]  # type: ignore[arg-type]


def describe(config: Config) -> str:
    """What is not the default, for test ids and messages."""
    plain = Config()
    changed = {n: v for n, v in vars(config).items() if v != getattr(plain, n)}
    return ",".join(f"{n}={v}" for n, v in changed.items()) or "default"


def weights(config: Config) -> dict[str, Tensor]:
    """All weights the layer could have, in float64, whatever its options: matrices [E, out, in], biases [E, out]."""
    generator = torch.Generator().manual_seed(config.seed)
    E, H, I = config.experts, config.hidden, config.width
    S = I + 4  # the shared expert's width

    def normal(*shape: int, std: float | None = None) -> Tensor:
        std = shape[-1] ** -0.5 if std is None else std
        return torch.randn(shape, dtype=torch.float64, generator=generator) * std

    return {
        "router": normal(E, H, std=2 * H**-0.5),
        "router_bias": normal(E, std=0.3),
        "correction": normal(E, std=0.2),
        "gate": normal(E, I, H),
        "up": normal(E, I, H),
        "down": normal(E, H, I),
        "gate_bias": normal(E, I, std=0.3),
        "up_bias": normal(E, I, std=0.3),
        "down_bias": normal(E, H, std=0.3),
        "shared_gate": normal(1, S, H),
        "shared_up": normal(1, S, H),
        "shared_down": normal(1, H, S),
        "shared_gate_bias": normal(1, S, std=0.3),
        "shared_up_bias": normal(1, S, std=0.3),
        "shared_down_bias": normal(1, H, std=0.3),
        "shared_mix": normal(1, H),
    }


def chosen(config: Config, W: dict[str, Tensor], x_H: Tensor) -> list[tuple[int, float]]:
    """(expert, weight) of one token's choices, the best first. Without the noise of training."""
    logits_E = W["router"] @ x_H + W["router_bias"] * config.router_bias
    logits = [float(v) for v in logits_E]
    if config.score == "sigmoid":
        scores = [float(1 / (1 + torch.exp(-v))) for v in logits_E]
    else:
        exp_E = torch.exp(logits_E - logits_E.max())
        scores = [float(v) for v in exp_E / exp_E.sum()]
    rank = logits if config.score == "topk_softmax" else list(scores)
    if config.correction != "none":
        rank = [r + float(c) for r, c in zip(rank, W["correction"], strict=True)]
    if config.groups is not None:
        size = config.experts // config.groups.count
        members = [range(g * size, (g + 1) * size) for g in range(config.groups.count)]
        best = 1 if config.groups.by == "max" else 2
        value = [sum(sorted((rank[e] for e in group), reverse=True)[:best]) for group in members]
        order = sorted(range(len(members)), key=lambda g: -value[g])
        for g in order[config.groups.kept :]:
            for e in members[g]:
                rank[e] = config.groups.fill
    top = sorted(range(config.experts), key=lambda e: -rank[e])[: config.k]
    total = sum(scores[e] for e in top) if config.renormalize or config.score == "topk_softmax" else 1.0
    return [(e, scores[e] / total * config.scale) for e in top]


def reference(config: Config, x: Tensor) -> Tensor:
    """The layer's output y in float64, for x in any of the three shapes; capacity decided choice by choice."""
    W, act = weights(config), ACTIVATIONS[config.act]
    inner, outer = config.bias in ("all", "inner"), config.bias in ("all", "down")

    def ffn(prefix: str, e: int, v_H: Tensor, at_inner: float = 1.0) -> Tensor:
        up = W[f"{prefix}up"][e] @ v_H + inner * W[f"{prefix}up_bias"][e]
        gate = W[f"{prefix}gate"][e] @ v_H + inner * W[f"{prefix}gate_bias"][e]
        a = act(gate) * up if config.gated else act(up)
        return W[f"{prefix}down"][e] @ (a * at_inner) + outer * W[f"{prefix}down_bias"][e]

    x = x.detach().double()
    sequence_first = config.shape == "TBH"
    rows = (x.transpose(0, 1) if sequence_first else x).reshape(-1, config.hidden)
    T = rows.shape[0]
    choices = [chosen(config, W, rows[t]) for t in range(T)]
    order = [(t, j) for t in range(T) for j in range(config.k)]
    if config.priority == "choice":
        order.sort(key=lambda tj: tj[1])  # stable: the tokens of one choice stay in their order
    y, served = torch.zeros_like(rows), [0] * config.experts
    for t, j in order:
        e, w = choices[t][j]
        served[e] += 1
        if served[e] > config.rows(T):
            continue
        if config.place == "input":
            y[t] += ffn("", e, rows[t] * w)
        elif config.place == "inner":
            y[t] += ffn("", e, rows[t], w)
        else:
            y[t] += w * ffn("", e, rows[t])
    for t in range(T):
        if config.shared != "none":
            mix = torch.sigmoid(W["shared_mix"][0] @ rows[t]) if config.shared == "gated" else 1.0
            y[t] += mix * ffn("shared_", 0, rows[t])
        y[t] += rows[t] * config.residual
    if sequence_first:
        return y.view(x.shape[1], x.shape[0], -1).transpose(0, 1)
    return y.view(x.shape)
