"""One training or evaluation step of a model, and how far apart two such steps are.

Shared by the family tests and by `benchmarks/family.py`, so that the table in the documentation is made of the numbers
that are tested. Nothing here knows of moefx: a model goes in as a callable, the optimized one and the original alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

Tensor = torch.Tensor

# Seeds of the batches that bf16 is compared on. Of three the median counts: rounding alone can send a token with two
# nearly equal scores to another expert, in the original as in the optimized model: a large error, but of one batch.
BF16_BATCHES = (1, 2, 3)


@dataclass
class Step:
    """What one step returned and left behind.

    Attributes:
        output: the model's output object, tensors detached.
        leaves: its tensors by dotted key, for example `router_logits.0`.
        tracked: keys of the tensors that autograd could differentiate.
        grads: gradients by parameter name; parameters without one are left out.
        rng: state of the CPU's random generator afterwards.
    """

    output: Any
    leaves: dict[str, Tensor]
    tracked: set[str]
    grads: dict[str, Tensor]
    rng: Tensor

    @property
    def loss(self) -> Tensor:
        """The scalar loss."""
        return self.leaves["loss"]

    def flat_grads(self, like: Step | None = None) -> Tensor:
        """All gradients as one float64 vector, in the order of `like` (or of its own parameters)."""
        return torch.cat([self.grads[n].double().flatten() for n in (like or self).grads])


def named_leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings, tuples and lists with their dotted path. None is a leaf."""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, tuple | list):
        items = enumerate(value)
    else:
        yield path, value
        return
    for key, inner in items:
        yield from named_leaves(inner, f"{path}.{key}" if path else str(key))


def train_step(model: Any, inputs: dict[str, Tensor], seed: int = 0) -> Step:
    """One forward and backward in training mode from a fixed seed; the model is left without gradients."""
    model.train()
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model(**inputs)
        output.loss.backward()
        rng = torch.get_rng_state()
    step = _step(output, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, rng)
    model.zero_grad(set_to_none=True)
    return step


def eval_step(model: Any, inputs: dict[str, Tensor]) -> Step:
    """One forward in evaluation mode without gradients; the model is left in training mode."""
    model.eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        output = model(**inputs)
        rng = torch.get_rng_state()
    model.train()
    return _step(output, {}, rng)


