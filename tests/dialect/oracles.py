"""What the dialect ops must compute, as loops over tokens, choices and experts in float64, and how to compare with it.

Nothing here is shared with the references under test: rows are found by walking Python lists, activations come from
`math`, gradients from finite differences or from their definition written out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import moefx.dialect  # noqa: F401  registers the ops
from moefx.kernels import registry

Tensor = torch.Tensor
ops = torch.ops.moefx

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "bf16", "fp16"))

# What dispatch picks on this machine, and the readable definition.
ARMS = ("dispatch", "reference")
each_arm = pytest.mark.parametrize("arm", ARMS)


@contextmanager
def running(arm: str) -> Iterator[None]:
    """Ops called within run the named arm."""
    if arm == "dispatch":
        yield
        return
    with registry.preferring(arm):
        yield


# -- plans -----------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """A dispatch plan as Python lists; see moefx/dialect/routing.py for the four."""

    token: list[int]
    order: list[int]
    slot: list[list[int]]
    offsets: list[int]


def plan(idx: Sequence[Sequence[int]], E: int, align: int) -> Plan:
    """Expert by expert, append the pairs that chose it in token order, then pad the expert's rows to `align`."""
    k = len(idx[0]) if idx else 1
    pairs = sum(len(choices) for choices in idx)
    S = (pairs + E * (align - 1)) // align * align
    token, order, offsets = list[int](), list[int](), [0]
    slot = [[-1] * len(choices) for choices in idx]
    for e in range(E):
        for t, choices in enumerate(idx):
            for j, choice in enumerate(choices):
                if choice == e:
                    slot[t][j] = len(order)
                    order.append(t * k + j)
                    token.append(t)
        while len(order) % align:
            order.append(-1)
            token.append(-1)
        offsets.append(len(order))
    spare = [-1] * (S - len(order))
    return Plan(token + spare, order + spare, slot, offsets)


@dataclass
class Routing:
    """A plan as tensors for the ops and as lists for the oracles."""

    idx: Tensor
    E: int
    align: int
    lists: Plan

    @property
    def token(self) -> Tensor:
        return torch.tensor(self.lists.token, dtype=torch.int64)

    @property
    def order(self) -> Tensor:
        return torch.tensor(self.lists.order, dtype=torch.int64)

    @property
    def slot(self) -> Tensor:
        return torch.tensor(self.lists.slot, dtype=torch.int64).view(self.idx.shape)

    @property
    def offsets(self) -> Tensor:
        return torch.tensor(self.lists.offsets, dtype=torch.int32)

    @property
    def rows(self) -> int:
        return len(self.lists.token)

    @property
    def expert(self) -> list[int]:
        """Expert of each row, padding included, or -1 behind the last offset."""
        ends = self.lists.offsets
        return [next((e for e in range(self.E) if ends[e] <= s < ends[e + 1]), -1) for s in range(self.rows)]


def routing(idx: Tensor, E: int, align: int = 1) -> Routing:
    return Routing(idx, E, align, plan(idx.tolist(), E, align))


def _cases() -> dict[str, tuple[Tensor, int, int]]:
    g = torch.Generator().manual_seed(1)

    def random(T: int, k: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (T, k), generator=g)

    return {
        "balanced": (random(23, 3, 0, 5), 5, 1),
        "k1": (random(17, 1, 0, 4), 4, 1),
        "one_expert": (random(9, 2, 0, 1), 1, 1),
        "one_hot_expert": (torch.full((13, 2), 3), 7, 1),
        "empty_experts": (random(11, 2, 2, 4), 9, 1),
        "dropped": (random(19, 4, -2, 8), 5, 1),
        "all_dropped": (torch.full((6, 2), 4), 4, 1),
        "no_tokens": (random(0, 2, 0, 3), 3, 1),
        "padded": (random(15, 2, 0, 4), 4, 8),
        "padded_and_dropped": (random(21, 3, -1, 6), 5, 4),
        "padded_no_tokens": (random(0, 2, 0, 3), 3, 4),
        "padded_all_dropped": (torch.full((5, 3), -1), 3, 4),
    }


CASES = {name: routing(*case) for name, case in _cases().items()}
each_case = pytest.mark.parametrize("r", CASES.values(), ids=CASES.keys())


# -- activations -----------------------------------------------------------------------------------------------------


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


SCALAR: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
}
KINDS = tuple(
    prefix + act
    for act in (*SCALAR, "clamp(1.25,1.702)")
    for prefix in ("", "plain ", "interleaved ")
    if not (prefix == "plain " and act.startswith("clamp"))
)
each_kind = pytest.mark.parametrize("kind", KINDS)


