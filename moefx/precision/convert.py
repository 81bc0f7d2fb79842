"""From codes and scales of one spec to those of another, without the tensor in between.

With scales that are powers of two, a number in another block's scale is its code with the exponent shifted: exact
unless it falls below the smallest normal number there, where it is rounded to nearest, ties to even, or beyond the
largest, where it saturates: the rules floor and even leave such numbers at the top of a block, which `quantize` limits
as well. So nothing is quantized twice. The conversions, by the names that errors and `exactness` use:

    R10     the same blocks                     codes and scales stay; square blocks serve both orientations
    R11     blocks along the other axis, scale  the largest scale of a tile of 128 rows (`tile_max`, as in FP8-Flow-MoE,
                                                arXiv 2511.02302, though there the codes are not rounded)
    R12     the same, tight                     by the spec's rule from the largest number that the column really holds:
                                                never above that of R11, so fewer numbers fall below the normal ones
    R14     smaller blocks                      each takes the scale of the block it was part of, whatever `eps` says
    R15     larger blocks                       as R11 or R12, along the same axis
    R16     4-bit codes to 8 bits               the largest scale, lowered so that the codes use the top of the wider
                                                format: exact while scales within a block span few binades (14 for E4M3)
    R17     8-bit codes to 4 bits               the same bits as through a wide tensor

Scales of blocks of zeros influence no other block. NaN stays NaN, alone where the format can say so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch

from moefx.errors import InputError, RecipeError, nearest

from .blocks import Blocks, Rows
from .formats import Format
from .quantize import Scales, TwoLevel, check_scales, with_least
from .scaling import (
    NAN_EXPONENT,
    exponents_of_scales,
    least_exponent,
    least_scale,
    mantissa_bound,
    scale_exponents,
    scales_from_exponents,
)
from .spec import QuantSpec

Tensor = torch.Tensor
Kind = Literal["bit", "value", "bounded", "refused"]
PlaceRule = Literal["tight", "tile_max"]
PLACE_RULES = ("tight", "tile_max")
_NONE = -float(1 << 22)  # below every exponent and every key; fp32 holds all of them exactly
_NAN = float(NAN_EXPONENT)


class Exactness(NamedTuple):
    """What a conversion does to the numbers.

    kind: "bit": the same codes and scales; "value": the same numbers; "bounded": numbers below the smallest normal one
    of their new block are rounded (R17: all are), those beyond its largest one saturate; "refused": there is no such
    conversion.
    requantized: whether the result (of the tight rule, where there is a choice) is bit for bit what dequantizing and
    quantizing again gives, blocks with NaN apart.
    """

    kind: Kind
    rule: str
    reason: str
    requantized: bool = False


def _along(spec: QuantSpec) -> int | None:
    """Elements of a block along its axis; None: all."""
    return spec.bc if spec.axis == -1 else spec.br


def _divides(small: int | None, large: int | None) -> bool:
    return large is None or (small is not None and large % small == 0)


def exactness(spec: QuantSpec | str, to_spec: QuantSpec | str) -> Exactness:
    """Whether and how `convert` gets from `spec` to `to_spec`, and what it costs; looks at no tensor.

    Only elements, blocks and scale formats matter: how the scales of `spec` were chosen is past, and rounding (`sr`) is
    to nearest in a conversion.
    """
    a, b = (QuantSpec.parse(s) for s in (spec, to_spec))
    fa, fb = a.format, b.format
    if (fa, a.block, a.scale) == (fb, b.block, b.scale):
        # Quantizing again finds another largest magnitude where that was rounded into the next binade; floor does not.
        stable = a.rule == b.rule == "floor" and not a.eps and not b.eps
        return Exactness("bit", "R10", "the same blocks: codes and scales stay as they are", stable)
    turned = a.block != b.block and not a.two_level and a.transposed().block == b.block
    if not (a.is_po2 and b.is_po2):
        if fa == fb and turned:
            why = "R13, blocks along the other axis with scales that are no powers of two, would round twice"
            return Exactness("refused", "R13", f"{why}: quantize both orientations from the wide tensor")
        return Exactness("refused", "", "no rule converts scales that are no powers of two")
    if a.axis is None or b.axis is None:
        return Exactness("refused", "", f"no rule converts blocks {a.block} to {b.block}")
    below = f"numbers below {fb.min_normal:g} times the new scale are rounded to multiples of {fb.quantum:g} times it"
    if b.rule in ("floor", "even"):
        below += f", those beyond {fb.max:g} times it saturate"
    same_axis, na, nb = a.axis == b.axis, _along(a), _along(b)
    if fa == fb:
        # E8M0 reaches one binade further down than a normal fp32 scale: then the codes may have to change.
        if same_axis and _divides(nb, na) and not (a.scale == "e8m0" and b.scale == "po2"):
            return Exactness("value", "R14", "each new block lies in an old one and takes its scale")
        if same_axis and _divides(na, nb):
            return Exactness("bounded", "R15", below, True)
        if turned and fa.per_byte == 1:
            return Exactness("bounded", "R11/R12", below, True)
        if turned:
            return Exactness(
                "refused", "", f"no rule turns blocks of {a.elem}, which has too few binades: R16 to 8 bits"
            )
        return Exactness(
            "refused", "", f"no rule converts blocks {a.block} to {b.block}: sizes must divide, axes agree"
        )
    if fa.per_byte == 1 and fb.per_byte == 2 and same_axis and _divides(nb, na):
        return Exactness(
            "bounded", "R17", f"rounds to {b.elem}: half a step of it, on top of the error of {a.elem}", True
        )
    if fa.per_byte == 2 and fb.per_byte == 1 and (not same_axis or _divides(na, nb)):
        return Exactness(
            "bounded", "R16", f"exact while scales in a block span {_span(fa, fb)} binades; beyond, {below}"
        )
    return Exactness("refused", "", f"no rule converts {a.elem} {a.block} to {b.elem} {b.block}")


def headroom(a: Format, b: Format) -> int:
    """The largest h with max of `a` * 2^h <= max of `b`: scales may be lowered by 2^h."""
    return b.emax - a.emax - (a.max / 2.0**a.emax > b.max / 2.0**b.emax)


def _span(a: Format, b: Format) -> int:
    """Binades by which codes of `a`, raised by the headroom, may be lowered without loss in `b`."""
    step = a.quantum * 2.0 ** headroom(a, b)
    span = 0
    while step / 2 >= b.quantum:
        step, span = step / 2, span + 1
    return span


def transpose_scaled(
    codes: Tensor,
    scales: Scales,
    spec: QuantSpec | str,
    to_spec: QuantSpec | str,
    *,
    offsets: Tensor | None = None,
    rule: PlaceRule = "tight",
) -> tuple[Tensor, Scales]:
    """Blocks along one axis to blocks along the other (1x128 to 128x1 and back, row to column) of the same matrix.

    Args:
        codes, scales: of `spec`, as `quantize` returns them for [..., M, N].
        spec, to_spec: powers of two on both sides, the same element, blocks that are each other's transpose; or equal.
        offsets: int32 [E+1] as in `quantize`: blocks of several rows stop at experts. Rows of nobody get code 0.
        rule: "tight" (R12) or "tile_max" (R11).

    Returns:
        codes [..., M, N], not transposed in memory, and scales of `to_spec`. Let S be the new scale: numbers of at
        least min_normal * S are unchanged, but for those beyond the format's largest number times S, which a tight
        scale by the rules floor and even leaves, and which become that; smaller ones are off by at most
        quantum / 2 * S.

    Raises:
        RecipeError: specs between which there is no such conversion.
        InputError: tensors that do not belong to `spec`.
    """
    spec, to_spec = QuantSpec.parse(spec), QuantSpec.parse(to_spec)
    found = exactness(spec, to_spec)
    if found.rule in ("R14", "R15", "R16", "R17"):
        why = f"{found.rule} changes more than the orientation of the blocks"
        raise RecipeError(f"{to_spec} is not {spec} along the other axis", why=why, todo="use convert")
    return convert(codes, scales, spec, to_spec, offsets=offsets, rule=rule)


def convert(
    codes: Tensor,
    scales: Scales,
    spec: QuantSpec | str,
    to_spec: QuantSpec | str,
    *,
    offsets: Tensor | None = None,
    width: int | None = None,
    rule: PlaceRule = "tight",
) -> tuple[Tensor, Scales]:
    """Codes and scales of `to_spec` for the numbers that `codes` and `scales` of `spec` mean; see the table above.

    Args:
        codes, scales: of `spec`, as `quantize` returns them for [..., M, N].
        offsets: int32 [E+1] as in `quantize`.
        width: N, for 4-bit codes of an odd number of columns.
        rule: how R11/R12 and R15 choose a scale: "tight" or "tile_max".

    Returns:
        codes and scales as `quantize(..., to_spec)` would shape them. Rounding is to nearest even also where
        `to_spec` says `sr`, so that a conversion can be repeated.

    Raises:
        RecipeError: no conversion between the specs; the error says which rule is missing. `exactness` tells before.
        InputError: tensors that do not belong to `spec`, or an unknown rule.
    """
    spec, to_spec = QuantSpec.parse(spec), QuantSpec.parse(to_spec)
    if rule not in PLACE_RULES:
        raise InputError(f"unknown rule {rule!r} for the scales of a conversion", todo=nearest(str(rule), PLACE_RULES))
    found = exactness(spec, to_spec)
    if found.kind == "refused":
        raise RecipeError(f"no conversion from {str(spec)!r} to {str(to_spec)!r}", why=found.reason)
    raw = spec.format.load(codes, width)
    rows = Rows.of(offsets, raw.shape[-2], raw.shape, raw.device)
    check_scales(scales, spec, raw.shape, rows)
    if found.kind == "bit":
        return codes, scales
    assert not isinstance(scales, TwoLevel)  # two levels are no powers of two
    source, target = Blocks.of(spec, raw.shape, rows), Blocks.of(to_spec, raw.shape, rows)
    T = exponents_of_scales(scales, spec)
    if found.rule == "R14":
        exponents = target.amax(source.at_elements(T).to(torch.float32), _NONE)
        # The codes stay, and so must their scales: the floor that `eps` of `to_spec` is for a magnitude is none here.
        return codes, _finish(exponents, replace(to_spec, eps=0.0), target)[0]
    new, new_scales = _shift(
        raw, T, spec, to_spec, source, target, found.rule if found.rule in ("R16", "R17") else rule
    )
    return to_spec.format.store(new), new_scales


def _shift(
    raw: Tensor, T: Tensor, spec: QuantSpec, to_spec: QuantSpec, source: Blocks, target: Blocks, rule: str
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [..., M, N] and scales of `to_spec`, whose exponents follow `rule`."""
    a, b = spec.format, to_spec.format
    T_elem = source.at_elements(T)
    x = torch.where(T_elem == NAN_EXPONENT, torch.nan, a.decode(raw))
    if source.rows is not None:  # after NaN: a row of nobody has no block, `at_elements` gives it that of another
        x = torch.where(source.rows.live[:, None], x, 0.0)
    bad = ~x.isfinite()
    if rule in ("tight", "R17"):
        exponents = _tight(x, bad, T_elem, a, to_spec, target)
    else:
        exponents = _largest(x, T, source, target)
        exponents = torch.where(exponents > _NONE, exponents - headroom(a, b), _NONE)
    if not b.has_nan:
        exponents = torch.where(target.amax(bad.to(torch.float32)) > 0, _NAN, exponents)
    scales, exact = _finish(exponents, to_spec, target)
    # No format spans 126 binades: a larger shift leaves zero.
    exact_elem = target.at_elements(exact)
    k = (exact_elem - T_elem).clamp(-126, 126)
    if not b.has_nan:
        x = torch.where(exact_elem == NAN_EXPONENT, torch.nan, x)  # code 0 throughout, as `quantize` has it
    new = b.encode(x * ((127 - k) << 23).view(torch.float32))
    return (torch.where(a.is_special(raw) & bad, raw, new) if a == b else new), scales


