"""Recipes: a name for a pipeline of passes. `bf16` is the only one so far: compute in the dtypes that the model has."""

from __future__ import annotations

from dataclasses import dataclass

from moefx.errors import RecipeError, nearest


@dataclass(frozen=True)
class Recipe:
    """A named list of passes in listing order (the manager orders them by what they require and provide)."""

    name: str
    passes: tuple[str, ...]
    about: str = ""


_RECIPES = {
    "bf16": Recipe(
        "bf16",
        (
            "merge_routers",
            "expand_experts",
            "share_plans",
            "fold_combine",
            "fuse_plan_permute",
            "dead_code",
            "drop_noops",
            "orient_wgrad",
            "dead_code_training",
        ),
        "computes in the dtypes of the model's own parameters (float32, bfloat16 or float16); no casts are added",
    )
}


def recipe_names() -> list[str]:
    """Names that `recipe=` accepts."""
    return list(_RECIPES)


def get_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by name; raises `RecipeError` with the nearest name otherwise."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in _RECIPES:
        raise RecipeError(f"unknown recipe {recipe!r}", todo=nearest(str(recipe), _RECIPES))
    return _RECIPES[recipe]
