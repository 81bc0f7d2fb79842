"""What a kernel's outputs are held to: the reference of its op, another run, and float64.

tests/kernels/test_gpu_cases.py runs all of it in the Triton interpreter, so that no GPU time goes into mending tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moefx.kernels import registry

from .cases import EXACT, op_of

Tensor = torch.Tensor
ops = torch.ops.moefx
ON_GPU = ("triton", "torch_grouped")  # providers of a GPU; each is held to the reference, not only the first in line


def providers(name: str) -> list[str]:
    return [p for p in registry.names(op_of(name)) if p in ON_GPU]


def run(name: str, args: tuple[Any, ...], provider: str) -> list[Tensor]:
    """The outputs of one call by that provider, which must take it."""
    op = op_of(name)
    with registry.preferring(provider):
        assert registry.choose(op, *args).name == provider, f"{name}: {provider} does not take these operands"
        # What is no dialect op, as Muon's products, is called through the registry alone.
        out = getattr(ops, op)(*args) if hasattr(ops, op) else registry.dispatch(op, *args)
    return [out] if isinstance(out, Tensor) else list(out)


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over that of `want`."""
    a, b = got.double(), want.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def compare(name: str, args: tuple[Any, ...], provider: str, what: str = "", twice: bool = True) -> list[Tensor]:
    """Two runs give the same bits, and what the reference gives: the same bits of movement and casts, near otherwise.

    Returns the outputs, for `compare_float64`.
    """
    what = f"{name} {what} by {provider}"
    got, want = run(name, args, provider), run(name, args, "reference")
    if name == "scaled_grouped_mm_quantize":
        # A sum in another order may fall on the other side of a scale's boundary, which moves a block of codes: those
        # must be the codes of the kernel's own product.
        with registry.preferring("reference"):
            cast = list(ops.quantize(got[0], args[4], args[8], 1))
        for g, w in zip(got[1:], cast, strict=True):
            assert torch.equal(bits(g), bits(w)), f"{what}: {int((bits(g) != bits(w)).sum())} are not of the product"
        want[1:] = cast
    for g, a, w in zip(got, run(name, args, provider) if twice else got, want, strict=True):
        assert torch.equal(bits(g), bits(a)), f"{what}: two runs differ"
        assert (g.shape, g.dtype) == (w.shape, w.dtype), what
        if op_of(name) in EXACT or not g.is_floating_point():
            assert torch.equal(bits(g), bits(w)), f"{what}: {int((bits(g) != bits(w)).sum())} differ"
        elif g.element_size() == 1:
            # A code may fall on the other side of a rounding boundary where exp differs in its last bit.
            steps = (bits(g).short() - bits(w).short()).abs()
            assert int((steps > 1).sum()) <= steps.numel() * 1e-5, what
            assert int((steps > 0).sum()) <= steps.numel() * 1e-2, what
        else:
            assert g.isfinite().all(), f"{what}: an element was not written"
            assert error(g, w) < 5e-3, f"{what}: {error(g, w)}"
    return got


def compare_float64(name: str, args: tuple[Any, ...], out: list[Tensor], what: str = "") -> None:
    """Outputs of a kernel, decoded where they are codes, against the same mathematics in float64."""
    with registry.preferring("reference"):
        got = DECODED.get(op_of(name), lambda args, out: out)(args, out)
        want = EXPECTED[op_of(name)](args)
    assert any(w is not None for w in want)
    limit = BOUND.get(name, WIDE_BOUND)
    for g, w in zip(got, want, strict=True):
        if w is not None:
            assert w.dtype == torch.float64
            assert g.shape == w.shape, f"{name} {what}"
            assert error(g, w) < limit, f"{name} {what}: {error(g, w)}, not below {limit}"


WIDE_BOUND = 4e-3  # one rounding to bf16 is 2^-9 at most, 1.1e-3 in the mean
# Codes: an E4M3 number is off by 2^-4 at most and 2.6e-2 in the mean, an E2M1 number by a quarter and 0.1.
BOUND = {
    "quantize": 4e-2, "transpose_scaled": 4e-2, "transpose_scaled tile_max": 4e-2, "glu_quantize": 4e-2,
    "glu_backward_quantize": 4e-2, "scaled_grouped_mm_quantize": 4e-2, "convert": 0.2, "convert wider": 4e-2,
}  # fmt: skip


def _wide(args: Sequence[Any]) -> list[Any]:
    """Floating-point operands in float64."""
    narrow = (torch.bfloat16, torch.float16, torch.float32)
    return [a.double() if isinstance(a, Tensor) and a.dtype in narrow else a for a in args]


