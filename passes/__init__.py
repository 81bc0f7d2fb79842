"""The passes, one file each, and the pipelines that recipes are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from moefx.errors import PassError, RecipeError, first_line, nearest
from moefx.losses import Item
from moefx.manager import Pass, PassManager, check_pass
from moefx.precision.recipe import BF16, Recipe, get_recipe

from .add_losses import AddLosses
from .align_plans import AlignPlans
from .bound_workspace import BoundWorkspace
from .dead_code import DeadCode
from .drop_noops import DropNoops
from .expand_experts import ExpandExperts
from .expand_routers import ExpandRouters
from .fold_casts import FoldCasts
from .fold_combine import FoldCombine
from .fuse_casts import FuseCasts
from .fuse_gather import FuseGather
from .fuse_plan_permute import FusePlanPermute
from .inline_pointwise import InlinePointwise
from .lower_wires import LowerWires
from .merge_routers import MergeRouters
from .orient_codes import OrientCodes
from .orient_wgrad import OrientWgrad
from .propagate_scales import PropagateScales
from .quantize import Quantize
from .raise_idioms import RaiseIdioms
from .raise_routers import RaiseRouters
from .recompute_activations import RecomputeActivations
from .route_by_token import RouteByToken
from .share_plans import SharePlans
from .store_low_precision import StoreLowPrecision
from .transpose_scales import TransposeScales
from .unbind_experts import UnbindExperts

Factory = TypeVar("Factory", bound=Callable[[], Pass])
_REGISTRY: dict[str, Callable[[], Pass]] = {}


def register_pass(factory: Factory) -> Factory:
    """Make a pass known by name, for `passes=[...]` and the command line. Usable as a class decorator.

    Raises `PassError` when the name is taken by another pass, and for what makes no pass when it is called.
    """
    if not callable(factory):
        what = f"the pass {factory.name} is an instance" if isinstance(factory, Pass) else f"{factory!r} makes no pass"
        raise PassError(
            f"{what}; register_pass takes a class or function that makes one",
            why="each pipeline gets a pass of its own by this name",
            todo="give the class, or lambda: MyPass(option=...) where it has options without a default",
        )
    try:
        p = factory()
    except Exception as e:
        raise PassError(
            f"{getattr(factory, '__name__', factory)!r} makes no pass when it is called without arguments",
            why=f"{type(e).__name__}: {first_line(e)}",
            todo="give every option a default, or register lambda: MyPass(option=...)",
        ) from e
    check_pass(p)
    if _REGISTRY.get(p.name, factory) is not factory:
        raise PassError(f"a pass named {p.name!r} is registered already", todo="choose another class name")
    _REGISTRY[p.name] = factory
    return factory


for _factory in (
    RaiseRouters,
    RouteByToken,
    ExpandRouters,
    MergeRouters,
    ExpandExperts,
    AddLosses,
    SharePlans,
    FoldCombine,
    AlignPlans,
    FusePlanPermute,
    DeadCode,
    DropNoops,
    OrientWgrad,
    Quantize,
    PropagateScales,
    FoldCasts,
    TransposeScales,
    FuseCasts,
    LowerWires,
    StoreLowPrecision,
    OrientCodes,
    RecomputeActivations,
    FuseGather,
    lambda: DeadCode(level="training"),
    InlinePointwise,
    RaiseIdioms,
    UnbindExperts,
    BoundWorkspace,
):
    register_pass(_factory)


def get_pass(name: str) -> Pass:
    """A registered pass by name; raises `PassError` with the nearest name otherwise."""
    if name not in _REGISTRY:
        raise PassError(f"no pass named {name!r}", todo=nearest(name, _REGISTRY))
    return _REGISTRY[name]()


def pass_names() -> list[str]:
    """Names of all registered passes, built-in ones in pipeline order."""
    return list(_REGISTRY)


def pipeline(recipe: str | Recipe | Mapping[str, str] = "bf16", *, codegen: str = "inductor") -> PassManager:
    """The passes that `optimize` runs for a recipe. Edit with `insert` and `remove`, and hand it back as `passes=`.

    `inline_pointwise` is part of it only for `codegen="inductor"`.
    """
    chosen = get_recipe(recipe)
    names = list(chosen.passes)
    if codegen == "inductor":
        names.append("inline_pointwise")
    return PassManager(tuple(_for_recipe(get_pass(n), chosen) for n in names))


def _for_recipe(p: Pass, recipe: Recipe) -> Pass:
    """A pass that has an option `recipe`, and was made without one, gets the recipe that its pipeline is for."""
    if _recipe_of(p) != BF16:
        return p
    made: Pass = dataclasses.replace(p, recipe=recipe)  # type: ignore[type-var]
    return made


def _recipe_of(p: Pass) -> Recipe | None:
    """The recipe that a pass has as an option; most have none."""
    found = getattr(p, "recipe", None) if "recipe" in getattr(type(p), "__dataclass_fields__", ()) else None
    return found if isinstance(found, Recipe) else None


def as_pipeline(
    passes: PassManager | Sequence[Pass | str] | None, recipe: str | Recipe | Mapping[str, str], codegen: str
) -> tuple[PassManager, Recipe]:
    """What the arguments `passes` and `recipe` of `optimize` mean together: the passes to run, and their recipe.

    Without `passes`, the recipe's own; a sequence is exactly these passes, by the recipe. A pipeline may have been made
    for a recipe; with `recipe` at "bf16", which asks for nothing, that one counts.

    Raises:
        PassError: `passes` is no pipeline and no list of passes.
        RecipeError: the passes were made for another recipe, or none of them makes the casts that the recipe asks for.
    """
    chosen = get_recipe(recipe)
    if passes is None:
        passes = pipeline(chosen, codegen=codegen)
    elif not isinstance(passes, PassManager):
        if isinstance(passes, str) or not isinstance(passes, Sequence):
            raise PassError(
                f"passes is {passes!r}", todo="give a pipeline (moefx.pipeline(...)) or a list of passes and pass names"
            )
        passes = PassManager(tuple(get_pass(p) if isinstance(p, str) else p for p in passes))
    for p in passes.passes:
        made_for = _recipe_of(p)
        if made_for is None or made_for in (BF16, chosen):
            continue
        if chosen != BF16:
            raise RecipeError(
                f"pass {p.name} was made for recipe {made_for.name!r}, and recipe is {chosen.name!r}",
                todo=f"start from moefx.pipeline({chosen.name!r}), or give recipe={made_for.name!r}",
            )
        chosen = made_for
    if chosen.quantizes and not any("quantized" in p.provides for p in passes.passes):
        raise RecipeError(
            f"recipe {chosen.name!r} asks for casts, and no pass of the pipeline makes them",
            why=f"it holds {', '.join(passes.names)}" if passes.names else "it is empty",
            todo=f"start from moefx.pipeline({chosen.name!r}) or its names, or leave the recipe out",
        )
    return PassManager(tuple(_for_recipe(p, chosen) for p in passes.passes), passes.given), chosen


def with_losses(passes: PassManager, losses: Sequence[Item]) -> PassManager:
    """The pipeline with `losses` in it, behind `raise_routers`: experts are expanded there, and routers not yet."""
    if not losses:
        return passes
    if "add_losses" in passes.names:
        raise PassError("the pipeline holds add_losses, and losses are given too", todo="give them in one place")
    early = [p for p in passes.passes if p.name == "expand_experts"]
    rest = [p for p in passes.passes if p.name != "expand_experts"]
    at = max((i + 1 for i, p in enumerate(rest) if p.name in ("raise_routers", "route_by_token")), default=0)
    return PassManager((*rest[:at], *early, AddLosses(tuple(losses)), *rest[at:]), passes.given)


def observing(passes: PassManager) -> PassManager:
    """The pipeline for a graph that does not train: losses only measure."""
    return PassManager(
        tuple(dataclasses.replace(p, training=False) if isinstance(p, AddLosses) else p for p in passes.passes),
        passes.given,
    )


__all__ = [
    "AddLosses",
    "AlignPlans",
    "BoundWorkspace",
    "DeadCode",
    "DropNoops",
    "ExpandExperts",
    "ExpandRouters",
    "FoldCasts",
    "FoldCombine",
    "FuseCasts",
    "FuseGather",
    "FusePlanPermute",
    "InlinePointwise",
    "LowerWires",
    "MergeRouters",
    "OrientCodes",
    "OrientWgrad",
    "PropagateScales",
    "Quantize",
    "RaiseIdioms",
    "RaiseRouters",
    "RecomputeActivations",
    "RouteByToken",
    "SharePlans",
    "StoreLowPrecision",
    "TransposeScales",
    "UnbindExperts",
    "as_pipeline",
    "get_pass",
    "observing",
    "pass_names",
    "pipeline",
    "register_pass",
    "with_losses",
]
