"""What a run is besides its settings, its data and its optimizer: the model, and what `optimize` made of it.

Checkpoints hold it, so that a run is not resumed as another one whose tensors happen to have the same shapes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

from ..errors import RecipeError
from ..losses import Item, RoutingMetrics, as_losses
from ..precision.recipe import Recipe, get_recipe
from ..routing import as_routing

# Of a transformers configuration: they say where it comes from and which version wrote it, not what the model computes.
_NOT_OF_THE_MODEL = ("transformers_version", "_name_or_path", "name_or_path")


def identity(model: nn.Module, spec: str | None = None, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """JSON values for `train(identity=)`, of a model and the keywords that `moefx.optimize` is called with for it.

    Left out is what changes a training by rounding alone, or not at all: `codegen`, `verify`, `dynamic`, `strict`, and
    `metrics` among the losses.

    Args:
        spec: what the model was built from, as `load_model` takes it; it identifies one that has no configuration.
    """
    given = options or {}
    passes = given.get("passes")
    found = {
        "model": {"class": _name(model), **_described(model, spec)},
        "recipe": _recipe(given.get("recipe")),
        "losses": {item.name: repr(item) if is_dataclass(type(item)) else _name(item) for item in added_losses(given)},
        "router": _router(given.get("router")),
        "passes": passes and [p if isinstance(p, str) else p.name for p in getattr(passes, "passes", passes)],
    }
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def added_losses(options: Mapping[str, Any]) -> list[Item]:
    """Of the keywords of `moefx.optimize`, the losses and bias updates: `metrics` only looks."""
    return [item for item in as_losses(options.get("losses") or ()) if not isinstance(item, RoutingMetrics)]


def digest_of(module: nn.Module) -> str:
    """SHA-256 of a module's configuration, if it has one, and of every tensor of its state, names and dtypes included.

    Reads all of the weights once: about a second per GB.
    """
    about = _described(module, None) or repr(getattr(module, "config", None))
    return state_digest(module, json.dumps(about, default=str, sort_keys=True))


def state_digest(module: nn.Module, about: str) -> str:
    """SHA-256 of a text and of every tensor of a module's state, names and dtypes included."""
    digest = hashlib.sha256(about.encode())
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _described(model: nn.Module, spec: str | None) -> dict[str, Any]:
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if not callable(to_dict):
        return {"spec": spec} if spec else {}
    return {k: v for k, v in to_dict().items() if k not in _NOT_OF_THE_MODEL}


def _recipe(recipe: Any) -> Any:
    """A recipe's name; with a digest of its fields where no registered one of this name is the same."""
    if isinstance(recipe, Mapping):
        recipe = get_recipe(recipe)
    if not isinstance(recipe, Recipe):
        return recipe
    try:
        if get_recipe(recipe.name) == recipe:
            return recipe.name
    except RecipeError:
        pass
    own = "\n".join(f"{f.name} {getattr(recipe, f.name)!r}" for f in fields(recipe) if f.name != "about")
    return f"{recipe.name} {hashlib.sha256(own.encode()).hexdigest()[:12]}"


def _router(router: Any) -> Any:
    routing = as_routing(router)
    if routing is None:
        return None
    own = {f.name: getattr(routing, f.name) for f in fields(routing) if f.name not in ("router", "causal")}
    return {"class": _name(routing.router), "digest": digest_of(routing.router), **own}
