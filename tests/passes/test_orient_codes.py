"""Codes by columns and copies of weights: the same numbers, the same casts, and no copy where none is wanted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moefx
from moefx.kernels.layout import lies_by_columns
from tests import reference as ref

Tensor = torch.Tensor
ops, aten = torch.ops.moefx, torch.ops.aten
CASTS = ("before", "after", "weights_before", "weights_after", "fused", "transposes", "stored")


def optimized(recipe: str, without: str = "") -> moefx.OptimizedModule:
    model = ref.tiny(hidden_size=128, moe_intermediate_size=128)
    return ref.optimize(model, recipe=recipe, passes=ref.as_on_gpu(recipe, without))


def step(opt: moefx.OptimizedModule) -> tuple[Tensor, dict[str, Tensor]]:
    opt.zero_grad(set_to_none=True)
    loss = opt(**ref.batch()).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in opt.named_parameters() if p.grad is not None}


def clones(opt: moefx.OptimizedModule, half: str) -> list[Any]:
    graph = opt.graphs[half].graph if half in opt.graphs else None
    found = [] if graph is None else graph.find_nodes(op="call_function", target=aten.clone.default)
    return [n for n in found if n.args[0].meta["val"].element_size() == 1]


@pytest.fixture(scope="module", params=["fp8_flow", "mxfp8"])
def pair(request: pytest.FixtureRequest) -> tuple[str, moefx.OptimizedModule, moefx.OptimizedModule]:
    return request.param, optimized(request.param), optimized(request.param, "orient_codes")


def test_same_step(pair: Any) -> None:
    _, oriented, plain = pair
    (loss, grads), (want, want_grads) = step(oriented), step(plain)
    assert torch.equal(loss, want)
    assert grads.keys() == want_grads.keys()
    for name, g in grads.items():
        torch.testing.assert_close(g, want_grads[name], rtol=1e-5, atol=1e-7, msg=name)


def test_casts_are_the_same(pair: Any) -> None:
    _, oriented, plain = pair
    assert [oriented.report.casts[k] for k in CASTS] == [plain.report.casts[k] for k in CASTS]
    assert oriented.report.casts["before"] > oriented.report.casts["after"]


def test_copies_of_weights_are_made_with_their_codes(pair: Any) -> None:
    """Square blocks serve both orientations: two weights are copied. MX casts a weight for each."""
    recipe, oriented, plain = pair
    wanted = 2 if recipe == "fp8_flow" else 0
    assert len(clones(oriented, "weights")) == wanted
    assert not clones(oriented, "forward")
    assert not clones(oriented, "backward")
    assert not clones(plain, "weights")
    made = {n.name for n in clones(oriented, "weights")}
    assert made <= {n.name for n in oriented.graphs["backward"].graph.find_nodes(op="placeholder")}
    for n in clones(oriented, "weights"):
        assert n.meta["val"].is_contiguous()


def test_microbatches_share_copies(pair: Any) -> None:
    recipe, oriented, _ = pair
    made = []

    class Copies(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is aten.clone.default and args[0].dim() == 3 and args[0].element_size() == 1:
                made.append(args[0])
            return func(*args, **(kwargs or {}))

    with oriented.microbatches(), Copies():
        step(oriented)
        first = len(made)
        step(oriented)
    assert first >= (2 if recipe == "fp8_flow" else 0)
    assert len(made) == first


def test_values_of_the_graph_lie_as_it_says(pair: Any) -> None:
    """Casts in blocks of columns really write by columns what the graph says they do."""
    _, oriented, _ = pair
    seen = []

    class Strides(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is ops.scaled_grouped_wgrad.default:
                seen.extend((lies_by_columns(args[0]), lies_by_columns(args[2]), args[8]))
            return func(*args, **(kwargs or {}))

    with Strides():
        step(oriented)
    assert seen == [True, True, 16] * 2


def test_unaligned_plans_are_left_alone() -> None:
    opt = optimized("fp8_flow", "align_plans")
    (row,) = [p for p in opt.report.passes if p.name == "orient_codes"]
    assert any("multiples of 1, not of 16" in r["why"] for r in row.rejected)
    assert all(
        n.args[-1] != 16 for n in opt.graphs["backward"].graph.nodes if n.target is ops.scaled_grouped_wgrad.default
    )


def test_nothing_happens_on_a_cpu() -> None:
    opt = ref.optimize(ref.tiny(hidden_size=128, moe_intermediate_size=128), recipe="fp8_flow")
    (row,) = [p for p in opt.report.passes if p.name == "orient_codes"]
    assert row.matched == 0
    assert not row.rejected
