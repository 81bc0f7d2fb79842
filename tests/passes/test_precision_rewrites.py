"""Each precision pass alone, on the graph that the passes before it leave.

`rewrite` checks after each: results, gradients, recorded values, origins, and that a second run changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import fx, nn

import moefx
from moefx import compat
from moefx.graph.casts import DEQUANTIZE, dequantize_nodes, quantize_nodes
from moefx.graph.edit import arguments, is_backward
from moefx.manager import PassManager
from moefx.passes import AlignPlans, FoldCasts, FuseCasts, LowerWires, StoreLowPrecision, TransposeScales
from moefx.precision.builtin import BUILT_IN
from moefx.precision.recipe import get_recipe
from moefx.report import Report
from tests.passes.subject import (
    ANY,
    Made,
    Subject,
    as_subject,
    captured_graph,
    count,
    nodes,
    ops,
    put,
    rewrite,
    run,
    trained,
    training_graph,
)

from .test_casts import Layer, make_inputs

Tensor = torch.Tensor
aten = torch.ops.aten
FLOW = get_recipe("fp8_flow")
WIDE_HIDDEN = FLOW.replace("wide_hidden", specs={"hidden.stored": None})


class Learned(Layer):
    """Something in front of the experts is trained, so that the backward goes through all of their products."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(256))

    def forward(self, x: Tensor, idx: Tensor, w: Tensor, g: Tensor) -> Tensor:
        """x, g [T, H], idx and w [T, k]."""
        return (self.experts(x * self.scale, idx, w) * g).sum()


@cache
def before(name: str, recipe: moefx.Recipe = FLOW, change: Callable[[Subject], None] | None = None) -> Subject:
    """The graph as the pass of this name finds it; `change` was applied in front of the activation's fusion."""
    passes = moefx.pipeline(recipe, codegen="eager").passes
    at = [p.name for p in passes].index(name)
    model = Learned()
    captured = captured_graph(model, **make_inputs(32))
    if passes[at].level == "model":
        subject = as_subject(captured)
        for p in passes[:at]:
            PassManager((p,), ANY).run("model", subject.gm, Report(), subject.fake_mode)
        return subject.copy()
    subject = trained(model, captured, [p for p in passes[:at] if p.level == "model"])
    known = ANY.union(*(p.provides for p in passes))
    for p in passes[:at]:
        if p.level == "training":
            if p.name == "fuse_casts" and change is not None:
                change(subject)
            PassManager((p,), known).run("training", subject.gm, Report(), subject.fake_mode)
    return subject.copy()


@pytest.fixture(autouse=True)
def _transformers() -> None:
    pytest.importorskip("transformers")


def read(subject: Subject, node: fx.Node) -> None:
    """Let something in the forward read `node` wide, and the first output depend on it."""
    assert not is_backward(node)
    with_sine = put(subject, node, aten.sin.default, node, users=False)
    total = put(subject, with_sine, aten.sum.default, with_sine, users=False)
    out = subject.graph.output_node().args[0][0]  # type: ignore[index]
    put(subject, out, aten.add.Tensor, out, total)


def read_activation(subject: Subject) -> None:
    """Of the activation, what a module of one's own might do with it."""
    read(subject, nodes(subject.graph, "glu")[0])


def read_as(q: fx.Node) -> tuple[str, str]:
    """Specs of a dequantize and of the quantize behind it."""
    wide: Any = q.args[0]
    (to,) = arguments(q)["specs"]
    return arguments(wide)["spec"], to


@pytest.mark.parametrize("recipe", [name for name in BUILT_IN if name != "bf16"])
def test_every_pass_keeps_its_class_under_every_recipe(recipe: str) -> None:
    opt = moefx.optimize(Learned(), make_inputs(32), recipe=recipe, codegen="eager", verify=True)
    classes = {p.name: p.numerics for p in opt.report.passes}
    # What is not written as codes of one format and powers of two is better cast from the wide tensor.
    other = recipe in ("deepseek_v3", "mxfp4_hopper", "fp8_tensorwise", "fp8_delayed", "nvfp4")
    assert classes.get("transpose_scales", "rounding") == ("changes" if other else "rounding")
    assert {classes[n] for n in ("fold_casts", "propagate_scales") if n in classes} <= {"rounding"}


def test_every_pass_keeps_its_class_where_casts_round_stochastically() -> None:
    """Turning codes rounds to nearest: a draw is left out, and those behind it are others."""
    drawn = FLOW.replace("drawn", specs={k: f"{s} sr" for k, s in FLOW.specs.items() if k.startswith("grad")})
    opt = moefx.optimize(Learned(), make_inputs(32), recipe=drawn, codegen="eager", verify=True)
    classes = {p.name: p.numerics for p in opt.report.passes}
    assert classes["transpose_scales"] == "changes"
    assert classes["fuse_casts"] == "exact"


