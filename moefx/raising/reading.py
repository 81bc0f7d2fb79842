"""Ways to read a bank: which of its parameters is gate, up and down, in which layout, with which activation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from moefx.dialect.glu import GluKind, glu_reference

from .bank import Bank, Stack

Tensor = torch.Tensor
_GATHERED = 512  # rows whose weights are gathered; of more, expert by expert
ACTS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@dataclass(frozen=True)
class Role:
    """A stack in its role. `turned`: stored [E, in, out]."""

    stack: Stack
    turned: bool = False
    bias: Stack | None = None


@dataclass(frozen=True)
class Reading:
    """One way to read a bank: `up` holds gate and up in one or two stacks, in this order unless `swapped`."""

    kind: GluKind
    up: tuple[Role, ...]
    down: Role
    swapped: bool = False

    @property
    def bias(self) -> bool:
        """Whether the products have biases."""
        return self.down.bias is not None or any(r.bias is not None for r in self.up)

    @property
    def names(self) -> frozenset[str]:
        """All parameters that are read."""
        roles = (*self.up, self.down)
        return frozenset(n for r in roles for s in (r.stack, r.bias) if s is not None for n in s.names)


def readings(bank: Bank, hidden: int, limits: tuple[tuple[float, float], ...]) -> Iterator[Reading]:
    """All ways to read a bank whose experts take rows of `hidden` features, the usual ones first."""
    gated = [GluKind(a) for a in ACTS]
    joint = [replace(k, interleaved=True) for k in gated]
    clamps = [GluKind("clamp", True, i, *pair) for pair in limits for i in (True, False)]
    plain = [GluKind(a, gated=False) for a in ACTS]
    for *ups, down in itertools.permutations(bank.matrices):
        layouts = [[t for t in (False, True) if s.shape[1 if t else 2] == hidden] for s in ups]
        for turned in itertools.product(*layouts):
            width = sum(s.shape[2 if t else 1] for s, t in zip(ups, turned, strict=True))
            if len(ups) == 2 and len({s.shape[2 if t else 1] for s, t in zip(ups, turned, strict=True)}) > 1:
                continue
            for down_turned in (False, True):
                inner = down.shape[1 if down_turned else 2]
                roles = [Role(s, t) for s, t in zip(ups, turned, strict=True)]
                if width == 2 * inner:
                    kinds = gated if len(ups) == 2 else [*gated, *joint, *clamps]
                    options = [(k, s) for k in kinds for s in (False, True) if not (s and len(ups) == 2)]
                elif width == inner and len(ups) == 1:
                    options = [(k, False) for k in plain]
                else:
                    continue
                for with_bias in _biases(bank, [*roles, Role(down, down_turned)]):
                    for kind, swapped in options:
                        yield Reading(kind, tuple(with_bias[:-1]), with_bias[-1], swapped)


def _biases(bank: Bank, roles: list[Role]) -> Iterator[list[Role]]:
    """Assignments of the bank's vectors to roles, all of them used first."""
    outs = [r.stack.shape[2 if r.turned else 1] for r in roles]
    options = [[None, *(v for v in bank.vectors if v.shape[1] == out)] for out in outs]
    chosen = [c for c in itertools.product(*options) if len({v for v in c if v}) == sum(v is not None for v in c)]
    for c in sorted(chosen, key=lambda c: sum(v is None for v in c)):
        yield [replace(r, bias=v) for r, v in zip(roles, c, strict=True)]


class Evaluator:
    """Expert outputs of single rows, with the parameters of the recorded block."""

    def __init__(self, block: nn.Module) -> None:
        self.params = dict(block.named_parameters(remove_duplicate=False))
        self._pre: dict[tuple[int, int, bool, Role], Tensor] = {}
        self._kept: list[Tensor] = []

    def _rows(self, stack: Stack, experts: Tensor) -> Tensor:
        """Parameters of the given experts [R, ...] without building the whole stack."""
        if len(stack.names) == 1:
            return stack.gather(lambda n: self.params[n].detach())[experts].float()
        return torch.stack([self.params[stack.names[e]].detach().float() for e in experts.tolist()])

    def _linear(self, x: Tensor, role: Role, experts: Tensor) -> Tensor:
        if experts.numel() > _GATHERED:
            out = role.stack.shape[2 if role.turned else 1]
            y = x.new_zeros(len(x), out, dtype=torch.float32)
            for e in experts.unique():
                mine = (experts == e).nonzero()[:, 0]
                w = self._rows(role.stack, e[None])[0]
                y[mine] = x[mine].float() @ (w if role.turned else w.t())
            return y if role.bias is None else y + self._rows(role.bias, experts)
        w = self._rows(role.stack, experts)
        y = torch.einsum("ri,rio->ro", x, w) if role.turned else torch.einsum("ri,roi->ro", x, w)
        return y if role.bias is None else y + self._rows(role.bias, experts)

    def __call__(self, reading: Reading, x: Tensor, rows: Tensor, pick: Tensor | None = None) -> Tensor:
        """f_e(x) of input rows x [N, k, H] and experts [N, k], for all or the picked tokens: [n, k, H].

        Without a k: x [R, H] and experts [R] give [R, H].
        """
        xs, chosen = (x, rows) if pick is None else (x[pick], rows[pick])
        flat, experts = xs.reshape(-1, x.shape[-1]), chosen.reshape(-1)
        parts = []
        for role in reading.up:  # shared by all activations, so kept
            key = (id(x), id(rows), pick is None, role)
            if key not in self._pre:
                self._kept += [x, rows]
                self._pre[key] = self._linear(flat, role, experts)
            parts.append(self._pre[key])
        h = torch.cat(parts, -1)
        if reading.swapped:
            if reading.kind.interleaved:
                h = h.view(*h.shape[:-1], -1, 2).flip(-1).flatten(-2)
            else:
                h = torch.cat(h.chunk(2, -1)[::-1], -1)
        z = self._linear(glu_reference(h, None, str(reading.kind)), reading.down, experts)
        return z.view(*chosen.shape, z.shape[-1])
