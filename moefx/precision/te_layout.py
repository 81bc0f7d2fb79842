"""Block-wise quantized matrices in the layout of TransformerEngine (TE), made of ours and back.

They are plain tensors: only `to_te_tensor` imports TE. Read for this: TE 2.20.0.dev0 (commit d0067d0),
pytorch/tensor/float8_blockwise_tensor.py and its storage class, common/recipe/recipe_common.cuh.

TE's `Float8BlockwiseQTensor` of a matrix [M, N] keeps bytes and fp32 scales ready for its products, where a block has
128 elements, r4 rounds up to a multiple of 4, and a scale is what a code is multiplied with, as ours:

    blocks              data                         scale_inv                          ours
    1x128               uint8 [M, N]                 [ceil(N/128), r4(M)]               [M, ceil(N/128)]
    128x1               uint8 [N, M]: transposed     [ceil(M/128), r4(N)]               [ceil(M/128), N]
    128x128             uint8 [M, N]                 [ceil(M/128), r4(ceil(N/128))]     [ceil(M/128), ceil(N/128)]
    128x128 columnwise  uint8 [N, M]: transposed     [ceil(N/128), r4(ceil(M/128))]

TE leaves the scales behind the padding as they were in memory; here they are zero, as TE's test reference makes them.
(From 2.5 to 2.11 it also had a compact layout, for all-gathers: ours, with untransposed data.)

Corners. A block whose codes are all zero has any finite scale: TE's is 1.0, or with an eps the one that belongs to eps;
ours is the smallest, unless the spec says otherwise. Both directions put in the convention of the other side. Every
other scale passes bit for bit: NaN, which TE never makes (it gives a block with an infinity the scale 1.0 and one with
a NaN the scale of its other elements), and 2^-127, TE's power-of-two scale of blocks whose 448 / amax overflows, where
ours stops at 2^-126. So codes times scales are the same numbers on both sides, always. Quantizing is a different
matter: with exact scales TE multiplies by fl32(448 / amax), we divide by fl32(amax / 448); single codes may differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, overload

import torch
from torch.nn.functional import pad

from moefx.errors import InputError
from moefx.packages import optional

from .blocks import Blocks, Rows
from .quantize import check_scales
from .scaling import least_scale, scales_from_amax
from .spec import QuantSpec

Tensor = torch.Tensor
_COLUMNWISE = {"1x128": False, "128x1": True, "128x128": None}  # None: either


class TeBlockwise(NamedTuple):
    """One orientation of a `Float8BlockwiseQTensor`; its `get_metadata()` has the tensors of both."""

    data: Tensor  # uint8 [M, N]; columnwise [N, M]
    scale_inv: Tensor  # fp32, see the table above
    columnwise: bool  # the layout is said, never guessed from shapes
    square: bool  # blocks of 128x128: TE's is_2D_scaled


@overload
def to_te_blockwise(
    codes: Tensor, scales: Tensor, spec: QuantSpec | str, *, columnwise: bool | None = None, offsets: None = None
) -> TeBlockwise: ...
@overload
def to_te_blockwise(
    codes: Tensor, scales: Tensor, spec: QuantSpec | str, *, columnwise: bool | None = None, offsets: Tensor
) -> list[TeBlockwise]: ...
def to_te_blockwise(
    codes: Tensor,
    scales: Tensor,
    spec: QuantSpec | str,
    *,
    columnwise: bool | None = None,
    offsets: Tensor | None = None,
) -> TeBlockwise | list[TeBlockwise]:
    """Codes and scales as `quantize` returns them, in TE's layout.

    Args:
        codes: E4M3 or E5M2 [M, N].
        scales: fp32, in the shape of `QuantSpec.scale_shape`.
        spec: blocks 1x128, 128x1 or 128x128; scales po2 or f32.
        columnwise: which orientation of 128x128 blocks; the others have one.
        offsets: int32 [E+1], first rows of experts. The host reads them: it waits for the device.

    Returns:
        TE's layout of the matrix, which holds copies; with `offsets` one per expert, as TE's grouped products take
        them, without the rows of nobody. Any sizes; TE's products want multiples of 128, of 16 for rows of experts.

    Raises:
        InputError: another block, element or scale, or tensors that do not belong to the spec.
    """
    spec, columnwise = _orientation(spec, columnwise)
    raw = spec.format.load(codes)
    if raw.dim() != 2:
        raise InputError("TransformerEngine's layout is that of a matrix", why=f"codes are {tuple(codes.shape)}")
    check_scales(scales, spec, raw.shape, Rows.of(offsets, raw.shape[0], raw.shape, raw.device))
    if offsets is None:
        return _to_te(raw, scales, spec, columnwise)
    return [_to_te(raw[r], scales[s], spec, columnwise) for r, s in _experts(offsets, raw.shape[0], spec)]


def _to_te(raw: Tensor, scales: Tensor, spec: QuantSpec, columnwise: bool) -> TeBlockwise:
    s = _zeros_as(raw, scales, dataclasses.replace(spec, zero="min" if spec.eps else "one"))
    s = s.T if _transposes_scales(spec, columnwise) else s
    data = raw.T if columnwise else raw
    s = pad(s, (0, -s.shape[1] % 4)).clone(memory_format=torch.contiguous_format)
    return TeBlockwise(data.clone(memory_format=torch.contiguous_format), s, columnwise, spec.axis is None)


def from_te_blockwise(
    te: TeBlockwise | Sequence[TeBlockwise],
    spec: QuantSpec | str,
    *,
    offsets: Tensor | None = None,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """TE's layout, one matrix or one per expert, as `quantize` would return codes and scales.

    Args:
        te: as `to_te_blockwise` returns it.
        spec: of the matrix; whether the scales are powers of two as it may say is not checked.
        offsets: int32 [E+1], where the experts' rows go; `te` is then one matrix per expert. The host reads them.
        rows: M with `offsets`, by default the end of the last expert. Rows of nobody get code 0 and the smallest scale.

    Returns:
        codes [M, N] in the format's dtype, and fp32 scales in the shape of `QuantSpec.scale_shape`.

    Raises:
        InputError: another layout than the spec's, shapes that do not belong together, or another number of rows.
    """
    spec = QuantSpec.parse(spec)
    if isinstance(te, TeBlockwise):
        if offsets is not None or rows is not None:
            raise InputError("with offsets there is one matrix per expert", why="got one", todo="leave offsets out")
        raw, scales = _from_te(te, spec)
        return spec.format.store(raw), scales
    if offsets is None or tuple(offsets.shape) != (len(te) + 1,) or not te:
        raise InputError("matrices of experts need as many offsets and one more", why=f"got {len(te)} matrices")
    parts = [_from_te(part, spec) for part in te]
    M, N = int(offsets[-1]) if rows is None else rows, parts[0][0].shape[1]
    places = _experts(offsets, M, spec)
    scales = te[0].scale_inv.new_full(spec.scale_shape((M, N), len(te)), least_scale(spec))
    raw = te[0].data.new_zeros(M, N)
    for e, ((r, s), (codes, own)) in enumerate(zip(places, parts, strict=True)):
        if codes.shape != (want := (r.stop - r.start, N)):
            raise InputError(f"the matrix of expert {e} is not {want}", why=f"it is {tuple(codes.shape)}")
        raw[r], scales[s] = codes, own
    return spec.format.store(raw), scales


def _from_te(te: TeBlockwise, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    spec, columnwise = _orientation(spec, te.columnwise)
    if te.square != (spec.axis is None) or te.data.dtype != torch.uint8 or te.data.dim() != 2:
        got = f"{te.data.dtype} {tuple(te.data.shape)}, blocks {'128x128' if te.square else 'of one row or column'}"
        raise InputError(f"not TransformerEngine's layout of {spec}", why=f"got {got}")
    raw = te.data.T.contiguous() if columnwise else te.data.clone()
    R, C = spec.scale_shape(raw.shape)
    R, C = (C, R) if _transposes_scales(spec, columnwise) else (R, C)
    want = (R, C + -C % 4)
    if te.scale_inv.dtype != torch.float32 or tuple(te.scale_inv.shape) != want:
        raise InputError(
            f"scale_inv does not belong to {spec} data of {tuple(raw.shape)}",
            why=f"got {te.scale_inv.dtype} {tuple(te.scale_inv.shape)}, want torch.float32 {want}",
            todo="give the layout for products; compact scales (all_gather_usage) are moefx's own layout",
        )
    s = te.scale_inv[:, :C]
    s = s.T if _transposes_scales(spec, columnwise) else s
    return raw, _zeros_as(raw, s, spec).contiguous()


def _orientation(spec: QuantSpec | str, columnwise: bool | None) -> tuple[QuantSpec, bool]:
    spec = QuantSpec.parse(spec)
    if spec.block not in _COLUMNWISE or spec.elem not in ("e4m3", "e5m2") or spec.scale not in ("po2", "f32"):
        raise InputError(
            f"TransformerEngine has no block-wise layout of {spec}",
            todo="use e4m3 or e5m2, blocks 1x128, 128x1 or 128x128, scales po2 or f32",
        )
    own = _COLUMNWISE[spec.block]
    if own is not None and columnwise not in (None, own):
        raise InputError(f"blocks of {spec} are {'columnwise' if own else 'rowwise'}", why=f"columnwise={columnwise}")
    return spec, bool(columnwise) if own is None else own


def _transposes_scales(spec: QuantSpec, columnwise: bool) -> bool:
    return spec.axis == -1 or (spec.axis is None and columnwise)


def _zeros_as(raw: Tensor, scales: Tensor, spec: QuantSpec) -> Tensor:
    """`scales` with those that `spec` gives to zeros where all codes are zero; a scale that is not finite stays."""
    used = Blocks.of(spec, raw.shape, None).amax(raw & 0x7F) > 0
    of_zeros = scales_from_amax(scales.new_zeros(()), spec)
    return torch.where(used | ~scales.isfinite(), scales, of_zeros)


def _experts(offsets: Tensor, M: int, spec: QuantSpec) -> list[tuple[slice, slice]]:
    """Rows of each expert, and the rows of its scales."""
    bounds = offsets.tolist()
    if bounds != sorted(bounds) or bounds[0] < 0 or bounds[-1] > M:
        raise InputError("offsets do not decrease and end within the rows", why=f"{bounds} for {M} rows")
    found, first = [], 0
    for start, end in pairwise(bounds):
        blocks = -(-(end - start) // 128)
        found.append((slice(start, end), slice(start, end) if spec.br == 1 else slice(first, first + blocks)))
        first += blocks
    return found


def to_te_tensor(
    spec: QuantSpec | str,
    row: TeBlockwise | None = None,
    column: TeBlockwise | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> Any:
    """A `transformer_engine.pytorch.Float8BlockwiseQTensor` that holds the tensors of one or both orientations.

    Args:
        spec: of either; the quantizer of the result takes element, scale and eps from it.
        row, column: made by `to_te_blockwise`, of the same matrix.
        dtype: which the result shows and dequantizes to.

    Raises:
        MissingPackageError: TransformerEngine is not installed.
        InputError: no orientation, one in the place of the other, or of different matrices.
    """
    spec, _ = _orientation(spec, None)
    given = [part for part in (row, column) if part is not None]
    shapes = [tuple(reversed(part.data.shape)) if part.columnwise else tuple(part.data.shape) for part in given]
    layouts = [(part.columnwise, part.square) for part in given]
    if layouts != [(c, spec.axis is None) for c, part in ((False, row), (True, column)) if part is not None] or (
        len(set(shapes)) != 1
    ):
        raise InputError("give the rowwise, the columnwise or both layouts of one matrix", why=f"{layouts} of {shapes}")
    purpose = "for its tensors"
    module = optional("transformer_engine.pytorch.tensor.float8_blockwise_tensor", purpose, "te")
    dtypes = optional("transformer_engine_torch", purpose, "te").DType
    quantizer = module.Float8BlockQuantizer(
        dtypes.kFloat8E4M3 if spec.elem == "e4m3" else dtypes.kFloat8E5M2,
        rowwise=row is not None,
        columnwise=column is not None,
        amax_epsilon=spec.eps,
        force_pow_2_scales=spec.is_po2,
        block_scaling_dim=2 if spec.axis is None else 1,
    )
    # The arguments of the tensor's own constructor differ between versions; those of make_empty do not.
    tensor = quantizer.make_empty(shapes[0], dtype=dtype, device=given[0].data.device)
    for side, part in (("rowwise", row), ("columnwise", column)):
        if part is not None:
            setattr(tensor, f"_{side}_data", part.data)
            setattr(tensor, f"_{side}_scale_inv", part.scale_inv)
    return tensor
