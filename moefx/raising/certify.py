"""The proof of a raise: the block and its raised form side by side on inputs that MoE code is known to trip over.

Same weights, same inputs, same random state; outputs, the gradients of all inputs and parameters, buffers and the
random state afterwards are compared. Sizes go from no token at all to many; rows that all want the same experts leave
others empty and fill capacities; equal logits make ties; large values pass clamps.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from moefx.errors import first_line

from .draw import as_given, redraw
from .probe import Inputs, Seen

Tensor = torch.Tensor
# Largest relative difference (Frobenius norm) per dtype, of outputs and of gradients.
LIMITS = {
    torch.float64: (1e-10, 1e-9),
    torch.float32: (2e-5, 1e-4),
    torch.bfloat16: (3e-2, 4e-2),
    torch.float16: (4e-3, 1e-2),
}


@dataclass(frozen=True)
class Case:
    """One kind of inputs: `rows` by `inner` tokens, or leading axes of given `sizes`."""

    rows: int
    inner: int
    kind: str = "random"
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None  # of a region around the block
    sizes: tuple[int, ...] | None = None
    backward: bool = True  # whether gradients are compared, too

    @property
    def precision(self) -> torch.dtype:
        """What the block's products round to."""
        return self.autocast or self.dtype

    @property
    def name(self) -> str:
        """The precision in words."""
        plain = str(self.precision).removeprefix("torch.")
        return f"autocast to {plain}" if self.autocast else plain

    def __str__(self) -> str:
        if self.kind == "seen":
            return f"the call that was seen, {self.name}"
        tokens = self.rows * self.inner if self.sizes is None else math.prod(self.sizes)
        return f"{tokens} tokens, {self.kind}, {self.name}"


FULL = (
    Case(2, 17),
    Case(4, 61),
    Case(1, 53, "alike"),
    Case(1, 1),
    Case(2, 9, "ties"),
    Case(2, 11, "large"),
    Case(0, 0),
    Case(3, 13, dtype=torch.bfloat16),
    Case(1, 47, "alike", torch.bfloat16),
    Case(1, 1, dtype=torch.bfloat16),
)


def own_cases(dtype: torch.dtype) -> tuple[Case, ...]:
    """One more case where the model has a dtype of its own."""
    return () if dtype in (torch.float32, torch.bfloat16) else (Case(2, 15, dtype=dtype),)


def under_autocast(low: torch.dtype | None) -> tuple[Case, ...]:
    """Cases inside the autocast region in which the model is called."""
    return (
        () if low is None else (Case(3, 15, autocast=low), Case(1, 43, "alike", autocast=low), Case(1, 1, autocast=low))
    )


_LONGEST = 4096  # tokens of a case that are still quick for a copy of one block


def beyond(block: nn.Module) -> tuple[Case, ...]:
    """Cases that fill every capacity that the block's modules carry as a number: what it drops shows on none below."""
    attributes = (kv for m in block.modules() for kv in m.__dict__.items())
    rows = {v for key, v in attributes if "capacity" in key.lower() and type(v) is int and v > 1}
    return tuple(Case(1, 2 * v + 3, "alike") for v in sorted(rows) if 2 * v + 3 <= _LONGEST)


SHORT = (Case(3, 19), Case(3, 13, dtype=torch.bfloat16))


# Few tokens, where a least number counts, and many, where one that is larger than all of the other cases does.
_ANY_SIZE = tuple(Case(r, n, "alike", backward=False) for r, n in ((1, 3), (1, 6), (2, 5), (1, 14), (1, 1021)))


def as_called(seen: Seen) -> tuple[Case, ...]:
    """Rows that want the same experts, in exactly the sizes of the calls that were seen: capacities follow them.

    Where sizes are symbols, in some others, too.
    """
    sizes = dict.fromkeys(Inputs(s).lead for s in (seen, *seen.later))
    exact = (Case(0, 0, "alike", sizes=s, backward=False) for s in sizes)
    return (*exact, *(_ANY_SIZE if seen.symbolic else ()))


GIVEN = (Case(0, 0, "seen", sizes=(), backward=False),)  # the call itself, for the block's own weights


class Refuted(Exception):  # noqa: N818  an answer, not a fault
    """Original and raised block differ; the text says in what, and by how much."""


@dataclass
class Certificate:
    """What was measured: dtype -> largest relative difference of outputs and gradients; cases that the original itself
    cannot run.
    """

    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    cases: int = 0
    skipped: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        return dict(vars(self))

    @property
    def error(self) -> float:
        """The largest difference in float32."""
        return max((e for e in self.errors.get("float32", {}).values()), default=0.0)


@dataclass
class _Run:
    outputs: list[Any]
    spec: Any
    grads: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    random: Tensor


