"""Rows in blocks of columns: the same result, never more than the bound at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moefx
from moefx.passes import BoundWorkspace, DropNoops, ExpandExperts, FoldCombine, get_pass
from moefx.precision.recipe import get_recipe
from tests import reference as ref
from tests.passes.subject import Made, Subject, count, experts, nodes, rand, rewrite, route, training_graph, weights
from tests.profile import often

Tensor = torch.Tensor
WIDTH, T, I, E = 512, 12, 16, 4
MIB = 2.0**-20
ROW = "e4m3 1x128 po2/rceil"
ops = torch.ops.moefx


def block(folded: bool = True) -> Subject:
    def run(m: torch.nn.Module, x: Tensor) -> Tensor:
        _, w, idx = route(m, x)
        return experts(m, x, idx, w)

    gen = torch.Generator().manual_seed(0)
    sizes = {"router": (E, WIDTH), "up": (E, 2 * I, WIDTH), "down": (E, WIDTH, I)}
    assert set(weights()) == set(sizes)
    made = {n: torch.randn(s, generator=gen) / s[-1] ** 0.5 for n, s in sizes.items()}
    passes = [ExpandExperts(), *([FoldCombine()] if folded else []), DropNoops()]
    return training_graph(Made(run, **made), rand(T, WIDTH).requires_grad_(), passes=passes)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return block()


def rows_of(subject: Subject) -> int:
    (up,) = {n.args[0].meta["val"].shape[0] for n in nodes(subject.graph, "unpermute")}
    return up


@pytest.mark.parametrize(("columns", "parts"), [(512, 1), (511, 2), (384, 2), (256, 2), (255, 4), (128, 4), (1, 4)])
def test_no_product_of_rows_is_above_the_bound(subject: Subject, columns: int, parts: int) -> None:
    bound = rows_of(subject) * 4 * columns
    done = rewrite(BoundWorkspace(mib=bound * MIB), subject)
    assert done.row.matched == (2 if parts > 1 else 0)  # forward and backward
    made = [n.args[0].meta["val"] for n in nodes(done.graph, "unpermute")]
    assert len(made) == 2 * parts
    assert columns < 128 or max(v.numel() * 4 for v in made) <= bound
    assert sum(v.shape[1] for v in made) == 2 * WIDTH


def test_rows_whose_weights_need_a_gradient_are_left(subject: Subject) -> None:
    done = rewrite(BoundWorkspace(mib=MIB), block(folded=False))
    assert count(done.graph, "unpermute") == 5  # the forward as it was, the backward in four
    assert any("gradient of its weights" in why for why in done.reasons)


@given(columns=st.integers(1, 600))
@settings(max_examples=10, deadline=None)
def test_any_bound_gives_the_same_results(subject: Subject, columns: int) -> None:
    rewrite(BoundWorkspace(mib=rows_of(subject) * 4 * columns * MIB), subject)  # compares outputs and gradients


@pytest.mark.parametrize(
    ("rows", "widths"), [(1, [128, 128, 128, 128]), (192, [384, 128]), (256, [256, 256]), (512, [512])]
)
def test_slices_of_quantized_weights_begin_at_a_block(rows: int, widths: list[int]) -> None:
    spec = f"e4m3 {rows}x{128 if rows == 1 else rows} po2/rceil"

    def run(m: torch.nn.Module, x: Tensor) -> Tensor:
        _, w, idx = route(m, x)
        token, order, slot, offsets = ops.plan(idx, E, 1)
        codes = ops.quantize(ops.permute(x, token, slot), offsets, [ROW])
        y = ops.scaled_grouped_mm(*codes, *ops.quantize(m.down, None, [spec]), offsets, ROW, spec, torch.float32)
        return ops.unpermute(y, token, order, slot, None) + w.sum()

    down = rand(E, WIDTH, I) * torch.logspace(0, 3, WIDTH)[:, None]  # every block has a scale of its own
    subject = training_graph(Made(run, grad=False, router=rand(E, I, seed=1), down=down), rand(T, I))
    done = rewrite(BoundWorkspace(mib=rows_of(subject) * 4 * 255 * MIB), subject)  # compares outputs
    assert [n.args[0].meta["val"].shape[1] for n in nodes(done.graph, "unpermute")] == widths
    assert (len(widths) == 1) == any("512 columns" in why for why in done.reasons)


@pytest.mark.parametrize("recipe", often(["bf16", "fp8_flow", "fp8_rowwise"], ["fp8_flow"]))
def test_in_a_pipeline(recipe: str) -> None:
    model = ref.tiny(hidden_size=256, moe_intermediate_size=128, initializer_range=0.02)
    plain = ref.optimize(model, recipe=recipe, codegen="eager")
    chain = moefx.pipeline(recipe, codegen="eager").insert(BoundWorkspace(mib=0.01), after="lower_wires")
    opt = ref.optimize(model, recipe=get_recipe(recipe), passes=chain, codegen="eager")
    (row,) = [p for p in opt.report.passes if p.name == "bound_workspace"]
    assert row.matched == 2
    value, grad = (1e-6, 1e-5) if recipe == "bf16" else (1e-3, 2e-2)
    ref.assert_same(ref.step(opt, ref.batch(), _loss), ref.step(plain, ref.batch(), _loss), value, grad)


def _loss(out: object) -> Tensor:
    found: Tensor = out.loss  # type: ignore[attr-defined]
    return found


def test_it_is_known_by_name() -> None:
    assert get_pass("bound_workspace") == BoundWorkspace()
