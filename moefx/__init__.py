"""moefx: a compiler for Mixture-of-Experts training, on torch.fx."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import losses, optim
from .errors import CaptureError, InputError, MissingPackageError, MoefxError, PassError, RecipeError
from .manager import Context, Pass, PassManager
from .module import OptimizedModule
from .optimize import optimize
from .passes import pipeline, register_pass
from .precision import QuantSpec, dequantize, quantize
from .precision.builtin import BUILT_IN
from .precision.recipe import Recipe, Rule, register_recipe
from .report import Report
from .routing import FutureTokensWarning, Precomputed, Routing
from .view import diff, render

if TYPE_CHECKING:
    from . import grouter
    from .models.grouter import Grouter

recipes = list(BUILT_IN)
__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "Context",
    "FutureTokensWarning",
    "Grouter",
    "InputError",
    "MissingPackageError",
    "MoefxError",
    "OptimizedModule",
    "Pass",
    "PassError",
    "PassManager",
    "Precomputed",
    "QuantSpec",
    "Recipe",
    "RecipeError",
    "Report",
    "Routing",
    "Rule",
    "dequantize",
    "diff",
    "grouter",
    "losses",
    "optim",
    "optimize",
    "pipeline",
    "quantize",
    "recipes",
    "register_pass",
    "register_recipe",
    "render",
]


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: `import moefx` stays light.
    if name == "grouter":
        return importlib.import_module(".grouter", __name__)
    if name == "Grouter":
        return importlib.import_module(".models.grouter", __name__).Grouter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
