"""The precision passes together: what a recipe asks for, what is left of it, and what the backward keeps."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moefx
from moefx.precision.recipe import get_recipe
from tests import reference as ref
from tests.family import zoo
from tests.profile import often

Tensor = torch.Tensor
PASSES = Path(moefx.passes.__file__).parent  # type: ignore[attr-defined]
ROW, COL = "e4m3 1x128 po2/rceil eps=1e-10", "e4m3 128x1 po2/rceil eps=1e-10"


def optimized(model: nn.Module, inputs: Any, recipe: Any, **options: Any) -> moefx.OptimizedModule:
    """Compiled with eager codegen."""
    return moefx.optimize(model, inputs, recipe=recipe, codegen="eager", **options)


# -- counts on whole models ------------------------------------------------------------------------------------------

FAMILIES = {
    "qwen3_moe": {"hidden_size": 256, "moe_intermediate_size": 128, "mlp_only_layers": []},
    "deepseek_v3": {"hidden_size": 128, "moe_intermediate_size": 256, "first_k_dense_replace": 0},
}
# recipe -> casts before and after, of weights, fused into activations, turned on codes
COUNTS = {
    "bf16": (0, 0, 0, 0, 0),
    "fp8_naive": (12, 12, 2, 0, 0),
    "fp8_flow": (12, 2, 2, 2, 2),
    "fp8_blockwise": (4, 2, 2, 2, 2),
    "deepseek_v3": (12, 2, 2, 2, 2),
    "fp8_tensorwise": (4, 2, 2, 2, 0),
    "mxfp8": (12, 2, 4, 2, 2),
    "mxfp4_hopper": (12, 2, 2, 2, 3),
}


def one_layer(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of the family with one layer, and a batch."""
    entry = dataclasses.replace(zoo.get(name), moe_layers=1)
    return zoo.build(entry, num_hidden_layers=1, **FAMILIES[name]), zoo.batch(entry)


@pytest.mark.parametrize(
    ("name", "recipe"),
    often(
        [(n, r) for n in FAMILIES for r in COUNTS],
        [*(("qwen3_moe", r) for r in COUNTS), ("deepseek_v3", "fp8_flow"), ("deepseek_v3", "mxfp4_hopper")],
    ),
)
def test_casts_of_a_layer(name: str, recipe: str) -> None:
    pytest.importorskip("transformers")
    model, batch = one_layer(name)
    opt = optimized(model, batch, recipe)
    c = opt.report.to_dict()["casts"]
    assert (c["before"], c["after"], c["weights_after"], c["fused"], c["transposes"]) == COUNTS[recipe]
    if recipe == "bf16":
        return
    # Counted in the graph itself, by the names of the ops.
    nodes = [
        n for n in opt.graphs["dead_code_training" if "dead_code_training" in opt.graphs else "lower_wires"].graph.nodes
    ]
    names = [getattr(getattr(n.target, "_schema", None), "name", "") for n in nodes]
    kept = [r for r in c["rows"] if r["fate"] in ("kept", "added")]
    assert names.count("moefx::quantize") + names.count("moefx::dequantize") == len(kept)
    assert names.count("moefx::grouped_mm") == names.count("moefx::grouped_wgrad") == 0
    assert names.count("moefx::dispatch") == names.count("moefx::combine") == 0
    if COUNTS[recipe][1] == 2:
        assert "moefx::dequantize" not in names
    got = opt(**batch)
    got.loss.backward()
    want = model(**batch).loss
    model.zero_grad()
    assert abs(got.loss.item() - want.item()) < 0.02 * want.item()
    assert got.loss.item() != want.item() or recipe == "bf16"


def test_no_pass_knows_a_recipe() -> None:
    """One rule set: no file of the passes names a recipe, and none looks at a recipe's name."""
    names = [n for n in moefx.recipes if n != "bf16"]
    for path in PASSES.glob("*.py"):
        text = path.read_text()
        assert not [n for n in names if n in text], path.name
        assert not re.search(r"recipe\.name\b", text), path.name
    assert "fp8_flow" in (PASSES.parent / "moefx/precision/builtin.py").read_text()  # the control


