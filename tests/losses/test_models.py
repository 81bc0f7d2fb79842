"""Losses in real models: values, and the gradient of every parameter, against hooks and loops in eager mode."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch

import moefx
from moefx import losses as L
from moefx.losses.metrics import SCORED, SHAPES
from tests import reference as ref
from tests.family import zoo
from tests.profile import nightly

from . import hooked, loops

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
Tensor = torch.Tensor
# Heavy weights: what a loss does to the gradients must not drown in the model's own.
SP, CP, LB, Z = L.Specialization(weight=0.5), L.Coupling(weight=0.5), L.LoadBalance(weight=0.1), L.ZLoss(weight=0.01)


def build(name: str, **overrides: Any) -> torch.nn.Module:
    overrides.setdefault("output_router_logits", False)
    return zoo.build(zoo.get(name), **overrides)


def grads(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def close(mine: dict[str, Tensor], want: dict[str, Tensor], rtol: float) -> None:
    """Relative to the largest gradient: those of biases in front of a softmax are noise."""
    assert mine.keys() == want.keys()
    largest = max(float(g.norm()) for g in want.values())
    for n, g in want.items():
        assert float((mine[n] - g).norm()) <= rtol * max(float(g.norm()), 1e-3 * largest), n


def expected(
    name: str, model: torch.nn.Module, inputs: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    out, layers = hooked.run(name, model, inputs)
    parts = {
        "sp": loops.specialization(layers), "cp": loops.coupling(layers),
        "lb": sum(loops.switch(m) for m in layers), "z": sum(loops.z(m) for m in layers),
    }  # fmt: skip
    weights = {i.name: i.weight for i in (SP, CP, LB, Z)}
    loss = out.loss + sum(weights[n] * v for n, v in parts.items())
    loss.backward()
    return loss.detach(), grads(model), {n: v.item() for n, v in parts.items()}


@pytest.mark.parametrize(
    ("name", "padded"),
    [
        ("qwen3_moe", True),
        ("deepseek_v3", False),
        ("gpt_oss", False),
        *(nightly(n, p) for n, p in (("qwen3_moe", False), ("deepseek_v3", True), ("gpt_oss", True))),
    ],
)
def test_gradients_of_all_parameters(name: str, padded: bool) -> None:
    model, inputs = build(name), zoo.batch(zoo.get(name), padded=padded)
    plain = model(**inputs).loss
    plain.backward()
    without = grads(model)
    loss, want, parts = expected(name, model, inputs)
    opt = moefx.optimize(model, inputs, codegen="eager", verify=True, losses=[SP, CP, LB, Z, "metrics"])
    out = opt(**inputs)
    assert type(out) is type(model(**inputs))
    out.loss.backward()
    mine = grads(model)
    torch.testing.assert_close(out.loss.detach(), loss, rtol=1e-5, atol=0)
    assert {n: v.item() for n, v in opt.losses.items() if n != "total"} == pytest.approx(parts, rel=1e-4)
    assert opt.losses["total"].item() == pytest.approx((loss - plain.detach()).item(), rel=1e-3)
    close(mine, want, 1e-4)
    with pytest.raises(AssertionError):
        close(mine, without, 1e-4)  # the losses are in there
    assert not any(v.requires_grad for v in (*opt.losses.values(), *opt.routing.values()))


@pytest.mark.nightly
def test_what_specialization_reaches() -> None:
    """Gate and up weights of the chosen experts, and what is in front; not the last layer's down weights and router."""
    model, inputs = build("qwen3_moe"), zoo.batch(zoo.get("qwen3_moe"))
    found = []
    for weight in (0.0, 1.0):
        opt = moefx.optimize(model, inputs, codegen="eager", losses=[L.Specialization(weight=weight)])
        opt(**inputs).loss.backward()
        found.append(grads(model))
    moved = {n for n, g in found[0].items() if float((found[1][n] - g).norm()) > 1e-5 * float(g.norm())}
    assert "model.layers.2.mlp.experts.gate_up_proj" in moved
    assert "model.layers.0.mlp.experts.gate_up_proj" in moved
    assert "model.layers.0.self_attn.q_proj.weight" in moved
    assert not {
        n
        for n in moved
        if n in ("model.layers.2.mlp.experts.down_proj", "model.layers.2.mlp.gate.weight", "lm_head.weight")
    }


