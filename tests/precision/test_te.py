"""TransformerEngine's recipes and layouts. Its classes are stood in for by ones of the same names and fields."""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass, field, make_dataclass, replace
from itertools import accumulate, pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from moefx.errors import InputError, MissingPackageError, RecipeError
from moefx.precision import QuantSpec, dequantize, quantize
from moefx.precision.builtin import FP8_BLOCKWISE, FP8_TENSORWISE, MXFP8, NVFP4
from moefx.precision.recipe import Recipe
from moefx.precision.te import TeBlockwise, from_te_blockwise, recipe_from_te, to_te_blockwise, to_te_tensor

from .oracles import same_bits, spread_rows

Tensor = torch.Tensor

# -- recipes ---------------------------------------------------------------------------------------------------------


class Format(enum.Enum):
    E2M1 = "E2M1"
    E4M3 = "E4M3"
    E5M2 = "E5M2"
    HYBRID = "HYBRID"


@dataclass(frozen=True)
class MMParams:
    use_split_accumulator: bool = True


@dataclass(frozen=True)
class QParams:
    power_2_scale: bool = False
    amax_epsilon: float = 0.0
    random_hadamard_transform: bool = False
    stochastic_rounding: bool = False
    fp4_2d_quantization: bool = False


@dataclass
class DelayedScaling:
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    reduce_amax: bool = True


@dataclass
class Float8CurrentScaling:
    use_power_2_scales: bool = False
    fp8_format: Format = Format.HYBRID
    fp8_quant_fwd_inp: QParams = QParams()
    fp8_quant_fwd_weight: QParams = QParams()
    fp8_quant_bwd_grad: QParams = QParams()
    fp8_gemm_fprop: MMParams = MMParams(False)
    fp8_gemm_dgrad: MMParams = MMParams()
    fp8_gemm_wgrad: MMParams = MMParams()
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None


@dataclass
class Float8BlockScaling:
    use_f32_scales: bool = False
    fp8_format: Format = Format.E4M3
    fp8_quant_fwd_inp: QParams = QParams(True)
    fp8_quant_fwd_weight: QParams = QParams(True)
    fp8_quant_bwd_grad: QParams = QParams(True)
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    fp8_gemm_fprop: MMParams = MMParams()
    fp8_gemm_dgrad: MMParams = MMParams()
    fp8_gemm_wgrad: MMParams = MMParams()
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None


class MXFP4QATFloat8BlockScaling(Float8BlockScaling):
    """Derived classes change what is quantized."""


@dataclass
class MXFP8BlockScaling:
    margin: int = 0
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None
    enable_2d_quantization: bool = False


@dataclass
class NVFP4BlockScaling:
    disable_rht: bool = False
    disable_stochastic_rounding: bool = False
    disable_2d_quantization: bool = False
    fp4_format: Format = Format.E2M1
    fp8_format: Format = Format.E4M3


def specs(input_: str, weight: str, grad: str) -> dict[str, str]:
    """Specs along columns, and for wgrad along rows, written out."""
    turned = {"1x128": "128x1", "1x32": "32x1"}

    def turn(text: str) -> str:
        elem, block, *rest = text.split()
        return " ".join((elem, turned.get(block, block), *rest))

    return {
        "input.fprop": input_, "input.stored": turn(input_), "input.wgrad": turn(input_),
        "weight.fprop": weight, "weight.dgrad": weight, "grad.dgrad": grad, "grad.wgrad": turn(grad),
    }  # fmt: skip