def _largest(x: Tensor, T: Tensor, source: Blocks, target: Blocks) -> Tensor:
    """The largest exponent (fp32) among the source blocks in each target block, blocks of zeros and NaN aside."""
    used = (source.amax((x.isfinite() & (x != 0)).to(torch.float32)) > 0) & (T != NAN_EXPONENT)
    largest = torch.where(used, T, int(_NONE)).to(torch.float32)
    if target.within_columns and source.within_rows:  # the same for all columns of a source block
        return _source_columns(target.amax_of_rows(largest, _NONE), source)
    return target.amax(source.at_elements(largest), _NONE)


def tile_max(
    raw: Tensor, scales: Tensor, spec: QuantSpec | str, to_spec: QuantSpec | str, offsets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What R11 needs besides moving codes, for blocks within rows turned to blocks within columns.

    Returns:
        raw codes uint8 [M, N], with NaN for blocks of a NaN scale and 0 for rows of nobody; scales of `to_spec`; how
        many binades the codes of each source block move, int32 [M, C], not negative.
    """
    spec, to_spec = QuantSpec.parse(spec), QuantSpec.parse(to_spec)
    rows = Rows.of(offsets, raw.shape[-2], raw.shape, raw.device)
    check_scales(scales, spec, raw.shape, rows)
    source, target = Blocks.of(spec, raw.shape, rows), Blocks.of(to_spec, raw.shape, rows)
    T, fmt = exponents_of_scales(scales, spec), spec.format
    lost = source.at_elements(T == NAN_EXPONENT) & ~fmt.is_special(raw)
    raw = torch.where(lost, fmt.encode(torch.tensor(torch.nan, device=raw.device)), raw)
    if rows is not None:
        raw = torch.where(rows.live[:, None], raw, 0)
    new_scales, exact = _finish(_largest(fmt.decode(raw), T, source, target), to_spec, target)
    moved = target.at_rows(exact)[:, :: source.bc] - T
    return raw, new_scales, torch.where(T == NAN_EXPONENT, 0, moved).clamp(min=0)


def _source_columns(s: Tensor, source: Blocks) -> Tensor:
    """[..., R, C] of blocks of several columns at each column: [..., R, N]."""
    return s.repeat_interleave(source.bc, -1)[..., : source.N]


def _tight(x: Tensor, bad: Tensor, T: Tensor, a: Format, to_spec: QuantSpec, target: Blocks) -> Tensor:
    """Exponents (fp32) by the rule of `to_spec` from the largest x * 2^T of each block, whatever its exponent.

    A number's key is its exponent and, in the last bits, its mantissa: keys are ordered as the magnitudes are, and do
    not overflow or underflow where the numbers would.
    """
    M = a.mantissa_bits
    key = ((x.abs().view(torch.int32) >> (23 - M)) - (127 << M)) + (T << M)
    key = torch.where(bad | (x == 0), _NONE, key.to(torch.float32))
    top = target.amax(key, _NONE).to(torch.int32)
    fraction = (top & ((1 << M) - 1)) << (23 - M)
    exponents = (top >> M) - to_spec.format.emax + (fraction > mantissa_bound(to_spec.format, to_spec.rule))
    return torch.where(top > int(_NONE), exponents.to(torch.float32), _NONE)


def _finish(exponents: Tensor, to_spec: QuantSpec, target: Blocks) -> tuple[Tensor, Tensor]:
    """Scales of `to_spec` and their int32 exponents from fp32 exponents: limits, eps, blocks of zeros, unused ones."""
    least = least_exponent(to_spec)
    if to_spec.eps:
        amax = torch.tensor(to_spec.eps, dtype=torch.float32, device=exponents.device)
        floor = scale_exponents(amax, to_spec).to(torch.float32)
        exponents = torch.maximum(exponents, floor)
    elif to_spec.zero == "one":
        exponents = torch.where(exponents == _NONE, 0.0, exponents)
    nan = exponents == _NAN
    exact = torch.where(nan, NAN_EXPONENT, exponents.clamp(least, 127).to(torch.int32))
    scales = scales_from_exponents(exact, to_spec)
    unused = target.unused()
    return (scales if unused is None else with_least(scales, unused, least_scale(to_spec))), exact
