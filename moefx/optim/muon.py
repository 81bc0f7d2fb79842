"""Muon and Muon-LITE: orthogonalized momentum for stacks of matrices, batched over parameters of one shape."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch

from .. import compat
from ..errors import InputError, nearest
from .adamw import ADAMW
from .base import Algorithm, Group, GroupedOptimizer, Item, State, need_matrices, parts, usable
from .diagnostics import diagnose
from .distributed import Place, check_copies, check_placements, is_dtensor, per_matrix
from .exchange import Cuts, Tensors, run
from .lite import LiteConfig, LiteValues, initial_basis
from .muon_update import DTYPES, SCALES, lr_scale, nesterov, new_weights, polar_steps
from .options import check_choice, check_count, check_number
from .polar import coefficients, matrices, slices
from .rounding import store, working_dtype

Tensor = torch.Tensor
REPLICAS = ("repeat", "split")


class _Piece(NamedTuple):
    """Matrices of one parameter that are updated in one batch."""

    item: Item
    rows: slice

    def rows_of(self, x: Tensor, flip: bool) -> Tensor:
        """Its matrices of a tensor shaped like the parameter, oriented for a projector on the last dimension."""
        part = matrices(x)
        if len(part) != self.rows.stop - self.rows.start:
            part = part[self.rows]
        return part.mT if flip else part


def flipped(group: Group, shape: torch.Size) -> bool:
    """Whether the projector acts on the stored tensor's second last dimension: by the layout, the side, or both."""
    stored_in_out = group["layout"] == "in_out"
    out, inp = (shape[-1], shape[-2]) if stored_in_out else shape[-2:]
    side = "right" if group["lite"] is None else group["lite"].side
    left = side == "left" or (side == "small" and out < inp)
    return bool(stored_in_out != left)


def _check(p: Tensor, where: str, group: Group) -> None:
    need_matrices(p, where, group)
    check_choice("scale", group["scale"], SCALES, where)
    if group["polar_dtype"] not in DTYPES:
        known = nearest(str(group["polar_dtype"]), [d for d in DTYPES if d])
        raise InputError(f"there is no polar_dtype {group['polar_dtype']!r}", where=where, todo=known)
    check_number("momentum", group["momentum"], where, below=1)
    if group["polar_steps"] is not None:
        check_count("polar_steps", group["polar_steps"], where, "give 1 or more, or None for 8 (6 in parity mode)")
    if group["replicas"] not in REPLICAS:
        known = nearest(str(group["replicas"]), REPLICAS)
        raise InputError(f"there is no way {group['replicas']!r} to step replicas", where=where, todo=known)
    check_placements(p, where, matrices=True)
    coefficients(group["polar"], polar_steps(group))


def _state(p: Tensor, group: Group) -> State:
    dtype = working_dtype(p)
    count = p.shape[:-2].numel()

    def each(value: float, dtype: torch.dtype) -> Tensor:
        return per_matrix(p, torch.full((count,), value, dtype=dtype, device=p.device))

    state: State = {"momentum_buffer": torch.zeros_like(p, dtype=dtype), "skipped": each(0, torch.int64)}
    lite: LiteConfig | None = group["lite"]
    if lite is None:
        return state
    m, n = (p.shape[-1], p.shape[-2]) if flipped(group, p.shape) else p.shape[-2:]
    if lite.mode == "parity":
        state["ratio"] = each(min(m, n) ** -0.5, dtype)
        state["inversions"] = each(0, torch.int64)
    else:
        columns = min(lite.rank(m, n) + lite.spare, min(m, n))
        state["basis"] = per_matrix(p, initial_basis(1, n, columns, dtype, p.device).expand(count, -1, -1), rows=True)
    # Whether the last step improved the basis; on the CPU, where reading it is free.
    group.setdefault("projected", torch.zeros((), dtype=torch.bool, device="cpu"))
    return state