ROW, SQUARE = "e4m3 1x128 po2/rceil", "e4m3 128x128 po2/rceil"
F32 = dict.fromkeys(("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"), QParams(False))
PO2 = dict.fromkeys(F32, QParams(True))
EXPRESSED = [
    (Float8BlockScaling(), specs(ROW, SQUARE, ROW)),
    (Float8BlockScaling(fp8_format=Format.HYBRID), specs(ROW, SQUARE, "e5m2 1x128 po2/rceil")),
    (Float8BlockScaling(fp8_format=Format.E5M2), specs(*(s.replace("e4m3", "e5m2") for s in (ROW, SQUARE, ROW)))),
    (Float8BlockScaling(w_block_scaling_dim=1), specs(ROW, ROW, ROW)),
    (Float8BlockScaling(w_block_scaling_dim=1, x_block_scaling_dim=2), specs(SQUARE, ROW, ROW)),
    (Float8BlockScaling(w_block_scaling_dim=1, grad_block_scaling_dim=2), specs(ROW, ROW, SQUARE)),
    (
        Float8BlockScaling(True, **F32),
        specs("e4m3 1x128 f32/exact", "e4m3 128x128 f32/exact", "e4m3 1x128 f32/exact"),
    ),
    (
        Float8BlockScaling(fp8_quant_fwd_inp=QParams(True, 1e-10), fp8_quant_bwd_grad=QParams(True, 2.0**-100)),
        specs(f"{ROW} eps=1e-10", SQUARE, f"{ROW} eps=7.888609052210118e-31"),
    ),
    (Float8CurrentScaling(), specs(*["e4m3 tensor f32/exact"] * 2, "e5m2 tensor f32/exact")),
    (
        Float8CurrentScaling(True, Format.E4M3, **PO2),
        specs(*["e4m3 tensor po2/rceil"] * 3),
    ),
    (MXFP8BlockScaling(), specs(*["e4m3 1x32 e8m0/rceil"] * 3)),
    (
        MXFP8BlockScaling(fp8_format=Format.HYBRID, enable_2d_quantization=True),
        specs("e4m3 1x32 e8m0/rceil", "e4m3 32x32 e8m0/rceil", "e5m2 1x32 e8m0/rceil"),
    ),
]


@pytest.mark.parametrize(("te", "want"), EXPRESSED, ids=lambda v: type(v).__name__)
def test_every_operand_has_its_format_block_and_scale(te: object, want: dict[str, str]) -> None:
    assert recipe_from_te(te).specs == want


def test_accumulation_alignment_and_names() -> None:
    block, current, mx = (Recipe.from_te(c()) for c in (Float8BlockScaling, Float8CurrentScaling, MXFP8BlockScaling))
    assert block.accumulate == dict.fromkeys(("fprop", "dgrad", "wgrad"), "promote128")
    assert current.accumulate == {"fprop": "fast", "dgrad": "fp32", "wgrad": "fp32"}
    assert mx.accumulate == {}
    assert (block.align, current.align, mx.align) == (16, 16, 32)
    assert (block.name, Recipe.from_te(MXFP8BlockScaling(), "mine").name) == ("te_float8blockscaling", "mine")
    assert block.about == "as TransformerEngine's Float8BlockScaling, E4M3"


@pytest.mark.parametrize(
    ("te", "builtin"),
    [(Float8BlockScaling(), FP8_BLOCKWISE), (Float8CurrentScaling(), FP8_TENSORWISE), (MXFP8BlockScaling(), MXFP8)],
    ids=lambda v: type(v).__name__,
)
def test_the_built_in_recipes_quantize_operands_as_their_namesakes(te: object, builtin: Recipe) -> None:
    """But for an eps, which TransformerEngine has not by default."""
    for key, text in recipe_from_te(te).specs.items():
        if key != "input.stored":
            assert replace(QuantSpec.parse(builtin.specs[key]), eps=0) == QuantSpec.parse(text)


def test_delayed_scaling_keeps_its_history() -> None:
    recipe = recipe_from_te(DelayedScaling(amax_history_len=16))
    assert recipe.amax_history == 16
    assert recipe.specs["input.fprop"] == recipe.specs["input.stored"] == "e4m3 tensor f32/exact delayed"
    assert recipe.specs["grad.wgrad"] == "e5m2 tensor f32/exact delayed"
    assert recipe_from_te(DelayedScaling(amax_compute_algo="most_recent")).amax_history == 1
    assert recipe_from_te(Float8CurrentScaling()).amax_history == 0


def test_magnitudes_of_all_ranks_are_refused_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = recipe_from_te(DelayedScaling())
    assert recipe_from_te(DelayedScaling(reduce_amax=False)) == alone  # on one process they are the same
    for ranks in (1, 2):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda ranks=ranks: ranks)
        assert recipe_from_te(DelayedScaling(reduce_amax=False)) == alone
        if ranks == 1:
            assert recipe_from_te(DelayedScaling()) == alone
    with pytest.raises(RecipeError, match="there are 2 ranks") as e:
        recipe_from_te(DelayedScaling())
    assert e.value.where == "reduce_amax=True"
    assert "set it to False" in (e.value.todo or "")
    assert recipe_from_te(Float8CurrentScaling()).amax_history == 0


