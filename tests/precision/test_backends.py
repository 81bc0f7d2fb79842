"""Which recipe runs natively where, and what an error says where it does not."""

from __future__ import annotations

import pytest

from moefx.errors import RecipeError
from moefx.precision.backends import BACKENDS
from moefx.precision.builtin import BUILT_IN

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
