"""Which recipe runs natively where, and what an error says where it does not."""

from __future__ import annotations

import pytest

from moefx.errors import RecipeError
from moefx.precision.backends import BACKENDS
from moefx.precision.builtin import BUILT_IN
from moefx.precision.recipe import Recipe, Rule

# recipe -> backends that multiply its operands, with the row alignment
NATIVE = {
    "fp8_flow": {"deepgemm_sm90": 128, "te_sm90": 16},
    "fp8_blockwise": {"deepgemm_sm90": 128, "te_sm90": 16},
    "deepseek_v3": {"deepgemm_sm90": 128, "te_sm90": 16},
    "fp8_rowwise": {"torch_sm90": 16},
    "fp8_tensorwise": {"te_sm90": 16},
    "mxfp8": {"cublas_sm100": 32},
    "mxfp4_hopper": {"deepgemm_sm90": 128, "te_sm90": 32},
    "nvfp4": {"cublas_sm100": 32},
}


@pytest.mark.parametrize("name", list(NATIVE))
def test_recipes_and_backends(name: str) -> None:
    for backend in BACKENDS:
        if backend in NATIVE[name]:
            assert BUILT_IN[name].for_backend(backend).align == NATIVE[name][backend]
            assert BUILT_IN[name].for_backend(backend).specs == BUILT_IN[name].specs
        else:
            with pytest.raises(RecipeError, match=f"{name}.*{backend}"):
                BUILT_IN[name].for_backend(backend)
    assert BUILT_IN[name].for_backend("emulation") is BUILT_IN[name]


FLOW = BUILT_IN["fp8_flow"]
MX = {"input.fprop": "e2m1 1x32 e8m0/rceil", "weight.fprop": "e2m1 32x32 e8m0/rceil"}
BY_ROW = {"weight.fprop": "e4m3 row po2/rceil", "weight.dgrad": "e4m3 row po2/rceil"}


@pytest.mark.parametrize(
    ("recipe", "texts"),
    [
        (FLOW.replace("own", specs=MX), ["input.fprop has a scale 'e8m0'"]),
        (FLOW.replace("ruled", rules=[Rule("*.1.*", MX)]), ["input.fprop has a scale 'e8m0'", "rules['*.1.*']"]),
        (FLOW.replace("own", specs=BY_ROW), ["fprop has blocks 1x128 and row", "where: input.fprop, weight.fprop"]),
        (
            FLOW.replace("down", specs={f"down.{k}": s for k, s in BY_ROW.items()}),
            ["fprop has blocks 1x128 and row", "where: input.fprop, down.weight.fprop"],
        ),
        (FLOW.replace("rows", specs={"grad.wgrad": "e4m3 128x128 po2/rceil"}), ["wgrad has blocks 128x128 and 128x1"]),
    ],
)
def test_every_module_and_product_is_checked(recipe: Recipe, texts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.for_backend("deepgemm_sm90")
    for text in texts:
        assert text in str(caught.value)
    recipe.replace("wide", rules=[Rule("*")]).for_backend("emulation")  # the control: it is a recipe


def test_operands_are_paired_within_their_product() -> None:
    """Up and down may be multiplied in different ways, each of which the backend knows; a wide module in none."""
    row, tile, whole = "e4m3 1x128 po2/rceil", "e4m3 128x128 po2/rceil", "e4m3 tensor f32/exact"
    specs = {"up.input.fprop": row, "up.weight.fprop": tile, "down.input.fprop": whole, "down.weight.fprop": whole}
    assert Recipe("both", specs=specs, rules=[Rule("*.0.*")]).for_backend("te_sm90").align == 16
    with pytest.raises(RecipeError, match="fprop has blocks tensor and tensor, which deepgemm_sm90"):
        Recipe("both", specs=specs).for_backend("deepgemm_sm90")


def test_passes_of_ones_own_stay() -> None:
    passes = tuple(n for n in FLOW.passes if n != "store_low_precision")
    own = Recipe("own", specs=FLOW.specs, passes=passes)
    assert own.for_backend("te_sm90").passes == own.replace("other", turn="tile_max").passes == passes
    assert FLOW.replace("naive", propagate=False, fuse=False).passes == BUILT_IN["fp8_naive"].passes  # the control
    assert own.replace("derived", passes=()).passes == FLOW.passes
    unaligned = own.replace("unaligned", passes=[n for n in passes if n != "align_plans"])
    with pytest.raises(RecipeError, match=r"at multiples of 16[^§]*leave out 'align_plans'"):
        unaligned.for_backend("te_sm90")


def test_alignment_becomes_a_pass() -> None:
    assert "align_plans" not in BUILT_IN["bf16"].passes
    assert "align_plans" not in BUILT_IN["fp8_tensorwise"].replace("t", align=1).passes
    assert "align_plans" in BUILT_IN["fp8_flow"].for_backend("te_sm90").passes


def test_errors_say_what_would_do() -> None:
    with pytest.raises(RecipeError) as caught:
        BUILT_IN["mxfp8"].for_backend("deepgemm_sm90")
    for text in ("has a scale 'e8m0'", "deepgemm_sm90 reads f32, po2", "emulation"):
        assert text in str(caught.value)
    with pytest.raises(RecipeError) as caught:
        BUILT_IN["fp8_flow"].for_backend("torch_sm90")
    for text in ("fprop has blocks 1x128 and 128x128", "row:row"):
        assert text in str(caught.value)
    with pytest.raises(RecipeError, match="did you mean 'te_sm90'"):
        BUILT_IN["fp8_flow"].for_backend("te_sm9")
