"""The polar factor U V^T of stacks of matrices by odd polynomials, and orthonormal columns.

Both take any leading dimensions and never wait for the device. On devices they are made of matrix products alone (a
Cholesky factor is of a small Gram matrix).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from moefx.kernels import symmetric

from ..errors import InputError, nearest

Tensor = torch.Tensor
Triple = tuple[float, float, float]

# Polar Express (Amsel et al., arXiv 2505.16932), for singular values in [1e-3, 1].
_POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_SAFETY = 1.01
# The largest value that is left by so many of them, and so the largest singular value that the next one takes.
_LARGEST_AFTER = (1.0, 1.992, 1.966, 1.866, 1.561)
_CLOSE = 5  # polynomials that leave singular values within 0.12 of 1, all but the smallest
# Muon's first polynomial (Jordan et al. 2024): fast, but it leaves singular values anywhere in 0.68 .. 1.2.
_QUINTIC: Triple = (3.4445, -4.775, 2.0315)
KINDS = ("polar_express", "quintic")


@cache
def coefficients(kind: str, steps: int) -> tuple[Triple, ...]:
    """The (a, b, c) of every step. Beyond the published eight, Polar Express repeats its last one."""
    if kind not in KINDS:
        raise InputError(f"there is no polynomial {kind!r}", todo=nearest(kind, KINDS))
    if steps < 1:
        raise InputError(f"the polar factor needs at least one step, got {steps}", todo="8 are accurate, 6 are cheaper")
    if kind == "quintic":
        return (_QUINTIC,) * steps
    # Rounding may push a singular value above 1, where the polynomials blow up: all but the last are stretched.
    safe = [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:-1]]
    return (*safe[:steps], *((_POLAR_EXPRESS[-1],) * (steps - len(safe[:steps]))))


def polar(
    x_BMN: Tensor,
    steps: int = 8,
    kind: str = "polar_express",
    compute_dtype: torch.dtype | None = None,
    tight: bool = False,
) -> Tensor:
    """U V^T of x = U S V^T, for the last two dimensions; a zero matrix gives zero.

    Args:
        x_BMN: [..., m, n], any floating dtype.
        steps: polynomial steps. Relative error of Polar Express in float32 on 64 x 64 matrices of condition number
            3e2, 1e3 and 1e4: 1e-3, 6e-2, 0.4 with 6 steps; 1e-6, 6e-5, 0.2 with 8; 1e-6, 3e-6, 3e-2 with 10.
        kind: "polar_express", or "quintic" (3.4445, -4.775, 2.0315).
        compute_dtype: of the matrix products; default float32, float64 for float64 input.
        tight: bound the largest singular value by the fourth root of the sum of fourth powers instead of the Frobenius
            norm (which the released LITE code takes), 4.7 times lower for a square Gaussian matrix of 1024 rows, and
            nearly free. Polar Express can then begin with its second polynomial: `steps` are as accurate as one more.
            Fewer than 4 begin later still: they leave singular values above 0.5, 0.15, 0.04 (1, 2, 3 steps) of the
            bound within 0.13 of 1, as 4 do those above 0.01, and lift smaller ones less.

    Returns:
        [..., m, n] in float32, or float64 for float64 input.
    """
    wide = torch.float64 if x_BMN.dtype == torch.float64 else torch.float32
    x = x_BMN.to(wide)
    # Scaled by the largest entry first: the squares of a gradient of 1e-25 would all be zero.
    top = largest(x)[..., None, None]
    x = x / torch.where(top > 0, top, 1)
    if not tight:
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        x.div_(torch.where(norm > 0, norm * (_SAFETY if kind == "polar_express" else 1), 1))
    x = x.to(compute_dtype or wide)
    tall = x.shape[-2] > x.shape[-1]
    x = matrices(x.mT if tall else x)
    spare, gram_at, poly_at = _workspace(x)
    # Few steps begin late: they lift fewer of the smallest values, but leave the rest as close to 1.
    skip = max(1, _CLOSE - steps) if tight and kind == "polar_express" else 0
    for number, (a, b, c) in enumerate(coefficients(kind, steps + skip)[skip:]):
        gram = outer(x, gram_at)
        if tight and number == 0:
            bound = torch.linalg.vector_norm(gram.to(wide), dim=(-2, -1), keepdim=True)  # of the squares
            factor = (_LARGEST_AFTER[skip] / _SAFETY if skip else 1) ** 2 / torch.where(bound > 0, bound, 1)
            here = spare is not None
            x = torch.mul(x, factor.sqrt().to(x.dtype), out=x if here else None)
            gram = torch.mul(gram, factor.to(x.dtype), out=gram if here else None)
        if halved(x):
            poly = outer(gram, poly_at).mul_(c).add_(gram, alpha=b)
        else:
            poly = symmetric.quadratic(gram, b, c, poly_at)
        x, spare = torch.baddbmm(x, poly, x, beta=a, out=spare), None if spare is None else x
    x = x.mT if tall else x
    return x.to(wide).unflatten(0, x_BMN.shape[:-2]) if x_BMN.ndim > 2 else x[0].to(wide)


def _workspace(x_BMN: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Where a CPU puts the next x, the Gram matrices and the polynomials; nothing on devices, whose allocator is cheap.

    Fresh memory costs a third of the time of a step for 21 matrices of 64 x 64: its pages are new every time.
    """
    if x_BMN.device.type != "cpu" or (torch.is_grad_enabled() and x_BMN.requires_grad):
        return None, None, None
    gram = x_BMN.new_empty(*x_BMN.shape[:-1], x_BMN.shape[-2])
    return torch.empty_like(x_BMN), gram, torch.empty_like(gram)


