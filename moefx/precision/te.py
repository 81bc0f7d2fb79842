"""What is shared with TransformerEngine (TE): recipes (`te_recipes`), block-wise quantized matrices (`te_layout`)."""

from __future__ import annotations

from .recipe import Recipe
from .te_layout import TeBlockwise, from_te_blockwise, to_te_blockwise, to_te_tensor

__all__ = ["TeBlockwise", "from_te_blockwise", "recipe_from_te", "to_te_blockwise", "to_te_tensor"]


def recipe_from_te(obj: object, name: str | None = None) -> Recipe:
    """A TransformerEngine recipe as ours, with the same formats, blocks and scales for every operand of a product.

    TE quantizes both orientations from the wide tensor and sends wide tensors: what the backward keeps is the operand
    of wgrad (`input.stored`), and there is nothing for `wire`. Rows are padded as TE pads them. `accumulate` follows
    `use_split_accumulator`: "promote128" for block-wise scaling, where TE always splits, otherwise "fp32" or "fast".
    Where casts are made is the pipeline's matter: `replace(name, propagate=False)` keeps them where TE has them.
    DelayedScaling: the history of a rank is of its own magnitudes, which is `reduce_amax=False`. True, TE's default,
    takes the largest of all ranks. That is the same on one process and refused once there are several, so call this
    behind `init_process_group`.

    Args:
        obj: DelayedScaling, Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling or NVFP4BlockScaling (without
            its random Hadamard transform), known by the name of its class and its fields.
        name: of the recipe; by default "te_" and the name of the class in small letters. It is not registered.

    Raises:
        RecipeError: a class or the value of a field that a moefx recipe cannot express; names both.
    """
    return Recipe.from_te(obj, name)
