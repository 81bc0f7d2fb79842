"""Optimizers for MoE training: Muon, SOAP and AdamW, each with LITE (arXiv 2602.22681) as an option."""

from .adamw import AdamW
from .base import ROLES
from .lite import LiteConfig
from .muon import Muon, MuonLITE
from .polar import polar
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
    "polar",
]