# -- fold_casts ------------------------------------------------------------------------------------------------------


def test_a_cast_to_what_the_codes_are_already_is_no_cast() -> None:
    subject = before("fold_casts")
    done = rewrite(FoldCasts(), subject)
    assert done.row.matched == 2  # X of the up product, and of dY what its product reads by rows
    assert count(done.graph, "quantize") == count(done.before, "quantize") - 1  # that of dY still makes the columns
    left = [q for q in quantize_nodes(done.graph) if getattr(q.args[0], "target", None) in DEQUANTIZE]
    assert left
    assert all(a != b for a, b in map(read_as, left))


def test_a_wide_reader_keeps_its_dequantize() -> None:
    subject = before("fold_casts").copy()
    q = next(q for q in quantize_nodes(subject.graph) if getattr(q.args[0], "target", None) in DEQUANTIZE)
    wide: Any = q.args[0]
    read(subject, wide)
    done = rewrite(FoldCasts(), subject)
    assert q.name not in {n.name for n in done.graph.nodes}
    assert {u.target for u in find_named(done.graph, wide.name).users} == {aten.sin.default}


def test_one_tensor_is_cast_once_for_all_who_want_the_same() -> None:
    subject = before("fold_casts").copy()
    plain = rewrite(FoldCasts(), subject)
    q = next(q for q in quantize_nodes(subject.graph) if q.args[0].target is ops.glu.default)  # type: ignore[union-attr]
    parts = list(q.users)
    (wide,) = [u for u in parts[0].users if u.target in DEQUANTIZE]
    with subject.graph.inserting_before(wide):
        twin = subject.graph.node_copy(q)
        for i, part in enumerate(parts):
            again = subject.graph.node_copy(part)
            again.update_arg(0, twin)
            wide.update_arg(i, again)  # what the backward reads was cast by itself
    done = rewrite(FoldCasts(), subject)
    assert done.row.matched == plain.row.matched + 1
    assert count(done.graph, "quantize") == count(plain.graph, "quantize")


def test_nothing_to_fold_where_every_cast_reads_a_wide_tensor() -> None:
    done = rewrite(FoldCasts(), before("fold_casts", get_recipe("fp8_tensorwise")))
    assert not done.changed


# -- transpose_scales ------------------------------------------------------------------------------------------------


def test_codes_are_turned_and_the_activation_writes_both_orientations() -> None:
    done = rewrite(TransposeScales(recipe=FLOW), before("transpose_scales"))
    assert done.row.matched == 3
    assert count(done.graph, "transpose_scaled") == 2  # Xp and dY arrive as codes
    assert not [q for q in quantize_nodes(done.graph) if getattr(q.args[0], "target", None) in DEQUANTIZE]
    (q,) = [q for q in quantize_nodes(done.graph) if q.args[0].target is ops.glu.default]  # type: ignore[union-attr]
    assert [s.split()[1] for s in arguments(q)["specs"]] == ["1x128", "128x1"]


def test_a_turn_for_one_reader_leaves_the_wide_value_to_the_others() -> None:
    subject = before("transpose_scales").copy()
    wide = next(d for d in dequantize_nodes(subject.graph) if d.users and not is_backward(d.args[0]))  # type: ignore[arg-type]
    other = put(subject, wide, aten.sin.default, wide, users=False)
    total = put(subject, other, aten.sum.default, other, users=False)
    grad: Any = subject.graph.output_node().args[0][1]  # type: ignore[index]
    put(subject, grad, aten.add.Tensor, grad, total)
    done = rewrite(TransposeScales(recipe=FLOW), subject)
    assert done.row.matched == 3
    assert {u.target for u in find_named(done.graph, wide.name).users} == {aten.sin.default}


def test_scales_that_are_no_powers_of_two_are_not_turned() -> None:
    """Their second cast stays, with the reason, unless the recipe allows it; then the error is noted."""
    specs = {
        key: text and text.replace("po2/rceil", "f32/exact") if "weight" not in key else text
        for key, text in FLOW.specs.items()
    }
    subject = before("transpose_scales", exact := FLOW.replace("exact", specs=specs))
    done = rewrite(TransposeScales(recipe=exact), subject)
    assert count(done.graph, "transpose_scaled") == 0
    assert done.reasons
    assert all("power" in why for why in done.reasons)


# -- fuse_casts ------------------------------------------------------------------------------------------------------


def test_the_activation_writes_codes_itself() -> None:
    done = rewrite(FuseCasts(), before("fuse_casts"))
    assert done.row.matched == 2
    assert [count(done.graph, n) for n in ("glu", "glu_backward")] == [0, 0]
    assert [count(done.graph, n) for n in ("glu_quantize", "glu_backward_quantize")] == [1, 1]
    assert count(done.graph, "quantize") == count(done.before, "quantize") - 2


