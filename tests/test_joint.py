"""Backward variants: outputs that get no gradient cost nothing, and any outputs may be differentiated."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from moefx.graph.edit import find
from moefx.program import Program
from moefx.tangents import prune_tangents

from . import reference as ref

Tensor = torch.Tensor
aten = torch.ops.aten


class Compiled:
    """A model, its optimized form and the program of the one signature that these tests call."""

    def __init__(self, model: Any, inputs: Any) -> None:
        self.model, self.inputs = model, inputs
        self.opt = ref.optimize(model, inputs)
        self.program: Program = ref.programs(self.opt)[0]

    @property
    def names(self) -> dict[int, str]:
        """Placeholder name of the tangent of each differentiable output."""
        return {key: name for name, key, _ in self.program.tangents}

    def pruned(self, *present: int) -> fx.Graph:
        """The backward when only these outputs have a tangent."""
        assert self.program.bw_graph is not None
        absent = frozenset(n for key, n in self.names.items() if key not in present)
        return prune_tangents(self.program.bw_graph, absent).graph


LOSS, AUX, LOGITS, ROUTER = range(4)  # flat positions in a Qwen3-MoE's output


@pytest.fixture(scope="module")
def lm() -> Compiled:
    return Compiled(ref.tiny(), ref.batch())


def wide(graph: fx.Graph, *ops: Callable[..., Any]) -> list[fx.Node]:
    """Nodes of these ops whose result holds a value for every token and word of the vocabulary."""
    return [n for n in find(graph, *ops) if n.meta["val"].numel() == ref.TOKENS * ref.VOCAB]


def squares(*names: str) -> Callable[[Any], Tensor]:
    """A differentiable function of the named outputs; router logits are a tuple."""

    def of(out: Any) -> Tensor:
        total = torch.zeros(())
        for name in names:
            value = out[name]
            total = total + sum(t.square().sum() for t in (value if isinstance(value, tuple) else (value,)))
        return total

    return of


# --- which backward runs


def test_the_loss_alone_runs_a_backward_without_the_other_tangents(lm: Compiled) -> None:
    before = lm.program.backward_variants
    got = ref.step(lm.opt, lm.inputs)
    assert [LOSS] in lm.program.backward_variants
    assert all(v in ([LOSS], *before) for v in lm.program.backward_variants)
    ref.assert_same(got, ref.step(lm.model, lm.inputs))


def test_backwards_are_built_when_first_needed_and_kept() -> None:
    c = Compiled(ref.Two(), (ref.hidden(),))
    assert c.program.backward_variants == []
    for _ in range(3):
        ref.step(c.opt, c.inputs, lambda out: out[0])
    assert c.program.backward_variants == [[0]]
    for _ in range(2):
        ref.step(c.opt, c.inputs, lambda out: out[1])
        ref.step(c.opt, c.inputs, lambda out: out[0] + out[1])
    assert c.program.backward_variants == [[0], [1], [0, 1]]
    assert len(c.opt.report.signatures) == 1


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["logits"], [LOGITS]),
        (["loss", "logits"], [LOSS, LOGITS]),
        (["router_logits"], [ROUTER]),
        (["aux_loss"], [AUX]),
        (["aux_loss", "router_logits", "logits"], [AUX, LOGITS, ROUTER]),
        (["loss", "aux_loss", "logits", "router_logits"], [LOSS, AUX, LOGITS, ROUTER]),
    ],
)
def test_any_outputs_can_be_differentiated(lm: Compiled, names: list[str], expected: list[int]) -> None:
    of = squares(*names)
    ref.assert_same(ref.step(lm.opt, lm.inputs, of), ref.step(lm.model, lm.inputs, of))
    assert expected in lm.program.backward_variants


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    weights=st.lists(st.sampled_from([0.0, 0.5, -2.0]), min_size=4, max_size=4).filter(any),
    B=st.integers(1, 4),
    S=st.integers(3, 9),
)
def test_random_shapes_and_outputs(dynamic_lm: Compiled, weights: list[float], B: int, S: int) -> None:
    def of(out: Any) -> Tensor:
        outs = (out.loss, out.aux_loss, out.logits.square().mean(), out.router_logits[0].square().mean())
        return torch.stack([w * o for w, o in zip(weights, outs, strict=True) if w]).sum()

    inputs = ref.batch(B, S, seed=B * 100 + S)
    ref.assert_same(ref.step(dynamic_lm.opt, inputs, of), ref.step(dynamic_lm.model, inputs, of))


@pytest.fixture(scope="module")
def dynamic_lm(lm: Compiled) -> Compiled:
    model = ref.tiny()
    c = Compiled.__new__(Compiled)
    c.model, c.inputs, c.opt = model, lm.inputs, ref.optimize(model, lm.inputs, dynamic=ref.DYNAMIC)
    return c


def test_a_parameter_that_no_differentiated_output_reaches_has_no_gradient(lm: Compiled) -> None:
    got = ref.step(lm.opt, lm.inputs, squares("router_logits"))
    assert got.grads["lm_head.weight"] is None
    assert got.grads["model.layers.0.mlp.gate.weight"] is not None


def test_tangents_of_any_layout_and_of_a_sum_over_an_expanded_view(lm: Compiled) -> None:
    def of(out: Any) -> Tensor:
        return out.logits.transpose(0, 1).contiguous().sum() + out.logits.expand(3, *out.logits.shape).sum()

    ref.assert_same(ref.step(lm.opt, lm.inputs, of), ref.step(lm.model, lm.inputs, of), value=1e-4)


# --- what the pruned graphs hold


def test_the_pruned_graph_has_no_work_for_the_vocabulary_but_the_loss(lm: Compiled) -> None:
    full, pruned = lm.pruned(LOSS, AUX, LOGITS, ROUTER), lm.pruned(LOSS)
    assert len(wide(full, aten.add.Tensor)) == 1  # the sum of what the loss and a tangent of the logits say
    assert not wide(pruned, aten.add.Tensor, aten.full.default, aten.zeros.default, aten.zeros_like.default)
    assert len(pruned.nodes) < len(full.nodes)
    names = {n.name for n in pruned.find_nodes(op="placeholder")}
    assert lm.names[LOSS] in names
    assert not names & {lm.names[k] for k in (AUX, LOGITS, ROUTER)}
    pruned.lint()


def test_router_logits_alone_need_no_vocabulary_and_no_experts(lm: Compiled) -> None:
    full, pruned = lm.pruned(LOSS, AUX, LOGITS, ROUTER), lm.pruned(ROUTER)
    assert len(find(pruned, aten.mm.default)) == len(find(full, aten.mm.default)) - 2  # dgrad and wgrad of the head
    assert find(full, torch.ops.moefx.grouped_mm, torch.ops.moefx.grouped_wgrad)
    assert not find(pruned, torch.ops.moefx.grouped_mm, torch.ops.moefx.grouped_wgrad)


def test_a_head_whose_output_is_not_differentiated_costs_no_gemm() -> None:
    c = Compiled(ref.Two(), (ref.hidden(),))
    mm = {present: len(find(c.pruned(*present), aten.mm.default)) for present in [(0, 1), (0,), (1,)]}
    # The second output goes through a head of its own, with one wgrad and one dgrad; the first does not.
    assert mm[0, 1] - mm[0,] == 2
    assert mm[1,] == mm[0, 1]


def test_pruning_leaves_the_graph_it_was_given_alone(lm: Compiled) -> None:
    assert lm.program.bw_graph is not None
    before = str(lm.program.bw_graph.graph)
    lm.pruned(ROUTER)
    assert str(lm.program.bw_graph.graph) == before


def test_pruning_nothing_keeps_every_node(lm: Compiled) -> None:
    assert lm.program.bw_graph is not None
    assert len(lm.pruned(LOSS, AUX, LOGITS, ROUTER).nodes) == len(lm.program.bw_graph.graph.nodes)


def test_an_absent_tangent_that_meets_a_present_one_reads_as_zeros() -> None:
    """Concatenated gradients: half of the concatenation is absent and cannot be left out."""
    c = Compiled(ref.Halves(), (ref.hidden(),))
    for of in (
        lambda out: out[0].square().sum(),
        lambda out: out[1].square().sum(),
        lambda out: (out[0] * out[1]).sum(),
    ):
        ref.assert_same(ref.step(c.opt, c.inputs, of), ref.step(c.model, c.inputs, of))
    assert sorted(c.program.backward_variants) == [[0], [0, 1], [1]]


def test_an_absent_tangent_meets_a_present_one_under_symbolic_sizes() -> None:
    model = ref.Halves()
    opt = ref.optimize(model, {"x": ref.hidden()}, dynamic={"x": (0, 1)})
    for B, S in ((2, 8), (3, 5)):
        x = {"x": torch.randn(B, S, ref.HIDDEN, generator=torch.Generator().manual_seed(B))}
        for of in (lambda out: out[0].square().sum(), lambda out: out[1].square().sum()):
            ref.assert_same(ref.step(opt, x, of), ref.step(model, x, of))
    assert len(ref.programs(opt)) == 1


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("dynamic", [None, {"x": (0, 1)}])
def test_gradients_that_meet_in_two_layouts(codegen: str, dynamic: Any) -> None:
    """What is left of a sum keeps the layout of the sum: views behind it were traced for that one."""
    model = ref.SequenceMajor()
    opt = ref.optimize(model, {"x": ref.hidden()}, dynamic=dynamic, codegen=codegen, verify=codegen == "eager")
    for of in (lambda out: out[0], lambda out: out[1].square().sum(), lambda out: out[0] + out[1].sum()):
        ref.assert_same(ref.step(opt, {"x": ref.hidden(2)}, of), ref.step(model, {"x": ref.hidden(2)}, of))
    if dynamic:
        x = {"x": torch.randn(3, 5, ref.HIDDEN, generator=torch.Generator().manual_seed(3))}
        ref.assert_same(ref.step(opt, x, lambda out: out[0]), ref.step(model, x, lambda out: out[0]))


# --- what runs


class Wide(TorchDispatchMode):
    """Names of the ops that made a tensor of zeros for every token and word of the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.zeros: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() == ref.TOKENS * ref.VOCAB and not out.any():
            self.zeros.append(str(func))
        return out


