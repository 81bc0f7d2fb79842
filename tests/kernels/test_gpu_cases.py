"""The tests on a GPU, tried without one: each case is what its op takes, meets its kernel, and has a right oracle.

Kernels run in the interpreter, on CPU tensors that pass for a GPU's, at the smallest size; whether the kernels take the
real sizes is asked with tensors that have no data.
"""

from __future__ import annotations

from itertools import count, cycle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from moefx.kernels import registry
from tests.gpu import cases as gpu
from tests.gpu import checks

SMALL = (17, 256, 128, 3, 2)
FIRST = registry._first_tensor


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DEVICE", "cpu")


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Providers of a GPU take tensors of a CPU."""

    def first(args: tuple[Any, ...]) -> Any:
        return SimpleNamespace(device=torch.device("cuda"), dtype=FIRST(args).dtype)

    monkeypatch.setattr(registry, "_first_tensor", first)


def test_every_kernel_has_a_case() -> None:
    kernels = {op for op, entry in registry._TABLE.items() if any(p.name == "triton" for p in entry.providers)}
    covered = {gpu.op_of(name) for name in gpu.OPERANDS}
    assert kernels - covered == set(), "ops with a Triton kernel and no case in tests/gpu/cases.py"
    assert covered - kernels == set()


def test_every_op_has_a_float64_oracle_or_moves() -> None:
    covered = {gpu.op_of(name) for name in gpu.OPERANDS}
    assert covered - set(checks.EXPECTED) == set(checks.MOVED)
    assert set(gpu.EXACT) > set(checks.MOVED)


@pytest.mark.parametrize("name", sorted(gpu.OPERANDS))
def test_kernels_take_the_real_sizes(name: str) -> None:
    with FakeTensorMode(), registry.preferring("triton"):
        for kind in gpu.ROUTINGS:
            for size, operands in gpu.cases(name, kind):
                args = pytree.tree_map(on_cuda, operands())
                assert registry.choose(gpu.op_of(name), *args).name == "triton", (kind, size)


def on_cuda(v: Any) -> Any:
    if not isinstance(v, torch.Tensor):
        return v
    return torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda")


@pytest.mark.parametrize("kind", gpu.ROUTINGS)
@pytest.mark.parametrize("name", sorted(gpu.OPERANDS))
def test_operands(name: str, kind: str) -> None:
    args, op = gpu.OPERANDS[name](kind, *SMALL), gpu.op_of(name)
    out = getattr(checks.ops, op)(*args) if hasattr(checks.ops, op) else registry.dispatch(op, *args)
    for t in [out] if isinstance(out, torch.Tensor) else out:
        assert t.device.type == "cpu"


# Interpreting all under every routing takes two minutes: each under one routing in turn, the others at night.
NAMES = sorted(gpu.OPERANDS)
RUNS = count(1)
IN_TURN = list(zip(NAMES, cycle(gpu.ROUTINGS), strict=False))
OTHERS = [(name, kind) for name in NAMES for kind in gpu.ROUTINGS if (name, kind) not in IN_TURN]


@pytest.mark.parametrize(
    ("name", "kind"), [*IN_TURN, *(pytest.param(*case, marks=pytest.mark.nightly) for case in OTHERS)]
)
@pytest.mark.usefixtures("as_on_gpu")
def test_kernels_and_oracles_agree(name: str, kind: str) -> None:
    args = gpu.OPERANDS[name](kind, *SMALL)
    out = checks.compare(name, args, "triton", twice=False)  # an interpreter repeats itself
    if gpu.op_of(name) in checks.EXPECTED:
        checks.compare_float64(name, args, out)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("permute", lambda t: t.view(torch.int16)[0, 0].add_(1), "1 differ"),
        ("glu", lambda t: t.mul_(1.01), "glu  by triton"),
        ("glu", lambda t: t[3, 7].fill_(torch.nan), "not written"),
        ("glu", lambda t: t[0, 0].fill_(next(RUNS)), "two runs differ"),
        ("dequantize", lambda t: t.mul_(1.01), "differ"),
    ],
)
@pytest.mark.usefixtures("as_on_gpu")
def test_a_wrong_kernel_is_caught(name: str, spoil: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args, right = gpu.OPERANDS[name]("balanced", *SMALL), checks.run

    def spoiled(name: str, args: tuple[Any, ...], provider: str) -> list[torch.Tensor]:
        # The reference in place of the kernel, which is not what this is about.
        out = right(name, args, "reference")
        if provider == "triton":
            spoil(out[0])
        return out

    checks.compare(name, args, "reference")
    monkeypatch.setattr(checks, "run", spoiled)
    with pytest.raises(AssertionError, match=message):
        checks.compare(name, args, "triton")


def test_a_wrong_result_is_caught_by_float64() -> None:
    """A mistake that kernel and reference share, which no comparison of the two shows."""
    for name in ("glu", "quantize", "scaled_grouped_mm"):
        args = gpu.OPERANDS[name]("balanced", *SMALL)
        out = checks.run(name, args, "reference")
        checks.compare_float64(name, args, out)
        out[-1] = out[-1] * 1.1
        with pytest.raises(AssertionError, match="not below"):
            checks.compare_float64(name, args, out)


def test_the_adversarial_routing_has_a_hot_expert_empty_ones_and_dropped_pairs() -> None:
    idx = gpu.routing("adversarial", 70, 16, 4)
    counts = idx.flatten().bincount(minlength=17)
    assert counts[15] >= 70 - 10
    assert (counts[4:15] == 0).all()
    assert counts[16] == 10
