"""moefx: a compiler for Mixture-of-Experts training, on torch.fx."""

from .errors import CaptureError, InputError, MissingPackageError, MoefxError, PassError, RecipeError
from .manager import Context, Pass, PassManager
from .module import OptimizedModule
from .optimize import optimize
from .passes import pipeline, register_pass
from .precision.recipe import Recipe, recipe_names
from .report import Report
from .view import diff, render

recipes = recipe_names()
__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "Context",
    "InputError",
    "MissingPackageError",
    "MoefxError",
    "OptimizedModule",
    "Pass",
    "PassError",
    "PassManager",
    "Recipe",
    "RecipeError",
    "Report",
    "diff",
    "optimize",
    "pipeline",
    "recipes",
    "register_pass",
    "render",
]