def test_an_activation_that_is_read_wide_is_not_computed_twice() -> None:
    subject = before("fuse_casts").copy()
    read_activation(subject)
    done = rewrite(FuseCasts(), subject)
    assert done.row.matched == 1
    assert count(done.graph, "glu") == 1
    assert count(done.graph, "glu_quantize") == 0
    assert done.reasons == ["sin_default reads the wide activation too"]


# -- lower_wires -----------------------------------------------------------------------------------------------------


def test_wires_of_one_process_are_taken_out() -> None:
    done = rewrite(LowerWires(), before("lower_wires"))
    assert done.row.matched == count(done.before, "dispatch") + count(done.before, "combine") == 6
    assert count(done.graph, "dispatch") == count(done.graph, "combine") == 0


def test_a_wire_stays_where_an_output_would_become_an_input() -> None:
    module = Made(lambda m, x: (ops.dispatch(x), (ops.dispatch(x * m.scale)).sum()), scale=torch.ones(4))
    done = rewrite(LowerWires(), training_graph(module, torch.arange(12.0).view(3, 4)))
    assert count(done.graph, "dispatch") == 1
    assert done.reasons == ["it is an output of the graph, and what it copies is an input or output too"]


# -- store_low_precision ---------------------------------------------------------------------------------------------


def test_gathered_codes_are_gathered_again_in_the_backward() -> None:
    """No node changes, only what the partitioner is told; `rewrite` would take that for nothing."""
    subject, p = before("store_low_precision", WIDE_HIDDEN).copy(), StoreLowPrecision(recipe=WIDE_HIDDEN)
    text, matched = str(subject.graph), []
    for _ in range(2):
        report = Report()
        PassManager((p,), ANY | p.requires).run("training", subject.gm, report, subject.fake_mode)
        matched.append(report.passes[0].matched)
    assert matched == [1, 0]
    assert str(subject.graph) == text
    (moved,) = [n for n in nodes(subject.graph, "permute_scaled") if not is_backward(n)]
    assert compat.is_recomputed(moved)
    codes: Any = moved.args[0]
    assert codes.args[0].target is ops.quantize.default
    assert not compat.is_recomputed(codes)  # the tokens' codes are what is kept


def test_pre_activations_are_kept_as_codes() -> None:
    plain = run(before("store_low_precision"))
    done = rewrite(StoreLowPrecision(recipe=FLOW), before("store_low_precision"))
    (forward,), (backward,) = nodes(done.graph, "glu_quantize"), nodes(done.graph, "glu_backward_quantize")
    assert arguments(forward)["h_specs"] == [FLOW.specs["hidden.stored"]]
    codes: Any = arguments(backward)["h"]
    assert codes.args[0] is forward
    # The activation for the weight gradient comes from the kept codes, too, and is not kept beside them.
    assert arguments(backward)["act_specs"] == ["e4m3 128x1 po2/rceil eps=1e-10"]
    assert len(arguments(forward)["specs"]) == 1
    product: Any = arguments(forward)["h"]
    assert not [u for u in product.users if is_backward(u)]
    changed = run(done.subject)
    errors = [float((changed[k] - plain[k]).norm() / plain[k].norm()) for k in plain if plain[k].is_floating_point()]
    assert 0 < max(errors) < 0.1  # gate and up are rounded to three bits
    assert torch.equal(changed["output 0"], plain["output 0"])  # and none in the forward


def test_pre_activations_stay_where_nothing_writes_their_codes() -> None:
    subject = before("store_low_precision", FLOW, read_activation)
    done = rewrite(StoreLowPrecision(recipe=FLOW), subject)
    assert count(done.graph, "glu") == 1
    assert done.reasons == ["the activation's forward was not fused with its cast, so nothing writes codes of h"]
    assert arguments(nodes(done.graph, "glu_backward_quantize")[0])["h_scales"] is None


# -- align_plans -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("align", "matched"), [(16, 1), (1, 0)])
def test_experts_start_at_multiples(align: int, matched: int) -> None:
    recipe = FLOW.replace("aligned", align=align)
    subject = before("share_plans", recipe)  # right behind `expand_experts`
    done = rewrite(AlignPlans(recipe=recipe), subject)
    assert done.row.matched == matched
    (plan,) = nodes(done.graph, "plan")
    assert arguments(plan)["align"] == align
    offsets = ops.plan(make_inputs(32)["idx"], 8, align)[3]
    assert not (offsets % align).any()


def find_named(graph: fx.Graph, name: str) -> fx.Node:
    """The node of this name."""
    return next(n for n in graph.nodes if n.name == name)
