"""Muon and Muon-LITE: orthogonalized momentum for stacks of matrices, batched over parameters of one shape."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch

from ..errors import InputError, nearest
from .adamw import ADAMW
from .base import Algorithm, Group, GroupedOptimizer, State, need_matrices, usable, working_dtype
from .diagnostics import diagnose
from .lite import LiteConfig, LiteValues, initial_basis, sharp_rank
from .muon_update import DTYPES, SCALES, lr_scale, nesterov, new_weights, polar_steps
from .polar import coefficients, matrices, slices

Tensor = torch.Tensor


class _Piece(NamedTuple):
    """Matrices of one parameter that are updated in one batch."""

    p: Tensor
    state: State
    rows: slice

    def rows_of(self, x: Tensor, flip: bool) -> Tensor:
        """Its matrices of a tensor shaped like the parameter, oriented for a projector on the last dimension."""
        part = matrices(x)
        if len(part) != self.rows.stop - self.rows.start:
            part = part[self.rows]
        return part.mT if flip else part


def flipped(group: Group, p: Tensor) -> bool:
    """Whether the projector acts on the stored tensor's second last dimension: by the layout, the side, or both."""
    stored_in_out = group["layout"] == "in_out"
    out, inp = (p.shape[-1], p.shape[-2]) if stored_in_out else p.shape[-2:]
    side = "right" if group["lite"] is None else group["lite"].side
    left = side == "left" or (side == "small" and out < inp)
    return bool(stored_in_out != left)


def _check(p: Tensor, where: str, group: Group) -> None:
    need_matrices(p, where, group)
    if group["scale"] not in SCALES:
        known = nearest(str(group["scale"]), SCALES)
        raise InputError(f"there is no scale {group['scale']!r}", where=where, todo=known)
    if group["polar_dtype"] not in DTYPES:
        known = nearest(str(group["polar_dtype"]), [d for d in DTYPES if d])
        raise InputError(f"there is no polar_dtype {group['polar_dtype']!r}", where=where, todo=known)
    if not 0 <= group["momentum"] < 1:
        raise InputError(f"momentum={group['momentum']} is no average", where=where, todo="give 0 to below 1")
    coefficients(group["polar"], polar_steps(group))


def _state(p: Tensor, group: Group) -> State:
    dtype = working_dtype(p)
    state: State = {"momentum_buffer": torch.zeros_like(p, dtype=dtype)}
    lite: LiteConfig | None = group["lite"]
    if lite is None:
        return state
    m, n = (p.shape[-1], p.shape[-2]) if flipped(group, p) else p.shape[-2:]
    count = matrices(p).shape[0]
    if lite.mode == "parity":
        state["ratio"] = torch.full((count,), min(m, n) ** -0.5, dtype=dtype, device=p.device)
        state["inversions"] = torch.zeros(count, dtype=torch.int64, device=p.device)
    else:
        columns = min(sharp_rank(lite.rank_fraction, m, n) + lite.spare, min(m, n))
        state["basis"] = initial_basis(count, n, columns, dtype, p.device)
    # Whether the last step improved the basis; on the CPU, where reading it is free.
    group.setdefault("projected", torch.zeros((), dtype=torch.bool))
    return state


def _update(params: list[Tensor], states: list[State], group: Group, step: int) -> None:
    """Same-shape matrices of all parameters go through the polar factor together, at most `chunk_bytes` at a time."""
    lite: LiteConfig | None = group["lite"]
    values = None if lite is None else lite.values(step)
    buckets: dict[Any, list[_Piece]] = {}
    for p, state in zip(params, states, strict=True):
        piece = _Piece(p, state, slice(0, matrices(p).shape[0]))
        buckets.setdefault((p.shape[-2:], p.dtype, p.device), []).append(piece)
    for bucket in buckets.values():
        for chunk in _chunks(bucket, budget(group, bucket[0].p.device)):
            _update_chunk(chunk, group, values)
    if lite is not None and lite.mode == "fast" and values is not None and params:
        group["projected"].fill_(not values.uniform)


