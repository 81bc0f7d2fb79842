"""Casts of weights in a graph of their own: the same numbers, made once for microbatches, and again after a change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import moefx
from moefx.dialect import scaled
from moefx.precision.recipe import get_recipe

from . import reference as ref

Tensor = torch.Tensor
ops = torch.ops.moefx


class Casts(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts quantize calls on weights (three axes)."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled.quantize.default and args[0].dim() == 3:
            self.weights += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def shared() -> moefx.OptimizedModule:
    return ref.optimize(ref.tiny(), recipe="fp8_rowwise", codegen="eager")


@pytest.fixture
def opt(shared: moefx.OptimizedModule) -> Iterator[moefx.OptimizedModule]:
    before = {n: p.detach().clone() for n, p in shared.named_parameters()}
    yield shared
    with torch.no_grad():
        for n, p in shared.named_parameters():
            p.copy_(before[n])
    shared.zero_grad(set_to_none=True)


def step(opt: moefx.OptimizedModule, seed: int) -> tuple[Tensor, int]:
    """One forward and backward: the loss, and how often weights were cast."""
    with Casts() as casts:
        loss = opt(**ref.batch(seed=seed)).loss
        loss.backward()
    return loss.detach(), casts.weights


def test_casts_of_weights_are_inputs_of_the_forward(opt: moefx.OptimizedModule) -> None:
    for half, weights in (("forward", "weights"), ("backward", "weights_backward")):
        taking, making = opt.graphs[half].graph, opt.graphs[weights].graph
        left = [n for n in taking.nodes if n.target is scaled.quantize.default]
        assert left
        assert not [n for n in left if n.args[0].meta["val"].dim() == 3]
        assert len([n for n in making.nodes if n.target is scaled.quantize.default]) == 2
        names = {n.name for n in taking.find_nodes(op="placeholder")}
        assert {n.name for n in making.output_node().args[0]} <= names


def test_memory_still_counts_codes_of_weights_that_both_halves_read() -> None:
    model = ref.tiny(hidden_size=128, moe_intermediate_size=128)
    opt = ref.optimize(model, recipe="fp8_flow", codegen="eager")
    (row,) = [r for r in opt.report.memory["layers"].values() if r["activations"]]
    codes = 4 * (256 * 128 + 128 * 128)
    assert row["weights"] == codes + codes // 128**2 * 4
    assert "weights_backward" not in opt.graphs


@pytest.mark.parametrize("within", [False, True])
def test_microbatches_share_casts_and_change_no_bit(opt: moefx.OptimizedModule, within: bool) -> None:
    want, each = [], 0
    for seed in range(3):
        loss, casts = step(opt, seed)
        want.append(loss)
        each = casts
    grads = {n: p.grad.clone() for n, p in opt.named_parameters() if p.grad is not None}
    opt.zero_grad(set_to_none=True)
    assert each > 0
    with opt.microbatches() if within else nullcontext():
        got = [step(opt, seed) for seed in range(3)]
    assert [n for _, n in got] == ([each, 0, 0] if within else [each] * 3)
    assert [float(loss) for loss, _ in got] == [float(loss) for loss in want]
    for n, p in opt.named_parameters():
        assert p.grad is None or torch.equal(p.grad, grads[n]), n


def _sgd(opt: moefx.OptimizedModule, **options: Any) -> None:
    torch.optim.SGD(opt.parameters(), lr=0.1, **options).step()


CHANGES = {
    "SGD": _sgd,
    "SGD foreach": lambda opt: _sgd(opt, foreach=True),
    "SGD fused": lambda opt: _sgd(opt, fused=True),
    "AdamW fused": lambda opt: torch.optim.AdamW(opt.parameters(), lr=0.1, fused=True).step(),
    "MuonLITE": lambda opt: moefx.optim.MuonLITE(moefx.optim.param_groups(opt, verbose=False), lr=0.1).step(),
    "load_state_dict": lambda opt: opt.load_state_dict({n: 2 * t for n, t in opt.state_dict().items()}),
    "p.data = ": lambda opt: [setattr(p, "data", 2 * p.data) for p in opt.parameters()],
    "in place": lambda opt: [p.detach().mul_(2) for p in opt.parameters()],
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_changed_parameter_is_cast_again(opt: moefx.OptimizedModule, change: str) -> None:
    with opt.microbatches():
        step(opt, 0)
        with torch.no_grad():
            CHANGES[change](opt)
        opt.zero_grad(set_to_none=True)
        loss, casts = step(opt, 1)
        assert casts > 0
        assert step(opt, 1) == (loss, 0)
    assert step(opt, 1)[0] == loss


def test_writing_through_data_is_not_seen_as_documented(opt: moefx.OptimizedModule) -> None:
    with opt.microbatches():
        step(opt, 0)
        for p in opt.parameters():
            p.data.mul_(2)
        assert step(opt, 0)[1] == 0
    assert step(opt, 0)[1] > 0


def test_scopes_nest_and_end(opt: moefx.OptimizedModule) -> None:
    with opt.microbatches():
        step(opt, 0)
        with opt.microbatches():
            assert step(opt, 0)[1] > 0
        assert step(opt, 0)[1] == 0
    assert step(opt, 0)[1] > 0


def test_evaluation_within_the_scope_follows_the_weights(opt: moefx.OptimizedModule) -> None:
    with opt.microbatches():
        step(opt, 0)
        opt.eval()
        with torch.no_grad():
            got = opt(**ref.batch(seed=0)).loss
        opt.train()
    opt.eval()
    with torch.no_grad():
        want = opt(**ref.batch(seed=0)).loss
    opt.train()
    assert torch.equal(got, want)


def test_bf16_has_no_graph_of_weights() -> None:
    plain = ref.optimize(ref.tiny(), codegen="eager")
    assert "weights" not in plain.graphs
    with plain.microbatches():
        plain(**ref.batch()).loss.backward()


def test_stochastic_casts_of_weights_stay_in_the_forward() -> None:
    noisy = get_recipe("fp8_rowwise").replace(
        "noisy", "stochastic weights", specs={"weight.fprop": "e4m3 row po2/rceil sr"}
    )
    made = ref.optimize(ref.tiny(), recipe=noisy, codegen="eager")
    left = [n for n in made.graphs["forward"].graph.nodes if n.target is scaled.quantize.default]
    assert any(s.endswith(" sr") for n in left for s in n.args[2])
