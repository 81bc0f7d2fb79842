"""Symmetric products against float64, and against their own transposes bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moefx import compat
from moefx.kernels import registry
from moefx.kernels import symmetric as ops
from moefx.kernels.gpu import symmetric as kernels
from moefx.optim.polar import polar

from .interpreter import assert_same_bits

Tensor = torch.Tensor
BF16, F16 = torch.bfloat16, torch.float16


def matrices(B: int, m: int, n: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(B, m, n, generator=torch.Generator().manual_seed(m + n)).to(dtype)


def assert_product(got: Tensor, x: Tensor, y: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> None:
    """alpha x x^T + beta y within sums of n terms in fp32 and one rounding; its transpose is the same in bits."""
    wide = x.double()
    want, size = alpha * wide @ wide.mT, abs(alpha) * wide.abs() @ wide.abs().mT
    if y is not None:
        want, size = want + beta * y.double(), size + abs(beta) * y.double().abs()
    bound = size * (x.shape[-1] + 4) * 2**-24 + want.abs() * torch.finfo(got.dtype).eps / 2 * 1.01
    wrong = ~((got.double() - want).abs() <= bound)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}, first at {wrong.nonzero()[0].tolist()}"
    assert_same_bits(got, got.mT)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(("B", "m", "n"), [(2, 128, 64), (1, 300, 70), (3, 5, 130), (1, 129, 1)])
def test_gram(B: int, m: int, n: int, dtype: torch.dtype) -> None:
    x = matrices(B, m, n, dtype)
    assert_product(kernels.gram(x), x)
    assert_same_bits(kernels.gram(x.mT.contiguous().mT), kernels.gram(x))


def test_strides_empty_batches_and_no_columns() -> None:
    x = matrices(2, 40, 48)
    strided = x.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, ::2, ::2]
    assert_same_bits(kernels.gram(strided), kernels.gram(x))
    assert_same_bits(kernels.gram(x.expand(2, 2, 40, 48)[0][:, :, :0]), torch.zeros(2, 40, 40, dtype=BF16))
    assert kernels.gram(x[:0]).shape == (0, 40, 40)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("B", "m"), [(2, 40), (1, 130)])
def test_quadratic(B: int, m: int) -> None:
    a = kernels.gram(matrices(B, m, 64)) / 16
    assert_product(kernels.quadratic(a, -2.9, 0.55), a, a, 0.55, -2.9)
    assert_product(kernels.quadratic(a.mT, 0.3, 1.0), a, a, 1.0, 0.3)


def test_the_comparison_sees_blocks_that_are_not_mirrored(monkeypatch: pytest.MonkeyPatch) -> None:
    x = matrices(1, 200, 32)
    whole = kernels.gram(x)
    with pytest.raises(AssertionError, match="of 40000"):
        assert_product(whole.tril(), x)
    one_off = whole.clone()
    one_off[0, 3, 150] = torch.nextafter(one_off[0, 3, 150], torch.tensor(1e4, dtype=BF16))
    with pytest.raises(AssertionError):
        assert_product(one_off, x)


def test_the_polar_factor_by_these_products(monkeypatch: pytest.MonkeyPatch) -> None:
    x = matrices(1, 272, 288).float()
    used = list[str]()

    def provider(name: str, run: Any) -> registry.Provider:
        return registry.Provider("kernel", lambda *args: used.append(name) or run(*args), ops._supports)

    for name, run in (("gram", kernels.gram), ("quadratic", kernels.quadratic)):
        entry = registry._TABLE[name]
        monkeypatch.setattr(entry, "providers", [provider(name, run), *entry.providers])
    with torch.no_grad():
        got = polar(x, 1, compute_dtype=BF16)
    assert used == ["gram", "quadratic"]
    with registry.preferring("reference"):
        want = polar(x, 1, compute_dtype=BF16)
    assert (got - want).norm() < 1e-2 * want.norm()


def test_chosen_on_cuda() -> None:
    with compat.FakeTensorMode():

        def name(m: int, n: int, dtype: torch.dtype = BF16, device: str = "cuda", grad: bool = False) -> str:
            x = torch.empty(2, m, n, dtype=dtype, device=device, requires_grad=grad)
            assert registry.choose("quadratic", x, 1.0, 1.0).name == registry.choose("gram", x).name
            return registry.choose("gram", x).name

        assert name(256, 16) == name(2048, 768, F16) == "triton"
        assert name(240, 256) == name(256, 24) == name(264, 256) == name(256, 256, torch.float32) == "reference"
        assert name(256, 256, device="cpu") == name(256, 256, grad=True) == "reference"
        with torch.no_grad():
            assert name(256, 256, grad=True) == "triton"
