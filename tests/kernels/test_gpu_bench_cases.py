"""What `benchmarks.gpu` measures: which cases there are, and what the bytes and operations of each are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import layers, ops
from benchmarks.gpu.operands import Operands
from moefx.kernels import registry
from moefx.kernels.layout import lies_by_columns

SHAPE = (1024, 256, 256, 8, 2)  # T, H, I, E, k: few dead rows beside those that hold a token


def tensors(values: Any) -> Iterable[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for v in values:
            yield from tensors(v)


def touched(call: Any) -> tuple[int, Any]:
    """Bytes of all operands and results, and the results."""
    out = call.op(*call.args)
    pieces = {t.data_ptr(): t.numel() * t.element_size() for t in tensors([call.args, out])}
    return sum(pieces.values()), out


def test_every_kernel_has_a_row() -> None:
    triton = {op for op, e in registry._TABLE.items() if any(p.name == "triton" for p in e.providers)}
    assert triton - {name.split()[0] for name in ops.OPS} == set()


def test_no_row_is_measured_twice_and_what_decides_comes_first() -> None:
    cases = gpu.every_case()
    rows = [(name, c.provider) for c in cases for name in c.names]
    assert len(rows) == len(set(rows))
    assert rows == [(case, provider) for _, case, provider in gpu.planned()]
    first = [c for c in cases if c.rank == min(c.rank for c in cases)]
    assert {c.part for c in first} == {"ops", "layers", "step"}
    assert {c.provider for c in first if c.part == "ops"} == {"triton", "torch_grouped"}
    assert len(first) < len(cases) / 4
    for op in ("permute_grouped_mm_glu", "transpose_scaled tight", "scaled_grouped_wgrad up"):
        for kind in ("", ", balanced", ", one hot expert"):
            assert (f"{op}, FP8-Flow{kind}", "triton") in rows


def test_layers_are_the_shapes_that_peers_publish() -> None:
    assert len(layers.LAYERS) == 26
    for model in ("1.4B", "7B", "30B", "120B"):
        for variant in "abc":
            assert f"sonic-{model} {variant}" in layers.LAYERS
    assert layers.LAYERS["DSv3 full T=8192"] == (8192, 7168, 2048, 256, 8)
    assert all(k <= E for _, _, _, E, k in layers.LAYERS.values())
    ways = {name.rpartition(", ")[2] for c in layers.cases() for name in c.names}
    assert ways == {"forward", "backward", "forward inference"}


@pytest.fixture(scope="module")
def balanced() -> dict[int, Any]:
    return {align: Operands(SHAPE, "cpu", "balanced", align) for align in (1, 16)}


@pytest.mark.parametrize("name", ops.OPS)
def test_bytes_are_those_of_operands_and_results(name: str, balanced: dict[int, Any]) -> None:
    op = ops.OPS[name]
    call = op.make(balanced[op.align])
    found, _ = touched(call)
    assert 0.8 * found < call.bytes <= found


@pytest.mark.parametrize("name", ops.OPS)
def test_the_kernel_takes_the_operands(name: str, balanced: dict[int, Any]) -> None:
    op = ops.OPS[name]
    call = op.make(balanced[op.align])

    def there(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

    with FakeTensorMode():
        args = tuple(there(a) for a in call.args)
        with registry.preferring("triton"):
            assert registry.choose(name.split()[0], *args).name == "triton"


def test_products_count_the_operations_of_rows_with_a_token(balanced: dict[int, Any]) -> None:
    T, H, I, _, k = SHAPE
    for name in ("grouped_mm up", "grouped_wgrad up", "permute_grouped_mm_glu", "scaled_grouped_mm dgrad"):
        assert ops.OPS[name].make(balanced[ops.OPS[name].align]).flop == 4 * T * k * H * I
    assert balanced[16].S > balanced[16].P == balanced[1].S == T * k


def test_codes_that_are_summed_over_rows_lie_by_columns(balanced: dict[int, Any]) -> None:
    o = balanced[16]
    a, _, b, *_ = ops.OPS["scaled_grouped_wgrad up"].make(o).args
    assert lies_by_columns(a)
    assert lies_by_columns(b)
    for name in ("transpose_scaled tight", "transpose_scaled tile_max", "transpose_scaled tight without experts"):
        assert lies_by_columns(touched(ops.OPS[name].make(o))[1][0])
    for name in ("glu_quantize row+column", "glu_backward_quantize row+column", "quantize row+column"):
        _, out = touched(ops.OPS[name].make(o))
        assert any(t.element_size() == 1 and lies_by_columns(t) for t in out)


@pytest.mark.parametrize("kind", ["random", "balanced", "one hot expert"])
def test_routings(kind: str) -> None:
    T, _, _, E, k = SHAPE
    o = Operands(SHAPE, "cpu", kind)
    assert all(len(set(row)) == k for row in o.idx.tolist())
    counts = o.idx.flatten().bincount(minlength=E)
    if kind == "balanced":
        assert set(counts.tolist()) == {T * k // E}
    elif kind == "random":
        assert o.live == E
        assert len(set(counts.tolist())) > 1
    else:
        assert counts[-1] == T
        assert (counts == 0).sum() >= E // 2
        every, read = (ops.OPS["grouped_mm up"].make(Operands(SHAPE, "cpu", w)) for w in ("balanced", kind))
        assert every.bytes - read.bytes == 2 * (E - o.live) * 2 * o.I * o.H  # weights of empty experts are not read


def test_a_provider_that_does_not_take_the_operands_is_not_measured_in_anothers_name() -> None:
    class Machine:
        device = torch.device("cpu")

    with pytest.raises(NotImplementedError, match="triton does not take"):
        ops._measure(Machine(), set(), "permute", "triton", SHAPE, "balanced")
    ops.release()