def test_a_recipe_that_nobody_has_seen(layer: nn.Module, inputs: dict[str, Tensor]) -> None:
    """E5M2 blocks of 64 on the wire back, wide wires forward: what is redundant goes, by the same rules."""
    row, col = "e5m2 1x64 po2/ceil", "e5m2 64x1 po2/ceil"
    mine = moefx.Recipe(
        "mine",
        specs={
            "input.fprop": row, "input.stored": row, "input.wgrad": col, "weight.fprop": "e5m2 64x64 po2/ceil",
            "weight.dgrad": "e5m2 64x64 po2/ceil", "grad.dgrad": row, "grad.wgrad": col, "grad.wire": row,
        },
    )  # fmt: skip
    explicit = optimized(layer, inputs, mine.replace("mine_naive", propagate=False, fuse=False)).report.casts
    c = optimized(layer, inputs, mine).report.casts
    # X is not narrow on the wire: the casts of the forward are Xp, A, and their copies in the other orientation.
    assert explicit["before"] == explicit["after"] == 10
    assert (c["before"], c["after"], c["fused"], c["transposes"], c["stored"]) == (10, 2, 2, 2, 0)


# -- numbers ---------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Experts with routing as an input, so that nothing but them reads x: what a distilled router leaves."""

    def __init__(self, H: int = 256, I: int = 128, E: int = 8) -> None:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        super().__init__()
        config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=2)
        config._experts_implementation = "grouped_mm"
        self.config, self.experts = config, Qwen3MoeExperts(config)
        for i, p in enumerate(self.parameters()):
            nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(i))

    def forward(self, x: Tensor, idx: Tensor, w: Tensor, g: Tensor) -> Tensor:
        """x, g [T, H], idx and w [T, k]."""
        return (self.experts(x * 1.5, idx, w) * g).sum()


@pytest.fixture(scope="module")
def layer() -> Layer:
    pytest.importorskip("transformers")
    return Layer()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return make_inputs(64)


def make_inputs(T: int, H: int = 256, E: int = 8, k: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Tokens whose magnitudes spread over six binades, a few of them zero; routing leaves an expert empty."""
    gen = torch.Generator().manual_seed(0)
    x, g = torch.randn(T, H, generator=gen), torch.randn(T, H, generator=gen)
    x, g = (t * torch.exp2(torch.randint(-6, 1, (T, 1), generator=gen)) for t in (x, g))
    x[::7] = 0
    score = torch.rand(T, E, generator=gen)
    score[:, 3] = 0
    w, idx = score.topk(k)
    return {"x": x.to(dtype), "idx": idx, "w": w.to(dtype), "g": g.to(dtype)}


def step(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and every gradient that there is."""
    leaves = {n: inputs[n].detach().clone().requires_grad_() for n in ("x", "w", "g")}
    loss = module(**{**inputs, **leaves})
    loss.backward()
    out = {"loss": loss.detach(), **{n: t.grad for n, t in leaves.items()}}
    out |= {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return out


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), 0))


@pytest.mark.parametrize(
    ("recipe", "least"),
    [("fp8_flow", 0.996), ("fp8_naive", 0.996), ("deepseek_v3", 0.996), ("mxfp8", 0.996), ("mxfp4_hopper", 0.97)],
)
# Rounding to E4M3 changes a tensor by 2.66 % of its norm, so that n roundings on the way leave a cosine of
# 1 - n * 0.0266^2 / 2; the longest way, through H, has eight: 0.997.
def test_gradients_point_where_wide_ones_do(layer: Layer, inputs: dict[str, Tensor], recipe: str, least: float) -> None:
    got, want = step(optimized(layer, inputs, recipe), inputs), step(layer, inputs)
    for name in want:
        if want[name].dim():
            assert least < cosine(got[name], want[name]) < 1 - 1e-7, name