# Bytes of temporaries of one batch. A CPU reads a batch that outgrows its cache from memory once per operation, and is
# then slower than a loop; a GPU wants few launches.
CACHE_BYTES, DEVICE_BYTES = 4 << 20, 256 << 20


def budget(group: Group, device: torch.device) -> int:
    """As configured, else by the device."""
    given: int | None = group["chunk_bytes"]
    return given if given is not None else CACHE_BYTES if device.type == "cpu" else DEVICE_BYTES


def _chunks(bucket: list[_Piece], budget: int) -> list[list[_Piece]]:
    """The matrices of a bucket in batches; a stack may be cut, and a batch may hold the end of one and the next."""
    p = bucket[0].p
    bytes_each = 12 * p.shape[-2:].numel() * working_dtype(p).itemsize  # about twelve such tensors are alive at once
    bounds = slices(sum(piece.rows.stop for piece in bucket), bytes_each, budget)
    chunks: list[list[_Piece]] = [[] for _ in bounds]
    offset = 0
    for piece in bucket:
        for chunk, bound in zip(chunks, bounds, strict=True):
            start, stop = max(bound.start - offset, 0), min(bound.stop - offset, piece.rows.stop)
            if start < stop:
                chunk.append(piece._replace(rows=slice(start, stop)))
        offset += piece.rows.stop
    return chunks