def test_no_zeros_are_made_in_the_place_of_missing_tangents(lm: Compiled) -> None:
    out = lm.opt(**lm.inputs)
    with Wide() as ran:
        out.loss.backward()
    assert ran.zeros == []
    out = lm.opt(**lm.inputs)
    with Wide() as ran:  # the control: this is what a runtime does that fills tangents in
        torch.autograd.backward([out.loss, out.logits], [torch.ones(()), torch.zeros_like(out.logits)])
    assert ran.zeros
    lm.opt.zero_grad()


class Alive(TorchDispatchMode):
    """Before every op, how many of the given storages still exist."""

    def __init__(self, refs: list[StorageWeakRef]) -> None:
        super().__init__()
        self.refs, self.counts = refs, list[tuple[str, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts.append((func.__name__, sum(not r.expired() for r in self.refs)))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_garbage() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage")
@pytest.mark.parametrize("retain", [False, True])
def test_saved_activations_die_at_their_last_use(lm: Compiled, retain: bool) -> None:
    """Not when the backward has ended; with a retained graph they stay."""
    loss = lm.opt(**lm.inputs).loss
    kept = (*lm.model.parameters(), *lm.model.buffers(), *lm.inputs.values())
    owned = {t.untyped_storage()._cdata for t in kept}
    refs = {r.cdata: r for r in (StorageWeakRef(t.untyped_storage()) for t in loss.grad_fn.saved_tensors)}
    refs = {k: r for k, r in refs.items() if k not in owned}
    assert len(refs) > 10
    with Alive(list(refs.values())) as seen:
        loss.backward(retain_graph=retain)
    lm.opt.zero_grad()
    assert seen.counts[0][1] == len(refs)
    last = dict(seen.counts)[
        "embedding_dense_backward.default"
    ]  # the end of the backward; autograd frees the rest later
    assert last == (len(refs) if retain else 0)