def _step(output: Any, grads: dict[str, Tensor], rng: Tensor) -> Step:
    leaves = dict(named_leaves(output))
    tracked = {k for k, v in leaves.items() if isinstance(v, Tensor) and v.requires_grad}
    return Step(output, {k: v.detach() if isinstance(v, Tensor) else v for k, v in leaves.items()}, tracked, grads, rng)


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of `want`, in float64; 0 when both are zero."""
    off, size = float((got.double() - want.double()).norm()), float(want.double().norm())
    return off / size if size else (0.0 if off == 0 else float("inf"))


def structure_faults(got: Step, want: Step) -> list[str]:
    """What differs between two steps before any value is looked at: types, keys, shapes, dtypes, who has a gradient."""
    faults = []
    if type(got.output) is not type(want.output):
        faults.append(f"output is a {type(got.output).__name__}, not a {type(want.output).__name__}")
    if list(got.leaves) != list(want.leaves):
        faults.append(f"output keys {list(got.leaves)} instead of {list(want.leaves)}")
    for key in got.leaves.keys() & want.leaves.keys():
        g, w = got.leaves[key], want.leaves[key]
        if type(g) is not type(w):
            faults.append(f"{key} is a {type(g).__name__}, not a {type(w).__name__}")
        elif isinstance(w, Tensor) and (g.shape, g.dtype) != (w.shape, w.dtype):
            faults.append(f"{key} is {g.dtype}{list(g.shape)} instead of {w.dtype}{list(w.shape)}")
    if got.tracked != want.tracked:
        faults.append(f"tracked by autograd in one only: {sorted(got.tracked ^ want.tracked)}")
    # An expert that no token reached has no gradient in a loop over experts, and one of zeros in a product of all.
    missing = want.grads.keys() - got.grads.keys()
    extra = {n for n in got.grads.keys() - want.grads.keys() if bool(got.grads[n].any())}
    if missing or extra:
        faults.append(f"gradients missing for {sorted(missing)}, extra for {sorted(extra)}")
    for name in got.grads.keys() & want.grads.keys():
        if (got.grads[name].shape, got.grads[name].dtype) != (want.grads[name].shape, want.grads[name].dtype):
            faults.append(f"gradient of {name} has another shape or dtype")
    return faults


def value_faults(got: Step, want: Step, *, loss: float = 1e-5, output: float = 1e-5, grad: float = 1e-4) -> list[str]:
    """Values that are further apart than allowed: `loss` absolute, `output` and `grad` in relative norm per tensor."""
    faults = []
    if "loss" in want.leaves and not abs(float(got.loss - want.loss)) <= loss:
        faults.append(f"loss {float(got.loss)} instead of {float(want.loss)}")
    for key, w in want.leaves.items():
        if not isinstance(w, Tensor):
            if got.leaves[key] != w:
                faults.append(f"{key} is {got.leaves[key]!r} instead of {w!r}")
        elif not (r := relative(got.leaves[key], w)) <= output:
            faults.append(f"{key} is off by {r:.1e}")
    for name, w in want.grads.items():
        if not (r := relative(got.grads[name], w)) <= grad:
            faults.append(f"gradient of {name} is off by {r:.1e}")
    return faults


def gradient_error(got: Step, want: Step) -> float:
    """The largest relative difference in norm of any parameter's gradient.

    A gradient that vanishes (of a key's bias before a softmax) is nothing but rounding of larger ones: where both are
    below the rounding of the largest gradient they count as equal.
    """
    largest = max(float(g.double().norm()) for g in want.grads.values())
    errors = [0.0]
    for name, w in want.grads.items():
        if max(float(got.grads[name].double().norm()), float(w.double().norm())) > 1e-7 * largest:
            errors.append(relative(got.grads[name], w))
    return max(errors)


def rng_faults(got: Step, want: Step) -> list[str]:
    """Whether one step drew more or other random numbers than the other."""
    return [] if torch.equal(got.rng, want.rng) else ["the random generator is in another state afterwards"]


@dataclass
class Rounding:
    """Errors of two low-precision steps against the same step in fp32: the original's own, and the optimized model's.

    The original's error is the yardstick: it says how much rounding this model has at this precision, so that nobody
    has to guess a tolerance. The loss is one number, whose error can be zero by luck; `logits` gives the size that it
    could as well have had.

    Attributes:
        loss: absolute errors (original, optimized).
        logits: root mean square errors.
        grad: relative errors of all gradients taken as one vector.
        params: relative errors of each parameter's gradient.
    """

    loss: tuple[float, float]
    logits: tuple[float, float]
    grad: tuple[float, float]
    params: dict[str, tuple[float, float]]

    @property
    def ratio(self) -> float:
        """The optimized model's gradient error in units of the original's."""
        return self.grad[1] / self.grad[0]


def rounding(original: Step, optimized: Step, exact: Step) -> Rounding:
    """Measure both steps against `exact`, which must come from an fp32 model that holds the same (rounded) weights."""

    def both(f: Any) -> tuple[float, float]:
        return f(original), f(optimized)

    want = exact.flat_grads()
    return Rounding(
        both(lambda s: abs(float(s.loss.double() - exact.loss.double()))),
        both(lambda s: float((s.leaves["logits"].double() - exact.leaves["logits"].double()).square().mean().sqrt())),
        both(lambda s: relative(s.flat_grads(exact), want)),
        {n: both(lambda s, n=n: relative(s.grads[n], exact.grads[n])) for n in exact.grads},
    )


def typical(measured: list[Rounding]) -> Rounding:
    """The measurement whose ratio of gradient errors is the median of an odd number of them."""
    middle = median(r.ratio for r in measured)
    return next(r for r in measured if r.ratio == middle)


def rounding_faults(
    r: Rounding, *, factor: float = 1.5, param_factor: float = 3.0, floor: float = 2.0**-8
) -> list[str]:
    """Where the optimized model rounds worse than the original does.

    `factor` times the original's error is allowed. On top come, for the loss, the original's error per logit, and for
    the gradient of a single parameter one rounding step of bf16; it also gets the wider `param_factor`, for it averages
    over fewer numbers.
    """
    faults = []
    if not r.loss[1] <= factor * r.loss[0] + r.logits[0]:
        faults.append(f"loss error {r.loss[1]:.1e}, the original's is {r.loss[0]:.1e}")
    if not r.logits[1] <= factor * r.logits[0]:
        faults.append(f"logits error {r.logits[1]:.1e}, the original's is {r.logits[0]:.1e}")
    if not r.grad[1] <= factor * r.grad[0]:
        faults.append(f"gradient error {r.grad[1]:.1e}, the original's is {r.grad[0]:.1e}")
    for name, (own, got) in r.params.items():
        if not got <= param_factor * own + floor:
            faults.append(f"gradient error of {name} {got:.1e}, the original's is {own:.1e}")
    return faults
