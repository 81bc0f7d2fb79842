"""How much the activations of one token's experts point the same way: the inside of the specialisation loss.

    overlap(z [S, I], slot [T, k], eps) -> [T]         sum over ordered pairs e != v of cos(z_e, z_v)^2

over the rows z_e that a token's k choices hold; -1 in `slot` is a dropped choice, which is in no pair. In fp32 (float64
for float64), the value is ||G||_F^2 - trace(G * G) with the Gram matrix G = U U^T of the rows u = z / max(|z|, eps). It
does not depend on the length of a row, and its gradient is orthogonal to the row:

    d overlap / dz_e = 4 sum_{v != e} c_ev (u_v - c_ev u_e) / |z_e|

The reference takes lengths and cosines from the Gram matrix of z itself, and the gradient as a k x k matrix times z, so
that nothing as large as z is made but the rows and the result. The backward computes both matrices again: nothing is
kept but z, which the gradient of the down weights reads anyway.
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


def _rows(z_SI: Tensor, slot_Tk: Tensor) -> Tensor:
    """The rows of each token's choices [T, k, I]; dropped choices have a row of zeros, whatever is in z."""
    spare = torch.cat([z_SI, z_SI.new_zeros(1, z_SI.shape[1])])
    flat = torch.where(slot_Tk < 0, z_SI.shape[0], slot_Tk).reshape(-1)
    return spare.index_select(0, flat).to(_wide(z_SI)).view(*slot_Tk.shape, z_SI.shape[1])


def _cosines(z_TkI: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines of pairs [T, k, k] with zeros on the diagonal, 1/|z| [T, k], and whether a row is longer than eps."""
    gram = z_TkI @ z_TkI.mT
    square = gram.diagonal(dim1=-2, dim2=-1)
    inverse = square.clamp_min(eps * eps).rsqrt()
    itself = torch.eye(gram.shape[-1], dtype=torch.bool, device=gram.device)
    # Filled, not subtracted: NaN in a row is no pair of it with itself.
    cosines = (gram * inverse[..., None] * inverse[..., None, :]).masked_fill(itself, 0)
    return cosines, inverse, square > eps * eps


def _overlap(z_SI: Tensor, slot_Tk: Tensor, eps: float = EPS) -> Tensor:
    return _cosines(_rows(z_SI, slot_Tk), eps)[0].square().sum((-2, -1))


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
    z = _rows(z_SI, slot_Tk)
    cosines, inverse, free = _cosines(z, eps)
    # All rows of a token at once: dz = W z with W [k, k]. A row shorter than eps is divided by eps, not by its length.
    along = torch.where(free, cosines.square().sum(-1) * inverse.square(), 0)
    weight = cosines * inverse[..., None] * inverse[..., None, :] - torch.diag_embed(along)
    dz = (4 * dout_T.to(z.dtype)[:, None, None] * weight @ z).to(z_SI.dtype).flatten(0, 1)
    # A row holds at most one choice. Read from there, not written to: rows that no choice holds are zeros.
    S, flat = z_SI.shape[0], slot_Tk.reshape(-1)
    choice = flat.new_full((S + 1,), len(flat), dtype=torch.long)
    choice = choice.index_put((torch.where(flat < 0, S, flat),), torch.arange(len(flat), device=flat.device))
    return torch.cat([dz, dz.new_zeros(1, dz.shape[1])]).index_select(0, choice[:S])


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
