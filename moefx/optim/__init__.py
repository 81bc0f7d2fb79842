"""Optimizers for MoE training, and which parameter gets which: Muon, SOAP and AdamW, each with LITE (arXiv 2602.22681)
as an option.

    optim = moefx.optim.MuonLITE(moefx.optim.param_groups(model), lr=1e-3)
"""

from .adamw import AdamW
from .groups import param_groups
from .lite import LiteConfig
from .muon import Muon, MuonLITE
from .polar import polar
from .roles import ROLES
from .schedule import CosineCoupled, Ramp, WarmupCosine, WarmupStableDecay
from .soap import Soap, SoapLITE

__all__ = [
    "ROLES",
    "AdamW",
    "CosineCoupled",
    "LiteConfig",
    "Muon",
    "MuonLITE",
    "Ramp",
    "Soap",
    "SoapLITE",
    "WarmupCosine",
    "WarmupStableDecay",
    "param_groups",
    "polar",
]
