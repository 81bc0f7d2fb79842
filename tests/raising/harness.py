"""One step of a model, the comparison of two steps, and a snapshot that shows whether anything of a model was left."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2}  # relative, Frobenius
# A gradient that vanishes (the router's, where k = 1 and the weights are renormalised) is rounding noise of the others.
# Between two spellings of one layer it was at most one unit of rounding of the largest gradient.
NOISE = 2.0


@dataclass
class Step:
    outputs: list[Any]
    grads: dict[str, Tensor | None]


@contextmanager
def seeded(seed: int):
    """Both random states from a seed, and as they were afterwards."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        yield
    random.setstate(state)


def step(model: nn.Module, args: Sequence[Any], seed: int = 0) -> Step:
    """Forward and backward of every differentiable output times fixed random numbers; leaves no gradients behind."""
    args = [a.detach().clone().requires_grad_(a.is_floating_point()) if isinstance(a, Tensor) else a for a in args]
    model.zero_grad(set_to_none=True)
    with seeded(seed):
        outputs = tree_flatten(model(*args))[0]
    generator = torch.Generator().manual_seed(seed + 1)
    roots = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
    cotangents = [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o.dtype) for o in roots]
    if roots:
        torch.autograd.backward(roots, cotangents)
    inputs = {f"input {i}": a.grad for i, a in enumerate(args) if isinstance(a, Tensor)}
    grads = inputs | {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return Step([o.detach().clone() if isinstance(o, Tensor) else o for o in outputs], grads)


def distance(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius distance; 0 for two empty tensors or two of zeros."""
    got, want = got.double(), want.double()
    if not torch.equal(got.isfinite(), want.isfinite()):
        return float("inf")
    got, want = got.nan_to_num(0, 0, 0), want.nan_to_num(0, 0, 0)
    return float((got - want).norm() / want.norm()) if want.norm() > 0 else float(got.norm())


def differences(got: Step, want: Step) -> list[str]:
    """What differs between two steps, in words; [] if nothing does. A missing gradient equals a gradient of zeros."""
    if len(got.outputs) != len(want.outputs):
        return [f"{len(got.outputs)} outputs, not {len(want.outputs)}"]
    found = []
    largest = max((float(g.double().norm()) for g in want.grads.values() if g is not None), default=0.0)
    pairs = [(f"output {i}", a, b, 0.0) for i, (a, b) in enumerate(zip(got.outputs, want.outputs, strict=True))]
    for name in want.grads.keys() | got.grads.keys():
        a, b = got.grads.get(name), want.grads.get(name)
        if a is None and b is None:
            continue
        a, b = torch.zeros_like(b) if a is None else a, torch.zeros_like(a) if b is None else b
        pairs.append((f"gradient of {name}", a, b, NOISE * torch.finfo(b.dtype).eps * largest))
    for name, a, b, noise in pairs:
        if not isinstance(b, Tensor):
            found += [f"{name}: {a!r}, not {b!r}"] if a != b else []
        elif not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            found.append(f"{name}: another type, shape or dtype")
        elif b.is_floating_point():
            error = distance(a, b)
            if not error <= TOLERANCE[b.dtype] and not float((a.double() - b.double()).norm()) <= noise:
                found.append(f"{name}: {error:.2g} away")
        elif not torch.equal(a, b):
            found.append(f"{name}: other integers")
    return sorted(found)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that raising could leave behind: classes, attributes, tensors by identity and value."""
    found: dict[str, Any] = {"random state": torch.get_rng_state().tolist(), "python random state": random.getstate()}
    for path, module in model.named_modules():
        found[f"{path}: class"] = type(module)
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                tensors = {
                    n: None if t is None else (id(t), t.dtype, t.requires_grad, t.grad is None, t.detach().tolist())
                    for n, t in value.items()
                }
                found[f"{path}.{name}"] = tensors
            elif name == "_modules" or name.endswith("hooks"):
                found[f"{path}.{name}"] = {key: id(v) for key, v in value.items()} if hasattr(value, "items") else value
            elif isinstance(value, bool | int | float | str | tuple | list | dict | None):
                found[f"{path}.{name}"] = repr(value)
            elif isinstance(value, Tensor):
                found[f"{path}.{name}"] = (id(value), value.detach().tolist())
            else:
                found[f"{path}.{name}"] = id(value)
    found["state_dict"] = list(model.state_dict())
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The entries in which two snapshots differ."""
    return sorted(k for k in before.keys() | after.keys() if before.get(k, ...) != after.get(k, ...))