@pytest.mark.parametrize("recipe", [nightly("bf16"), "fp8_flow"])
def test_bf16_and_a_recipe_with_casts(recipe: str) -> None:
    name = "qwen3_moe"
    overrides = {} if recipe == "bf16" else {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 16}
    model, inputs = (
        zoo.build(zoo.get(name), dtype=torch.bfloat16, output_router_logits=False, **overrides),
        zoo.batch(zoo.get(name)),
    )
    loss, want, parts = expected(name, model, inputs)
    opt = moefx.optimize(model, inputs, recipe=recipe, codegen="eager", losses=[SP, CP, LB, Z])
    out = opt(**inputs)
    out.loss.backward()
    rtol = 0.05 if recipe == "bf16" else 0.3
    assert {n: v.item() for n, v in opt.losses.items() if n != "total"} == pytest.approx(parts, rel=rtol)
    mine = grads(model)
    key = "model.layers.2.mlp.experts.gate_up_proj"
    assert float((mine[key] - want[key]).norm()) <= rtol * float(want[key].norm())
    assert opt.losses["sp"].dtype == torch.float32
    assert out.loss.item() == pytest.approx(loss.item(), rel=0.05)


def test_a_router_that_is_not_known_has_specialization_alone() -> None:
    model, inputs = build("phimoe"), zoo.batch(zoo.get("phimoe"))
    opt = moefx.optimize(model, inputs, codegen="eager", losses=["sp", "orth"])
    opt(**inputs).loss.backward()
    assert 0 < opt.losses["sp"].item() < 2 * 2
    with pytest.raises(
        moefx.PassError, match=r"loss 'cp' is not defined for model\.layers\.0\.mlp\.experts[\s\S]*exponential_"
    ):
        moefx.optimize(model, inputs, codegen="eager", losses=["cp"])


def test_top_1_is_refused() -> None:
    model, inputs = build("qwen3_moe", num_experts_per_tok=1), zoo.batch(zoo.get("qwen3_moe"))
    with pytest.raises(moefx.PassError, match=r"loss 'sp' is not defined for model\.layers\.0[\s\S]*makes no pair"):
        moefx.optimize(model, inputs, codegen="eager", losses="sp")
    opt = moefx.optimize(model, inputs, codegen="eager", losses="cp,lb,metrics")
    opt(**inputs)
    assert opt.routing["overlap"].tolist() == [0, 0]


def test_all_experts_for_every_token_is_refused() -> None:
    block, x = ref.Block(num_experts_per_tok=4), ref.hidden()
    for name in ("cp", "lb"):
        with pytest.raises(
            moefx.PassError, match=rf"'{name}' is not defined for moe\.experts[\s\S]*all 4 experts[\s\S]*leave '{name}'"
        ):
            ref.optimize(block, (x,), losses=name)


@pytest.mark.parametrize(
    ("config", "call"),
    [
        (True, {}),
        (True, {"return_dict": False}),
        nightly(False, {"return_dict": False, "output_router_logits": True}),
    ],
)
def test_a_model_that_balances_itself_is_not_balanced_twice(config: bool, call: dict[str, bool]) -> None:
    """Whether its outputs have names or not."""
    model, inputs = ref.tiny(output_router_logits=config), {**ref.batch(), **call}
    with pytest.raises(moefx.PassError, match=r"loss of its own[\s\S]*output_router_logits=False"):
        ref.optimize(model, inputs, losses="lb")


