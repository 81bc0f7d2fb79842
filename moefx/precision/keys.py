"""The keys of a recipe's specs, and the operands of each product that they name."""

from __future__ import annotations

from collections.abc import Mapping

USAGES = {
    "input": ("fprop", "wgrad", "wire", "stored"),
    "weight": ("fprop", "dgrad"),
    "grad": ("dgrad", "wgrad", "wire"),
    "hidden": ("stored",),
}
PRODUCTS = {
    "fprop": ("input.fprop", "weight.fprop"),
    "dgrad": ("grad.dgrad", "weight.dgrad"),
    "wgrad": ("grad.wgrad", "input.wgrad"),
}
GEMMS = ("up", "down")
KEYS = tuple(f"{role}.{usage}" for role, usages in USAGES.items() for usage in usages)


def lookup(specs: Mapping[str, str], gemm: str, key: str) -> str | None:
    """The spec of `role.usage` in the up or down product."""
    return specs.get(f"{gemm}.{key}", specs.get(key))
