"""Optimizers for MoE training, and which parameter gets which."""

from __future__ import annotations

from .groups import param_groups
from .roles import ROLES

__all__ = ["ROLES", "param_groups"]
