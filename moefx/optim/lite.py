"""LITE: keep the sharp part of a base update, amplify and damp the flat one (arXiv 2602.22681).

Sharp directions are the top singular directions of the momentum. `parity` follows the released code: a projector made
of two polar factors, and a controller that steers its rank. `fast` keeps a low-rank basis from step to step and
improves it by one subspace iteration: no second polar factor, no controller, no inversion on ill-conditioned momenta.
All tensors here are stacks [B, m, n] whose projector acts on the last dimension.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..errors import InputError, nearest
from .options import check_count, real
from .polar import orthonormal, polar
from .schedule import CosineCoupled, Value, at, damping_ramp, describe

Tensor = torch.Tensor
_CHOICES = {
    "mode": ("fast", "parity"),
    "damping": ("orthogonal", "shared"),
    "side": ("right", "left", "small"),
}
_SCHEDULED, _OPTIONAL = ("chi", "beta1", "beta2", "chi_diagonal"), ("chi_diagonal", "kappa")
COLD_ITERATIONS = 8  # subspace iterations where the last step left no basis to start from


class LiteValues(NamedTuple):
    """A configuration at one step."""

    chi: float
    beta1: float
    beta2: float

    @property
    def neutral(self) -> bool:
        """The base update and nothing else."""
        return self.chi == 1 and self.beta1 == 0 and self.beta2 == 0

    @property
    def uniform(self) -> bool:
        """Sharp and flat directions are treated alike: no projector is needed."""
        return self.chi == 1 and self.beta1 == self.beta2


@dataclass(frozen=True)
class LiteConfig:
    """How LITE changes a base optimizer.

    `chi`, `chi_diagonal`, `beta1` and `beta2` are numbers or callables of the completed steps (`moefx.optim.schedule`).

    Args:
        chi: amplification of learning rate and weight decay in flat directions; 1 leaves them.
        beta1, beta2: Hessian damping in sharp and in flat directions.
        chi_diagonal: amplification in embeddings and norms (AdamW groups); None takes `chi`.
        rank_fraction: sharp share f of the smaller dimension s. k = floor(f s) in fast mode, whose basis then takes no
            more than that share of the momentum's memory, and floor(f s) + 1 in parity mode, as released; at least 1,
            at most s - 1. 0 leaves matrices to the base optimizer, as the released code does; in AdamW groups 0 makes
            everything flat and 1 everything sharp.
        mode: "fast", or "parity" with the released Muon code. The fast basis takes one subspace iteration per step,
            after eight in the first step that needs it; a matrix whose first gradient comes later has only the one.
        damping: "orthogonal" adds beta polar(G), as the released code; "shared" is the paper's formula: the damped
            gradient joins the momentum, polar(M + beta (1 - momentum) G), where beta = 1 adds about 5 %. Muon only:
            SOAP's damping always shares its preconditioner.
        side: which side of the (out, in) matrix the projector acts on: "right" (input features, as the released code),
            "left", or the "small" one.
        damping_steps: fast mode with orthogonal damping: polynomial steps of polar(G), from its tight bound (see
            `polar`). 3 leave singular values within 0.13 of 1 down to 0.04 of the bound, and smaller ones below, where
            the five steps of the first Muon leave them anywhere in 0.68 .. 1.2; 4 resolve them down to 0.01. On the
            river quadratic of the tests, losses change by 0.2 % at most.
        spare: columns of the fast basis beyond k; the k with the largest response are used. A basis that goes on from
            step to step gains nothing from them in the tests, and they are state.
        guard: parity mode: detect that the controller selects the flattest directions, treat that matrix as all sharp
            in this step, and restart its controller. False reproduces the released code there too.
        kappa: SOAP: scale of the damped gradient against the momentum average; None is 1 - betas[0].

    Raises:
        InputError: an unknown choice or a number out of range.
    """

    chi: Value = 2.0
    beta1: Value = -0.25
    beta2: Value = 1.0
    chi_diagonal: Value | None = None
    rank_fraction: float = 0.1
    mode: str = "fast"
    damping: str = "orthogonal"
    side: str = "right"
    damping_steps: int = 3
    spare: int = 0
    guard: bool = True
    kappa: float | None = None

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if (given := getattr(self, name)) not in known:
                raise InputError(f"LiteConfig has no {name}={given!r}", todo=nearest(str(given), known))
        share = real(self.rank_fraction)
        if share is None or not 0 <= share <= 1:
            todo = "give a number from 0 to 1, the same in all steps"
            raise InputError(f"rank_fraction={self.rank_fraction!r} is no share", todo=todo)
        check_count("damping_steps", self.damping_steps, todo="give 1 or more; 3 are the default")
        check_count("spare", self.spare, todo="give 0 columns or more", least=0)
        for name in ("chi", "beta1", "beta2", "chi_diagonal", "kappa"):
            given = getattr(self, name)
            if (given is None and name in _OPTIONAL) or (callable(given) and name in _SCHEDULED):
                continue
            number = real(given)
            if number is None or not math.isfinite(number):
                todo = "give a number, or a callable of the completed steps" if name in _SCHEDULED else "give a number"
                raise InputError(f"{name}={given!r} is no finite number", todo=todo)
            if name in ("chi", "chi_diagonal") and number < 0:
                raise InputError(f"{name}={given} would climb in flat directions", todo="give 1 or more")
        if self.mode == "parity" and self.damping != "orthogonal":
            raise InputError('mode="parity" has orthogonal damping', todo='use mode="fast" for damping="shared"')

    @classmethod
    def cosine(
        cls,
        *,
        warmup: int,
        total: int,
        chi: float = 2.0,
        beta1: float = -0.25,
        beta2: float = 1.0,
        chi_diagonal: float = 4.0,
        min_lr_fraction: float = 0.1,
        **rest: Any,
    ) -> LiteConfig:
        """The released schedules for a cosine learning rate of `warmup` and `total` steps (dense models)."""
        return cls(
            chi=CosineCoupled(chi, warmup, total, min_lr_fraction),
            chi_diagonal=CosineCoupled(chi_diagonal, warmup, total, min_lr_fraction, ramp=None),
            beta1=beta1,
            beta2=damping_ramp(beta1, beta2, warmup, total, "cosine"),
            **rest,
        )

    @classmethod
    def wsd(
        cls,
        *,
        warmup: int,
        total: int,
        chi: float = 1.0,
        beta1: float = 0.0,
        beta2: float = 1.0,
        chi_diagonal: float = 8.0,
        **rest: Any,
    ) -> LiteConfig:
        """The released recipe of MoE models under warm-up, stable, decay: damping in matrices, chi in the rest."""
        ramp = damping_ramp(beta1, beta2, warmup, total, "wsd")
        return cls(chi=chi, chi_diagonal=chi_diagonal, beta1=beta1, beta2=ramp, **rest)

    def rank(self, m: int, n: int) -> int:
        """k of a matrix [m, n]; 1 for vectors in disguise, whose only direction is the sharp one."""
        s = min(m, n)
        return max(1, min(int(self.rank_fraction * s) + (self.mode == "parity"), s - 1))

    def values(self, step: int) -> LiteValues:
        """Of the hidden matrices at a step."""
        return LiteValues(at(self.chi, step), at(self.beta1, step), at(self.beta2, step))

    def diagonal(self, step: int) -> float:
        """Amplification of AdamW groups at a step."""
        return at(self.chi if self.chi_diagonal is None else self.chi_diagonal, step)

    def acts_on(self, algorithm: str) -> bool:
        """Whether this can ever differ from the base algorithm; where it cannot, the base runs, and nothing else."""
        constant = [v for v in (self.chi, self.beta1, self.beta2) if not callable(v)]
        if algorithm == "adamw":
            chi = self.chi if self.chi_diagonal is None else self.chi_diagonal
            return (callable(chi) or chi != 1) and self.rank_fraction <= 1 - 1e-5
        neutral = len(constant) == 3 and LiteValues(*map(float, constant)).neutral
        return not neutral and self.rank_fraction > 1e-6

    def describe(self) -> dict[str, Any]:
        """Plain numbers and strings, for checkpoints."""
        return {f.name: describe(getattr(self, f.name)) for f in dataclasses.fields(self)}


def initial_basis(count: int, n: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthonormal columns [count, n, columns], the same in every process and independent of the global seed."""
    # On the CPU whatever the default device is, as its generator is.
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randn(n, columns, generator=generator, dtype=torch.float64, device="cpu")
    basis: Tensor = torch.linalg.qr(drawn)[0]
    return basis.to(device, dtype).expand(count, -1, -1).clone()