def _update(items: list[Item], group: Group, step: int) -> None:
    """Same-shape matrices of all parameters go through the polar factor together, at most `chunk_bytes` at a time."""
    if "max_momentum" in group:
        # OneCycleLR and CyclicLR leave this mark. They cycle `betas` wherever an optimizer has them, for AdamW groups.
        group["momentum"] = group["betas"][0]
    lite: LiteConfig | None = group["lite"]
    values = None if lite is None else lite.values(step)
    buckets: dict[Any, list[_Piece]] = {}
    for x in items:
        key = (x.place._replace(shape=x.place.shape[-2:]), x.weights.dtype, x.weights.device)
        buckets.setdefault(key, []).append(_Piece(x, slice(0, matrices(x.weights).shape[0])))
    if step == 0 and group["replicas"] == "split":
        check_copies([x.grad for x in items], [x.place for x in items])
    # Matrices dealt so far among the same ranks, which all count alike; of what is whole, each rank has its own number.
    turns: dict[Any, int] = {}
    for bucket in buckets.values():
        place = bucket[0].item.place
        ranks = place.gather, place.copies
        for chunk in _chunks(bucket, budget(group, bucket[0].item.weights.device)):
            turn = turns.get(ranks, 0)
            _update_chunk(chunk, group, values, turn)
            turns[ranks] = turn + sum(piece.rows.stop - piece.rows.start for piece in chunk)
    if lite is not None and lite.mode == "fast" and values is not None and items:
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
    w, place = bucket[0].item.weights, bucket[0].item.place
    # About twelve such tensors are alive at once. The same on all ranks, whose parts of one matrix may differ.
    bytes_each = 12 * place.shape[-2:].numel() // place.ways * working_dtype(w).itemsize
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