def test_propagation_changes_no_value_that_power_of_two_scales_keep(layer: Layer, inputs: dict[str, Tensor]) -> None:
    """12 casts or 2: the same numbers but for what stored pre-activations round, and sums in another order."""
    wide_h = get_recipe("fp8_flow").replace("wide_h", specs={"hidden.stored": None})
    naive, flow = (step(optimized(layer, inputs, r), inputs) for r in ("fp8_naive", wide_h))
    for name in naive:
        assert ref.error(flow[name], naive[name]) < 1e-5, name
    exact = {
        k: v.replace("po2/rceil eps=1e-10", "f32/exact") for k, v in get_recipe("fp8_naive").specs.items()
    }  # the control: scales that are no powers of two round twice, and the two flows differ
    specs = {k: v for k, v in exact.items() if k != "hidden.stored"}
    a = step(optimized(layer, inputs, moefx.Recipe("a", specs=specs, propagate=False, fuse=False)), inputs)
    b = step(optimized(layer, inputs, moefx.Recipe("b", specs=specs)), inputs)
    name = "experts.down_proj"
    assert ref.error(b[name], a[name]) > 1e-3


def test_gathering_again_changes_no_bit(layer: Layer, inputs: dict[str, Tensor]) -> None:
    """Kept or made again in the backward (R24): the same codes, so the same gradients."""
    recipe = get_recipe("fp8_flow").replace("wide_h", specs={"hidden.stored": None})
    again = optimized(layer, inputs, recipe)
    passes = moefx.pipeline(recipe, codegen="eager").remove("store_low_precision")
    once = optimized(layer, inputs, recipe, passes=passes)
    assert len(kept(once, inputs)) > 0
    assert sum(t.numel() for t in kept(once, inputs)) > sum(t.numel() for t in kept(again, inputs))
    a, b = step(again, inputs), step(once, inputs)
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("recipe", ["fp8_flow", "fp8_naive", "mxfp8", "mxfp4_hopper"])
def test_a_nan_stays_with_its_token_and_experts(layer: Layer, inputs: dict[str, Tensor], recipe: str) -> None:
    x = inputs["x"].clone()
    x[5, 3] = float("nan")
    token = torch.arange(x.shape[0]) == 5
    got = step(optimized(layer, inputs, recipe), {**inputs, "x": x})
    clean = step(optimized(layer, inputs, recipe), inputs)
    assert got["g"][token].isnan().any()  # the gradient of the sum with respect to g is the experts' output
    for name in ("g", "x"):
        assert got[name][~token].isfinite().all()
    assert torch.equal(got["g"][~token], clean["g"][~token])
    hit = torch.zeros(8, dtype=torch.bool).index_fill(0, inputs["idx"][5], True)
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        assert got[name][hit].isnan().any()
        assert torch.equal(got[name][~hit], clean[name][~hit])


def frozen(*names: str) -> Layer:
    """The layer with some of its experts' weights frozen."""
    pytest.importorskip("transformers")
    layer = Layer()
    for name in names:
        getattr(layer.experts, name).requires_grad_(False)
    return layer