def improve_basis(m_BMN: Tensor, basis_BNK: Tensor, iterations: int, ordered: bool = True) -> Tensor:
    """Subspace iterations towards the top right singular vectors of m, strongest column first.

    Source: orthogonal iteration on m^T m. A small multiple of the old basis is kept, which changes no eigenvector but
    keeps columns alive that a rank-deficient m would send to zero. Columns are ordered by their response ||m v_j|| at
    the begin of an iteration: one product with m less than afterwards. Not `ordered`, they stay where they are: where
    all of them are used, only their span matters.
    """
    keep = m_BMN.shape[-1] * torch.finfo(m_BMN.dtype).eps
    for _ in range(iterations):
        response_BKM = _unit(basis_BNK.mT @ m_BMN.mT)
        if ordered:
            order = response_BKM.square().sum(-1).argsort(dim=-1, descending=True, stable=True)[:, None, :]
            basis_BNK = basis_BNK.gather(-1, order.expand_as(basis_BNK))
            response_BKM = response_BKM.gather(1, order.mT.expand_as(response_BKM))
        turned_BKN = _unit(response_BKM @ m_BMN)
        found, ok = orthonormal(torch.add(turned_BKN.mT, basis_BNK, alpha=keep))
        basis_BNK = torch.where(ok[:, None, None], found, basis_BNK)
    return basis_BNK


