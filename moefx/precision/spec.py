"""`QuantSpec`: how a tensor is quantized, as one line of text that reads back as itself.

    <element> <block> <scale>/<rule> [eps=<number>] [sr] [zero=one] [delayed]

    e4m3 1x128 po2/rceil            one fp32 power-of-two scale per row and 128 columns (FP8 blockwise, activations)
    e4m3 128x1 po2/rceil            the same along the other axis;  128x128: weights
    e2m1 1x32 e8m0/rceil            MXFP4;  e4m3 1x32 e8m0/rceil: MXFP8
    e2m1 1x16 e4m3+f32/exact        NVFP4: an E4M3 scale per block on top of one fp32 scale
    e4m3 row f32/exact              a scale per row;  column, tensor (one per matrix) likewise
    e5m2 tensor f32/exact delayed   the scale comes from the largest magnitudes of earlier steps

A block covers rows x columns of the last two axes; the last blocks may be partial. Rules: `moefx.precision.scaling`.
Options: `eps` is a floor for the largest magnitude of a block; `sr` rounds stochastically; `zero=one` gives blocks of
zeros the scale 1 instead of the smallest one (Transformer Engine's choice, which harms whoever takes the largest scale
of several blocks); `delayed` makes the caller pass the largest magnitude.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Real
from typing import NoReturn

import torch

from moefx.errors import RecipeError, nearest

from .formats import Format, get_format

SCALES = ("po2", "f32", "e8m0", "e4m3+f32")
RULES = ("exact", "rceil", "floor", "ceil", "even")
WHOLE = ("row", "column", "tensor")
ZERO_RULES = ("min", "one")
OPTIONS = ("eps=", "sr", "zero=one", "delayed")


@dataclass(frozen=True)
class QuantSpec:
    """Element format, block, scale and rule. Build one with `parse`, or field by field; both are checked.

    Args:
        elem: name of the element format.
        block: "<rows>x<columns>", "row", "column" or "tensor".
        scale: "po2" (fp32 powers of two, normal numbers), "f32", "e8m0" (powers of two in a byte) or "e4m3+f32".
        rule: how a scale follows from the largest magnitude of its block.
        eps: floor of that magnitude; 0 for none.
        stochastic: elements are rounded stochastically.
        zero: scale of a block of zeros: "min", the smallest scale, or "one".
        delayed: the largest magnitude is an argument of `quantize`, not measured.

    Raises:
        RecipeError: an unknown or contradictory field, which the error names.
    """

    elem: str
    block: str
    scale: str
    rule: str
    eps: float = 0.0
    stochastic: bool = False
    zero: str = "min"
    delayed: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        object.__setattr__(self, "eps", float(self.eps))  # numbers of other libraries print otherwise
        fmt = get_format(self.elem)
        if not fmt.signed:
            self._refuse("element", f"{self.elem} is a format of scales")
        for field, value, known in (
            ("scale", self.scale, SCALES),
            ("rule", self.rule, RULES),
            ("zero", self.zero, ZERO_RULES),
        ):
            if value not in known:
                self._refuse(field, f"unknown {field} {value!r}", nearest(value, known))
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", self.block)
        if match is None and self.block not in WHOLE:
            self._refuse("block", f"unknown block {self.block!r}", nearest(self.block, ("1x128", "128x1", *WHOLE)))
        if match is not None and self.block == "1x1":
            self._refuse("block", "a block of one element is no block")
        po2 = self.scale in ("po2", "e8m0")
        if po2 and self.rule == "exact":
            self._refuse("rule", f"a scale of {self.scale} is a power of two, the rule exact gives any number")
        if not po2 and self.rule != "exact":
            self._refuse("rule", f"{self.rule} gives powers of two, which is written po2/{self.rule}")
        if self.scale == "e4m3+f32" and match is None:
            self._refuse("block", "a scale of e4m3+f32 needs blocks of a fixed size, 1x16 for NVFP4")
        if not (math.isfinite(self.eps) and self.eps >= 0 and (self.eps == 0 or self.eps >= 2.0**-126)):
            self._refuse("eps", f"eps={self.eps!r} is not zero or a normal fp32 number")
        if self.eps and self.zero == "one":
            self._refuse("zero", "eps already gives a block of zeros its scale")
        if self.delayed and self.block != "tensor":
            self._refuse("delayed", f"a scale from earlier steps needs the block tensor, not {self.block}")
        if self.zero == "one" and self.scale == "e4m3+f32":
            self._refuse("zero", "with two levels of scales, a block of zeros carries the smallest one")

    def _check_types(self) -> None:
        """Fields are what they are taken for below, and what `str` can print."""
        for kind, what, names in (
            (str, "text", ("elem", "block", "scale", "rule", "zero")),
            (Real, "a number", ("eps",)),
            (bool, "True or False", ("stochastic", "delayed")),
        ):
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, kind) or (kind is Real and isinstance(value, bool)):
                    raise RecipeError(
                        "cannot build a quantization spec",
                        where=f"{name}={value!r}",
                        why=f"it is {type(value).__name__}, not {what}",
                        todo="QuantSpec('e4m3', '1x128', 'po2', 'rceil', eps=1e-10) for example, or QuantSpec.parse",
                    )

    def _refuse(self, field: str, why: str, todo: str | None = None) -> NoReturn:
        raise RecipeError("contradictory quantization spec", f"{field} of {str(self)!r}", why, todo)

    @staticmethod
    def parse(text: str | QuantSpec) -> QuantSpec:
        """Read a spec (a `QuantSpec` is returned as it is); raises `RecipeError` naming the field that is wrong."""
        if isinstance(text, QuantSpec):
            return text
        if not isinstance(text, str):
            raise RecipeError(
                "cannot read a quantization spec",
                why=f"it is {type(text).__name__}, not a line of text",
                todo="for example 'e4m3 1x128 po2/rceil'",
            )
        return _parse(text)

    def __str__(self) -> str:
        options = [f"eps={self.eps:g}" if float(f"{self.eps:g}") == self.eps else f"eps={self.eps!r}"] * (self.eps != 0)
        options += ["sr"] * self.stochastic + [f"zero={self.zero}"] * (self.zero != "min") + ["delayed"] * self.delayed
        return " ".join((self.elem, self.block, f"{self.scale}/{self.rule}", *options))

    # -- parts -------------------------------------------------------------------------------------------------------

    @property
    def format(self) -> Format:
        """The element format."""
        return get_format(self.elem)

    @property
    def br(self) -> int | None:
        """Rows of a block; None: all of them."""
        if self.block in WHOLE:
            return 1 if self.block == "row" else None
        return int(self.block.split("x")[0])

    @property
    def bc(self) -> int | None:
        """Columns of a block; None: all of them."""
        if self.block in WHOLE:
            return 1 if self.block == "column" else None
        return int(self.block.split("x")[1])

    @property
    def is_po2(self) -> bool:
        """Whether every scale is a power of two."""
        return self.scale in ("po2", "e8m0")

    @property
    def two_level(self) -> bool:
        """Whether a scale is the product of one per block and one per matrix."""
        return self.scale == "e4m3+f32"

    @property
    def axis(self) -> int | None:
        """The axis along which a product may contract: -1 (blocks within a row), -2 (within a column), None (both)."""
        if self.br == 1:
            return -1
        return -2 if self.bc == 1 else None

    @property
    def sums_rows(self) -> bool:
        """Whether codes are made for sums over rows alone. Those that share a byte are not: they share it in a row."""
        return self.axis == -2 and self.format.per_byte == 1

    @property
    def scale_dtype(self) -> torch.dtype:
        """dtype of the scales of the blocks."""
        return {"e8m0": torch.float8_e8m0fnu, "e4m3+f32": torch.float8_e4m3fn}.get(self.scale, torch.float32)

    # -- sizes -------------------------------------------------------------------------------------------------------

    def scale_shape(self, shape: Sequence[int], groups: int | None = None) -> tuple[int, ...]:
        """Shape of the scales of a tensor of `shape` [..., M, N]: [..., ceil(M/br), ceil(N/bc)].

        With `groups` experts, blocks of several rows start anew at each expert's first row; their number depends on
        the routing, so there are M // br + groups rows of scales, enough for any; for blocks of whole columns there is
        one per expert. A block of a whole axis exists even if the axis is empty.

        Raises:
            RecipeError: fewer than two axes, or groups with more than two.
        """
        if len(shape) < 2 or (groups is not None and len(shape) != 2):
            raise RecipeError(
                f"no blocks of {self} in shape {tuple(shape)}", todo="give [..., M, N], or [M, N] with groups"
            )
        *front, M, N = shape
        columns = 1 if self.bc is None else -(-N // self.bc)
        if groups is None or self.br == 1:
            return (*front, 1 if self.br is None else -(-M // self.br), columns)
        return (groups if self.br is None else M // self.br + groups, columns)

    def nbytes(self, shape: Sequence[int], groups: int | None = None) -> int:
        """Bytes of codes and scales of a tensor of `shape`."""
        scales = math.prod(self.scale_shape(shape, groups)) * self.scale_dtype.itemsize
        return self.format.nbytes(shape) + scales + 4 * math.prod(shape[:-2]) * self.two_level

    # -- relations ---------------------------------------------------------------------------------------------------

    def transposed(self) -> QuantSpec:
        """The spec with blocks along the other axis: 1x128 and 128x1, row and column; square ones are their own."""
        if self.block in WHOLE:
            block = {"row": "column", "column": "row"}.get(self.block, self.block)
        else:
            block = "x".join(reversed(self.block.split("x")))
        return replace(self, block=block)

    def same_values(self, other: QuantSpec) -> bool:
        """Whether quantizing any tensor either way and dequantizing it gives the same numbers.

        The scale of a block of zeros makes no difference to them. Stochastic rounding is never the same twice.
        """
        return not self.stochastic and not other.stochastic and replace(self, zero="min") == replace(other, zero="min")


@lru_cache
def _parse(text: str) -> QuantSpec:
    def refuse(field: str, why: str, todo: str | None = None) -> NoReturn:
        raise RecipeError("cannot read a quantization spec", f"{field} of {text!r}", why, todo)

    words = text.split()
    if len(words) < 3 or words[2].count("/") != 1:
        refuse("text", "it must begin with element, block and scale/rule", "for example 'e4m3 1x128 po2/rceil'")
    elem, block, scale_rule, *options = words
    scale, rule = scale_rule.split("/")
    fields: dict[str, object] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key in fields:
            refuse(key, f"the option {key!r} is given twice")
        if option in ("sr", "delayed"):
            fields[key] = True
        elif key == "zero" and value in ZERO_RULES:
            fields[key] = value
        elif key == "eps":
            try:
                fields[key] = float(value)
            except ValueError:
                refuse("eps", f"{value!r} is not a number")
        else:
            refuse("options", f"unknown option {option!r}", nearest(option, OPTIONS))
    stochastic = bool(fields.pop("sr", False))
    return QuantSpec(elem, block, scale, rule, stochastic=stochastic, **fields)  # type: ignore[arg-type]
