"""moefx: a compiler for Mixture-of-Experts training, on torch.fx."""

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
from .view import diff, render

recipes = list(BUILT_IN)
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
    "QuantSpec",
    "Recipe",
    "RecipeError",
    "Report",
    "Rule",
    "dequantize",
    "diff",
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