def test_nvfp4_without_its_transform() -> None:
    assert recipe_from_te(NVFP4BlockScaling(disable_rht=True)).specs == NVFP4.specs


def without(obj: Any, name: str) -> object:
    fields = {k: v for k, v in vars(obj).items() if k != name}
    return type(type(obj).__name__, (SimpleNamespace,), {})(**fields)


def with_field(cls: type, value: int) -> object:
    return make_dataclass(cls.__name__, [("later", int, field(default=0))], bases=(cls,))(later=value)


REFUSED = [
    (DelayedScaling(margin=3), "margin=3", "0"),
    (DelayedScaling(amax_compute_algo="mean"), "amax_compute_algo='mean'", "most_recent"),
    (DelayedScaling(reduce_amax="no"), "reduce_amax='no'", "False"),  # type: ignore[arg-type]
    (DelayedScaling(amax_history_len=1.5), "amax_history_len=1.5", "1024"),  # type: ignore[arg-type]
    (DelayedScaling(amax_history_len="x"), "amax_history_len='x'", "1024"),  # type: ignore[arg-type]
    (DelayedScaling(amax_history_len=None), "amax_history_len=None", "1024"),  # type: ignore[arg-type]
    (DelayedScaling(amax_history_len=0), "amax_history_len=0", "1024"),
    (NVFP4BlockScaling(), "disable_rht=False", "MXFP8BlockScaling"),
    (Float8BlockScaling(x_block_scaling_dim=2), "x_block_scaling_dim=2, w_block_scaling_dim=2", "all but one"),
    (Float8BlockScaling(grad_block_scaling_dim=2), "w_block_scaling_dim=2, grad_block_scaling_dim=2", "all but one"),
    (Float8BlockScaling(x_block_scaling_dim=3), "x_block_scaling_dim=3", "use 1 or 2"),
    (Float8BlockScaling(fp8_gemm_wgrad=MMParams(False)), "fp8_gemm_wgrad.use_split_accumulator=False", "True"),
    (Float8BlockScaling(fp8_quant_fwd_weight=QParams(True, -1.0)), "fp8_quant_fwd_weight.amax_epsilon=-1.0", "use 0"),
    (Float8BlockScaling(use_f32_scales=True), "use_f32_scales=True", "fp8_quant_"),
    (Float8CurrentScaling(use_power_2_scales=True), "use_power_2_scales=True", "fp8_quant_"),
    (
        Float8CurrentScaling(fp8_quant_bwd_grad=QParams(stochastic_rounding=True)),
        "fp8_quant_bwd_grad.stochastic_rounding=True",
        "False",
    ),
    (
        Float8BlockScaling(fp8_quant_fwd_inp=QParams(True, random_hadamard_transform=True)),
        "fp8_quant_fwd_inp.random_hadamard_transform=True",
        "False",
    ),
    (Float8CurrentScaling(fp8_format=["E4M3"]), "fp8_format=['E4M3']", "E4M3"),  # type: ignore[arg-type]
    (
        Float8BlockScaling(fp8_quant_fwd_inp=QParams(True, "1e-3")),  # type: ignore[arg-type]
        "fp8_quant_fwd_inp.amax_epsilon='1e-3'",
        "use 0",
    ),
    (Float8CurrentScaling(fp8_format=Format.E2M1), "fp8_format='E2M1'", "E4M3"),
    (MXFP8BlockScaling(margin=1), "margin=1", "0"),
    (MXFP8BlockScaling(fp8_dpa=True), "fp8_dpa=True", "False"),
    (MXFP8BlockScaling(fp8_mha=True), "fp8_mha=True", "False"),
    (Float8BlockScaling(backward_override="dequantized"), "backward_override='dequantized'", "None"),
    (without(Float8BlockScaling(), "w_block_scaling_dim"), "w_block_scaling_dim=None", "2.3"),
    (without(MXFP8BlockScaling(), "fp8_format"), "fp8_format=None", "2.3"),
    (with_field(Float8BlockScaling, 1), "later=1", "leave it at 0"),
    (MXFP4QATFloat8BlockScaling(), "MXFP4QATFloat8BlockScaling", "Float8BlockScaling"),
    (object(), "builtins.object", "moefx.Recipe"),
]


