"""Recipes: which operand of which product is stored, computed and sent in which format. Data, not code.

A recipe maps `role.usage` to a QuantSpec string. Roles are `input` (activations that enter an expert product),
`weight`, `grad` (gradients that enter one) and `hidden` (what the activation function reads). Usages are the products
`fprop`, `dgrad`, `wgrad`, what travels between ranks (`wire`), and what the backward keeps (`stored`). A key may name
one product of the experts in front: `down.grad.dgrad`. What no key names stays wide.

Specs are about the operand as [rows, columns]: rows of tokens for input, grad and hidden; [out, in] for a weight in
fprop and [in, out] in dgrad. Blocks run along the axis that is summed over: columns in fprop and dgrad, rows in wgrad.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, NoReturn

from moefx.errors import RecipeError, nearest

from .backends import check_backend
from .keys import GEMMS, KEYS, PRODUCTS, USAGES, lookup
from .spec import QuantSpec
from .te_recipes import fields_from_te

__all__ = [
    "BF16", "GEMMS", "KEYS", "PRODUCTS", "USAGES", "Recipe", "Rule", "get_recipe", "lookup", "recipe_names",
    "register_recipe",
]  # fmt: skip

ACCUMULATE = ("fp32", "fast", "promote128")
TURNS = ("tight", "tile_max")
OUT = ("wide", "float32", "bfloat16")

_MODEL = ("raise_routers", "expand_routers", "merge_routers", "expand_experts", "share_plans", "fold_combine")
_TRAINING = ("dead_code", "drop_noops", "orient_wgrad")
_FUSED = ("recompute_activations", "fuse_gather")


class _Settled(dict[str, str]):
    """A copy of a mapping that refuses to be written to, and is a dict to whatever reads it: JSON, `repr`, equality."""

    def _refuse(self, *args: object, **fields: object) -> NoReturn:
        raise RecipeError(
            "a recipe cannot be written to",
            why="it was checked when it was made, and others may share it",
            todo="recipe.replace('mine', specs={...}) makes another one, with these specs in place of its own",
        )

    __setitem__ = __delitem__ = __ior__ = _refuse
    update = setdefault = pop = popitem = clear = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type, tuple[dict[str, str]]]:
        return type(self), (dict(self),)  # not item by item, as dicts are pickled and copied


@dataclass(frozen=True)
class Rule:
    """Specs for the modules whose dotted path matches a shell pattern; `specs=None` leaves them wide.

    The keys given replace the recipe's; the others stay. The first rule that matches a module decides.

    Raises:
        RecipeError: a path that is no text, specs that are no mapping. What the specs say, the recipe checks.
    """

    path: str
    specs: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            raise RecipeError(
                f"the path of a rule is {self.path!r}, which is no text",
                todo="give a shell pattern of module paths, such as Rule('*.layers.0.*')",
            )
        if self.specs is not None:
            _check_mapping(f"specs of the rule for {self.path!r}", self.specs)
            object.__setattr__(self, "specs", _Settled(self.specs))

    def matches(self, path: str) -> bool:
        """Whether this rule is about the module at `path`."""
        return fnmatch.fnmatchcase(path, self.path)


@dataclass(frozen=True, init=False)
class Recipe:
    """A precision recipe. It copies the mappings that it is given, and cannot be changed: see `replace`.

    Args:
        name: how it is chosen: `moefx.optimize(..., recipe=name)` once it is registered.
        about: one line for `moefx recipes`.
        specs: `[up.|down.]role.usage` -> spec string, for example {"input.fprop": "e4m3 1x128 po2/rceil"}.
        rules: ordered exceptions by module path.
        align: rows of each expert are padded to a multiple of this, for kernels that need it; see also `gpu_align`.
        accumulate, out: per product (fprop, dgrad, wgrad): accumulation wanted of a kernel, dtype of the result.
        turn: how codes in the other orientation get their scales: "tight", or "tile_max" as in FP8-Flow-MoE.
        amax_history: steps whose largest magnitudes the scales of `delayed` specs follow.
        allow_double_quant: accept conversions that round a second time on another grid (R13); measured and printed.
        force: keep low precision also where it was measured slower than the wide program (`moefx.kernels.decisions`).
        propagate, fuse: whether explicit casts are propagated and folded, and fused into activations.
        passes: the whole pipeline by name, instead of the one that follows from the other fields.

    Raises:
        RecipeError: an unknown field or key, an unreadable spec, specs that contradict each other. Names the field.
    """

    name: str
    about: str = ""
    specs: Mapping[str, str] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    align: int = 1
    accumulate: Mapping[str, str] = field(default_factory=dict)
    out: Mapping[str, str] = field(default_factory=dict)
    turn: str = "tight"
    amax_history: int = 0
    allow_double_quant: bool = False
    force: bool = False
    propagate: bool = True
    fuse: bool = True
    passes: tuple[str, ...] = ()

    def __init__(self, name: str, about: str = "", **fields: Any) -> None:
        known = {f: d for f, d in _DEFAULTS.items()}
        for f in fields:
            if f not in known:
                raise RecipeError(f"recipe {name!r} has an unknown field {f!r}", todo=nearest(f, known))
        values = {"name": name, "about": about, **known, **fields}
        for f, example in _LISTS.items():
            values[f] = _listed(f"recipe {name!r}: {f}", values[f], example)
        for f in _MAPPINGS:
            _check_mapping(f"recipe {name!r}: {f}", values[f])
            values[f] = _Settled(values[f])
        for f, v in values.items():
            object.__setattr__(self, f, v)
        self._check()
        if not self.passes:
            object.__setattr__(self, "passes", self._pipeline())

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted(self.specs.items())), self.passes))

    def _pipeline(self) -> tuple[str, ...]:
        if not self.quantizes:
            return (*_MODEL, "fuse_plan_permute", *_TRAINING, "lower_wires", *_FUSED, "dead_code_training")
        aligned = ("align_plans",) if self.gpu_align > 1 else ()
        steps = ["quantize"]
        steps += ["propagate_scales", "fold_casts", "transpose_scales"] if self.propagate else []
        steps += ["fuse_casts"] if self.fuse else []
        steps += ["lower_wires"]
        steps += ["store_low_precision"] if self.propagate and self.fuse else []
        steps += ["orient_codes"]
        return (*_MODEL, *aligned, *_TRAINING, *steps, *_FUSED, "dead_code_training")

    def replace(self, name: str, about: str = "", **fields: Any) -> Recipe:
        """A recipe like this one but for the given fields; `specs` given here are added to this one's.

        `passes` that this one was given stay; those that follow from its fields follow from the new ones, where
        `dataclasses.replace` would keep the old ones.
        """
        kept: dict[str, Any] = {f: getattr(self, f) for f in _DEFAULTS if self.own_passes or f != "passes"}
        given = fields.pop("specs", {})
        _check_mapping(f"recipe {name!r}: specs", given)
        specs = {**self.specs, **given}
        return Recipe(name, about, **{**kept, **fields, "specs": {k: v for k, v in specs.items() if v is not None}})

    @staticmethod
    def from_te(obj: object, name: str | None = None) -> Recipe:
        """A recipe of TransformerEngine as ours; see `moefx.precision.te.recipe_from_te`."""
        return Recipe(name or f"te_{type(obj).__name__.lower()}", **fields_from_te(obj))

    def for_backend(self, backend: str) -> Recipe:
        """This recipe with the row alignment that a backend's products need (`moefx.precision.backends`).

        Raises `RecipeError` naming the field that the backend cannot read.
        """
        align = check_backend(self, backend)
        return self if align == self.align else self.replace(self.name, self.about, align=align)

    @property
    def quantizes(self) -> bool:
        """Whether it asks for any cast, be it by a rule for some modules."""
        return bool(self._every())

    @property
    def own_passes(self) -> bool:
        """Whether `passes` were given: they are not those that follow from the other fields."""
        return self.passes != self._pipeline()

    @property
    def gpu_align(self) -> int:
        """`align` on a GPU: FP8 codes of weight gradients are read 16 rows at a time (`moefx.kernels.layout`)."""
        by_columns = any(QuantSpec.parse(s).sums_rows for key, s in self._every() if key.endswith(".wgrad"))
        return math.lcm(self.align, 16) if by_columns else self.align

    def for_module(self, path: str) -> Mapping[str, str] | None:
        """The specs that hold in a module: the recipe's, with those of the first rule that matches; None is wide."""
        rule = self.rule(path)
        if rule is None:
            return self.specs or None
        return None if rule.specs is None else {**self.specs, **rule.specs}

    def rule(self, path: str) -> Rule | None:
        """The rule that decides for a module, if any."""
        return next((r for r in self.rules if r.matches(path)), None)

    def variants(self) -> list[tuple[str | None, Mapping[str, str]]]:
        """All specs that hold together in some module: the recipe's, and with those of each rule that has any.

        The first of each pair says which rule it is, None for the recipe itself.
        """
        ruled = [(f"rules[{r.path!r}]", {**self.specs, **r.specs}) for r in self.rules if r.specs is not None]
        return [(None, self.specs), *ruled]

    def specs_of(self, role: str) -> list[str]:
        """Every spec that a role ("input", "weight", "grad", "hidden") has anywhere, rules and products included."""
        return [text for key, text in self._every() if role in key.split(".")]

    def _every(self) -> list[tuple[str, str]]:
        """Keys and specs of the recipe and of its rules."""
        return [item for specs in (self.specs, *(r.specs for r in self.rules if r.specs)) for item in specs.items()]

    # --- checks

    def _check(self) -> None:
        self._check_types()
        for f in _FLAGS:
            if type(getattr(self, f)) is not bool:
                raise RecipeError(f"recipe {self.name!r}: {f} is {getattr(self, f)!r}", todo="give True or False")
        for f, allowed in (("accumulate", ACCUMULATE), ("out", OUT)):
            for product, value in getattr(self, f).items():
                self._known(f, product, PRODUCTS)
                self._known(f"{f}[{product!r}]", value, allowed)
        self._known("turn", self.turn, TURNS)
        if type(self.align) is not int or self.align < 1:
            raise RecipeError(f"recipe {self.name!r}: align is {self.align!r}", todo="give a positive number of rows")
        if type(self.amax_history) is not int or self.amax_history < 0:
            raise RecipeError(
                f"recipe {self.name!r}: amax_history is {self.amax_history!r}", todo="give a number of steps, or 0"
            )
        for where, specs in [("specs", self.specs), *((f"rules[{r.path!r}]", r.specs) for r in self.rules)]:
            if specs is not None:
                self._check_keys(where, specs)
        delayed = [s for _, s in self._every() if QuantSpec.parse(s).delayed]
        if bool(delayed) != (self.amax_history > 0):
            raise RecipeError(
                f"recipe {self.name!r}: amax_history is {self.amax_history}",
                why=f"{delayed[0]!r} takes its scale from earlier steps" if delayed else "no spec is delayed",
                todo="say how many steps are kept, 1024 for example" if delayed else "leave it at 0",
            )
        for _, specs in self.variants():
            for gemm in GEMMS:
                self._check_products(specs, gemm)

    def _check_types(self) -> None:
        """Names and what lists hold are what they are taken for below."""
        for f in ("name", "about"):
            if not isinstance(getattr(self, f), str):
                raise RecipeError(f"recipe {self.name!r}: {f} is {getattr(self, f)!r}", todo="give text")
        if not self.name.strip() or not self.name.isprintable():
            raise RecipeError(
                f"recipe {self.name!r}: name is {self.name!r}",
                why="it is chosen by its name, and listed with it on one line",
                todo="give a name of one line that is not empty, such as 'mine'",
            )
        for p in self.passes:
            if not isinstance(p, str):
                raise RecipeError(
                    f"recipe {self.name!r}: passes holds {p!r}, which is no name",
                    todo="write names of registered passes; moefx.optimize(passes=[...]) takes passes themselves",
                )
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise RecipeError(
                    f"recipe {self.name!r}: rules holds {rule!r}, which is no Rule",
                    todo="write Rule('*.layers.0.*') for modules that stay wide, Rule(path, specs) for others",
                )

    def _known(self, where: str, value: str, allowed: Iterable[str]) -> None:
        if value not in allowed:
            raise RecipeError(f"recipe {self.name!r}: {where} names {value!r}", todo=nearest(str(value), allowed))

    def _check_keys(self, where: str, specs: Mapping[str, str]) -> None:
        for key, text in specs.items():
            name = str(key)
            gemm, _, plain = name.partition(".") if name.split(".")[0] in GEMMS else ("", "", name)
            self._known(where, plain, KEYS)
            if (gemm and plain.endswith(".wire")) or (gemm == "down" and plain == "hidden.stored"):
                raise RecipeError(
                    f"recipe {self.name!r}: {where} names {name!r}, which nothing reads",
                    why="rows travel to the experts and back once, and pre-activations are the up product's",
                    todo=f"write {plain!r}",
                )
            if not isinstance(text, str):
                raise RecipeError(
                    f"recipe {self.name!r}: {where}[{key!r}] is {text!r}, which is no line of text",
                    todo="leave the key out, or write str(spec); a rule with specs=None keeps its modules wide",
                )
            try:
                spec = QuantSpec.parse(text)
            except RecipeError as e:
                raise RecipeError(f"recipe {self.name!r}: {where}[{key!r}]: {e.what}", e.where, e.why, e.todo) from e
            usage = plain.split(".")[1]
            if usage == "wire" and spec.br != 1:
                raise RecipeError(
                    f"recipe {self.name!r}: {where}[{key!r}] is {text!r}, whose blocks span rows",
                    why="rows travel to different ranks, each with its scales",
                    todo="use blocks within a row: 1x128, 1x32 or row",
                )
            if plain == "hidden.stored" and spec.delayed:
                raise RecipeError(
                    f"recipe {self.name!r}: {where}[{key!r}] is {text!r}, a scale from earlier steps",
                    why="no history is kept of pre-activations: the op that computes them measures what it writes",
                    todo="take the option 'delayed' out of it",
                )
            along_rows = usage == "wgrad"
            if usage in PRODUCTS and spec.axis not in (None, -2 if along_rows else -1):
                axis, example = ("rows", "128x1") if along_rows else ("columns", "1x128")
                raise RecipeError(
                    f"recipe {self.name!r}: {where}[{key!r}] is {text!r}, but {usage} sums over {axis}",
                    why="a scale must be constant along the part of a sum that it multiplies",
                    todo=f"use blocks along {axis}, such as {example!r}",
                )

    def _check_products(self, specs: Mapping[str, str], gemm: str) -> None:
        for product, keys in PRODUCTS.items():
            found = [lookup(specs, gemm, k) for k in keys]
            if (found[0] is None) != (found[1] is None):
                there, lacking = (keys[0], keys[1]) if found[0] else (keys[1], keys[0])
                raise RecipeError(
                    f"recipe {self.name!r}: {product} of the {gemm} product has {there} but no {lacking}",
                    why="a product runs on codes of both operands, or wide",
                    todo=f"add {lacking}, or take {there} out",
                )
            if all(t is not None and _is_square(QuantSpec.parse(t)) for t in found):
                raise RecipeError(
                    f"recipe {self.name!r}: {product} has two-dimensional blocks on both operands",
                    where=f"{keys[0]}, {keys[1]}",
                    todo="use 1x128 on one side",
                )