def prove(
    block: nn.Module, copied: nn.Module, forward: Callable[..., Any], inputs: Inputs, cases: tuple[Case, ...]
) -> Certificate:
    """Compare a copy of `block`, made by `probe.copy_of`, with itself under `forward`; raises `Refuted`.

    Weights and buffers are drawn once more, or numbers of the copy that was recorded could pass for constants. The call
    that was seen is compared with the block's own.
    """
    try:
        redraw(copied, block, 1)
        done = certify(copied, forward, inputs, (*cases, *as_called(inputs.seen)))
        as_given(copied, block)
        return certify(copied, forward, inputs, GIVEN, done)
    except Refuted:
        redraw(copied, block, 0)  # as it was recorded, for another try
        raise


def certify(
    block: nn.Module,
    forward: Callable[..., Any],
    inputs: Inputs,
    cases: tuple[Case, ...],
    done: Certificate | None = None,
) -> Certificate:
    """Compare `block`, a copy, with itself under `forward`; raises `Refuted`. `done`: what was measured before.

    The copy is left in the dtype of the last case.
    """
    first, done = done is None, done or Certificate()
    for number, case in enumerate(cases):
        block.to(case.dtype)
        sizes = inputs.sizes(case.rows, case.inner) if case.sizes is None else case.sizes
        try:
            want = _run(block, None, inputs, sizes, case, number)
        except Exception as e:  # the user's own code, on inputs that it may not be made for
            if first and number == 0:
                raise Refuted(f"the block itself fails on random inputs: {type(e).__name__}: {first_line(e)}") from e
            done.skipped[str(case)] = f"the block itself fails: {type(e).__name__}: {first_line(e)}"
            continue
        try:
            got = _run(block, forward, inputs, sizes, case, number)
        except Exception as e:
            raise Refuted(f"{case}: the raised block fails: {type(e).__name__}: {first_line(e)}") from e
        try:
            _compare(want, got, case, done, functools.partial(_exact, block, inputs, sizes, case, number))
        except Refuted:
            # Rounding alone can put one number on the other side of a kink. It does not do so on most inputs.
            more = (number + 100, number + 200)
            if case.precision == torch.float32 or not all(
                _agrees(_run(block, None, inputs, sizes, case, n), block, forward, inputs, sizes, case, n) for n in more
            ):
                raise
        done.cases += 1
    return done


def _agrees(
    want: _Run, block: nn.Module, forward: Callable[..., Any], inputs: Inputs, sizes: Any, case: Case, seed: int
) -> bool:
    """Whether the new forward gives what the block gave, `want`."""
    got = _run(block, forward, inputs, sizes, case, seed)
    try:
        _compare(want, got, case, Certificate(), lambda: _exact(block, inputs, sizes, case, seed))
    except Refuted:
        return False
    return True


def agreeing(block: nn.Module, forwards: Sequence[Callable[..., Any]], inputs: Inputs, case: Case) -> list[bool] | None:
    """Which new forwards give the same as a copy of a block for one case; None where the block itself fails."""
    sizes = inputs.sizes(case.rows, case.inner)
    try:
        want = _run(block, None, inputs, sizes, case, 0)
    except Exception:
        return None

    def same(forward: Callable[..., Any]) -> bool:
        try:
            return _agrees(want, block, forward, inputs, sizes, case, 0)
        except Exception:  # the new forward fails
            return False

    return [same(f) for f in forwards]


def _exact(block: nn.Module, inputs: Inputs, sizes: Any, case: Case, seed: int) -> _Run:
    """The block's own run in float32, from the same rounded weights and inputs."""
    block.float()
    try:
        return _run(block, None, inputs, sizes, case, seed, torch.float32)
    finally:
        block.to(case.dtype)


