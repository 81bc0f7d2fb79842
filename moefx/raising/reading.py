"""Ways to read a bank: which of its parameters is gate, up and down, in which layout, with which activation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
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

    @property
    def into(self) -> int:
        """Features that the product takes."""
        return self.stack.shape[1 if self.turned else 2]

    @property
    def out(self) -> int:
        """Features that it gives."""
        return self.stack.shape[2 if self.turned else 1]


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

    def activation(self, products: Sequence[Tensor]) -> Tensor:
        """What goes into the second product [R, I], from the first products in the order of `up`."""
        h = torch.cat(list(products), -1)
        return glu_reference(swap_halves(h, 1, self.kind.interleaved) if self.swapped else h, None, str(self.kind))


def swap_halves(t: Tensor, dim: int, interleaved: bool) -> Tensor:
    """Gate and up in the other order along an axis, where they are two halves, or alternate."""
    if interleaved:
        flipped: Tensor = t.unflatten(dim, (-1, 2)).flip(dim + 1).flatten(dim, dim + 1)
        return flipped
    return torch.cat(t.chunk(2, dim)[::-1], dim)


def readings(bank: Bank, hidden: int, limits: tuple[tuple[float, float], ...]) -> Iterator[Reading]:
    """All ways to read a bank whose experts take rows of `hidden` features, the usual ones first."""
    gated = [GluKind(a) for a in ACTS]
    joint = [replace(k, interleaved=True) for k in gated]
    clamps = [GluKind("clamp", True, i, *pair) for pair in limits for i in (True, False)]
    plain = [GluKind(a, gated=False) for a in ACTS]
    for *ups, down in itertools.permutations(bank.matrices):
        layouts = [[r for t in (False, True) if (r := Role(s, t)).into == hidden] for s in ups]
        for roles in itertools.product(*layouts):
            width = sum(r.out for r in roles)
            if len({r.out for r in roles}) > 1:
                continue
            for second in (Role(down, False), Role(down, True)):
                inner = second.into
                if width == 2 * inner:
                    kinds = gated if len(ups) == 2 else [*gated, *joint, *clamps]
                    options = [(k, s) for k in kinds for s in (False, True) if not (s and len(ups) == 2)]
                elif width == inner and len(ups) == 1:
                    options = [(k, False) for k in plain]
                else:
                    continue
                for with_bias in _biases(bank, [*roles, second]):
                    for kind, swapped in options:
                        yield Reading(kind, tuple(with_bias[:-1]), with_bias[-1], swapped)


def _biases(bank: Bank, roles: list[Role]) -> Iterator[list[Role]]:
    """Assignments of the bank's vectors to roles, all of them used first."""
    options = [[None, *(v for v in bank.vectors if v.shape[1] == r.out)] for r in roles]
    chosen = [c for c in itertools.product(*options) if len({v for v in c if v}) == sum(v is not None for v in c)]
    for c in sorted(chosen, key=lambda c: sum(v is None for v in c)):
        yield [replace(r, bias=v) for r, v in zip(roles, c, strict=True)]


class Evaluator:
    """Expert outputs of single rows, with the parameters of the recorded block."""

    def __init__(self, block: nn.Module) -> None:
        self.params = dict(block.named_parameters(remove_duplicate=False))
        self._pre: dict[tuple[int, int, bool, Role], Tensor] = {}
        self._kept: list[Tensor] = []
        self._whole: dict[Stack, Tensor] = {}

    def _get(self, name: str) -> Tensor:
        return self.params[name].detach()

    def linear(self, x: Tensor, role: Role, experts: Tensor) -> Tensor:
        """Rows x [R, in] times the matrices of their experts [R], plus biases: [R, out]."""
        if experts.numel() > _GATHERED:
            y = x.new_zeros(len(x), role.out, dtype=torch.float32)
            for e in experts.unique():
                mine = (experts == e).nonzero()[:, 0]
                w = role.stack.rows(self._get, e[None])[0]
                y[mine] = x[mine].float() @ (w if role.turned else w.t())
        else:
            w = role.stack.rows(self._get, experts)
            y = torch.einsum("ri,rio->ro" if role.turned else "ri,roi->ro", x, w)
        return y if role.bias is None else y + role.bias.rows(self._get, experts)

    def everywhere(self, reading: Reading, x: Tensor) -> Tensor:
        """f_e(x) of rows x [n, H] for all experts of the bank: [n, E, H]. Whole stacks in float32 are kept."""
        parts = []
        for role in reading.up:
            key = (id(x), 0, False, role)
            if key not in self._pre:
                self._kept.append(x)
                self._pre[key] = self._all(x[:, None].expand(-1, role.stack.shape[0], -1), role)
            parts.append(self._pre[key].flatten(0, 1))
        return self._all(reading.activation(parts).view(len(x), -1, reading.down.into), reading.down)

    def _all(self, x: Tensor, role: Role) -> Tensor:
        if role.stack not in self._whole:
            self._whole[role.stack] = role.stack.gather(self._get).float()
        w = self._whole[role.stack]
        y = torch.einsum("nei,eio->neo" if role.turned else "nei,eoi->neo", x, w)
        return y if role.bias is None else y + role.bias.gather(self._get).float()

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
                self._pre[key] = self.linear(flat, role, experts)
            parts.append(self._pre[key])
        z = self.linear(reading.activation(parts), reading.down, experts)
        return z.view(*chosen.shape, z.shape[-1])