class OwnLoss(ref.Block):
    """A block whose own code adds a loss of its router to the model's."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        logits = self.moe.gate(x.flatten(0, 1))[0]
        if self.kind == "z":
            own = logits.logsumexp(-1).square().mean()
        else:
            probabilities = logits.softmax(-1)
            chosen = probabilities.topk(2).indices
            own = (probabilities.mean(0) * torch.bincount(chosen.flatten(), minlength=4) / len(logits)).sum()
        return self.moe(x).square().mean() + 0.01 * own


def test_a_loss_in_the_code_of_a_model_is_told_from_balance() -> None:
    with pytest.raises(moefx.PassError, match=r"loss of its own[\s\S]*balanced twice"):
        ref.optimize(OwnLoss("balance"), (ref.hidden(),), losses="lb")
    ref.optimize(OwnLoss("balance"), (ref.hidden(),), losses="z")
    ref.optimize(OwnLoss("z"), (ref.hidden(),), losses="lb")


@pytest.mark.nightly
def test_the_transformers_form_is_what_the_model_would_add() -> None:
    inputs = zoo.batch(zoo.get("qwen3_moe"), padded=True)
    own = build("qwen3_moe", output_router_logits=True)
    want = own(**inputs)
    want.loss.backward()
    expected_grads = grads(own)
    loss = L.LoadBalance(form="transformers", weight=own.config.router_aux_loss_coef)
    opt = moefx.optimize(build("qwen3_moe"), inputs, codegen="eager", losses=[loss])
    out = opt(**inputs)
    out.loss.backward()
    torch.testing.assert_close(opt.losses["lb"], want.aux_loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(out.loss, want.loss)
    close(grads(opt), expected_grads, 1e-4)


def test_evaluation_measures_and_adds_nothing() -> None:
    model, inputs = build("qwen3_moe").eval(), zoo.batch(zoo.get("qwen3_moe"))
    opt = moefx.optimize(model, inputs, codegen="eager", losses="sp,lb,metrics")
    torch.testing.assert_close(opt(**inputs).loss, model(**inputs).loss)
    assert opt.losses == {}
    assert opt.routing["load"].sum(1).tolist() == pytest.approx([1, 1])
    model.train()
    with torch.no_grad():
        assert opt(**inputs).loss.item() == pytest.approx(model(**inputs).loss.item())
    assert opt(**inputs).loss.item() > model(**inputs).loss.item()
    assert set(opt.losses) == {"sp", "lb", "total"}


def test_values_of_a_training_call_are_not_those_of_the_evaluation_behind_it() -> None:
    """Without metrics the graph of an evaluation returns nothing beside the outputs."""
    block, x = ref.Block(), ref.hidden()
    opt = ref.optimize(block, (x,), losses="z")
    opt(x)
    assert set(opt.losses) == {"z", "total"}
    with torch.no_grad():
        opt(x)
    assert opt.losses == {}


def test_a_model_without_a_loss_gets_it_in_the_backward() -> None:
    model, inputs = build("qwen3_moe"), zoo.batch(zoo.get("qwen3_moe"))
    labels = inputs.pop("labels")

    def mean(logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    out, layers = hooked.run("qwen3_moe", model, inputs)
    (mean(out.logits) + 0.5 * loops.specialization(layers)).backward()
    want = grads(model)
    opt = moefx.optimize(model, inputs, codegen="eager", verify=True, losses=[SP])
    torch.testing.assert_close(opt(**inputs).logits, out.logits)
    mean(opt(**inputs).logits).backward()
    close(grads(model), want, 1e-4)
    # Twice the loss is twice the model's gradient, and the same of what was injected.
    (2 * mean(opt(**inputs).logits)).backward()
    assert not torch.allclose(
        grads(model)["model.layers.0.mlp.experts.gate_up_proj"],
        2 * want["model.layers.0.mlp.experts.gate_up_proj"],
        rtol=1e-3,
    )


@pytest.mark.nightly
def test_dynamic_sizes() -> None:
    model, inputs = build("qwen3_moe"), zoo.batch(zoo.get("qwen3_moe"))
    dynamic = {"input_ids": [0, 1], "labels": [0, 1]}
    losses = ["sp", "cp", L.LoadBalance(form="sequence"), "metrics"]
    opt = moefx.optimize(model, inputs, codegen="eager", dynamic=dynamic, losses=losses)
    ids = torch.randint(0, 64, (3, 10), generator=torch.Generator().manual_seed(0))
    again = {"input_ids": ids, "labels": ids.clone()}
    opt(**again).loss.backward()
    assert len(opt.report.signatures) == 1
    mine, values = grads(model), dict(opt.losses)
    fixed = moefx.optimize(model, again, codegen="eager", losses=losses)
    fixed(**again).loss.backward()
    close(mine, grads(model), 1e-5)
    assert all(torch.allclose(values[n], v) for n, v in fixed.losses.items())


@pytest.mark.nightly
def test_inductor() -> None:
    model, inputs = build("qwen3_moe"), zoo.batch(zoo.get("qwen3_moe"))
    _, want, parts = expected("qwen3_moe", model, inputs)
    opt = moefx.optimize(model, inputs, losses=[SP, CP, LB, Z, "metrics"])
    opt(**inputs).loss.backward()
    close(grads(model), want, 1e-4)
    assert {n: v.item() for n, v in opt.losses.items() if n != "total"} == pytest.approx(parts, rel=1e-4)


def test_biases_follow_the_load() -> None:
    model, inputs = build("deepseek_v3"), zoo.batch(zoo.get("deepseek_v3"))
    biases = {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    before = {n: b.clone() for n, b in biases.items()}
    _, layers = hooked.run("deepseek_v3", model, inputs)
    opt = moefx.optimize(model, inputs, codegen="eager", losses=[L.BiasUpdate(rate=0.25)])
    with pytest.raises(moefx.InputError, match="no choices were counted"):
        opt.update_router_bias()
    for _ in range(2):  # two micro-batches count together
        opt(**inputs).loss.backward()
    copies = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]  # with what they have counted
    opt.update_router_bias()
    for other in copies:
        other.update_router_bias()
        moved = dict(other.original.named_buffers())
        assert all(torch.equal(moved[n], b) for n, b in biases.items())
    assert len(biases) == len(layers) == 2
    for (name, bias), m in zip(biases.items(), layers, strict=True):
        counts = [m.c(e) for e in range(m.experts)]
        mean = sum(counts) / len(counts)
        signs = torch.tensor([(mean > c) - (mean < c) for c in counts])
        torch.testing.assert_close(bias, before[name] + 0.25 * signs)
    with pytest.raises(moefx.InputError, match="no choices were counted"):
        opt.update_router_bias()
    with pytest.raises(moefx.PassError, match="has no correction bias"):
        moefx.optimize(build("qwen3_moe"), inputs, codegen="eager", losses="bias")
    plain = moefx.optimize(model, inputs, codegen="eager")
    with pytest.raises(moefx.InputError, match="nothing counts"):
        plain.update_router_bias()


def test_layers_that_share_a_bias_count_together() -> None:
    model, inputs = build("deepseek_v3"), zoo.batch(zoo.get("deepseek_v3"))
    holders = [m for m in model.modules() if "e_score_correction_bias" in m._buffers]
    for m in holders:
        m._buffers["e_score_correction_bias"] = holders[0].e_score_correction_bias
    before = holders[0].e_score_correction_bias.clone()
    _, layers = hooked.run("deepseek_v3", model, inputs)
    opt = moefx.optimize(model, inputs, codegen="eager", losses=[L.BiasUpdate(rate=0.25)])
    opt(**inputs).loss.backward()
    pooled = torch.tensor([[m.c(e) for e in range(m.experts)] for m in layers], dtype=torch.float32).sum(0)
    (counted,) = opt._counts.values()
    assert counted.tolist() == pooled.tolist()
    opt.update_router_bias()
    moved = holders[1].e_score_correction_bias - before
    torch.testing.assert_close(moved, 0.25 * (pooled.mean() - pooled).sign())


def test_the_report_and_what_is_kept() -> None:
    """Each loss names its layers. The folded combine stays, overlap reads its weighted activation, nothing is kept."""
    model, inputs = build("qwen3_moe"), zoo.batch(zoo.get("qwen3_moe"))
    opt = moefx.optimize(model, inputs, codegen="eager", verify=True, losses="sp=0.25,metrics")
    paths = ["model.layers.0.mlp.experts", "model.layers.2.mlp.experts"]
    rows = opt.report.to_dict()["losses"]
    assert [(r["name"], r["weight"], r["layers"]) for r in rows] == [("sp", 0.25, paths), ("metrics", None, paths)]
    assert "losses: Specialization (sp, weight 0.25) taps 2 layers" in str(opt.report)
    passes = {p.name: p for p in opt.report.passes}
    assert passes["add_losses"].matched == 2
    assert (passes["fold_combine"].matched, passes["fold_combine"].rejected) == (2, [])
    plain = moefx.optimize(model, inputs, codegen="eager")
    assert plain.report.to_dict()["losses"] == []
    assert opt.report.memory["saved_bytes"] == plain.report.memory["saved_bytes"]


def test_losses_are_refused_where_routers_are_not_raised() -> None:
    model, inputs = build("qwen3_moe"), zoo.batch(zoo.get("qwen3_moe"))
    passes = moefx.pipeline("bf16", codegen="eager").remove("raise_routers")
    with pytest.raises(moefx.PassError, match="requires 'routers_raised'"):
        moefx.optimize(model, inputs, codegen="eager", passes=passes, losses="sp")


class Blended(torch.nn.Module):
    """All experts on all tokens, weighted: a bank of experts that no router chooses from."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(8, 4)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        w = self.gate(x).softmax(-1)
        return sum(w[..., i : i + 1] * e(x) for i, e in enumerate(self.experts))


