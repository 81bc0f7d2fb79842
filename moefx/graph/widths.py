"""Whether blocks and packed codes fit the widths of the tensors that a recipe casts."""

from __future__ import annotations

from torch import fx

from moefx.dialect.glu import GluKind
from moefx.errors import RecipeError
from moefx.precision.spec import QuantSpec

from .edit import place

REMEDY = "choose another spec, or keep the module wide by a rule"


def check_width(text: str, width: int, node: fx.Node, tensor: str) -> None:
    """Raise `RecipeError` when blocks do not divide the columns of a tensor, or codes that share a byte would be torn.

    For operands whose columns a product sums over, for wires, and for what the backward stores.
    """
    check_packed(text, width, node, tensor)
    block = QuantSpec.parse(text).bc
    if block is not None and width % block:
        raise RecipeError(
            f"{tensor} has {width} columns, which blocks of {block} do not divide",
            where=place(node, named=True),
            why=f"{text!r} scales {block} columns together, and the last block would hold {width % block}",
            todo=f"make the width (of a shard: its own) a multiple of {block}, {REMEDY}",
        )


def check_packed(text: str, width: int, node: fx.Node, tensor: str) -> None:
    """Raise `RecipeError` when codes that share a byte would be torn."""
    fmt = QuantSpec.parse(text).format
    if width % fmt.per_byte:
        raise RecipeError(
            f"{tensor} has {width} columns, an odd number",
            where=place(node, named=True),
            why=f"codes of {fmt.name} lie two in a byte along a row, and stored ones do not say that the last is alone",
            todo=f"make the width even, {REMEDY}",
        )


def check_halves(text: str, kind: str, width: int, node: fx.Node, tensor: str) -> None:
    """Raise `RecipeError` when a block of what an activation of `kind` reads (or its gradient) holds gate and up."""
    glu = GluKind.parse(kind)
    block = QuantSpec.parse(text).bc
    if block is not None and glu.gated and not glu.interleaved and (width // 2) % block:
        raise RecipeError(
            f"{tensor} holds gate and up in halves of {width // 2} columns, which blocks of {block} do not divide",
            where=place(node, named=True),
            why="one scale would cover columns of both halves",
            todo=f"make the experts' width a multiple of {block}, {REMEDY}",
        )