@pytest.mark.parametrize(("te", "where", "todo"), REFUSED, ids=[r[1] for r in REFUSED])
def test_what_cannot_be_expressed_is_refused_by_field_and_value(te: object, where: str, todo: str) -> None:
    with pytest.raises(RecipeError) as e:
        recipe_from_te(te)
    assert where in (e.value.where or "")
    assert todo in (e.value.todo or "")
    assert e.value.why


def test_fields_of_newer_and_older_versions_may_be_there_or_not() -> None:
    assert recipe_from_te(with_field(Float8BlockScaling, 0)) == recipe_from_te(Float8BlockScaling())
    old = without(Float8BlockScaling(), "backward_override")
    assert recipe_from_te(old) == recipe_from_te(Float8BlockScaling())


# -- matrices --------------------------------------------------------------------------------------------------------

SIZES = [(1, 1), (3, 5), (128, 128), (130, 257), (256, 640), (127, 516), (0, 130), (4, 0)]
LAYOUTS = [("1x128", False), ("128x1", True), ("128x128", False), ("128x128", True)]
SCALES = [("e4m3", "po2/rceil"), ("e5m2", "po2/rceil eps=0.001"), ("e4m3", "f32/exact"), ("e5m2", "po2/rceil zero=one")]


def rounded(n: int, to: int) -> int:
    return -(-n // to)


def matrix(M: int, N: int) -> Tensor:
    """Rows spread over 30 binades, with rows, columns and blocks of zeros."""
    x = spread_rows(M, N, 30) * 2.0**-20
    x[::5], x[:, 3:4] = 0, 0
    x[128:, :128] = 0
    return x


def values(te: TeBlockwise, elem: str, transpose_data: bool = True) -> Tensor:
    """What a reader of TransformerEngine's layout gets, in float64, one element at a time."""
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[elem]
    codes = te.data.view(dtype).double()
    r, c = (torch.arange(n) for n in codes.shape)
    if te.square:
        scales = te.scale_inv[r[:, None] // 128, c[None, :] // 128]
    else:
        scales = te.scale_inv[c[None, :] // 128, r[:, None]]
    x = codes * scales.double()
    return x.T if te.columnwise and transpose_data else x


def wide(codes: Tensor, scales: Tensor, spec: str) -> Tensor:
    return dequantize(codes, scales, spec).double()


@pytest.mark.parametrize(("elem", "scale"), SCALES)
@pytest.mark.parametrize(("block", "columnwise"), LAYOUTS)
@pytest.mark.parametrize(("M", "N"), SIZES)
def test_layout_values_and_round_trip(M: int, N: int, block: str, columnwise: bool, elem: str, scale: str) -> None:
    spec = f"{elem} {block} {scale}"
    codes, scales = quantize(matrix(M, N), spec)
    assert isinstance(scales, Tensor)
    te = to_te_blockwise(codes, scales, spec, columnwise=columnwise)
    rows, cols = (N, M) if columnwise else (M, N)
    assert te.data.dtype == torch.uint8
    assert te.data.shape == (rows, cols)
    R, C = (rounded(rows, 128), rounded(cols, 128)) if block == "128x128" else (rounded(cols, 128), rows)
    assert te.scale_inv.shape == (R, 4 * rounded(C, 4))
    assert te.data.is_contiguous()
    assert te.scale_inv.is_contiguous()
    assert not te.scale_inv[:, C:].any()
    if "f32" in scale:  # one product is fp32, the other float64
        torch.testing.assert_close(values(te, elem), wide(codes, scales, spec), rtol=2.0**-23, atol=0)
    else:
        assert torch.equal(values(te, elem), wide(codes, scales, spec))
    back = from_te_blockwise(te, spec)
    assert same_bits(back[0], codes)
    assert same_bits(back[1], scales)
    assert torch.equal(wide(*back, spec), wide(codes, scales, spec))


def test_values_without_the_transpose_are_others() -> None:
    """The control: a square matrix whose data stays untransposed has the right shapes and the wrong numbers."""
    spec = "e4m3 128x1 po2/rceil"
    x = spread_rows(256, 256, 4)
    codes, scales = quantize(x, spec)
    assert isinstance(scales, Tensor)
    te = to_te_blockwise(codes, scales, spec)
    assert torch.equal(values(te, "e4m3"), wide(codes, scales, spec))
    assert not torch.equal(values(te, "e4m3", transpose_data=False), wide(codes, scales, spec))
    untransposed = te._replace(data=codes.view(torch.uint8))
    assert not torch.equal(wide(*from_te_blockwise(untransposed, spec), spec), wide(codes, scales, spec))


def test_blocks_of_zeros_carry_the_convention_of_each_side() -> None:
    x = torch.ones(2, 256)
    x[0, :128] = -0.0
    for options, theirs, ours in [("", 1.0, 2.0**-126), (" zero=one", 1.0, 1.0), (" eps=0.875", 2.0**-9, 2.0**-9)]:
        spec = f"e4m3 1x128 po2/rceil{options}"
        codes, scales = quantize(x, spec)
        assert isinstance(scales, Tensor)
        te = to_te_blockwise(codes, scales, spec)
        assert te.scale_inv[0, 0] == theirs
        assert te.data[0, 0] == 0x80
        assert from_te_blockwise(te, spec)[1][0, 0] == ours


def test_scales_that_are_not_normal_numbers_pass() -> None:
    spec = "e4m3 1x128 po2/rceil"
    codes = torch.tensor([[1, 0x7E], [0x7F, 0x7F], [0, 0]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.tensor([[2.0**-127], [torch.nan], [torch.nan]])
    te = to_te_blockwise(codes, scales, spec)
    assert te.scale_inv[0, 0].view(torch.int32) == 0x00400000
    assert te.scale_inv[0].isnan().tolist() == [False, True, True, False]
    back = from_te_blockwise(te, spec)
    assert same_bits(back[1], scales)
    assert wide(*back, spec)[0].tolist() == [2.0**-136, 448 * 2.0**-127]


EXPERTS = {"edges": [0, 1, 15, 127, 128, 129, 0], "hot": [0, 0, 300], "none": [0, 0]}


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("spare", [0, 9])
@pytest.mark.parametrize("sizes", EXPERTS.values(), ids=EXPERTS)
@pytest.mark.parametrize(("block", "columnwise"), LAYOUTS)
def test_a_matrix_per_expert(block: str, columnwise: bool, sizes: list[int], spare: int, first: int) -> None:
    spec = f"e4m3 {block} po2/rceil"
    offsets = torch.tensor([first, *(first + n for n in accumulate(sizes))], dtype=torch.int32)
    x = matrix(first + sum(sizes) + spare, 257)
    codes, scales = quantize(x, spec, offsets=offsets)
    assert isinstance(scales, Tensor)
    parts = to_te_blockwise(codes, scales, spec, columnwise=columnwise, offsets=offsets)
    for part, (start, end) in zip(parts, pairwise(offsets.tolist()), strict=True):
        own, own_scales = quantize(x[start:end], spec)
        assert isinstance(own_scales, Tensor)
        one = to_te_blockwise(own, own_scales, spec, columnwise=columnwise)
        assert torch.equal(part.data, one.data)
        assert torch.equal(part.scale_inv, one.scale_inv)
    back = from_te_blockwise(parts, spec, offsets=offsets, rows=len(x))
    assert same_bits(back[0], codes)
    assert same_bits(back[1], scales)
    y = dequantize(*back, spec, offsets=offsets)
    assert torch.equal(y, dequantize(codes, scales, spec, offsets=offsets))
    assert spare or len(from_te_blockwise(parts, spec, offsets=offsets)[0]) == len(x)


def made(spec: str = ROW, M: int = 130, N: int = 200, **options: Any) -> TeBlockwise:
    codes, scales = quantize(matrix(M, N), spec)
    assert isinstance(scales, Tensor)
    return to_te_blockwise(codes, scales, spec, **options)


def test_layouts_that_do_not_belong_are_refused() -> None:
    codes, scales = quantize(matrix(130, 200), ROW)
    assert isinstance(scales, Tensor)
    te = made()
    offsets = torch.tensor([0, 30, 130], dtype=torch.int32)
    parts = to_te_blockwise(codes, scales, ROW, offsets=offsets)
    calls: list[Any] = [
        lambda: made("e4m3 1x32 po2/rceil"),
        lambda: made("e4m3 1x128 e8m0/rceil"),
        lambda: made("e2m1 1x128 po2/rceil"),
        lambda: made(ROW, columnwise=True),
        lambda: made("e4m3 128x1 po2/rceil", columnwise=False),
        lambda: to_te_blockwise(codes, scales.T, ROW),
        lambda: to_te_blockwise(codes[None], scales[None], ROW),
        lambda: to_te_blockwise(codes, scales, ROW, offsets=torch.tensor([0, 60, 30], dtype=torch.int32)),
        lambda: to_te_blockwise(codes, scales, ROW, offsets=torch.tensor([0, 131], dtype=torch.int32)),
        lambda: from_te_blockwise(te, SQUARE),
        lambda: from_te_blockwise(te, "e4m3 128x1 po2/rceil"),
        lambda: from_te_blockwise(te._replace(data=te.data.float()), ROW),
        lambda: from_te_blockwise(te._replace(scale_inv=scales), ROW),  # the compact layout
        lambda: from_te_blockwise(te._replace(scale_inv=te.scale_inv[:, :130]), ROW),
        lambda: from_te_blockwise(te._replace(scale_inv=te.scale_inv.double()), ROW),
        lambda: from_te_blockwise(te, ROW, offsets=offsets),
        lambda: from_te_blockwise(parts, ROW),
        lambda: from_te_blockwise(parts[:1], ROW, offsets=offsets),
        lambda: from_te_blockwise(parts[::-1], ROW, offsets=offsets),
        lambda: from_te_blockwise(parts, ROW, offsets=offsets, rows=100),
        lambda: from_te_blockwise([], ROW, offsets=offsets[:1]),
        lambda: to_te_tensor(ROW),
        lambda: to_te_tensor(ROW, None, te),
        lambda: to_te_tensor(ROW, te, made("e4m3 128x1 po2/rceil", 130, 72)),
        lambda: to_te_tensor(SQUARE, te),
        lambda: to_te_tensor("e4m3 1x32 e8m0/rceil", te),
    ]
    for i, call in enumerate(calls):
        with pytest.raises(InputError):
            print(i, call())


def test_its_own_tensor_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(MissingPackageError, match="moefx\\[te\\]"):
        to_te_tensor(ROW, made())


def test_its_own_tensor_holds_the_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in with the same signatures: what is passed where."""

    class Float8BlockQuantizer:
        def __init__(self, fp8_dtype: str, *, rowwise: bool, columnwise: bool, **options: object) -> None:
            self.made_with = {"fp8_dtype": fp8_dtype, "rowwise": rowwise, "columnwise": columnwise, **options}

        def make_empty(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> SimpleNamespace:
            return SimpleNamespace(quantizer=self, shape=shape, dtype=dtype, device=device, _columnwise_data=None)

    name = "transformer_engine.pytorch.tensor.float8_blockwise_tensor"
    for i in range(1, 5):
        monkeypatch.setitem(sys.modules, ".".join(name.split(".")[:i]), ModuleType("stand_in"))
    monkeypatch.setattr(sys.modules[name], "Float8BlockQuantizer", Float8BlockQuantizer, raising=False)
    extension = ModuleType("transformer_engine_torch")
    extension.DType = SimpleNamespace(kFloat8E4M3="E4M3", kFloat8E5M2="E5M2")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine_torch", extension)

    row, column = made(f"{ROW} eps=0.5"), made("e4m3 128x1 po2/rceil eps=0.5")
    both = to_te_tensor(f"{ROW} eps=0.5", row, column)
    assert both.quantizer.made_with == {
        "fp8_dtype": "E4M3", "rowwise": True, "columnwise": True, "amax_epsilon": 0.5, "force_pow_2_scales": True,
        "block_scaling_dim": 1,
    }  # fmt: skip
    assert (both.shape, both.dtype, both.device) == ((130, 200), torch.bfloat16, row.data.device)
    assert both._rowwise_data is row.data
    assert both._rowwise_scale_inv is row.scale_inv
    assert both._columnwise_data is column.data
    assert both._columnwise_scale_inv is column.scale_inv
    square = to_te_tensor("e5m2 128x128 f32/exact", made("e5m2 128x128 f32/exact"), dtype=torch.float32)
    assert square.quantizer.made_with["fp8_dtype"] == "E5M2"
    assert square.quantizer.made_with["columnwise"] is False
    assert square.quantizer.made_with["force_pow_2_scales"] is False
    assert square.quantizer.made_with["block_scaling_dim"] == 2
    assert square._columnwise_data is None
