"""Values as codes and scales: quantize, dequantize, and what moves or turns codes without widening them.

These ops belong to training graphs, where forward and backward are one graph: no gradient flows through a code, and
asking for one is an error rather than a silent zero. A spec string (`moefx.precision.spec`) says how to read codes; it
is an argument of the op, so that a printed graph can be read.

    quantize(x [S, N], offsets, specs, align) -> codes, scales of each spec in turn
    dequantize(codes, scales, offsets, spec, dtype) -> x
    permute_scaled(codes [T, N], scales, token, slot) -> codes [S, N], scales; rows without a token hold code 0
    transpose_scaled(codes, scales, offsets, spec, to_spec, rule, align) -> the same values in blocks of the other axis
    convert(codes, scales, offsets, spec, to_spec, align) -> the same values in another format

`offsets` int32 [E+1] keep blocks that span rows inside one expert; weights and blocks within a row need none. Codes
keep the logical shape [S, N] whatever their blocks are; how they lie in memory follows from `align`
(`moefx.kernels.layout`). Two levels of scales are carried as their product, one fp32 tensor; a scale from earlier steps
is refused, because it does not follow from `x`. Exactness: docs/precision.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import moefx.kernels.casts
import moefx.kernels.permute
import moefx.kernels.transpose_scaled  # noqa: F401  all register their providers before the references
from moefx.errors import InputError
from moefx.kernels.layout import check_promise, codes_fake, laid_out
from moefx.precision.convert import convert as convert_codes
from moefx.precision.convert import transpose_scaled as turn_codes
from moefx.precision.quantize import dequantize as dequantize_codes
from moefx.precision.quantize import fp32_scales
from moefx.precision.quantize import quantize as quantize_tensor
from moefx.precision.spec import QuantSpec

from ._op import define, dense

Tensor = torch.Tensor


def training_only(name: str) -> Callable[..., Any]:
    """The backward of an op that belongs to training graphs."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise InputError(
            f"moefx.{name} was differentiated",
            why="it belongs to training graphs, behind autograd: a gradient in the dtype of a code would be lost",
            todo="leave casts to a precision recipe, or differentiate before the values are quantized",
        )

    return refuse


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def check_specs(name: str, *specs: str) -> None:
    """Raise `InputError` unless the op can carry what `specs` say: scales measured from the values."""
    for text in specs:
        if QuantSpec.parse(text).delayed:
            raise InputError(
                f"moefx.{name} cannot carry {text!r}",
                why="its scale comes from earlier steps, and the op measures it from its operand",
            )


def encoded_fake(x: Tensor, specs: Sequence[str], groups: int | None, align: int = 1) -> list[Tensor]:
    """Fakes of codes and scales of `x` under each spec."""
    out = []
    for text in specs:
        spec = QuantSpec.parse(text)
        out.append(codes_fake(x, spec, x.shape, align))
        out.append(x.new_empty(spec.scale_shape(x.shape, groups), dtype=graph_scale_dtype(spec)))
    return out


def graph_scale_dtype(spec: QuantSpec) -> torch.dtype:
    """dtype of scales in a graph, where two levels of scales are carried as their product."""
    return torch.float32 if spec.two_level else spec.scale_dtype


def encode(x: Tensor, specs: Sequence[str], offsets: Tensor | None, align: int = 1) -> list[Tensor]:
    """Codes and scales of `x` under each spec, codes laid out as `align` says."""
    out: list[Tensor] = []
    for text in specs:
        codes, scales = quantize_tensor(x, text, offsets=offsets)
        # Two levels of scales are one tensor here, their product: every op takes codes and scales.
        scales = scales if isinstance(scales, Tensor) else fp32_scales(scales, QuantSpec.parse(text))
        out += [laid_out(codes, text, align), dense(scales)]
    return out


def value_shape(codes: Tensor, spec: str) -> tuple[int, ...]:
    """Shape of the values behind stored codes. A packed width counts as even: blocks divide it."""
    return (*codes.shape[:-1], codes.shape[-1] * QuantSpec.parse(spec).format.per_byte)


def groups_of(offsets: Tensor | None) -> int | None:
    """Number of experts that offsets delimit."""
    return None if offsets is None else offsets.shape[0] - 1


def _check_quantize(x: Tensor, offsets: Tensor | None, specs: Sequence[str], align: int = 1) -> None:
    check_specs("quantize", *specs)
    check_promise("quantize", offsets, align)


quantize = define(
    "quantize",
    "(Tensor x, Tensor? offsets, str[] specs, int align=1) -> Tensor[]",
    reference=lambda x, offsets, specs, align=1: encode(x, specs, offsets, align),
    fake=lambda x, offsets, specs, align=1: encoded_fake(x, specs, groups_of(offsets), align),
    check=_check_quantize,
    setup=_no_context,
    backward=training_only("quantize"),
    codes=True,
)


def _dequantize(codes: Tensor, scales: Tensor, offsets: Tensor | None, spec: str, dtype: torch.dtype) -> Tensor:
    return dequantize_codes(codes, scales, spec, dtype=dtype, offsets=offsets)