def needing_x(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with tokens that need a gradient."""
    return {**inputs, "x": inputs["x"].clone().requires_grad_()}


@pytest.mark.parametrize("recipe", often(["fp8_flow", "deepseek_v3", "mxfp8", "mxfp4_hopper"], ["fp8_flow"]))
def test_a_frozen_up_projection_changes_no_other_gradient(layer: Layer, inputs: dict[str, Tensor], recipe: str) -> None:
    """Then dH is cast by rows alone, while the activation that its backward writes again is cast by columns."""
    got = step(optimized(frozen("gate_up_proj"), needing_x(inputs), recipe), inputs)
    want = step(optimized(layer, needing_x(inputs), recipe), inputs)
    assert want.keys() - got.keys() == {"experts.gate_up_proj"}
    assert all(torch.equal(got[n], want[n]) for n in got)


def test_stored_columns_stay_with_their_expert_where_experts_are_frozen(inputs: dict[str, Tensor]) -> None:
    """Neither cast of the activation spans rows then, and the stored pre-activations do: a NaN stays in its expert."""
    recipe = get_recipe("fp8_flow").replace("columns", specs={"hidden.stored": COL})
    x = inputs["x"].clone()
    x[5, 3] = float("nan")
    opt = optimized(frozen("gate_up_proj", "down_proj"), needing_x(inputs), recipe)
    assert opt.report.casts["stored"] == 1
    got = step(opt, {**inputs, "x": x})["x"]
    shares = (inputs["idx"][:, :, None] == inputs["idx"][5]).any(-1).any(-1)
    assert got[5].isnan().all()
    assert not shares.all()
    assert got[~shares].isfinite().all()


@pytest.mark.parametrize("routing", ["all to one expert", "one token", "no token"])
def test_extreme_routings(layer: Layer, routing: str) -> None:
    T = {"all to one expert": 130, "one token": 1, "no token": 0}[routing]
    inputs = make_inputs(max(T, 1))
    inputs = {k: v[:T].contiguous() for k, v in inputs.items()}
    if routing == "all to one expert":
        inputs["idx"] = torch.tensor([[2, 5]]).expand(T, 2).contiguous()
    got, want = step(optimized(layer, inputs, "fp8_flow"), inputs), step(layer, inputs)
    for name in want:
        assert got[name].isfinite().all()
        if T and want[name].dim() and want[name].norm() > 0:
            assert cosine(got[name], want[name]) > 0.996, name
        elif not T:
            assert got[name].norm() == 0


def test_the_papers_rule_of_turning_is_an_option(layer: Layer, inputs: dict[str, Tensor]) -> None:
    """The largest scale of a tile instead of each column's own: as close, and four codes at a time on a CPU."""
    tight = step(optimized(layer, inputs, "fp8_flow"), inputs)
    opt = optimized(layer, inputs, get_recipe("fp8_flow").replace("paper", turn="tile_max"))
    loose, want = step(opt, inputs), step(layer, inputs)
    assert "torch_words/cpu/float8_e4m3fn" in opt.report.providers["transpose_scaled"]
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        assert not torch.equal(tight[name], loose[name])
        assert ref.error(loose[name], want[name]) < 1.01 * ref.error(tight[name], want[name])
    assert torch.equal(tight["x"], loose["x"])  # only weight gradients read turned codes


@pytest.mark.parametrize("recipe", often(["fp8_flow", "mxfp4_hopper", "fp8_delayed"], ["fp8_flow"]))
def test_symbolic_sizes(recipe: str) -> None:
    """One variant for batches of all sizes, with the numbers that a static one gives."""
    pytest.importorskip("transformers")
    model = ref.tiny(hidden_size=128, moe_intermediate_size=128)
    fresh = [optimized(model, ref.batch(B, S), recipe) for B, S in [(2, 8), (3, 5)]]
    opt = optimized(model, ref.batch(2, 8), recipe, dynamic=ref.DYNAMIC)
    for static, (B, S) in zip(fresh, [(2, 8), (3, 5)], strict=True):
        if recipe == "fp8_delayed":
            opt.load_precision_state(static.precision_state())  # nothing is remembered yet
        got, want = ref.step(opt, ref.batch(B, S)), ref.step(static, ref.batch(B, S))
        ref.assert_same(got, want)
    assert len(ref.programs(opt)) == 1
    assert (opt.report.casts["before"], opt.report.casts["after"]) == COUNTS.get(recipe, (4, 4))[:2]


def test_fp32_weights_under_autocast(layer: Layer, inputs: dict[str, Tensor]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        opt = optimized(layer, {**inputs, "x": inputs["x"].clone().requires_grad_()}, "fp8_flow")
        got, want = step(opt, inputs), step(layer, inputs)
    # The weights of rows are fp32: a conversion stands between the activation and its cast, and keeps them apart.
    assert (opt.report.casts["before"], opt.report.casts["after"]) == (12, 4)
    assert all(
        "_to_copy" in r["kept_because"]
        for r in opt.report.casts["rows"]
        if r["tensor"] in ("A", "dH") and r["fate"] == "kept"
    )
    for name in ("x", "experts.gate_up_proj", "experts.down_proj"):
        assert got[name].dtype == torch.float32
        assert 0.996 < cosine(got[name], want[name]) < 1 - 1e-6


def test_verify_runs_every_pass(layer: Layer, inputs: dict[str, Tensor]) -> None:
    opt = optimized(layer, {**inputs, "x": inputs["x"].clone().requires_grad_()}, "fp8_flow", verify=True)
    errors = {p.name: p.error for p in opt.report.passes if p.error is not None}
    assert {"quantize", "propagate_scales", "fold_casts", "transpose_scales", "fuse_casts"} <= errors.keys()
    assert errors["quantize"] > 1e-3
    assert max(errors[n] for n in ("propagate_scales", "fold_casts", "fuse_casts")) == 0.0


# -- what is kept ----------------------------------------------------------------------------------------------------


def kept(opt: moefx.OptimizedModule, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The tensors that autograd is given to keep, parameters and inputs apart."""
    found: list[Tensor] = []
    own = {t.data_ptr() for t in (*opt.parameters(), *inputs.values())}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            found.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        opt(**inputs)
    return found


@pytest.mark.parametrize(
    ("hidden", "per_element", "limit"), [(ROW, 1 + 4 / 128, 0.52), ("e2m1 1x32 e8m0/rceil", 0.5 + 1 / 32, 0.31)]
)
def test_bytes_kept_are_the_recipes_arithmetic(hidden: str, per_element: float, limit: float) -> None:
    """X in FP8 and H as the recipe stores it, to the byte, at most 0.52 and 0.31 of both in bf16."""
    pytest.importorskip("transformers")
    T, H, I, E, k = 96, 256, 256, 8, 4
    layer = Layer(H, I, E).bfloat16()
    inputs = make_inputs(T, H, E, k, torch.bfloat16)
    inputs["x"].requires_grad_()
    opt = optimized(layer, inputs, get_recipe("fp8_flow").replace("mine", specs={"hidden.stored": hidden}))
    S = T * k
    weights = {E * 2 * I * H, E * H * I}
    tensors = [t for t in kept(opt, inputs) if t.is_floating_point() or t.dtype == torch.uint8]
    rows = [t for t in tensors if t.dim() == 2 and t.shape[0] in (T, S)]
    got = sum(t.numel() * t.element_size() for t in rows)
    want = T * H * (1 + 4 / 128) + S * 2 * I * per_element
    assert got == want
    reported = opt.report.to_dict()["memory"]["layers"]["experts"]
    assert reported["activations"] == want
    assert reported["weights"] == E * 3 * H * I + 4 * E * (2 * I // 128 * (H // 128) + H // 128 * (I // 128))
    assert want <= limit * 2 * (T * H + S * 2 * I)
    # Nothing wide of S rows is kept, and of T rows only what is no activation of the experts.
    assert not [t for t in tensors if t.dim() == 2 and t.shape[0] == S and t.dtype == torch.bfloat16]
    assert {t.numel() for t in tensors if t.dim() == 3} >= weights
    bf16 = kept(optimized(layer, inputs, "bf16"), inputs)
    assert [t for t in bf16 if t.dim() == 2 and t.shape[0] == S and t.dtype == torch.bfloat16]  # the control


def test_an_activation_of_the_models_own_reads_what_the_products_epilogue_stored(inputs: dict[str, Tensor]) -> None:
    pytest.importorskip("transformers")
    layer = Layer()
    layer.experts.act_fn = nn.Softsign()
    opt = optimized(layer, {**inputs, "x": inputs["x"].clone().requires_grad_()}, "fp8_flow", verify=True)
    assert opt.report.blocks[0]["idiom"].startswith("opaque")
    text = moefx.render(opt.graphs["dead_code_training" if "dead_code_training" in opt.graphs else "lower_wires"])
    assert text.count("moefx.scaled_grouped_mm_quantize(") == 1
    c = opt.report.casts
    # The activation itself is not fused: A and dH are casts of their own, and H is widened where its gradient is made.
    assert (c["before"], c["fused"], c["stored"]) == (12, 0, 1)
    (added,) = [r for r in c["rows"] if r["fate"] == "added"]
    assert (added["tensor"], added["op"], added["direction"]) == ("H", "dequantize", "bwd")
    S = inputs["idx"].numel()
    tensors = kept(opt, {**inputs, "x": inputs["x"].clone().requires_grad_()})
    assert [t for t in tensors if tuple(t.shape) == (S, 256) and t.dtype == torch.float8_e4m3fn]
    got, want = step(opt, inputs), step(layer, inputs)
    for name in ("x", "experts.gate_up_proj", "experts.down_proj"):
        assert 0.99 < cosine(got[name], want[name]) < 1 - 1e-6, name


def test_codes_of_a_tensor_that_is_kept_wide_are_made_again() -> None:
    """A learned router's weight gradient needs X wide: its codes are not kept beside it."""
    pytest.importorskip("transformers")
    model, batch = one_layer("qwen3_moe")
    opt = optimized(model, batch, "fp8_flow")
    assert opt.report.casts["recomputed"] == 1
    saved: Any = opt.graphs["forward"].graph.output_node().args[0]
    values = [n.meta["val"] for n in saved if hasattr(n, "meta") and isinstance(n.meta.get("val"), Tensor)]
    tokens = batch["input_ids"].numel()
    narrow = [v for v in values if v.dtype == torch.float8_e4m3fn and v.dim() == 2]
    assert [tuple(v.shape) for v in narrow if v.shape[0] == tokens] == []
    assert len(narrow) == 1  # H


# -- the ledger ------------------------------------------------------------------------------------------------------


def test_the_ledger_says_what_became_of_each_cast(layer: Layer, inputs: dict[str, Tensor]) -> None:
    rows = optimized(layer, inputs, "fp8_flow").report.casts["rows"]
    assert len(rows) == 14
    assert all(r["fate"] and (r["kept_because"] or r["fate"] not in ("kept", "added")) for r in rows)
    fates = {(r["tensor"], r["op"], r["direction"]): r["fate"] for r in rows}
    assert fates["X", "quantize", "fwd"] == fates["dY", "quantize", "bwd"] == "kept"
    assert "R1" in fates["Xp", "quantize", "fwd"]
    assert "R19" in fates["A", "quantize", "fwd"]
    assert "R19" in fates["dH", "quantize", "bwd"]
    x = next(r for r in rows if r["tensor"] == "X" and r["op"] == "quantize")
    T, H = inputs["x"].shape
    assert (x["from"], x["to"], x["bytes"]) == ("float32", ROW, 4 * T * H + T * H + T * (H // 128) * 4)
    assert x["layer"] == "experts"
    dO = next(r for r in rows if r["tensor"] == "dO")
    assert dO["to"] == f"{ROW} & {COL}"


def test_rules_keep_modules_wide_and_say_when_they_match_nothing(inputs: dict[str, Tensor]) -> None:
    pytest.importorskip("transformers")
    rules = [moefx.Rule("experts"), moefx.Rule("*.nowhere", {"input.fprop": ROW}), moefx.Rule("exp*")]
    opt = optimized(Layer(), inputs, get_recipe("fp8_flow").replace("ruled", rules=rules))
    (row,) = [p for p in opt.report.passes if p.name == "quantize"]
    assert row.matched == 0
    assert row.notes == [
        "rule '*.nowhere' matched no module",
        "rule 'exp*' decides for no module: 'experts' stands in front of it",
    ]
    assert {r["why"] for r in row.rejected} == {"a rule of the recipe keeps this module wide"}
    assert opt.report.casts["before"] == 0


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    return