def _numbers(codes: Tensor, scales: Tensor, offsets: Tensor | None, spec: str) -> Tensor:
    numbers: Tensor = ops.dequantize(codes, scales, offsets, spec, torch.float64)
    return numbers


def _pairs(out: Sequence[Tensor], offsets: Tensor | None, specs: Sequence[str]) -> list[Tensor]:
    """The numbers of codes and scales that alternate."""
    return [_numbers(*out[2 * i : 2 * i + 2], offsets, spec) for i, spec in enumerate(specs)]


def _in_float64(name: str) -> Callable[[tuple[Any, ...]], list[Tensor | None]]:
    """The op's reference, which computes in the dtype of its operands."""

    def expected(args: tuple[Any, ...]) -> list[Tensor | None]:
        op = getattr(ops, name, None)
        out = op(*_wide(args)) if op is not None else registry.dispatch(name, *_wide(args))
        return [t if t.is_floating_point() else None for t in ([out] if isinstance(out, Tensor) else out)]

    return expected


def _scaled_mm(args: tuple[Any, ...]) -> list[Tensor | None]:
    x, xs, w, ws, offsets, x_spec, w_spec, *_ = args
    return [ops.grouped_mm(_numbers(x, xs, offsets, x_spec), _numbers(w, ws, None, w_spec), offsets)]


def _scaled_wgrad(args: tuple[Any, ...]) -> list[Tensor | None]:
    a, as_, b, bs, offsets, a_spec, b_spec, *_ = args
    return [ops.grouped_wgrad(_numbers(a, as_, offsets, a_spec), _numbers(b, bs, offsets, b_spec), offsets)]


def _live(x: Tensor, offsets: Tensor) -> Tensor:
    """Rows of nobody are zero: no scale is theirs."""
    return x.masked_fill(torch.arange(x.shape[0], device=x.device)[:, None] >= offsets[-1], 0)


def _glu_quantize(args: tuple[Any, ...]) -> list[Tensor | None]:
    h, w, offsets, kind, specs, *_ = args
    return [_live(ops.glu(h.double(), w.double(), kind), offsets)] * len(specs)


def _glu_backward_quantize(args: tuple[Any, ...]) -> list[Tensor | None]:
    da, h, _, w, offsets, kind, _, specs, *_ = args
    dh, dw = ops.glu_backward(da.double(), h.double(), w.double(), kind)
    return [dw, *[_live(dh, offsets)] * len(specs)]


EXPECTED: dict[str, Callable[[tuple[Any, ...]], list[Tensor | None]]] = {
    **{
        op: _in_float64(op)
        for op in (
            "grouped_mm", "grouped_wgrad", "permute_grouped_mm", "permute_grouped_mm_glu", "permute_grouped_wgrad",
            "gram", "quadratic", "glu", "glu_backward", "glu_backward_again", "unpermute", "unpermute_backward",
            "overlap", "overlap_backward", "topk_route", "topk_route_backward",
        )
    },
    "quantize": lambda args: [_live(args[0].double(), args[1])] * len(args[2]),
    "dequantize": lambda args: [args[0].double() * args[1].double().repeat_interleave(128, 1)],
    "transpose_scaled": lambda args: [_numbers(*args[:4])],
    "convert": lambda args: [_numbers(*args[:4])],
    "glu_quantize": _glu_quantize,
    "glu_backward_quantize": _glu_backward_quantize,
    "scaled_grouped_mm": _scaled_mm,
    "scaled_grouped_mm_quantize": lambda args: _scaled_mm(args) * 2,
    "scaled_grouped_wgrad": _scaled_wgrad,
}  # fmt: skip
# Outputs as numbers, where they are codes.
DECODED: dict[str, Callable[[tuple[Any, ...], list[Tensor]], list[Tensor]]] = {
    "quantize": lambda args, out: _pairs(out, args[1], args[2]),
    "transpose_scaled": lambda args, out: [_numbers(*out, args[2], args[4])],
    "convert": lambda args, out: [_numbers(*out, args[2], args[4])],
    "glu_quantize": lambda args, out: _pairs(out, args[2], args[4]),
    "glu_backward_quantize": lambda args, out: [out[0], *_pairs(out[1:], args[4], args[7])],
    "scaled_grouped_mm_quantize": lambda args, out: [out[0], *_pairs(out[1:], args[4], args[8])],
}
# Moved, not computed: `compare` asks for the reference's bits.
MOVED = ("plan", "permute", "permute_scaled", "gather_weights", "scatter_weights", "plan_permute")
