"""`transpose_scaled` in the interpreter against its reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from moefx.kernels import registry
from moefx.kernels.gpu import transpose_scaled as kernel
from moefx.kernels.transpose_scaled import shift_codes
from moefx.precision.convert import transpose_scaled

from .casts import COLUMN, MX, MX_COLUMN, ROW, ROWS, check, coded, offsets, same

PAIRS = [(ROW, COLUMN), (COLUMN, ROW), (f"{ROW} eps=1e-10", f"{COLUMN} eps=1e-10"), (MX, MX_COLUMN)]


@triton.jit
def _moved(words, k, out, wrong, ROUND: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    w, by = tl.load(words + at), tl.load(k + at)
    moved, bad = kernel._move(w, by)
    if ROUND:
        moved = kernel._round(w, moved, bad, by)
    tl.store(out + at, moved)
    tl.store(wrong + at, bad)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("rule", ["tight", "tile_max"])
@pytest.mark.parametrize(("spec", "to_spec"), PAIRS)
def test_same_as_the_reference(
    spec: str, to_spec: str, rule: str, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = offsets() if grouped else None
    q = coded(spec, (ROWS, 128), groups, spread=30.0)
    want = transpose_scaled(*q, spec, to_spec, offsets=groups, rule=rule)
    check(monkeypatch, lambda: kernel.transpose_scaled(*q, groups, spec, to_spec, rule), want)


@pytest.mark.parametrize("rule", ["tight", "tile_max"])
@pytest.mark.parametrize("shape", [(0, 128), (1, 256), (150, 144), (2, 140, 128)])
def test_shapes(shape: tuple[int, ...], rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q = coded(ROW, shape, spread=3.0)
    want = transpose_scaled(*q, ROW, COLUMN, rule=rule)
    check(monkeypatch, lambda: kernel.transpose_scaled(*q, None, ROW, COLUMN, rule), want)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_codes_that_begin_anywhere_in_memory(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales = coded(ROW, (150, 256), spread=30.0)
    memory = torch.zeros(offset + codes.numel(), dtype=torch.uint8)
    shifted = memory[offset:].view(codes.dtype).view(codes.shape).copy_(codes)
    assert shifted.is_contiguous()
    assert shifted.storage_offset() == offset
    want = transpose_scaled(codes, scales, ROW, COLUMN, rule="tile_max")
    check(monkeypatch, lambda: kernel.transpose_scaled(shifted, scales, None, ROW, COLUMN, "tile_max"), want)


@pytest.mark.parametrize("to_spec", [COLUMN, f"{COLUMN} zero=one", f"{COLUMN} eps=0.5"])
def test_scales_at_the_ends_of_their_range(to_spec: str) -> None:
    codes = coded(ROW, (128, 256))[0]
    codes.view(torch.uint8)[:, 128:] &= 0x80  # only zeros
    field = torch.tensor([0, 1, 2, 120, 126, 253, 254, 255]).repeat(16)[:, None].expand(128, 2)
    scales = (field.to(torch.int32) << 23).view(torch.float32)
    got = kernel.transpose_scaled(codes, scales, None, ROW, to_spec, "tile_max")
    same(got, transpose_scaled(codes, scales, ROW, to_spec, rule="tile_max"))


def _all_codes(ROUND: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every code moved by every k, beside three other codes; what is expected; which words are wrong."""
    k = torch.tensor([*range(21), 126, 254], dtype=torch.int32).repeat_interleave(256)
    codes = torch.arange(256, dtype=torch.uint8).repeat(23)
    lanes = torch.stack([codes, codes.flip(0), codes.roll(77), codes.roll(1000)], 1)
    size = triton.next_power_of_2(len(k))
    words, by = torch.zeros(size, dtype=torch.int32), torch.zeros(size, dtype=torch.int32)
    words[: len(k)], by[: len(k)] = lanes.view(torch.int32)[:, 0], k
    out, wrong = torch.empty_like(words), torch.empty_like(words)
    _moved[(1,)](words, by, out, wrong, ROUND=ROUND, N=size)
    got = out[: len(k), None].view(torch.uint8)
    return got, shift_codes(lanes, k[:, None]), wrong[: len(k), None].view(torch.uint8) != 0


def test_words_of_every_code_by_every_shift() -> None:
    got, want, _ = _all_codes(ROUND=True)
    assert torch.equal(got, want)


def test_subtraction_alone_is_right_where_it_says_so() -> None:
    got, want, wrong = _all_codes(ROUND=False)
    assert torch.equal(got[~wrong], want[~wrong])
    assert (got != want).any()  # without rounding, the rest would be seen


def test_who_computes_it() -> None:
    with FakeTensorMode():
        codes = torch.empty(256, 256, dtype=torch.float8_e4m3fn, device="cuda")
        for rule in ("tight", "tile_max"):
            assert registry.choose("transpose_scaled", codes, codes, None, ROW, COLUMN, rule).name == "triton"
        whole = ("e4m3 row po2/rceil", "e4m3 column po2/rceil")
        assert registry.choose("transpose_scaled", codes, codes, None, *whole).name == "reference"
