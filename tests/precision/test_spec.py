"""Specs as text, their contradictions, and the sizes they predict."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moefx.errors import RecipeError
from moefx.precision import QuantSpec, dequantize, exactness, quantize

from . import oracles

TEXTS = (
    "e4m3 1x128 po2/rceil",
    "e4m3 128x128 po2/rceil",
    "e4m3 128x1 po2/floor",
    "e5m2 1x128 po2/even",
    "e2m1 1x32 e8m0/rceil",
    "e2m1 1x32 e8m0/ceil sr",
    "e4m3 row f32/exact",
    "e4m3 column f32/exact zero=one",
    "e5m2 tensor f32/exact delayed",
    "e4m3 tensor po2/rceil sr delayed",
    "e2m1 1x16 e4m3+f32/exact",
    "e4m3 1x128 po2/rceil eps=1e-10",
    "e4m3fnuz 1x128 po2/rceil eps=0.0001 sr",
    "e3m2 16x16 e8m0/rceil",
)


@pytest.mark.parametrize("text", TEXTS)
def test_reads_back_as_itself(text: str) -> None:
    spec = QuantSpec.parse(text)
    assert str(spec) == text
    assert QuantSpec.parse(str(spec)) == spec
    assert QuantSpec.parse(spec) is spec
    assert hash(spec) == hash(QuantSpec.parse(text))


@given(eps=st.floats(min_value=2.0**-126, max_value=1e30), sr=st.booleans())
def test_any_eps_reads_back(eps: float, sr: bool) -> None:
    spec = QuantSpec("e4m3", "1x128", "po2", "rceil", eps=eps, stochastic=sr)
    assert QuantSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("fields", "where", "why"),
    [
        ({"elem": None}, "elem=None", "NoneType, not text"),
        ({"elem": ["e4m3"]}, "elem=['e4m3']", "list, not text"),
        ({"block": 128}, "block=128", "int, not text"),
        ({"scale": None}, "scale=None", "NoneType, not text"),
        ({"rule": 1}, "rule=1", "int, not text"),
        ({"zero": None}, "zero=None", "NoneType, not text"),
        ({"eps": "1e-3"}, "eps='1e-3'", "str, not a number"),
        ({"eps": None}, "eps=None", "NoneType, not a number"),
        ({"eps": True}, "eps=True", "bool, not a number"),
        ({"stochastic": "no"}, "stochastic='no'", "str, not True or False"),
        ({"delayed": 1}, "delayed=1", "int, not True or False"),
    ],
)
def test_fields_of_other_types_are_named(fields: dict[str, Any], where: str, why: str) -> None:
    good: dict[str, Any] = {"elem": "e4m3", "block": "1x128", "scale": "po2", "rule": "rceil"}
    with pytest.raises(RecipeError) as e:
        QuantSpec(**{**good, **fields})
    assert e.value.where == where
    assert why in (e.value.why or "")
    assert "QuantSpec('e4m3', '1x128', 'po2', 'rceil'" in (e.value.todo or "")
    assert QuantSpec(**good, eps=1) == QuantSpec.parse(f"{QuantSpec(**good)} eps=1")  # the control


def test_spaces_and_defaults_do_not_matter() -> None:
    want = QuantSpec.parse("e4m3 1x128 po2/rceil")
    assert QuantSpec.parse("  e4m3   1x128 po2/rceil zero=min") == want
    assert QuantSpec.parse("e4m3 1x128 po2/rceil eps=0") == want
    assert QuantSpec.parse("e4m3 1x128 po2/rceil eps=1e-10 sr") == QuantSpec.parse("e4m3 1x128 po2/rceil sr eps=1e-10")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "text of"),
        ("e4m3 1x128", "must begin with"),
        ("e4m3 1x128 po2", "must begin with"),
        ("e4m4 1x128 po2/rceil", "did you mean 'e4m3'"),
        ("e8m0 1x128 po2/rceil", "element of .*\n.*a format of scales"),
        ("e4m3 1x po2/rceil", "block of"),
        ("e4m3 0x128 po2/rceil", "block of"),
        ("e4m3 1x1 po2/rceil", "block of"),
        ("e4m3 rows f32/exact", "did you mean 'row'"),
        ("e4m3 1x128 pow2/rceil", "unknown scale 'pow2'.*\n.*did you mean 'po2'"),
        ("e4m3 1x128 po2/rcel", "unknown rule 'rcel'.*\n.*did you mean 'rceil'"),
        ("e4m3 1x128 po2/exact", "rule of .*\n.*power of two"),
        ("e4m3 1x32 e8m0/exact", "rule of .*\n.*power of two"),
        ("e4m3 1x128 f32/rceil", "rule of .*\n.*po2/rceil"),
        ("e2m1 1x16 e4m3+f32/rceil", "rule of"),
        ("e2m1 row e4m3+f32/exact", "block of .*\n.*fixed size"),
        ("e2m1 1x16 e4m3+f32/exact zero=one", "zero of"),
        ("e4m3 1x128 po2/rceil sr sr", "twice"),
        ("e4m3 1x128 po2/rceil eps=1 eps=2", "twice"),
        ("e4m3 1x128 po2/rceil srr", "unknown option 'srr'.*\n.*did you mean 'sr'"),
        ("e4m3 1x128 po2/rceil sr=1", "unknown option"),
        ("e4m3 1x128 po2/rceil zero=two", "unknown option 'zero=two'.*\n.*zero=one"),
        ("e4m3 1x128 po2/rceil eps=big", "eps of .*\n.*not a number"),
        ("e4m3 1x128 po2/rceil eps=-1", "eps of"),
        ("e4m3 1x128 po2/rceil eps=nan", "eps of"),
        ("e4m3 1x128 po2/rceil eps=1e-40", "eps of"),
        ("e4m3 1x128 po2/rceil eps=1e-10 zero=one", "zero of"),
        ("e4m3 1x128 po2/rceil delayed", "delayed of .*\n.*tensor"),
    ],
)
def test_a_contradiction_is_refused_by_name(text: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        QuantSpec.parse(text)


def test_fields_are_checked_like_text() -> None:
    with pytest.raises(RecipeError, match="rule of"):
        QuantSpec("e4m3", "1x128", "po2", "exact")
    with pytest.raises(RecipeError, match="zero of"):
        QuantSpec("e4m3", "1x128", "po2", "rceil", zero="two")


def test_parts() -> None:
    def parts(text: str) -> tuple[object, ...]:
        s = QuantSpec.parse(text)
        return s.br, s.bc, s.axis, s.is_po2, s.two_level, s.scale_dtype

    assert parts("e4m3 1x128 po2/rceil") == (1, 128, -1, True, False, torch.float32)
    assert parts("e4m3 128x1 po2/rceil") == (128, 1, -2, True, False, torch.float32)
    assert parts("e4m3 128x128 po2/rceil") == (128, 128, None, True, False, torch.float32)
    assert parts("e2m1 1x32 e8m0/rceil") == (1, 32, -1, True, False, torch.float8_e8m0fnu)
    assert parts("e4m3 row f32/exact") == (1, None, -1, False, False, torch.float32)
    assert parts("e4m3 column f32/exact") == (None, 1, -2, False, False, torch.float32)
    assert parts("e4m3 tensor f32/exact") == (None, None, None, False, False, torch.float32)
    assert parts("e2m1 1x16 e4m3+f32/exact") == (1, 16, -1, False, True, torch.float8_e4m3fn)


def test_transposed() -> None:
    pairs = (("1x128", "128x1"), ("128x128", "128x128"), ("row", "column"), ("tensor", "tensor"), ("1x32", "32x1"))
    for a, b in pairs:
        x, y = (QuantSpec("e4m3", block, "po2", "rceil", eps=1e-10) for block in (a, b))
        assert x.transposed() == y
        assert y.transposed() == x
    assert QuantSpec.parse("e2m1 1x16 e4m3+f32/exact").transposed().br == 16


def test_same_values() -> None:
    a = QuantSpec.parse("e4m3 1x128 po2/rceil")
    assert a.same_values(QuantSpec.parse("e4m3 1x128 po2/rceil zero=one"))
    for other in (
        "e4m3 1x128 po2/floor",
        "e4m3 1x128 e8m0/rceil",
        "e4m3 1x64 po2/rceil",
        "e4m3 1x128 po2/rceil eps=1e-10",
    ):
        assert not a.same_values(QuantSpec.parse(other))
    sr = QuantSpec.parse("e4m3 1x128 po2/rceil sr")
    assert not sr.same_values(sr)


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shape", "groups", "scales", "nbytes"),
    [
        ("e4m3 1x128 po2/rceil", (4096, 7168), None, (4096, 56), 4096 * 7168 + 4 * 4096 * 56),
        ("e4m3 128x128 po2/rceil", (4, 2048, 512), None, (4, 16, 4), 4 * 2048 * 512 + 4 * 4 * 16 * 4),
        ("e4m3 128x1 po2/rceil", (4096, 512), None, (32, 512), 4096 * 512 + 4 * 32 * 512),
        ("e4m3 128x1 po2/rceil", (4096, 512), 8, (40, 512), 4096 * 512 + 4 * 40 * 512),
        ("e4m3 128x128 po2/rceil", (1000, 300), 3, (10, 3), 300000 + 4 * 30),
        ("e4m3 1x128 po2/rceil", (1000, 300), 3, (1000, 3), 300000 + 4 * 3000),
        ("e2m1 1x32 e8m0/rceil", (4096, 7168), None, (4096, 224), 4096 * 3584 + 4096 * 224),
        ("e2m1 1x32 e8m0/rceil", (3, 33), None, (3, 2), 3 * 17 + 6),
        ("e2m1 1x16 e4m3+f32/exact", (128, 64), None, (128, 4), 128 * 32 + 128 * 4 + 4),
        ("e2m1 1x16 e4m3+f32/exact", (5, 128, 64), None, (5, 128, 4), 5 * (128 * 32 + 128 * 4 + 4)),
        ("e4m3 row f32/exact", (128, 64), None, (128, 1), 128 * 64 + 512),
        ("e4m3 column f32/exact", (128, 64), None, (1, 64), 128 * 64 + 256),
        ("e4m3 column f32/exact", (128, 64), 8, (8, 64), 128 * 64 + 4 * 512),
        ("e5m2 tensor f32/exact", (7, 128, 64), None, (7, 1, 1), 7 * 128 * 64 + 28),
        ("e5m2 tensor f32/exact", (128, 64), 8, (8, 1), 128 * 64 + 32),
        ("e4m3 1x128 po2/rceil", (0, 64), None, (0, 1), 0),
        ("e4m3 128x1 po2/rceil", (0, 64), 4, (4, 64), 1024),
        ("e3m2 1x32 e8m0/rceil", (10, 64), None, (10, 2), 640 + 20),
    ],
)
def test_sizes_by_hand(
    text: str, shape: tuple[int, ...], groups: int | None, scales: tuple[int, ...], nbytes: int
) -> None:
    spec = QuantSpec.parse(text)
    assert spec.scale_shape(shape, groups) == scales
    assert spec.nbytes(shape, groups) == nbytes
    if nbytes < 10**6:
        offsets = None if groups is None else torch.zeros(groups + 1, dtype=torch.int32)
        codes, s = quantize(torch.zeros(shape), spec, offsets=offsets)
        parts = [codes, s] if isinstance(s, torch.Tensor) else [codes, *s]
        assert sum(t.numel() * t.element_size() for t in parts) == nbytes


def test_bits_per_element() -> None:
    """8.25 for FP8 in blocks of 128 and MXFP8, 4.25 for MXFP4, 4.5 for NVFP4."""
    shape = (4096, 4096)
    for text, bits in (("e4m3 1x128 po2/rceil", 8.25), ("e4m3 1x32 e8m0/rceil", 8.25), ("e2m1 1x32 e8m0/rceil", 4.25)):
        assert QuantSpec.parse(text).nbytes(shape) * 8 == bits * 4096 * 4096
    assert QuantSpec.parse("e2m1 1x16 e4m3+f32/exact").nbytes(shape) * 8 == 4.5 * 4096 * 4096 + 32


def test_shapes_without_blocks_are_refused() -> None:
    spec = QuantSpec.parse("e4m3 1x128 po2/rceil")
    for shape, groups in (((5,), None), ((2, 3, 4), 2)):
        with pytest.raises(RecipeError, match="no blocks of"):
            spec.scale_shape(shape, groups)


# -- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "kind", "rule"),
    [
        ("e4m3 1x128 po2/rceil", "e4m3 1x128 po2/rceil", "bit", "R10"),
        ("e4m3 128x128 po2/rceil", "e4m3 128x128 po2/rceil", "bit", "R10"),
        ("e4m3 128x128 f32/exact", "e4m3 128x128 f32/exact", "bit", "R10"),
        ("e4m3 128x128 po2/rceil eps=1e-10", "e4m3 128x128 po2/floor", "bit", "R10"),
        ("e5m2 tensor f32/exact delayed", "e5m2 tensor f32/exact", "bit", "R10"),
        ("e4m3 1x128 po2/rceil sr", "e4m3 128x1 po2/rceil", "bounded", "R11/R12"),
        ("e5m2 column po2/rceil", "e5m2 row po2/rceil", "bounded", "R11/R12"),
        ("e4m3 1x128 po2/rceil", "e4m3 1x32 e8m0/rceil", "value", "R14"),
        ("e4m3 128x1 po2/rceil", "e4m3 32x1 e8m0/rceil", "value", "R14"),
        ("e4m3 row po2/rceil", "e4m3 1x128 po2/rceil", "value", "R14"),
        ("e4m3 1x32 e8m0/rceil", "e4m3 1x128 po2/rceil", "bounded", "R15"),
        ("e4m3 1x32 e8m0/rceil", "e4m3 1x32 po2/rceil", "bounded", "R15"),
        ("e4m3 1x128 po2/rceil", "e4m3 row po2/rceil", "bounded", "R15"),
        ("e2m1 1x32 e8m0/rceil", "e4m3 1x128 po2/rceil", "bounded", "R16"),
        ("e2m1 1x32 e8m0/rceil", "e4m3 128x1 po2/rceil", "bounded", "R16"),
        ("e4m3 1x128 po2/rceil", "e2m1 1x32 e8m0/floor", "bounded", "R17"),
    ],
)
def test_what_a_conversion_costs(a: str, b: str, kind: str, rule: str) -> None:
    found = exactness(a, b)
    assert (found.kind, found.rule) == (kind, rule)
    assert found.reason


def test_quantizing_again_is_only_stable_with_floor() -> None:
    for rule in ("rceil", "floor", "ceil", "even"):
        spec = QuantSpec.parse(f"e4m3 1x8 po2/{rule}")
        assert exactness(spec, spec).requantized == (rule == "floor")
        codes, scales = quantize(oracles.spread_rows(2000, 16, 12), spec)
        again = quantize(dequantize(codes, scales, spec), spec)
        assert isinstance(scales, torch.Tensor)
        assert isinstance(again[1], torch.Tensor)
        same = oracles.same_bits(again[0], codes) and oracles.same_bits(again[1], scales)
        assert same or rule != "floor"
        assert not same or rule not in ("rceil", "ceil")


def test_the_span_without_loss() -> None:
    mxfp4 = "e2m1 1x32 e8m0/rceil"
    assert "span 14 binades" in exactness(mxfp4, "e4m3 1x128 po2/rceil").reason
    assert "span 28 binades" in exactness(mxfp4, "e5m2 1x128 po2/rceil").reason


REFUSED = (
    ("e4m3 1x128 f32/exact", "e4m3 128x1 f32/exact", "R13"),
    ("e4m3 row f32/exact", "e4m3 column f32/exact", "R13"),
    ("e4m3 1x128 f32/exact", "e2m1 1x32 e8m0/rceil", "no powers of two"),
    ("e2m1 1x16 e4m3+f32/exact", "e4m3 1x128 po2/rceil", "no powers of two"),
    ("e4m3 1x128 po2/rceil", "e4m3 128x1 f32/exact", "no powers of two"),
    ("e4m3 128x128 po2/rceil", "e4m3 1x128 po2/rceil", "no rule"),
    ("e4m3 1x128 po2/rceil", "e5m2 1x128 po2/rceil", "no rule"),
    ("e4m3 1x128 po2/rceil", "e4m3 1x96 po2/rceil", "sizes must divide"),
    ("e4m3 1x128 po2/rceil", "e4m3 64x1 po2/rceil", "axes agree"),
    ("e2m1 1x32 e8m0/rceil", "e2m1 32x1 e8m0/rceil", "R16"),
    ("e4m3 1x128 po2/rceil", "e2m1 32x1 e8m0/rceil", "no rule"),
)


@pytest.mark.parametrize(("a", "b", "why"), REFUSED)
def test_refusals_say_what_is_missing(a: str, b: str, why: str) -> None:
    found = exactness(a, b)
    assert found.kind == "refused"
    assert why in found.reason


def test_what_is_no_text_is_no_spec() -> None:
    for spec in (None, 3, ["e4m3"]):
        with pytest.raises(RecipeError, match=f"it is {type(spec).__name__}, not a line of text"):
            quantize(torch.ones(2, 2), spec)  # type: ignore[arg-type]