def _run(
    block: nn.Module,
    forward: Callable[..., Any] | None,
    inputs: Inputs,
    sizes: Any,
    case: Case,
    seed: int,
    dtype: torch.dtype | None = None,
) -> _Run:
    args, kwargs = inputs.make(sizes, 1000 + seed, dtype=case.dtype, kind=case.kind)
    if dtype is not None:
        args, kwargs = pytree.tree_map(
            lambda t: t.detach().to(dtype).requires_grad_() if _differentiable(t) else t, (args, kwargs)
        )
    leaves: dict[str, Tensor] = {}
    if case.backward:
        leaves = {f"input {i}": t for i, t in enumerate(pytree.tree_leaves((args, kwargs))) if _differentiable(t)}
        leaves |= {n: p for n, p in block.named_parameters() if p.requires_grad}
    kept = {n: b.clone() for n, b in block.named_buffers()}
    # Copies of the leaves: a block may write into its inputs.
    args, kwargs = pytree.tree_map(lambda t: t.clone() if _differentiable(t) else t, (args, kwargs))
    low = case.autocast if dtype is None else None
    with torch.random.fork_rng(), torch.set_grad_enabled(case.backward), _under(block, forward):
        torch.manual_seed(seed)
        with torch.autocast(device_of(block), low) if low else contextlib.nullcontext():
            out = block.forward(*args, **kwargs)
        outputs, spec = pytree.tree_flatten(out)
        random = torch.get_rng_state()
        ends = [o for o in outputs if _differentiable(o)]
        gen = torch.Generator().manual_seed(seed)
        tangents = [torch.randn(o.shape, generator=gen).to(o.device, o.dtype) for o in ends]
        grads = torch.autograd.grad(ends, list(leaves.values()), tangents, allow_unused=True) if ends and leaves else ()
    buffers = {f"buffer {n}": b.clone() for n, b in block.named_buffers()}
    given = (t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    buffers |= {f"input {i} afterwards": t.detach() for i, t in enumerate(given)}
    with torch.no_grad():
        for n, b in block.named_buffers():
            b.copy_(kept[n])
    outputs = [o.detach() if isinstance(o, Tensor) else o for o in outputs]
    return _Run(outputs, spec, dict(zip(leaves, grads, strict=False)), buffers, random)


def device_of(block: nn.Module) -> str:
    """The kind of device on which a block is, as autocast knows it (it does not know "meta")."""
    found = next((p.device.type for p in block.parameters()), "cpu")
    return found if torch.amp.is_autocast_available(found) else "cpu"


def _differentiable(t: Any) -> bool:
    return isinstance(t, Tensor) and t.requires_grad


@contextlib.contextmanager
def _under(block: nn.Module, forward: Callable[..., Any] | None) -> Iterator[None]:
    before = block.__dict__.get("forward")
    if forward is not None:
        block.__dict__["forward"] = forward
    try:
        yield
    finally:
        if forward is not None:
            block.__dict__.pop("forward", None)
            if before is not None:
                block.__dict__["forward"] = before


def _compare(want: _Run, got: _Run, case: Case, done: Certificate, exact: Callable[[], _Run]) -> None:
    worst = done.errors.setdefault(case.name, {"output": 0.0, "gradient": 0.0})
    for_outputs, for_gradients = LIMITS[case.precision]
    if want.spec != got.spec:
        raise Refuted(f"{case}: the outputs have another structure")
    for i, (a, b) in enumerate(zip(want.outputs, got.outputs, strict=True)):
        if not isinstance(a, Tensor):
            if a != b:
                raise Refuted(f"{case}: output {i} is {b}, not {a}")
            continue
        worst["output"] = max(worst["output"], _close(f"output {i}", a, b, _norm(a), for_outputs, case))
    truth: _Run | None = None
    scale = max((g.norm() for g in want.grads.values() if g is not None and g.numel()), default=torch.zeros(()))
    for key, g in want.grads.items():
        h = got.grads[key]
        if g is None and h is None:
            continue
        # Of an expert without tokens a loop leaves no gradient, one product for all a gradient of zeros.
        a = torch.zeros_like(h) if g is None and h is not None else g
        b = torch.zeros_like(g) if h is None and g is not None else h
        assert a is not None
        assert b is not None
        limit = for_gradients
        if case.precision != torch.float32 and relative(a, b, scale) > limit:
            # What is left of large terms that cancel is all rounding, the block's own included: that is the measure.
            true = (truth := truth or exact()).grads[key]
            limit = max(limit, 0.0 if true is None else 2 * min(relative(true, a, scale), 0.5))
        error = _close(f"the gradient of {key}", a, b, scale, limit, case, scaled=True)
        worst["gradient"] = max(worst["gradient"], error)
    for key, b in want.buffers.items():
        _close(key, b, got.buffers[key], _norm(b), for_outputs, case)
    if not torch.equal(want.random, got.random):
        raise Refuted(f"{case}: other random numbers are drawn")


def _norm(t: Tensor) -> Tensor:
    """What differences of a tensor are measured by; integers, which have no norm, are compared exactly."""
    return t.double().norm() if t.is_floating_point() else torch.zeros(())


def _close(what: str, a: Tensor, b: Tensor, scale: Any, limit: float, case: Case, *, scaled: bool = False) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        raise Refuted(f"{case}: {what} is {b.dtype} {tuple(b.shape)}, not {a.dtype} {tuple(a.shape)}")
    if not a.is_floating_point():
        if not torch.equal(a, b):
            raise Refuted(f"{case}: {what} differs")
        return 0.0
    a, b = a.double(), b.double()
    if not bool((a.isfinite() == b.isfinite()).all()) or not bool((a.isnan() == b.isnan()).all()):
        raise Refuted(f"{case}: {what} is not finite where the original is, or the other way round")
    # What vanishes by cancellation is compared on the scale of the largest gradient, whose rounding it consists of.
    error = relative(a.nan_to_num(), b.nan_to_num(), scale)
    rounding = 2 * torch.finfo(case.precision).eps * float(scale)
    if error > limit and not (scaled and float((a.nan_to_num() - b.nan_to_num()).norm()) <= rounding):
        raise Refuted(f"{case}: {what} differs by {error:.1e} (limit {limit:.0e})")
    return error


def relative(a: Tensor, b: Tensor, scale: Any, noise: float = 1e-3) -> float:
    """Relative difference in norm. What vanishes by cancellation is compared on the scale of the largest gradient."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / (a.norm() + noise * scale.double() + 1e-12))
