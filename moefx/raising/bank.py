"""Banks of experts, found by structure: parameters that come E times, or E at once in one tensor.

No class name is looked at. `experts.3.w1.weight` is the fourth of a stack because its brothers have the same shape and
a name that differs in the number alone; a parameter [E, out, in] is a stack by itself, and so are matrices [E * I, H]
where E is a number that the module carries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

Tensor = torch.Tensor
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Stack:
    """One role's parameters of all experts: E names, or one name that holds them all. `shape` is [E, ...].

    `spare`: the parameter has rows for more experts than the bank.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    spare: bool = False

    def gather(self, get: Callable[[str], Tensor]) -> Tensor:
        """The stack as one tensor [E, ...], a view where it is stored as one."""
        if len(self.names) > 1:
            return torch.stack([get(n) for n in self.names])
        whole = get(self.names[0])
        return whole[: self.shape[0]] if self.spare else whole.view(self.shape)

    def rows(self, get: Callable[[str], Tensor], experts: Tensor) -> Tensor:
        """The parameters of the given experts [R] in float32, [R, ...], without building a stack of all."""
        if len(self.names) == 1:
            return self.gather(get)[experts].float()
        return torch.stack([get(self.names[e]).float() for e in experts.tolist()])

    def __str__(self) -> str:
        return self.names[0] if len(self.names) == 1 else f"{self.names[0]} .. {self.names[-1]}"


@dataclass(frozen=True)
class Bank:
    """Experts of one layer: matrices [E, a, b] and vectors [E, a]."""

    experts: int
    matrices: tuple[Stack, ...]
    vectors: tuple[Stack, ...]

    @property
    def names(self) -> frozenset[str]:
        """All parameters of the bank."""
        return frozenset(n for s in (*self.matrices, *self.vectors) for n in s.names)


def find_banks(block: nn.Module) -> list[Bank]:
    """All groups of parameters in a module that could be its experts, larger groups first."""
    # Parametrized matrices are functions of their parameters, which are no matrices that experts multiply with.
    named = ((n, p) for n, p in block.named_parameters(remove_duplicate=False) if ".parametrizations." not in f".{n}")
    params: dict[str, Tensor] = {n: p for n, p in named if p.dtype in _FLOATS}
    banks = [*_listed(params), *_stacked(params), *_flat(block, params)]
    unique = {b.names: b for b in banks if 2 <= len(b.matrices) <= 3 and len(b.vectors) <= 3}
    return sorted(unique.values(), key=lambda b: -sum(_size(s) for s in b.matrices))


def _size(s: Stack) -> int:
    return int(torch.Size(s.shape).numel())


def _bank(stacks: Sequence[Stack]) -> Bank:
    matrices = tuple(s for s in stacks if len(s.shape) == 3)
    return Bank(stacks[0].shape[0], matrices, tuple(s for s in stacks if len(s.shape) == 2))


def _listed(params: dict[str, Tensor]) -> list[Bank]:
    """Families of parameters whose names differ in one number: (module path) -> (rest of the name) -> number."""
    found: dict[str, dict[str, dict[int, str]]] = {}
    for name in params:
        parts = name.split(".")
        for i, part in enumerate(parts):
            for m in re.finditer(r"\d+", part):
                rest = ".".join((f"{part[: m.start()]}*{part[m.end() :]}", *parts[i + 1 :]))
                found.setdefault(".".join(parts[:i]), {}).setdefault(rest, {})[int(m[0])] = name
    banks: list[Bank] = []
    lone: dict[int, list[Stack]] = {}
    for rests in found.values():
        sets: dict[tuple[int, ...], list[Stack]] = {}
        for at in rests.values():
            numbers = tuple(sorted(at))
            members = [params[at[n]] for n in numbers]
            if len(numbers) < 2 or numbers[-1] - numbers[0] != len(numbers) - 1:
                continue
            if len({(m.shape, m.dtype) for m in members}) > 1 or members[0].dim() not in (1, 2):
                continue
            names = tuple(at[n] for n in numbers)
            stack = Stack(names, (len(numbers), *members[0].shape), members[0].dtype)
            sets.setdefault(numbers, []).append(stack)
        for stacks in sets.values():
            if sum(len(s.shape) == 3 for s in stacks) > 1:
                banks.append(_bank(stacks))
            else:
                lone.setdefault(stacks[0].shape[0], []).extend(stacks)
    # Lists by role, `w1 = ParameterList(...)`, `w2 = ...`: each family has one matrix.
    return banks + [_bank(stacks) for stacks in lone.values() if sum(len(s.shape) == 3 for s in stacks) > 1]


def _stacked(params: dict[str, Tensor]) -> list[Bank]:
    """Tensors [E, ...]: by the module that holds them, and all of one E together."""
    groups: dict[tuple[str | None, int], list[Stack]] = {}
    for name, p in params.items():
        if p.dim() != 3 or p.shape[0] < 2:
            continue
        stack = Stack((name,), tuple(p.shape), p.dtype)
        groups.setdefault((name.rpartition(".")[0], p.shape[0]), []).append(stack)
        groups.setdefault((None, p.shape[0]), []).append(stack)
    banks = []
    for (_, E), stacks in groups.items():
        owners = {s.names[0].rpartition(".")[0] for s in stacks}
        vectors = [
            Stack((n,), tuple(p.shape), p.dtype)
            for n, p in params.items()
            if p.dim() == 2 and p.shape[0] == E and (n.rpartition(".")[0] in owners or "bias" in n)
        ]
        banks.append(_bank([*stacks, *vectors]))
    return banks + _uneven(params)


def _uneven(params: dict[str, Tensor]) -> list[Bank]:
    """Tensors [E, ...] of one module of which some have rows to spare, where indices past the last expert are legal."""
    owners: dict[str, list[str]] = {}
    for name, p in params.items():
        if p.dim() == 3:
            owners.setdefault(name.rpartition(".")[0], []).append(name)
    banks = []
    for names in owners.values():
        E = min(params[n].shape[0] for n in names)
        if E > 1 and any(params[n].shape[0] > E for n in names):
            shapes = {n: (E, *params[n].shape[1:]) for n in names}
            banks.append(_bank([Stack((n,), shapes[n], params[n].dtype, params[n].shape[0] > E) for n in names]))
    return banks


def _flat(block: nn.Module, params: dict[str, Tensor]) -> list[Bank]:
    """Matrices [E * I, H] of one module, E being an int that some module of the block carries."""
    counts = {v for m in block.modules() for v in m.__dict__.values() if type(v) is int and v > 1}
    counts |= {v for m in block.modules() if (v := getattr(m, "out_features", 0)) > 1}
    owners: dict[str, list[str]] = {}
    for name, p in params.items():
        if p.dim() == 2 and not name.rpartition(".")[2].isdigit():
            owners.setdefault(name.rpartition(".")[0], []).append(name)
    banks = []
    for names in owners.values():
        for E in counts:
            fit = [n for n in names if params[n].shape[0] % E == 0 and params[n].shape[0] > E]
            if len(fit) > 1:
                shapes = {n: (E, params[n].shape[0] // E, params[n].shape[1]) for n in fit}
                banks.append(_bank([Stack((n,), shapes[n], params[n].dtype) for n in fit]))
    return banks