def _update_chunk(pieces: list[_Piece], group: Group, values: LiteValues | None) -> None:
    first = pieces[0].p
    flip, dtype, theta = flipped(group, first), working_dtype(first), group["momentum"]

    def gathered(tensors: list[Tensor]) -> Tensor:
        parts = [piece.rows_of(t, flip).to(dtype) for piece, t in zip(pieces, tensors, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    w = gathered([piece.p for piece in pieces])
    momentum = gathered([piece.state["momentum_buffer"] for piece in pieces])
    grad = gathered([piece.p.grad for piece in pieces if piece.p.grad is not None])
    active, finite = usable(grad)
    # Gates are factors of 0 and 1: a torch.where over the batch costs six times as much on a CPU.
    on = active.to(dtype)[:, None, None]
    grad = grad.nan_to_num(0.0, 0.0, 0.0).mul_(on)

    averaged = momentum.lerp(grad, (1 - theta) * on)
    mixed = nesterov(averaged, grad, group)

    kept: dict[str, Tensor] = {}
    if group["lite"] is not None:
        name = "ratio" if group["lite"].mode == "parity" else "basis"
        kept = {name: torch.cat([piece.state[name][piece.rows] for piece in pieces])}
    a, b = first.shape[-2:]
    scale = lr_scale(group["scale"], *((a, b) if group["layout"] == "out_in" else (b, a)))
    new, changed = new_weights(w, mixed, grad, group, values, kept, scale, on)

    sizes = [piece.rows.stop - piece.rows.start for piece in pieces]
    for name, result in (("", new), ("momentum_buffer", averaged)):
        stored = [piece.rows_of(piece.state[name] if name else piece.p, flip) for piece in pieces]
        torch._foreach_copy_(stored, result.split(sizes))
    torch._foreach_add_([piece.state["skipped"] for piece in pieces], [x.sum() for x in (~finite).split(sizes)])
    for name, value in changed.items():
        for piece, here, alive in zip(pieces, value.split(sizes), active.split(sizes), strict=True):
            old = piece.state[name][piece.rows]
            if name == "inversions":
                old += here & alive
            else:
                old.copy_(torch.where(alive.view(-1, *[1] * (here.ndim - 1)), here, old))


MUON = Algorithm(_check, _state, _update)


class Muon(GroupedOptimizer):
    """Muon for matrices and stacks of them, Muon-LITE with `lite`, and AdamW in groups with `algorithm="adamw"`.

    Args:
        params: parameters or groups. A group may carry `algorithm`, `role`, `names`, `lite` (True, False or a
            LiteConfig of its own), `layout` and any argument below.
        lr: learning rate of all algorithms.
        lite: None for plain Muon. Groups of role router, head, bias or other stay plain unless they say `lite=True`.
        weight_decay: decoupled; LITE amplifies it by chi in flat directions.
        momentum, nesterov: of the gradient average.
        scale: "rms", "spectral", "original" or "none"; see `muon_update.lr_scale`.
        polar, polar_steps: "polar_express" or "quintic", and how many steps; None is 8, and 6 in parity mode.
        polar_dtype: of the polynomial's products: None (float32), "bfloat16", "float32", "float64".
        layout: "out_in" as nn.Linear stores weights, or "in_out"; LITE's side and the scale are about (out, in).
        betas, eps: of AdamW groups.
        chunk_bytes: about how much the temporaries of one batch may take (at least one matrix is updated); None is
            4 MiB on a CPU, whose cache it should fit, and 256 MiB elsewhere.
        nonfinite: "skip" (and count, per matrix) or "raise" for gradients with NaN or infinity.

    Matrices without a gradient (a zero-token expert) are left as they are: weight, momentum, projector, no decay.
    State is float32 for half-precision parameters. Sharded parameters (DTensor) are refused.

    Raises:
        InputError: see `add_param_group`, `step` and `load_state_dict`.
    """

    own: ClassVar[str] = "muon"
    algorithms: ClassVar[dict[str, Algorithm]] = {"muon": MUON, "adamw": ADAMW}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        lite: LiteConfig | None = None,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        scale: str = "rms",
        polar: str = "polar_express",
        polar_steps: int | None = None,
        polar_dtype: str | None = None,
        layout: str = "out_in",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        chunk_bytes: int | None = None,
        nonfinite: str = "skip",
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "scale": scale,
            "polar": polar,
            "polar_steps": polar_steps,
            "polar_dtype": polar_dtype,
            "layout": layout,
            "betas": betas,
            "eps": eps,
            "chunk_bytes": chunk_bytes,
        }
        super().__init__(params, defaults, lite, nonfinite)

    @torch.no_grad()
    def diagnostics(self) -> dict[str, dict[str, Tensor]]:
        """Metrics of the last step, by parameter name: tensors [E] (E = 1 for a matrix), on the parameter's device.

        Call it between `step` and `zero_grad`: updates are computed again from momentum and gradient, at the cost of
        about one more step. Parameters of other algorithms, and those without a gradient, are left out.

            update_rms          of the orthogonalized, scaled update per unit of learning rate, without decay; plain
                                Muon and steps without a projector have this one alone
            update_rms_sharp, update_rms_flat
                                of its two parts, per coordinate in a basis of theirs: 0.2 each in plain square Muon
            effective_rank      trace of the sharp projector; `rank` is the k that it should have
            captured            share of the momentum's energy in the sharp directions, at least k / min(m, n) for
                                the true top k
            inverted            less than half of that bound: flat directions were taken for sharp ones
            inversions          parity mode: how often the guard saw that
            cosine              between polar(momentum) and polar(gradient)
            overlap             cosine of this projector and that of the last call, 1 for equal ones; not in the first

        In parity mode the projector is that of the controller's present ratio, one move after the step's own.
        """
        before: dict[Tensor, Tensor] = self.__dict__.setdefault("_projectors", {})
        found = {}
        for group in self.param_groups:
            lite: LiteConfig | None = group["lite"]
            values = None if lite is None else lite.values(max(int(group["step"]) - 1, 0))
            for index, p in enumerate(group["params"]):
                if group["algorithm"] != "muon" or p.grad is None:
                    continue
                metrics, rows = diagnose(p, self.state[p], group, values, flipped(group, p), before.get(p))
                if rows is not None:
                    before[p] = rows
                found[self._name(group, index)] = metrics
        return found


class MuonLITE(Muon):
    """`Muon` with LITE on: `lite` defaults to `LiteConfig()`."""

    def __init__(self, params: Any, lr: float = 1e-3, lite: LiteConfig | None = None, **options: Any) -> None:
        super().__init__(params, lr, LiteConfig() if lite is None else lite, **options)