def _unit(x_BMK: Tensor) -> Tensor:
    """Every matrix over its largest entry, in place: squares of tiny numbers would be zero."""
    top = x_BMK.abs().amax((-2, -1), keepdim=True)
    return x_BMK.div_(top.clamp_min_(torch.finfo(x_BMK.dtype).tiny))


class Controlled(NamedTuple):
    """The projector of parity mode and the next state of its controller."""

    s: Tensor  # [B, m, n]: partial isometry onto the sharp singular triplets
    ratio: Tensor  # [B]
    inverted: Tensor  # [B] bool: the flattest directions were selected


def controlled_projector(
    m_BMN: Tensor, o_BMN: Tensor, ratio_B: Tensor, rank: int, steps: int, compute_dtype: torch.dtype | None = None
) -> Controlled:
    """The released code's sharp projector: singular values above ratio ||m||, a ratio that chases the rank."""
    norm = torch.linalg.vector_norm(m_BMN, dim=(-2, -1), keepdim=True)
    threshold = norm * ratio_B[:, None, None] + 1e-9
    s = 0.5 * (o_BMN + polar(m_BMN / threshold - o_BMN, steps, compute_dtype=compute_dtype))
    squares = s.square().sum((-2, -1))
    ratio = torch.where(squares.sqrt() > rank**0.5, 1.05 * ratio_B, 0.95 * ratio_B).clamp(max=1.0)
    # The top r of s singular directions hold at least r/s of the energy; unresolved tails that take their place hold
    # almost none. Half of that bound leaves room for a soft edge.
    gram = m_BMN @ s.mT if m_BMN.shape[-2] <= m_BMN.shape[-1] else s.mT @ m_BMN
    captured = gram.square().sum((-2, -1)) / norm[:, 0, 0].square().clamp_min(torch.finfo(norm.dtype).tiny)
    inverted = captured * min(m_BMN.shape[-2:]) < 0.5 * squares
    return Controlled(s, ratio, inverted)


def apply_isometry(x_BMN: Tensor, s_BMN: Tensor) -> Tensor:
    """x S^T S by the cheaper of the two orders."""
    return (x_BMN @ s_BMN.mT) @ s_BMN if s_BMN.shape[-2] <= s_BMN.shape[-1] else x_BMN @ (s_BMN.mT @ s_BMN)