def test_losses_of_a_model_without_raised_experts_say_why_there_are_none() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), Blended())
    with pytest.raises(moefx.CaptureError, match=r"no MoE layer was raised[\s\S]*1 \(Blended\) was not raised"):
        ref.optimize(model, (torch.randn(2, 5, 8),), losses="metrics")


class Table(torch.nn.Module):
    """Logits are a function of the token id alone."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(128, experts, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table[input_ids]


@pytest.mark.parametrize("training", [True, nightly(False)])
def test_metrics_of_a_model_that_is_routed_by_token_ids(training: bool) -> None:
    model, inputs = build("qwen3_moe").train(training), zoo.batch(zoo.get("qwen3_moe"))
    E, k = model.config.num_experts, model.config.num_experts_per_tok
    opt = moefx.optimize(model, inputs, router=Table(E), codegen="eager", losses=["sp", L.RoutingMetrics(choices=True)])
    opt(**inputs)
    idx = Table(E)(inputs["input_ids"]).flatten(0, 1).topk(k).indices
    load = torch.bincount(idx.flatten(), minlength=E) / idx.numel()
    found = opt.routing
    assert set(found) == set(SHAPES)
    assert torch.equal(found["choices"], torch.stack([idx, idx]))
    s = Table(E)(inputs["input_ids"]).flatten(0, 1).softmax(-1)
    wanted = {
        "token_entropy": -(s * s.log()).sum(-1).mean() / math.log(E),
        "marginal_entropy": -(s.mean(0) * s.mean(0).log()).sum() / math.log(E),
        "mass": s.gather(-1, idx).sum(-1).mean(),
    }
    for name, want in wanted.items():
        torch.testing.assert_close(found[name], want.expand(2))
    for i in range(2):
        torch.testing.assert_close(found["load"][i], load)
        assert float(found["max_violation"][i]) == pytest.approx(float(load.max()) * E - 1, rel=1e-5)
        assert float(found["dead_experts"][i]) == int((load == 0).sum())
    # All layers take the same choice, so that tokens stay on the diagonal.
    assert torch.equal(found["transitions"][0], torch.diag(torch.bincount(idx[:, 0], minlength=E).float()))
    assert not torch.equal(found["overlap"][0], found["overlap"][1])
    if training:
        assert float(opt.losses["sp"]) == pytest.approx(k * (k - 1) * float(found["overlap"].sum()), rel=1e-5)


@pytest.mark.nightly
def test_scores_are_not_known_of_precomputed_routing_and_leave_a_selection_bias_out() -> None:
    model, inputs = build("qwen3_moe"), zoo.batch(zoo.get("qwen3_moe"))
    E, k = model.config.num_experts, model.config.num_experts_per_tok
    biased = Table(E)
    biased.register_buffer("selection_bias", torch.linspace(0, 3, E))
    plain, other = (
        moefx.optimize(model, inputs, router=moefx.Routing(t, gates=gates), codegen="eager", losses="metrics")
        for t, gates in ((Table(E), "router"), (biased, "layer"))
    )
    plain(**inputs)
    other(**inputs)
    assert torch.equal(plain.routing["token_entropy"], other.routing["token_entropy"])
    assert bool((plain.routing["mass"] > other.routing["mass"] + 1e-3).all())  # the bias chooses, and costs mass
    idx, gates = torch.zeros((*inputs["input_ids"].shape, k), dtype=torch.int64), torch.full((k,), 1 / k)
    idx += torch.arange(k)
    given = {**inputs, "routing_idx": idx, "routing_gates": gates.expand(idx.shape).contiguous()}
    opt = moefx.optimize(model, given, router=moefx.Precomputed(), codegen="eager", losses="metrics")
    opt(**given)
    assert set(opt.routing) == set(SHAPES) - set(SCORED) - {"choices"}


@pytest.mark.nightly
def test_losses_of_routers_that_are_gone_say_so() -> None:
    model, inputs = build("qwen3_moe"), zoo.batch(zoo.get("qwen3_moe"))
    table = Table(model.config.num_experts)
    for losses in ("cp", "lb", "z", "var", "erc", "bias"):
        with pytest.raises(moefx.PassError, match=rf"loss '{losses}' .*[\s\S]*token ids, and its own routers are gone"):
            moefx.optimize(model, inputs, router=table, codegen="eager", losses=losses)
    with pytest.raises(moefx.PassError, match="token ids, and its own routers only weigh"):
        moefx.optimize(model, inputs, router=moefx.Routing(table, gates="layer"), codegen="eager", losses="cp")


def test_metrics_of_a_router_that_is_not_known() -> None:
    model, inputs = build("phimoe"), zoo.batch(zoo.get("phimoe"))
    opt = moefx.optimize(model, inputs, codegen="eager", losses="metrics")
    opt(**inputs)
    assert set(opt.routing) == set(SHAPES) - set(SCORED) - {"choices"}
    assert opt.routing["load"].sum(1).tolist() == pytest.approx([1] * len(opt.routing["load"]))