def _update_chunk(pieces: list[_Piece], group: Group, values: LiteValues | None, turn: int) -> None:
    place, dtype, theta = pieces[0].item.place, working_dtype(pieces[0].item.weights), group["momentum"]
    flip = flipped(group, place.shape)

    def gathered(tensors: list[Tensor]) -> Tensor:
        parts = [piece.rows_of(t, flip).to(dtype) for piece, t in zip(pieces, tensors, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    w = gathered([piece.item.weights for piece in pieces])
    momentum = gathered([piece.item.state["momentum_buffer"] for piece in pieces])
    grad = gathered([piece.item.grad for piece in pieces])
    active, finite = usable(grad, place)
    # Gates are factors of 0 and 1: a torch.where over the batch costs six times as much on a CPU.
    on = active.to(dtype)[:, None, None]
    grad = grad.nan_to_num(0.0, 0.0, 0.0).mul_(on)

    averaged = momentum.lerp(grad, (1 - theta) * on)
    mixed = nesterov(averaged, grad, group)

    kept: dict[str, Tensor] = {}
    lite: LiteConfig | None = group["lite"]
    if lite is not None and values is not None and (lite.mode == "parity" or not values.uniform):
        name = "ratio" if lite.mode == "parity" else "basis"
        kept = {name: torch.cat([piece.item.state[name][piece.rows] for piece in pieces])}
    new, changed = _solved(w, mixed, grad, kept, place, group, values, turn, on)

    sizes = [piece.rows.stop - piece.rows.start for piece in pieces]
    buffers = [piece.rows_of(piece.item.state["momentum_buffer"], flip) for piece in pieces]
    torch._foreach_copy_(buffers, averaged.split(sizes))
    if pieces[0].item.noise is None:
        torch._foreach_copy_([piece.rows_of(piece.item.weights, flip) for piece in pieces], new.split(sizes))
    else:
        for piece, here in zip(pieces, new.split(sizes), strict=True):
            store(piece.item.weights, here, piece.item.noise, piece.rows, flip)
    for piece, here in zip(pieces, (~finite).split(sizes), strict=True):
        piece.item.state["skipped"][piece.rows] += here
    for name, value in changed.items():
        for piece, here, alive in zip(pieces, value.split(sizes), active.split(sizes), strict=True):
            old = piece.item.state[name][piece.rows]
            if name == "inversions":
                old += here.bool() & alive
            else:
                old.copy_(torch.where(alive.view(-1, *[1] * (here.ndim - 1)), here, old))


def _solved(
    w: Tensor,
    mixed: Tensor,
    grad: Tensor,
    kept: Tensors,
    place: Place,
    group: Group,
    values: LiteValues | None,
    turn: int,
    on_B11: Tensor,
) -> tuple[Tensor, Tensors]:
    """`new_weights` on whichever ranks it takes."""
    a, b = place.shape[-2:]
    scale = lr_scale(group["scale"], *((a, b) if group["layout"] == "out_in" else (b, a)))
    if place.gather is None and not place.copies:
        return new_weights(w, mixed, grad, group, values, kept, scale, on_B11)
    decay = float(group["weight_decay"])
    inputs = {"mixed": mixed, **kept}
    if values is not None and (values.beta1 or values.beta2):
        inputs["grad"] = grad
    # The new weights are linear in the old ones: unless LITE decays flat directions, w can be added afterwards, here.
    stays = place.gather is not None and (values is None or values.chi == 1 or not decay)
    if not stays:
        inputs["w"] = w

    def solve(x: Tensors) -> Tensors:
        old = torch.zeros_like(x["mixed"]) if stays else x["w"]
        side = {name: x[name] for name in kept}
        new, changed = new_weights(old, x["mixed"], x.get("grad", x["mixed"]), group, values, side, scale)
        return {"new": new, **changed}

    cuts: Cuts = {}
    if place.cut is not None:
        flip = flipped(group, place.shape)
        dim = -3 - place.cut if flip else place.cut  # -2 and -1 change places
        cuts = dict.fromkeys(("w", "mixed", "grad", "new"), (dim, place.shape[place.cut]))
        cuts["basis"] = (-2, a if flip else b)
    changed = run(solve, inputs, place, cuts, turn)
    new = changed.pop("new")
    new = new + w * (1 - float(group["lr"]) * decay) if stays else new
    return torch.where(on_B11 > 0, new, w), changed


MUON = Algorithm(_check, _state, _update)


class Muon(GroupedOptimizer):
    """Muon for matrices and stacks of them, Muon-LITE with `lite`, and AdamW in groups with `algorithm="adamw"`.

    Args:
        params: parameters or groups. A group may carry `algorithm`, `role`, `names`, `lite` (True, False or a
            LiteConfig of its own), `layout`, `split` (see `moefx.optim.split`) and any argument below.
        lr: learning rate of all algorithms.
        lite: None for plain Muon. Groups of role router, head, bias or other stay plain unless they say `lite=True`.
        weight_decay: decoupled; LITE amplifies it by chi in flat directions.
        momentum, nesterov: of the gradient average. What OneCycleLR and CyclicLR cycle, besides the betas of AdamW
            groups.
        scale: "rms", "spectral", "original" or "none"; see `muon_update.lr_scale`.
        polar, polar_steps: "polar_express" or "quintic", and how many steps; None is 8, and 6 in parity mode.
        polar_dtype: of the polynomial's products: None (float32), "bfloat16", "float32", "float64".
        layout: "out_in" as nn.Linear stores weights, or "in_out"; LITE's side and the scale are about (out, in).
        betas, eps: of AdamW groups.
        chunk_bytes: about how much the temporaries of one batch may take (at least one matrix is updated); None is
            4 MiB on a CPU, whose cache it should fit, and 256 MiB elsewhere.
        replicas: what ranks with the same matrices do: "repeat" the update each, or "split" the matrices among them
            and all-gather the results. Of plain tensors, "split" means all ranks of the default process group.
        rounding: how bfloat16 and float16 parameters take float32 updates: "nearest" loses what is below half a unit in
            the last place; "master" keeps a float32 copy in the state, whose rounding the parameter is; "stochastic"
            (bfloat16 alone) rounds up or down at random, without bias and without state. Others are not touched by it.
        nonfinite: "skip" (and count, per matrix) or "raise" for gradients with NaN or infinity.

    Matrices without a gradient (a zero-token expert) are left as they are: weight, momentum, projector, no decay.
    State is float32 for half-precision parameters. Sharded parameters (DTensor, FSDP2) are gathered in shares.

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
        replicas: str = "repeat",
        rounding: str = "nearest",
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
            "replicas": replicas,
            "rounding": rounding,
        }
        super().__init__(params, defaults, lite, nonfinite)

    @torch.no_grad()
    def diagnostics(self) -> dict[str, dict[str, Tensor]]:
        """Metrics of the last step, by parameter name: tensors [E] (E = 1 for a matrix), on the parameter's device.

        A split parameter has an entry for each run of equal blocks, `name.0`, `name.1`, with E of them.

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
        before: dict[tuple[Tensor, str], Tensor] = self.__dict__.setdefault("_projectors", {})
        found = {}
        for group in self.param_groups:
            lite: LiteConfig | None = group["lite"]
            values = None if lite is None else lite.values(max(int(group["step"]) - 1, 0))
            for index, p in enumerate(group["params"]):
                if group["algorithm"] != "muon" or p.grad is None:
                    continue
                if is_dtensor(p):
                    raise InputError(
                        "diagnostics are for whole parameters, and this one is sharded",
                        where=f"group {group.get('name', '')!r}, shape {list(p.shape)}",
                        todo="call them on an optimizer of a model on one process",
                    )
                for suffix, grad in parts(p.grad, group):
                    flip, state = flipped(group, grad.shape), self._state_of(p, suffix)
                    with compat.disable_autocast():
                        metrics, rows = diagnose(grad, state, group, values, flip, before.get((p, suffix)))
                    if rows is not None:
                        before[p, suffix] = rows
                    found[self._name(group, index) + suffix] = metrics
        return found


class MuonLITE(Muon):
    """`Muon` with LITE on: `lite` defaults to `LiteConfig()`."""

    def __init__(self, params: Any, lr: float = 1e-3, lite: LiteConfig | None = None, **options: Any) -> None:
        super().__init__(params, lr, LiteConfig() if lite is None else lite, **options)