def halved(x_BMN: Tensor) -> bool:
    """Whether x x^T is worth computing by halves.

    Measured on a CPU: a polar factor takes 12 % less time with m = 512 and 25 % less with 1024; nothing is gained
    below, and bfloat16 gets slower. On GPUs `kernels.symmetric` leaves out blocks inside of one launch.
    """
    return x_BMN.device.type == "cpu" and x_BMN.dtype != torch.bfloat16 and x_BMN.shape[-2] >= 512


def outer(x_BMN: Tensor, out: Tensor | None = None) -> Tensor:
    """x x^T [B, m, m]. It is symmetric: where that pays, one off-diagonal block is the transpose of the other."""
    return _outer(x_BMN, out) if halved(x_BMN) else symmetric.gram(x_BMN, out)


def _outer(x_BMN: Tensor, out: Tensor | None = None) -> Tensor:
    m = x_BMN.shape[-2]
    if m <= 128:
        return torch.bmm(x_BMN, x_BMN.mT)
    half = -(-m // 32) * 16  # a multiple of 16 rows, for whole vectors
    first, second = x_BMN[:, :half], x_BMN[:, half:]
    if out is None:
        out = x_BMN.new_empty(x_BMN.shape[0], m, m)
    out[:, :half, :half], out[:, half:, half:] = _outer(first), _outer(second)
    low = torch.bmm(second, first.mT)
    out[:, half:, :half], out[:, :half, half:] = low, low.mT
    return out


def orthonormal(y_BNK: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal columns with the span of y, as `cholesky_qr` gives them.

    On a CPU by Householder reflections: of a 64 x 6 matrix in a sixth of the time, and dependent columns do no harm.
    """
    if y_BNK.device.type != "cpu":
        return cholesky_qr(y_BNK)
    q = torch.linalg.qr(y_BNK)[0]
    return q, torch.linalg.vector_norm(q, dim=(-2, -1)).isfinite()


def cholesky_qr(y_BNK: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal columns with the span of y by Cholesky QR: a shifted first round, then two plain ones.

    Column j of the result lies in the span of the first j + 1 columns of y, as with any QR factorization.

    Returns:
        q [..., n, k], and ok [...]: False where the columns were too dependent, and q is not to be used.
    """
    columns = torch.linalg.vector_norm(y_BNK, dim=-2, keepdim=True)
    q = y_BNK / torch.where(columns > 0, columns, 1)
    n, k = q.shape[-2:]
    eye = torch.eye(k, dtype=q.dtype, device=q.device)
    ok = torch.ones(q.shape[:-2], dtype=torch.bool, device=q.device)
    # The shift of Fukaya et al. (2020) for columns of norm 1, ||q||^2 <= k; it makes the first factor exist.
    shift = 11 * (n + k + 1) * k * torch.finfo(q.dtype).eps
    for amount in (min(shift, 1e-2), 0.0, 0.0):
        factor, info = torch.linalg.cholesky_ex(q.mT @ q + amount * eye)
        q = torch.linalg.solve_triangular(factor.mT, q, upper=True, left=False)
        ok = ok & (info == 0)
    return q, ok & torch.isfinite(q).all(-1).all(-1)


def largest(x_BMN: Tensor) -> Tensor:
    """The largest absolute value of every matrix, NaN if it has one; without a temporary of its size."""
    return torch.maximum(x_BMN.amax((-2, -1)), -x_BMN.amin((-2, -1)))


def matrices(x: Tensor) -> Tensor:
    """[..., m, n] as a view [E, m, n]."""
    return x.unsqueeze(0) if x.ndim == 2 else x.flatten(0, -3)


def slices(count: int, bytes_each: int, budget: int) -> Sequence[slice]:
    """`count` matrices in runs of at most `budget` bytes, at least one matrix each."""
    at_once = max(1, budget // max(bytes_each, 1))
    return [slice(i, min(i + at_once, count)) for i in range(0, count, at_once)]
