"""SOAP as its reference (Vyas et al., arXiv 2409.11321), for stacks of matrices; and a reconstructed SOAP-LITE.

No source of SOAP-LITE was published. Here it is derived from the same rule as Muon-LITE: SOAP's columns are ordered by
curvature, so the sharp subspace is the leading columns of a rotated matrix, and costs nothing. The choices (side,
kappa) are options, not facts.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .adamw import ADAMW
from .base import Algorithm, Group, GroupedOptimizer, Item, State, need_matrices, usable
from .distributed import check_placements, per_matrix
from .lite import LiteConfig, LiteValues
from .options import check_count, check_number
from .polar import matrices
from .rounding import store, working_dtype

Tensor = torch.Tensor
_SIDES = ("left", "right")


def _check(p: Tensor, where: str, group: Group) -> None:
    need_matrices(p, where, group)
    check_placements(p, where, matrices=True, cut=False)
    check_count("frequency", group["frequency"], where)
    if group["shampoo_beta"] is not None:
        check_number("shampoo_beta", group["shampoo_beta"], where, below=1)


def _state(p: Tensor, group: Group) -> State:
    dtype, (m, n) = working_dtype(p), p.shape[-2:]
    count = p.shape[:-2].numel()

    def each(whole: Tensor) -> Tensor:
        return per_matrix(p, whole.expand(count, *whole.shape))

    state: State = {
        "exp_avg": torch.zeros_like(p, dtype=dtype),  # in the rotated basis, as the second moment
        "exp_avg_sq": torch.zeros_like(p, dtype=dtype),
        "updates": each(torch.zeros((), dtype=torch.int64, device=p.device)),  # of each matrix
        "skipped": each(torch.zeros((), dtype=torch.int64, device=p.device)),
        # Steps with a gradient, on the CPU: says when to refresh.
        "calls": torch.zeros((), dtype=torch.int64, device="cpu"),
    }
    for side, size in zip(_SIDES, (m, n), strict=True):
        # A side that is too large keeps the identity, and no tensor.
        if size <= group["max_precond_dim"]:
            state[side] = each(torch.zeros((), dtype=dtype, device=p.device).expand(size, size))
            state[f"{side}_basis"] = each(torch.eye(size, dtype=dtype, device=p.device))
    return state


def rotate(x: Tensor, state: State, back: bool = False) -> Tensor:
    """Q_L^T x Q_R, or Q_L x Q_R^T to come back."""
    if "left_basis" in state:
        q = state["left_basis"]
        x = (q if back else q.mT) @ x
    if "right_basis" in state:
        q = state["right_basis"]
        x = x @ (q.mT if back else q)
    return x


def _too_large(grad_EMN: Tensor) -> Tensor:
    """[E] bool: a matrix has a square that overflows, or may once sums have been rounded.

    Nothing finite could be made of it: every entry of G G^T and of the rotated squares is at most ||G||^2, and one that
    is infinite spoils the whole basis.
    """
    norm = torch.linalg.vector_norm(grad_EMN, dim=(-2, -1))
    large: Tensor = norm > 0.5 * torch.finfo(norm.dtype).max ** 0.5  # also where the norm itself has overflown
    return large


def _overflowing(grad: Tensor) -> Tensor:
    return _too_large(matrices(grad).to(working_dtype(grad))).sum()


def _update(items: list[Item], group: Group, step: int) -> None:
    lite: LiteConfig | None = group["lite"]
    values = None if lite is None else lite.values(step)
    for x in items:
        state, dtype = x.state, working_dtype(x.weights)
        grad = matrices(x.grad).to(dtype)
        active, finite = usable(grad, x.place)
        fits = ~_too_large(grad)
        active, finite = active & fits, finite & fits
        grad = torch.where(active[:, None, None], grad, 0)
        state["skipped"] += ~finite
        if int(state["calls"]) == 0:
            _begin(state, grad, group)
        else:
            w = matrices(x.weights).to(dtype)
            new = _step(w, grad, active, state, group, values)
            store(x.weights, torch.where(active[:, None, None], new, w), x.noise)
            _accumulate(state, grad, active, group)
            if int(state["calls"]) % group["frequency"] == 0:
                _refresh(state)
        state["calls"] += 1


def _begin(state: State, grad: Tensor, group: Group) -> None:
    """The first gradient only gives the bases, no moments and no update. A matrix without one keeps the identity."""
    _accumulate(state, grad, torch.ones(len(grad), dtype=torch.bool, device=grad.device), group)
    for side in _SIDES:
        if side in state:
            seen = state[side].abs().amax((-2, -1)) > 0
            q = torch.linalg.eigh(state[side])[1].flip(-1)
            state[f"{side}_basis"].copy_(torch.where(seen[:, None, None], q, state[f"{side}_basis"]))


def _accumulate(state: State, grad: Tensor, active: Tensor, group: Group) -> None:
    """L and R follow G G^T and G^T G."""
    beta = group["shampoo_beta"] if group["shampoo_beta"] is not None else group["betas"][1]
    weight = (1 - beta) * active.to(grad.dtype)[:, None, None]
    for side in _SIDES:
        if side in state:
            state[side].lerp_(grad @ grad.mT if side == "left" else grad.mT @ grad, weight)


def _refresh(state: State) -> None:
    """One orthogonal iteration: columns by falling response, then Q of L Q; the moments move to the new basis."""
    first = rotate(matrices(state["exp_avg"]), state, back=True)
    for side, dim in zip(_SIDES, (-2, -1), strict=True):
        if side not in state:
            continue
        q, second = state[f"{side}_basis"], matrices(state["exp_avg_sq"])
        response = (q * (state[side] @ q)).sum(-2)
        order = response.argsort(dim=-1, descending=True, stable=True)
        index = order[:, :, None] if dim == -2 else order[:, None, :]
        second.copy_(second.gather(dim, index.expand_as(second)))
        q = q.gather(-1, order[:, None, :].expand_as(q))
        # A matrix that never had a gradient has L = 0, whose QR factor is no basis of anything.
        seen = state[side].abs().amax((-2, -1)) > 0
        new = torch.linalg.qr(state[side] @ q)[0]
        state[f"{side}_basis"].copy_(torch.where(seen[:, None, None], new, q))
    matrices(state["exp_avg"]).copy_(rotate(first, state))


def _step(w: Tensor, grad: Tensor, active: Tensor, state: State, group: Group, values: LiteValues | None) -> Tensor:
    """Weights [E, m, n] after the step; moments and counts of active matrices move."""
    lr, decay, (b1, b2) = float(group["lr"]), float(group["weight_decay"]), group["betas"]
    on = active[:, None, None]
    turned = rotate(grad, state)
    first, second = matrices(state["exp_avg"]), matrices(state["exp_avg_sq"])
    first.copy_(torch.where(on, first.lerp(turned, 1 - b1), first))
    second.copy_(torch.where(on, second.lerp(turned.square(), 1 - b2), second))
    state["updates"] += active
    count = state["updates"].clamp_min(1).double()[:, None, None]
    size = ((1 - b2**count).sqrt() / (1 - b1**count)).to(w.dtype)
    lite: LiteConfig | None = group["lite"]
    denominator = second.sqrt() + group["eps"]
    chi = 1.0
    normal = first / denominator * size
    sharp = None if lite is None else _sharp_columns(state, group, w.shape)
    if lite is not None and values is not None and sharp is not None and not values.neutral:
        # kappa = 1 - b1 is the weight of one gradient in the average, and so the paper's un-normalized momentum.
        kappa = 1 - b1 if lite.kappa is None else lite.kappa
        damped = kappa * turned / denominator
        # The damped gradient is no average, so the momentum's correction for its start does not apply to it.
        damped = damped * (1 - b2**count).sqrt().to(w.dtype)
        if values.uniform:
            normal = normal + values.beta1 * damped
        else:
            chi, (side, k) = values.chi, sharp
            flat = chi * (normal + values.beta2 * damped)
            normal = normal + values.beta1 * damped
            if side == "right":
                normal = torch.cat([normal[..., :k], flat[..., k:]], -1)
            else:
                normal = torch.cat([normal[..., :k, :], flat[..., k:, :]], -2)
    new = w - lr * rotate(normal, state, back=True)
    if decay:
        rest = new * (lr * decay * (chi - 1)) if chi != 1 else None
        new = new * (1 - lr * decay)
        if rest is not None and sharp is not None:
            side, k = sharp
            q = state[f"{side}_basis"][..., :k]
            new = new - (rest - ((rest @ q) @ q.mT if side == "right" else q @ (q.mT @ rest)))
    return new


def _sharp_columns(state: State, group: Group, shape: torch.Size) -> tuple[str, int] | None:
    """(side, k): how many leading directions of which basis are sharp; None where that side keeps the identity."""
    lite: LiteConfig = group["lite"]
    m, n = shape[-2:]
    side = lite.side
    if side == "small":
        # In logical (out, in) order, with ties to the right as for Muon.
        out, inp = (m, n) if group["layout"] == "out_in" else (n, m)
        side = "left" if out < inp else "right"
    if group["layout"] == "in_out":
        side = "left" if side == "right" else "right"
    size = m if side == "left" else n
    return (side, max(1, min(int(lite.rank_fraction * size) + 1, size - 1))) if side in state else None


SOAP = Algorithm(_check, _state, _update, _overflowing)


class Soap(GroupedOptimizer):
    """SOAP for matrices and stacks of them, SOAP-LITE with `lite`, AdamW in groups with `algorithm="adamw"`.

    SOAP-LITE is a reconstruction: the paper reports it, but no source was published.

    Args:
        params: parameters or groups, as for `Muon`.
        lite: None for plain SOAP. `damping` and `mode` do not matter: the preconditioner is shared.
        betas, eps: of SOAP's moments; `adamw_betas` are those of AdamW groups.
        shampoo_beta: of the factors L and R; None takes betas[1].
        frequency: steps between refreshes of the bases.
        max_precond_dim: a side larger than this keeps the identity, and LITE leaves a matrix alone on such a side.
        layout: "out_in" or "in_out": which stored side LITE's "right" (the input features) is.
        rounding: of half-precision parameters; see `Muon`.
        nonfinite: "skip" (and count, per matrix) or "raise", for gradients that are not finite or whose squared norm
            overflows (entries of about 1e19 in float32): L and R are made of squares.

    DTensors must hold whole matrices on each rank: stacks cut along their first dimension, or replicated.

    As in the reference the first gradient only gives the bases, and weight decay comes after the step. A stack begins
    with its parameter's first gradient: an expert without tokens in that step starts from the identity basis.
    """

    own: ClassVar[str] = "soap"
    algorithms: ClassVar[dict[str, Algorithm]] = {"soap": SOAP, "adamw": ADAMW}

    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        lite: LiteConfig | None = None,
        *,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        frequency: int = 10,
        max_precond_dim: int = 10000,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        layout: str = "out_in",
        rounding: str = "nearest",
        nonfinite: str = "skip",
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "betas": betas,
            "shampoo_beta": shampoo_beta,
            "eps": eps,
            "frequency": frequency,
            "max_precond_dim": max_precond_dim,
            "adamw_betas": adamw_betas,
            "layout": layout,
            "rounding": rounding,
        }
        super().__init__(params, defaults, lite, nonfinite)

    def _completed(self, given: Group) -> Group:
        group = super()._completed(given)
        if group["algorithm"] == "adamw":
            group.setdefault("betas", self.defaults["adamw_betas"])
        return group


class SoapLITE(Soap):
    """`Soap` with LITE on (a reconstruction): `lite` defaults to `LiteConfig()`."""

    def __init__(self, params: Any, lr: float = 3e-3, lite: LiteConfig | None = None, **options: Any) -> None:
        super().__init__(params, lr, LiteConfig() if lite is None else lite, **options)