dequantize = define(
    "dequantize",
    "(Tensor codes, Tensor scales, Tensor? offsets, str spec, ScalarType dtype) -> Tensor",
    reference=_dequantize,
    fake=lambda codes, scales, offsets, spec, dtype: codes.new_empty(value_shape(codes, spec), dtype=dtype),
    setup=_no_context,
    backward=training_only("dequantize"),
)


def _check_rows(codes: Tensor, scales: Tensor, token: Tensor, slot: Tensor) -> None:
    def got() -> str:
        return f"permute_scaled: codes [T, N] are {tuple(codes.shape)}, scales [T, C] {tuple(scales.shape)}"

    torch._check(codes.dim() == 2 and scales.dim() == 2, got)
    torch._check(codes.shape[0] == scales.shape[0], lambda: f"{got()}: only blocks within a row move with it")


def _permute_scaled(codes: Tensor, scales: Tensor, token_S: Tensor, slot_Tk: Tensor) -> tuple[Tensor, Tensor]:
    empty_S, row_S = (token_S < 0)[:, None], token_S.clamp_min(0)
    # A row without a token holds zeros; its scale must not be the largest of a tile, so it is the smallest there is.
    least = 0 if scales.element_size() == 1 else 2.0**-126

    def move(t: Tensor, fill: float) -> Tensor:
        bits = t.view(torch.uint8) if t.element_size() == 1 else t
        if t.shape[0] == 0:  # there is no row to read, and none holds a token
            return bits.new_full((token_S.shape[0], t.shape[1]), fill).view(t.dtype)
        return bits.index_select(0, row_S).masked_fill_(empty_S, fill).view(t.dtype)

    return move(codes, 0), move(scales, least)


# `slot` is what the adjoint of the wide op gathers by; codes have none, but the two ops stay interchangeable.
permute_scaled = define(
    "permute_scaled",
    "(Tensor codes, Tensor scales, Tensor token, Tensor slot) -> (Tensor, Tensor)",
    reference=_permute_scaled,
    fake=lambda codes, scales, token, slot: (
        codes.new_empty(token.shape[0], codes.shape[1]),
        scales.new_empty(token.shape[0], scales.shape[1]),
    ),
    check=_check_rows,
    setup=_no_context,
    backward=training_only("permute_scaled"),
)


def _own(codes: Tensor, scales: Tensor, new: tuple[Tensor, Any], to_spec: str, align: int) -> tuple[Tensor, Tensor]:
    """`new` as it lies, in memory of its own: a conversion that changes nothing returns what it was given."""
    new_codes, new_scales = new
    made = laid_out(new_codes, to_spec, align)
    if made is codes:
        made = codes.clone(memory_format=torch.contiguous_format)
    return made, scales.clone() if new_scales is scales else dense(new_scales)


def _transpose_scaled(
    codes: Tensor, scales: Tensor, offsets: Tensor | None, spec: str, to_spec: str, rule: str = "tight", align: int = 1
) -> tuple[Tensor, Tensor]:
    new = turn_codes(codes, scales, spec, to_spec, offsets=offsets, rule=rule)  # type: ignore[arg-type]
    return _own(codes, scales, new, to_spec, align)


def _turned_fake(
    codes: Tensor, scales: Tensor, offsets: Tensor | None, spec: str, to_spec: str, rule: str = "tight", align: int = 1
) -> tuple[Tensor, Tensor]:
    values = codes.new_empty(value_shape(codes, spec))
    new_codes, new_scales = encoded_fake(values, [to_spec], groups_of(offsets), align)
    return new_codes, new_scales


def _check_turn(
    codes: Tensor, scales: Tensor, offsets: Tensor | None, spec: str, to_spec: str, rule: str = "tight", align: int = 1
) -> None:
    check_specs("transpose_scaled", spec, to_spec)
    check_promise("transpose_scaled", offsets, align)


transpose_scaled = define(
    "transpose_scaled",
    '(Tensor codes, Tensor scales, Tensor? offsets, str spec, str to_spec, str rule="tight", int align=1)'
    " -> (Tensor, Tensor)",
    reference=_transpose_scaled,
    fake=_turned_fake,
    check=_check_turn,
    setup=_no_context,
    backward=training_only("transpose_scaled"),
    codes=True,
)


def _converted(
    codes: Tensor, scales: Tensor, offsets: Tensor | None, spec: str, to_spec: str, align: int = 1
) -> tuple[Tensor, Tensor]:
    return _own(codes, scales, convert_codes(codes, scales, spec, to_spec, offsets=offsets), to_spec, align)


def _converted_fake(
    codes: Tensor, scales: Tensor, offsets: Tensor | None, spec: str, to_spec: str, align: int = 1
) -> tuple[Tensor, Tensor]:
    return _turned_fake(codes, scales, offsets, spec, to_spec, align=align)


def _check_convert(
    codes: Tensor, scales: Tensor, offsets: Tensor | None, spec: str, to_spec: str, align: int = 1
) -> None:
    check_specs("convert", spec, to_spec)
    check_promise("convert", offsets, align)


convert = define(
    "convert",
    "(Tensor codes, Tensor scales, Tensor? offsets, str spec, str to_spec, int align=1) -> (Tensor, Tensor)",
    reference=_converted,
    fake=_converted_fake,
    check=_check_convert,
    setup=_no_context,
    backward=training_only("convert"),
    codes=True,
)
