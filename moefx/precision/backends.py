"""What the scaled products of known libraries take: scale dtypes, blocks, rows per expert.

A recipe says what is wanted; a backend says what can be run natively. `Recipe.for_backend` holds one against the other
before anything is traced. `emulation` takes everything: operands are dequantized and multiplied in fp32. Facts from the
libraries' documentation and sources (cuBLAS 13, DeepGEMM, TransformerEngine 2, torch `_scaled_grouped_mm`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moefx.errors import RecipeError, nearest

from .keys import GEMMS, PRODUCTS, lookup
from .spec import QuantSpec

if TYPE_CHECKING:  # recipes ask this module
    from .recipe import Recipe


@dataclass(frozen=True)
class Backend:
    """Limits of one library on one generation of hardware.

    Attributes:
        scales: scale kinds of a spec that its products read; a power of two is a number, so `f32` covers `po2`.
        blocks: (operand block, weight block) pairs; for wgrad, the transposed operand block on both sides.
        elems: element formats.
        align: rows of an expert are padded to a multiple of this.
    """

    name: str
    scales: frozenset[str]
    blocks: frozenset[tuple[str, str]]
    elems: frozenset[str]
    align: int


def _backend(name: str, scales: str, blocks: str, elems: str, align: int) -> Backend:
    pairs = frozenset((a, b) for a, b in (p.split(":") for p in blocks.split()))
    return Backend(name, frozenset(scales.split()), pairs, frozenset(elems.split()), align)


BACKENDS = {
    b.name: b
    for b in (
        _backend("deepgemm_sm90", "f32 po2", "1x128:128x128 1x128:1x128", "e4m3", 128),
        _backend("te_sm90", "f32 po2", "1x128:128x128 1x128:1x128 tensor:tensor", "e4m3 e5m2", 16),
        _backend("torch_sm90", "f32 po2", "row:row", "e4m3 e5m2", 16),
        _backend("cublas_sm100", "e8m0 e4m3+f32", "1x32:1x32 1x32:32x32 1x16:1x16 1x16:16x16", "e4m3 e5m2 e2m1", 32),
    )
}


def check_backend(recipe: Recipe, backend: str) -> int:
    """The row alignment that `recipe` needs on a backend.

    Raises:
        RecipeError: an unknown backend, an operand that it cannot read, in the recipe or under one of its rules (names
            the field and what would do), or `passes` of one's own without the one that aligns rows.
    """
    if backend == "emulation":
        return recipe.align
    if backend not in list(BACKENDS):  # also one that cannot be hashed
        raise RecipeError(f"unknown backend {backend!r}", todo=nearest(backend, ("emulation", *BACKENDS)))
    b = BACKENDS[backend]
    for where, specs in recipe.variants():
        for gemm in GEMMS:
            for product, keys in PRODUCTS.items():
                _check_product(recipe.name, b, where, product, [_found(specs, gemm, key) for key in keys])
    align = max(recipe.align, b.align)
    if align > 1 and recipe.own_passes and "align_plans" not in recipe.passes:
        raise RecipeError(
            f"recipe {recipe.name!r}: {backend} needs the rows of each expert at multiples of {align}",
            why="its `passes` leave out 'align_plans', which sees to that",
            todo="add 'align_plans' behind 'fold_combine', or leave `passes` to the recipe",
        )
    return align


def _found(specs: Mapping[str, str], gemm: str, key: str) -> tuple[str, QuantSpec] | None:
    """The key that decides in the up or down product, and its spec; None: wide."""
    text, own = lookup(specs, gemm, key), f"{gemm}.{key}"
    return None if text is None else (own if own in specs else key, QuantSpec.parse(text))


def _check_product(
    name: str, b: Backend, where: str | None, product: str, found: Sequence[tuple[str, QuantSpec] | None]
) -> None:
    operands = [f for f in found if f is not None]
    for key, spec in operands:
        for field, got, known in (("scale", spec.scale, b.scales), ("element", spec.elem, b.elems)):
            if got not in known:
                raise RecipeError(
                    f"recipe {name!r}: {key} has a {field} {got!r}, which {b.name} does not read",
                    where=where,
                    why=f"{str(spec)!r}; {b.name} reads {', '.join(sorted(known))}",
                    todo=f"choose a spec with {field} {sorted(known)[0]!r}, another backend, or 'emulation'",
                )
    if len(operands) < 2:
        return
    # A weight gradient sums over rows, and both of its operands are rows: the operand's block, turned, on both sides.
    turned = product == "wgrad"
    allowed = {p for p in b.blocks if p[0] == p[1]} if turned else b.blocks
    (key, spec), (other, partner) = operands
    blocks = tuple((s.transposed() if turned else s).block for s in (spec, partner))
    if blocks not in allowed:
        raise RecipeError(
            f"recipe {name!r}: {product} has blocks {spec.block} and {partner.block}, which {b.name} does not multiply",
            where=", ".join(p for p in (where, key, other) if p),
            why=f"it takes {', '.join(':'.join(p) for p in sorted(allowed))} along the axis that is summed",
            todo="choose blocks of that list, another backend, or 'emulation'",
        )