def activate(row: Sequence[float], kind: str) -> list[float]:
    """One row of h through a glu kind."""
    *flags, act = kind.split(" ")
    if "plain" in flags:
        return [SCALAR[act](x) for x in row]
    half = len(row) // 2
    gates, ups = (row[::2], row[1::2]) if "interleaved" in flags else (row[:half], row[half:])
    if not act.startswith("clamp"):
        return [SCALAR[act](g) * u for g, u in zip(gates, ups, strict=True)]
    limit, alpha = (float(x) for x in act[len("clamp(") : -1].split(","))
    out = []
    for g, u in zip(gates, ups, strict=True):
        g, u = min(g, limit), max(-limit, min(u, limit))
        out.append(g * _sigmoid(alpha * g) * (u + 1))
    return out


def glu(h: Tensor, w: Tensor | None, kind: str) -> Tensor:
    rows = [activate(row, kind) for row in h.double().tolist()]
    width = h.shape[1] if kind.startswith("plain") else h.shape[1] // 2
    a = torch.tensor(rows, dtype=torch.float64).view(h.shape[0], width)
    return a if w is None else a * w.double()[:, None]


def glu_slack(h: Tensor, w: Tensor | None, kind: str) -> Tensor:
    """What a few roundings in fp32 leave in `glu`: relative to its factors, since the tail of GELU cancels."""
    x = h.double().abs()
    if not kind.startswith("plain"):
        gate, up = (x[:, ::2], x[:, 1::2]) if kind.startswith("interleaved") else x.chunk(2, 1)
        x = gate * (up + 1)
    return 4 * torch.finfo(torch.float32).eps * (x if w is None else x * w.double().abs()[:, None])


def central(f: Callable[[Tensor], Tensor], x: Tensor, seed: Tensor, eps: float = 1e-6) -> Tensor:
    """Gradient of <f(x), seed> by central differences, one element of a row at a time, all rows at once.

    Only for functions that map rows to rows.
    """
    grad = torch.zeros_like(x)
    for i in range(x.shape[1]):
        step = torch.zeros_like(x)
        step[:, i] = eps
        grad[:, i] = ((f(x + step) - f(x - step)) * seed).sum(1) / (2 * eps)
    return grad


# -- comparison ------------------------------------------------------------------------------------------------------


def check(
    got: Tensor,
    want: Tensor,
    *,
    roundings: float = 2,
    scale: Tensor | float | None = None,
    slack: Tensor | float = 0.0,
) -> None:
    """`got` is within `roundings` roundings to its dtype of the float64 `want`, and `slack` in absolute terms.

    `scale` is what a rounding is relative to: by default the largest value wanted; for sums with cancellation, the sum
    of the terms' absolute values.
    """
    assert want.dtype == torch.float64
    assert got.shape == want.shape
    if want.numel() == 0:
        return
    info = torch.finfo(got.dtype)
    reference = want.abs().max() if scale is None else torch.as_tensor(scale, dtype=torch.float64)
    bound = roundings * (info.eps / 2 * reference + info.smallest_normal * info.eps) + slack
    worst = (got.double() - want).abs() - bound
    assert worst.max() <= 0, f"error above the bound by {float(worst.max()):.3g}, bound {float(bound.max()):.3g}"


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values that `dtype` holds exactly, so that the oracle starts from the same numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layouts(t: Tensor) -> dict[str, Tensor]:
    """The same values under other strides."""
    t = t.detach()
    stepped = torch.full([2 * n + 1 for n in t.shape], float("nan") if t.is_floating_point() else 0, dtype=t.dtype)
    inner = stepped[tuple(slice(1, None, 2) for _ in t.shape)]
    inner.copy_(t)
    out = {"stepped": inner}
    if t.dim() > 1:
        out["transposed"] = t.transpose(-1, -2).contiguous().transpose(-1, -2)
        padded = torch.full(
            (*t.shape[:-1], t.shape[-1] + 3), float("nan") if t.is_floating_point() else 0, dtype=t.dtype
        )
        padded[..., 1:-2] = t
        out["sliced"] = padded[..., 1:-2]
    for variant in out.values():
        assert equal(variant, t)
    return out


def bits(t: Tensor) -> Tensor:
    """The bytes of a tensor of 8-bit floating-point numbers, which PyTorch cannot compare; any other as it is."""
    return t.view(torch.uint8) if t.is_floating_point() and t.element_size() == 1 else t


def equal(a: Tensor, b: Tensor) -> bool:
    """`torch.equal`, of the same dtype, and bit by bit for 8-bit floating-point numbers."""
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def tensors(*args: Any) -> list[Tensor]:
    """All tensors among arguments or outputs, lists included."""
    out = list[Tensor]()
    for a in args:
        if isinstance(a, Tensor):
            out.append(a)
        elif isinstance(a, (tuple, list)):
            out += tensors(*a)
    return out