_DEFAULTS: dict[str, Any] = {
    "specs": {}, "rules": (), "align": 1, "accumulate": {}, "out": {}, "turn": "tight", "amax_history": 0,
    "allow_double_quant": False, "force": False, "propagate": True, "fuse": True, "passes": (),
}  # fmt: skip
_MAPPINGS = tuple(f for f, value in _DEFAULTS.items() if isinstance(value, dict))
_LISTS = {"rules": "[Rule('*.layers.0.*')]", "passes": "['quantize', 'fold_casts']"}
_FLAGS = tuple(f for f, value in _DEFAULTS.items() if isinstance(value, bool))


def _check_mapping(where: str, given: object) -> None:
    if not isinstance(given, Mapping):
        raise RecipeError(f"{where} is {type(given).__name__}, not a mapping", todo="give a dict")


def _listed(where: str, given: object, example: str) -> tuple[Any, ...]:
    """What a list, a tuple or a generator holds, in its order."""
    if isinstance(given, str | Mapping | Set) or not isinstance(given, Iterable):
        raise RecipeError(f"{where} is {given!r}, not a list", todo=f"give a list: {example}")
    return tuple(given)


def _is_square(spec: QuantSpec) -> bool:
    return spec.axis is None and spec.block != "tensor"


_RECIPES: dict[str, Recipe] = {}


