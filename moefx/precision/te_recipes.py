"""Recipes of TransformerEngine (TE), read as the fields of ours.

TE is not needed for it: recipes are known by the name of their class and by their fields. Read for this: TE 2.20.0.dev0
(commit d0067d0), common/recipe/__init__.py and pytorch/quantization.py. A field with a value that no recipe of ours can
express is an error, also one that this version lacks and that is not at its default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NoReturn

import torch.distributed as dist

from moefx.errors import RecipeError, nearest

from .keys import PRODUCTS
from .spec import QuantSpec

_FORMATS = {"E4M3": ("e4m3", "e4m3"), "HYBRID": ("e4m3", "e5m2"), "E5M2": ("e5m2", "e5m2")}
_QUANTS = ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad")
_DIMS = ("x_block_scaling_dim", "w_block_scaling_dim", "grad_block_scaling_dim")
_ALIGN = {"MXFP8BlockScaling": 32, "NVFP4BlockScaling": 16}  # to this, otherwise to 16, TE pads the rows of experts
# Fields that must have one value: it, why not another, and what to do.
_ONLY: dict[str, tuple[object, str, str]] = {
    "fp8_dpa": (False, "a recipe of moefx is about experts, not attention", "set it to False"),
    "fp8_mha": (False, "a recipe of moefx is about experts, not attention", "set it to False"),
    "backward_override": (None, "forward and backward products of a layer are narrow together", "set it to None"),
    "margin": (0, "no scale rule leaves a margin", "set it to 0"),
}
_KNOWN = {
    *_ONLY, *_QUANTS, *_DIMS, *(f"fp8_gemm_{p}" for p in PRODUCTS), "fp8_format", "use_f32_scales",
    "use_power_2_scales", "enable_2d_quantization", "amax_history_len", "amax_compute_algo", "reduce_amax",
    "disable_rht", "disable_2d_quantization", "disable_stochastic_rounding", "fp4_format",
}  # fmt: skip


def fields_from_te(obj: object) -> dict[str, Any]:
    """The fields of `moefx.Recipe` that a TransformerEngine recipe stands for; see `moefx.precision.te.recipe_from_te`.

    Raises:
        RecipeError: a class or the value of a field that a moefx recipe cannot express; names both.
    """
    kind = type(obj).__name__
    if kind not in _MAKERS:
        raise RecipeError(
            f"{kind} is not a TransformerEngine recipe that can be read",
            where=f"type {type(obj).__module__}.{kind}",
            why="recipes are known by the name of their class; derived classes may mean something else",
            todo=f"{nearest(kind, _MAKERS)}; or write a moefx.Recipe",
        )
    specs, accumulate = _MAKERS[kind](obj)
    _check(obj)
    about = f"as TransformerEngine's {kind}"
    about += f", {_format(obj)}" if kind != "NVFP4BlockScaling" else ""
    return {
        "about": about, "specs": specs, "accumulate": accumulate, "align": _ALIGN.get(kind, 16),
        "amax_history": _history(obj),
    }  # fmt: skip


def _refuse(obj: object, field: str, value: object, why: str, todo: str) -> NoReturn:
    raise RecipeError(f"moefx has no recipe for this {type(obj).__name__}", f"{field}={value!r}", why, todo)


def _field(obj: object, path: str, *default: Any) -> Any:
    value = obj
    for part in path.split("."):
        if not hasattr(value, part):
            if default:
                return default[0]
            _refuse(obj, path, None, "the object lacks this field", "give a recipe of TransformerEngine 2.3 or newer")
        value = getattr(value, part)
    return value


def _check(obj: object) -> None:
    for f, (only, why, todo) in _ONLY.items():
        if (value := _field(obj, f, only)) != only:
            _refuse(obj, f, value, why, todo)
    # Of these two TE reads the defaults, once, when it is imported.
    for f, po2 in (("use_power_2_scales", True), ("use_f32_scales", False)):
        wanted = _field(obj, f, None)
        for q in _QUANTS if wanted is not None else ():
            if _field(obj, f"{q}.power_2_scale") != (bool(wanted) == po2):
                why = f"{q}.power_2_scale says otherwise, and that is what TransformerEngine goes by"
                _refuse(obj, f, wanted, why, "set power_2_scale of all fp8_quant_* to what you want")
    for field in dataclasses.fields(obj) if dataclasses.is_dataclass(obj) else ():
        value = getattr(obj, field.name, field.default)
        if field.name not in _KNOWN and value != field.default:
            _refuse(obj, field.name, value, "moefx does not know this field", f"leave it at {field.default!r}")


def _specs(x: QuantSpec, w: QuantSpec, g: QuantSpec) -> dict[str, str]:
    """Specs of a recipe from those of input, weight and gradient in fprop and dgrad, along columns."""
    x_rows, g_rows = x.transposed(), g.transposed()
    specs = {
        "input.fprop": x, "input.stored": x_rows, "input.wgrad": x_rows, "weight.fprop": w, "weight.dgrad": w,
        "grad.dgrad": g, "grad.wgrad": g_rows,
    }  # fmt: skip
    return {key: str(spec) for key, spec in specs.items()}


def _format(obj: object) -> str:
    fmt = _field(obj, "fp8_format")
    name = getattr(fmt, "name", fmt)
    if not isinstance(name, str) or name not in _FORMATS:
        _refuse(obj, "fp8_format", name, "that is no format of an FP8 recipe", nearest(name, _FORMATS))
    return name


def _elements(obj: object) -> tuple[str, str, str]:
    """Elements of input, weight and gradient."""
    forward, backward = _FORMATS[_format(obj)]
    return forward, forward, backward


def _quantizers(obj: object, blocks: Sequence[str]) -> list[QuantSpec]:
    specs = []
    for f, elem, block in zip(_QUANTS, _elements(obj), blocks, strict=True):
        for flag in ("random_hadamard_transform", "stochastic_rounding", "fp4_2d_quantization"):
            if _field(obj, f"{f}.{flag}", False):
                _refuse(obj, f"{f}.{flag}", True, "TransformerEngine has this for NVFP4 only", "set it to False")
        scale, rule = ("po2", "rceil") if _field(obj, f"{f}.power_2_scale") else ("f32", "exact")
        eps = _field(obj, f"{f}.amax_epsilon")
        try:
            specs.append(QuantSpec(elem, block, scale, rule, eps=eps))
        except RecipeError as e:
            _refuse(obj, f"{f}.amax_epsilon", eps, e.why or e.what, "use 0 or a normal fp32 number")
    return specs


_Made = tuple[dict[str, str], dict[str, str]]


def _current(obj: object) -> _Made:
    split = {p: _field(obj, f"fp8_gemm_{p}.use_split_accumulator") for p in PRODUCTS}
    return _specs(*_quantizers(obj, ["tensor"] * 3)), {p: "fp32" if s else "fast" for p, s in split.items()}


def _blockwise(obj: object) -> _Made:
    dims = {f: _field(obj, f) for f in _DIMS}
    for f, dim in dims.items():
        if dim not in (1, 2):
            _refuse(obj, f, dim, "blocks are 1x128 (1) or 128x128 (2)", "use 1 or 2")
    square = [f for f, dim in dims.items() if dim == 2]
    if len(square) > 1:
        why = "a product takes two-dimensional blocks on one side only"
        _refuse(obj, "=2, ".join(square), 2, why, "use 1 for all but one of them")
    for p in PRODUCTS:
        if not _field(obj, f"fp8_gemm_{p}.use_split_accumulator"):
            why = "products with block scales are accumulated in parts of 128"
            _refuse(obj, f"fp8_gemm_{p}.use_split_accumulator", False, why, "set it to True")
    blocks = ["128x128" if dim == 2 else "1x128" for dim in dims.values()]
    return _specs(*_quantizers(obj, blocks)), {p: "promote128" for p in PRODUCTS}


def _mxfp8(obj: object) -> _Made:
    blocks = ("1x32", "32x32" if _field(obj, "enable_2d_quantization", False) else "1x32", "1x32")
    return _specs(*(QuantSpec(e, b, "e8m0", "rceil") for e, b in zip(_elements(obj), blocks, strict=True))), {}


def _nvfp4(obj: object) -> _Made:
    if not _field(obj, "disable_rht", False):
        why = "there is no random Hadamard transform of the operands of wgrad"
        _refuse(obj, "disable_rht", False, why, "set it to True, or use MXFP8BlockScaling")
    square, sr = (
        not _field(obj, "disable_2d_quantization", False),
        not _field(obj, "disable_stochastic_rounding", False),
    )
    x = QuantSpec("e2m1", "1x16", "e4m3+f32", "exact")
    w = dataclasses.replace(x, block="16x16") if square else x
    return _specs(x, w, dataclasses.replace(x, stochastic=sr)), {}


def _delayed(obj: object) -> _Made:
    if (algorithm := _field(obj, "amax_compute_algo", "max")) not in ("max", "most_recent"):
        why = "a scale follows the largest magnitude of the steps that are kept, or the last one"
        _refuse(obj, "amax_compute_algo", algorithm, why, "use 'max' or 'most_recent'")
    _check_reduction(obj)
    specs = (QuantSpec(e, "tensor", "f32", "exact", delayed=True) for e in _elements(obj))
    return _specs(*specs), {"fprop": "fast", "dgrad": "fp32", "wgrad": "fp32"}


def _check_reduction(obj: object) -> None:
    """TE takes the largest magnitude of all ranks (`reduce_amax`); a history here is of one rank."""
    reduced = _field(obj, "reduce_amax", True)
    if type(reduced) is not bool:
        _refuse(obj, "reduce_amax", reduced, "it is neither True nor False", "set it to False")
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if reduced and ranks > 1:
        why = f"there are {ranks} ranks, and the scales of each follow its own magnitudes here, not those of all"
        _refuse(obj, "reduce_amax", True, why, "set it to False if scales may differ from rank to rank")


def _history(obj: object) -> int:
    """Steps that the scales of a delayed recipe follow; 0 for others."""
    if type(obj).__name__ != "DelayedScaling":
        return 0
    steps = _field(obj, "amax_history_len")
    if type(steps) is not int or steps < 1:
        _refuse(obj, "amax_history_len", steps, "a history holds a whole number of steps", "set it to 1024 or so")
    return 1 if _field(obj, "amax_compute_algo", "max") == "most_recent" else steps


_MAKERS = {
    "DelayedScaling": _delayed,
    "Float8CurrentScaling": _current,
    "Float8BlockScaling": _blockwise,
    "MXFP8BlockScaling": _mxfp8,
    "NVFP4BlockScaling": _nvfp4,
}
