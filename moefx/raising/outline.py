"""What the parameters of a module tell about experts that are no bank: the first thing that keeps them from being one.

Only structure is looked at (children, shapes, names in the code of `forward`); nothing is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

Tensor = torch.Tensor
EXPERT_NAME = re.compile(r"expert|moe", re.IGNORECASE)
_LOOPS = frozenset({"where", "nonzero", "any", "index_add", "index_add_", "unique"})
_CHOICES = frozenset({"topk", "argmax", "max", "sort", "argsort"})
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def outline(module: nn.Module, stacked: list[str]) -> str | None:
    """Nearest idiom and difference of a module that looks like one with experts; None where structure says nothing.

    Args:
        stacked: its own parameters that hold something of all experts.
    """
    code = _code(module)
    named = EXPERT_NAME.search(type(module).__name__) is not None
    tables = [n for n, m in module._modules.items() if isinstance(m, _EMBEDDINGS)]
    if tables and (named or any(EXPERT_NAME.search(n) for n in tables)):
        return (
            f"nearest to gathered weights, but its experts are rows of an embedding ({', '.join(tables)}), "
            "not matrices that a token is multiplied with"
        )
    if stacked:
        what = _stacks(module, stacked, code)
        near = "gathered weights" if code & _CHOICES else _EVERY
        return f"nearest to {near}, but {what}" if what else None
    for name, experts in _lists(module):
        what = _experts(name, experts)
        if what is not None:
            return f"{nearest_in_code(module)}, but {what}"
    return None


def nearest_in_code(module: nn.Module) -> str:
    """The nearest idiom of a module that holds its experts in a list and was not run, from its code."""
    return f"nearest to {'a loop over experts' if _code(module) & _LOOPS else _EVERY}"


_EVERY = "every expert on every token"


def _code(module: nn.Module) -> frozenset[str]:
    """Names that the code of `forward` uses."""
    code = getattr(type(module).forward, "__code__", None)
    return frozenset(code.co_names) if code is not None else frozenset()


def _lists(module: nn.Module) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    for name, child in module._modules.items():
        if isinstance(child, nn.ModuleList | nn.ModuleDict) and EXPERT_NAME.search(name) and len(child) > 1:
            # Where the list itself has a forward, a dropout may sit beside the experts.
            called = type(child).forward not in (nn.ModuleList.forward, nn.ModuleDict.forward)
            beside = (nn.Dropout,) if called else ()
            yield name, {k: m for k, m in child.named_children() if not isinstance(m, beside)}


def _shape(t: Tensor) -> str:
    return "x".join(map(str, t.shape))


def _stacks(module: nn.Module, names: list[str], code: frozenset[str]) -> str | None:
    """Parameters [E, a, b] that are no two or three matrices per expert."""
    if "scaled_dot_product_attention" in code and len(names) > 3:
        return (
            f"it calls scaled_dot_product_attention, in which tokens read other tokens, and has {len(names)} stacked "
            f"parameters ({', '.join(names)}), where an expert has two or three matrices"
        )
    shapes = [tuple(module.get_parameter(n).shape[1:]) for n in names if module.get_parameter(n).dim() == 3]
    listed = ", ".join(names)
    small = {min(s) for s in shapes}
    if len(shapes) > 3 and len(shapes) % 2 == 0 and len(small) == 1 and all(3 * min(s) <= max(s) for s in shapes):
        rank = f"each with one side of {small.pop()} only, as low-rank factors have it"
        return f"it has {len(shapes)} matrices per expert ({listed}), {rank}, where an expert has two or three"
    if len(shapes) == 1:
        return f"it has one matrix per expert ({listed}), where an expert has two or three"
    if len(shapes) > 3:
        return f"it has {len(shapes)} matrices per expert ({listed}), where an expert has two or three"
    return None


def _experts(name: str, experts: dict[str, nn.Module]) -> str | None:
    """The first thing about modules in a list that makes them no bank of experts."""
    kinds = list(experts.values())
    path = f"{name}.{next(iter(experts))}"
    if all(isinstance(m, nn.ModuleList | nn.ModuleDict) for m in kinds):
        inner = sorted({len(m) for m in kinds})  # type: ignore[arg-type]
        return f"{name!r} holds {len(kinds)} lists of {' or '.join(map(str, inner))} experts: two levels, nested"
    for key, m in experts.items():
        for inside, part in m.named_modules():
            if parametrize.is_parametrized(part):
                at = ".".join(p for p in (name, key, inside) if p)
                return f"the weights of {at} are parametrized: what it multiplies with is computed from parameters"
    differing = _differing(name, experts)
    matrices = [p for p in kinds[0].parameters() if p.dim() == 2]
    single = "; nor is an expert more than one matrix" if len(matrices) == 1 else ""
    if differing is not None:
        return differing + single
    for inside, m in kinds[0].named_modules():
        if isinstance(m, nn.modules.conv._ConvNd):
            size = "x".join(map(str, m.kernel_size))
            see = ", which mix neighbouring positions" if max(m.kernel_size) > 1 else ""
            return f"its experts are convolutions{see} ({path}.{inside}, {type(m).__name__}, kernel {size})"
    if len(matrices) == 1:
        return f"an expert is a single matrix ({path}, {_shape(matrices[0])}): there are no two products in it"
    if not 2 <= len(matrices) <= 3:
        return f"an expert has {len(matrices)} matrices ({path}), where two or three are known"
    for inside, m in kinds[0].named_modules():
        if "norm" in type(m).__name__.lower():
            return f"every expert has a norm of its own ({path}.{inside}, {type(m).__name__}) beside its linear layers"
    vectors = [n for n, p in kinds[0].named_parameters() if p.dim() == 1]
    if len(vectors) > len(matrices):
        return f"every expert has {len(vectors)} vectors ({', '.join(vectors)}), where biases of its matrices are known"
    if not all(re.search(r"\d", k) for k in experts):
        return f"its experts have names ({', '.join(list(experts)[:4])}) and no numbers"
    return None


def _differing(name: str, experts: dict[str, Any]) -> str | None:
    """Where experts are not of the same shapes."""
    items = list(experts.items())
    first = {n: _shape(p) for n, p in items[0][1].named_parameters()}
    for key, m in items[1:]:
        other = {n: _shape(p) for n, p in m.named_parameters()}
        if other.keys() != first.keys():
            lone = sorted(other.keys() ^ first.keys())[0]
            has, lacks = (key, items[0][0]) if lone in other else (items[0][0], key)
            return f"its experts have different parameters: {name}.{has} has {lone}, {name}.{lacks} has not"
        for n, shape in first.items():
            if other[n] != shape:
                alone = sum("x" in s for s in first.values()) == 1 and "x" in shape
                outputs = alone and shape.split("x")[0] != other[n].split("x")[0]
                return (
                    f"its experts differ in {'the width of their outputs' if outputs else 'width'}: "
                    f"{name}.{items[0][0]}.{n} is {shape}, {name}.{key}.{n} {other[n]}"
                )
    return None
