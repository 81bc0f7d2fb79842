"""What the scaled products of known libraries take: scale dtypes, blocks, rows per expert.

A recipe says what is wanted; a backend says what can be run natively. `Recipe.for_backend` holds one against the other
before anything is traced. `emulation` takes everything: operands are dequantized and multiplied in fp32. Facts from the
libraries' documentation and sources (cuBLAS 13, DeepGEMM, TransformerEngine 2, torch `_scaled_grouped_mm`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moefx.errors import RecipeError, nearest

from .spec import QuantSpec

if TYPE_CHECKING:
    from .recipe import Recipe

PRODUCTS = ("fprop", "dgrad", "wgrad")


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
        RecipeError: an unknown backend, or an operand that it cannot read; names the field and what would do.
    """
    if backend == "emulation":
        return recipe.align
    if backend not in BACKENDS:
        raise RecipeError(f"unknown backend {backend!r}", todo=nearest(backend, ("emulation", *BACKENDS)))
    b = BACKENDS[backend]
    specs = {k: QuantSpec.parse(v) for k, v in recipe.specs.items() if k.split(".")[-1] in PRODUCTS}
    for key, spec in specs.items():
        for field, got, known in (("scale", spec.scale, b.scales), ("element", spec.elem, b.elems)):
            if got not in known:
                raise RecipeError(
                    f"recipe {recipe.name!r}: {key} has a {field} {got!r}, which {backend} does not read",
                    why=f"{str(spec)!r}; {backend} reads {', '.join(sorted(known))}",
                    todo=f"choose a spec with {field} {sorted(known)[0]!r}, another backend, or 'emulation'",
                )
    for product in PRODUCTS:
        for key, spec in specs.items():
            if not key.endswith(product) or ("weight" in key):
                continue
            other = "weight" if product != "wgrad" else "input"
            partner = next((s for k, s in specs.items() if k.endswith(f"{other}.{product}")), None)
            a, w = (s if product != "wgrad" else s.transposed() for s in (spec, partner or spec))
            if (a.block, w.block) not in b.blocks:
                raise RecipeError(
                    f"recipe {recipe.name!r}: {product} has blocks {spec.block} and {(partner or spec).block}, "
                    f"which {backend} does not multiply",
                    where=f"{key}, {other}.{product}",
                    why=f"it takes {', '.join(':'.join(p) for p in sorted(b.blocks))} along the axis that is summed",
                    todo="choose blocks of that list, another backend, or 'emulation'",
                )
    return max(recipe.align, b.align)
