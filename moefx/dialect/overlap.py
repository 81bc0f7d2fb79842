"""How much the activations of one token's experts point the same way: the inside of the specialisation loss.

    overlap(z [S, I], slot [T, k], eps) -> [T]         sum over ordered pairs e != v of cos(z_e, z_v)^2

over the rows z_e that a token's k choices hold; -1 in `slot` is a dropped choice, which is in no pair. Rows are
normalised in fp32 (float64 for float64), u = z / max(|z|, eps), and the value is ||G||_F^2 - trace(G * G) of the Gram
matrix G = U U^T. It does not depend on the length of a row, and its gradient is orthogonal to the row:

    d overlap / dz_e = 4 sum_{v != e} c_ev (u_v - c_ev u_e) / |z_e|

The backward computes U and G again, so nothing is kept but z, which the gradient of the down weights reads anyway.
Source: R_sp of Hu et al., arXiv 2602.14159, eq. 4.
"""

from __future__ import annotations

from typing import Any

import torch

import moefx.kernels.overlap  # noqa: F401  its provider comes before the reference

from ._op import alone, define

Tensor = torch.Tensor
EPS = 1e-12  # rows are scaled by their length however small it is: routing weights may have scaled them before


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _normalised(z_SI: Tensor, slot_Tk: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """u [T, k, I], 1/|z| [T, k, 1], and whether a row is longer than eps [T, k, 1]. Dropped choices have u = 0."""
    if z_SI.shape[0] == 0:
        u = z_SI.sum().to(_wide(z_SI)) + z_SI.new_zeros((*slot_Tk.shape, z_SI.shape[1]), dtype=_wide(z_SI))
        return u, u[..., :1], u[..., :1] > 0
    z_TkI = torch.where((slot_Tk < 0)[..., None], 0, z_SI[slot_Tk.clamp_min(0)].to(_wide(z_SI)))
    square = z_TkI.square().sum(-1, keepdim=True)
    inverse = square.clamp_min(eps * eps).rsqrt()
    return z_TkI * inverse, inverse, square > eps * eps


def _cosines(u_TkI: Tensor) -> Tensor:
    """The Gram matrix [T, k, k] with zeros on its diagonal."""
    itself = torch.eye(u_TkI.shape[-2], dtype=torch.bool, device=u_TkI.device)
    return (u_TkI @ u_TkI.mT).masked_fill(itself, 0)  # not a difference: NaN in a row is no pair of it with itself


def _overlap(z_SI: Tensor, slot_Tk: Tensor, eps: float = EPS) -> Tensor:
    u, _, _ = _normalised(z_SI, slot_Tk, eps)
    return _cosines(u).square().sum((-2, -1))


def _check(z: Tensor, slot: Tensor, eps: float) -> None:
    torch._check(z.dim() == 2 and slot.dim() == 2, lambda: f"overlap: z {tuple(z.shape)}, slot {tuple(slot.shape)}")
    torch._check(eps > 0, lambda: f"overlap: eps is {eps}, not above zero")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, slot, ctx.eps = inputs
    ctx.save_for_backward(z, slot)


def _backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    z, slot = ctx.saved_tensors
    return torch.ops.moefx.overlap_backward(dout, z, slot, ctx.eps), None, None


overlap = define(
    "overlap",
    "(Tensor z, Tensor slot, float eps=1e-12) -> Tensor",
    reference=_overlap,
    fake=lambda z, slot, eps=EPS: z.new_empty(slot.shape[0], dtype=_wide(z)),
    check=lambda z, slot, eps=EPS: _check(z, slot, eps),
    setup=_setup,
    backward=_backward,
)


def _overlap_backward(dout_T: Tensor, z_SI: Tensor, slot_Tk: Tensor, eps: float = EPS) -> Tensor:
    u, inverse, free = _normalised(z_SI, slot_Tk, eps)
    du = 4 * dout_T.to(u.dtype)[:, None, None] * (_cosines(u) @ u)
    # A row shorter than eps is divided by eps, not by its length.
    along = torch.where(free, (du * u).sum(-1, keepdim=True), 0)
    dz = ((du - along * u) * inverse).to(z_SI.dtype)
    # A row holds at most one choice; dropped choices hit a spare row that is cut off.
    S, flat = z_SI.shape[0], slot_Tk.reshape(-1)
    rows = z_SI.new_zeros(S + 1, z_SI.shape[1])
    return rows.index_put((torch.where(flat < 0, S, flat),), dz.flatten(0, 1))[:S].clone()


def _second_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dout, z, slot, ctx.eps = inputs
    ctx.save_for_backward(dout, z, slot)


def _second_backward(ctx: Any, ddz: Tensor) -> tuple[Any, ...]:
    """Second derivatives: autograd differentiates the reference, as for `glu_backward`."""
    dout, z, slot = ctx.saved_tensors
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        d, rows = alone(dout), alone(z)
        out = _overlap_backward(d, rows, slot, ctx.eps)
        grads = torch.autograd.grad(out, (d, rows), ddz, create_graph=further, allow_unused=True)
    return *grads, None, None


overlap_backward = define(
    "overlap_backward",
    "(Tensor dout, Tensor z, Tensor slot, float eps=1e-12) -> Tensor",
    reference=_overlap_backward,
    fake=lambda dout, z, slot, eps=EPS: z.new_empty(z.shape),
    check=lambda dout, z, slot, eps=EPS: _check(z, slot, eps),
    setup=_second_setup,
    backward=_second_backward,
)