def register_recipe(recipe: Recipe) -> Recipe:
    """Make a recipe known by its name. Raises `RecipeError` for a taken name, and for what is no `Recipe`."""
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"{recipe!r} is a {type(recipe).__name__}, not a recipe",
            why="what is registered is known by the name that it carries",
            todo="give a moefx.Recipe, such as Recipe('mine', specs={...})",
        )
    if _RECIPES.get(recipe.name, recipe) != recipe:
        raise RecipeError(f"a recipe named {recipe.name!r} is registered already", todo="choose another name")
    _RECIPES[recipe.name] = recipe
    return recipe


def recipe_names() -> list[str]:
    """Names that `recipe=` accepts."""
    return list(_RECIPES)


def get_recipe(recipe: str | Recipe | Mapping[str, str]) -> Recipe:
    """A recipe by name, itself, or by its specs alone: `Recipe("custom", specs=recipe)`.

    Raises:
        RecipeError: an unknown name (with the nearest one), specs that a recipe refuses, anything else.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return Recipe("custom", specs=recipe)
    if not isinstance(recipe, str):
        raise RecipeError(
            f"the recipe is {recipe!r}, a {type(recipe).__name__}",
            todo="give a name (moefx recipes lists them), a moefx.Recipe, or a dict of specs",
        )
    if recipe not in _RECIPES:
        raise RecipeError(f"unknown recipe {recipe!r}", todo=nearest(recipe, _RECIPES))
    return _RECIPES[recipe]


BF16 = register_recipe(
    Recipe("bf16", "computes in the dtypes of the model's own parameters (float32, bfloat16 or float16); no casts")
)
