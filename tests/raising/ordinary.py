"""The ordinary MoE layer that the look-alikes are compared with, the table of them, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H, I, E, K = 16, 24, 4, 2
B, T = 2, 12


def tokens(B: int = B, T: int = T, seed: int = 1) -> Tensor:
    return torch.randn(B, T, H, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Trigger:
    """Where an adversarial module differs from the ordinary layer of the same weights."""

    inputs: Callable[[], Tensor] = tokens
    training: bool = True
    dtype: torch.dtype = torch.float32
    calls: int = 1  # on which call
    gradients: bool = False  # the outputs are equal there, the gradients are not


@dataclass(frozen=True)
class LookAlike:
    build: Callable[[], nn.Module]
    nearest: str
    differs: str  # regular expression
    in_form: str = ""
    trigger: Trigger | None = None
    args: Callable[[], tuple[Any, ...]] = lambda: (tokens(),)

    def model(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()


CASES: dict[str, LookAlike] = {}
CONTROLS: dict[str, LookAlike] = {}  # ordinary after all: these must be raised


def case(nearest: str, differs: str, **options: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    def add(cls: type[nn.Module]) -> type[nn.Module]:
        CASES[cls.__name__] = LookAlike(cls, nearest, differs, **options)
        return cls

    return add


def control(**options: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    def add(cls: type[nn.Module]) -> type[nn.Module]:
        CONTROLS[cls.__name__] = LookAlike(cls, "A1", "", **options)
        return cls

    return add


class FFN(nn.Module):
    """The expert of all of them where nothing else is said."""

    def __init__(self, width: int = I, out: int = H, act: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.up_proj, self.down_proj, self.act = nn.Linear(H, width), nn.Linear(width, out), act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x)))


@control()
class Ordinary(nn.Module):
    """A1 written with hooks for what the others change: an ordinary layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(self.make(e) for e in range(E))

    def make(self, e: int) -> nn.Module:
        return FFN()

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        w_TK, idx_TK = F.softmax(self.gate(x_TH), dim=-1).topk(K, dim=-1)
        return w_TK / w_TK.sum(dim=-1, keepdim=True), idx_TK

    def expert(self, e: int, x: Tensor, nth: Tensor, token: Tensor) -> Tensor:
        return self.experts[e](x)

    def weight(self, e: int, w: Tensor) -> Tensor:
        return w

    def before(self, x_TH: Tensor) -> Tensor:
        return x_TH

    def after(self, y_TH: Tensor, x_TH: Tensor) -> Tensor:
        return y_TH

    def forward(self, x: Tensor) -> Tensor:
        x_TH = self.before(x.reshape(-1, H))
        w_TK, idx_TK = self.route(x_TH)
        y_TH = torch.zeros_like(x_TH)
        for e in range(E):
            token, nth = torch.where(idx_TK == e)
            z = self.expert(e, x_TH[token], nth, token) * self.weight(e, w_TK[token, nth, None])
            y_TH = y_TH.index_add(0, token, z)
        return self.after(y_TH, x_TH).view(x.shape)


@control()
class PositionRouted(Ordinary):
    """The router sees the position only; the experts are ordinary."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Embedding(64, E)

    def forward(self, x: Tensor) -> Tensor:
        position_T = torch.arange(x.shape[1], device=x.device).repeat(x.shape[0]) % 64
        w_TK, idx_TK = F.softmax(self.gate(position_T), dim=-1).topk(K, dim=-1)
        x_TH = x.reshape(-1, H)
        y_TH = torch.zeros_like(x_TH)
        for e, expert in enumerate(self.experts):
            token, nth = torch.where(idx_TK == e)
            y_TH = y_TH.index_add(0, token, expert(x_TH[token]) * w_TK[token, nth, None])
        return y_TH.view(x.shape)


@control(args=lambda: (tokens(), torch.randint(0, 32, (B, T), generator=torch.Generator().manual_seed(3))))
class TokenRouted(nn.Module):
    """Hash routing: token ids choose experts from a fixed table; the weights are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(FFN() for _ in range(E))
        self.register_buffer("table", torch.stack([torch.randperm(E)[:K] for _ in range(32)]))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x_TH, idx_TK = x.reshape(-1, H), self.table[ids.reshape(-1)]
        y_TH = torch.zeros_like(x_TH)
        for e, expert in enumerate(self.experts):
            token, _ = torch.where(idx_TK == e)
            y_TH = y_TH.index_add(0, token, expert(x_TH[token]) / K)
        return y_TH.view(x.shape)
