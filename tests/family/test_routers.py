"""Which normal form the routers of the families have, and that each comes back from it bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moefx
from moefx.passes import ExpandRouters, RaiseRouters
from tests.passes.subject import Subject, as_subject, captured_graph, nodes, rewrite, run, same_results

from ..profile import often
from . import zoo

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")

_V3 = "sigmoid f32 | bias | groups {} by top2sum fill -inf | top2 unsorted | sum + 1e-20 | x {}"
_ERNIE = "softmax f32 | bias | top2 | sum >= 1e-12"
# In fp32, and in bf16 where that is another spec.
SPECS: dict[str, tuple[str, str | None]] = {
    "qwen2_moe": ("softmax f32 | top2 | sum", "softmax f32 | top2 | sum | to bf16"),
    "qwen3_moe": ("softmax f32 | top2", "softmax f32 | top2 | to bf16"),
    "mixtral": ("softmax f32 | top2 | sum", None),
    "olmoe": ("softmax f32 | top2", "softmax f32 | top2 | to bf16"),
    "deepseek_v2": ("softmax f32 | groups 4 keep 2 by max fill 0 masked | top2 unsorted | x 1.5", None),
    "deepseek_v3": (_V3.format("4 keep 2", 2.5), None),
    "glm4_moe": ("sigmoid f32 | bias | top2 unsorted | sum + 1e-20", None),
    "dots1": ("sigmoid f32 | bias | top2 unsorted | x 2.0", None),
    "gpt_oss": ("identity f32 | top2 | softmax", "identity bf16 | top2 | softmax"),
    "granitemoe": ("identity f32 | top2 | softmax", "identity f32 | top2 | softmax | to bf16"),
    "jamba": ("softmax f32 | top2", "softmax f32 | top2 | to bf16"),
    "hunyuan_v1_moe": ("softmax f32 | top2 | sum", None),
    "minimax": ("softmax f32 | top2 | sum", None),
    "minimax_m2": ("sigmoid f32 | bias | top2 unsorted | sum", None),
    "ernie4_5_moe": (_ERNIE, f"{_ERNIE} | to bf16"),
    "nemotron_h": (_V3.format("2 keep 1", 1.5), None),
    "lfm2_moe": ("sigmoid f32 | bias | top2 | sum + 1e-06", "sigmoid bf16 | bias | top2 | sum + 1e-06"),
    "flex_olmo": ("softmax f32 | top2", "softmax f32 | top2 | to bf16"),
}
ALIKE = ("qwen2_moe", "olmoe", "jamba", "minimax", "flex_olmo", "glm4_moe")  # another family has the same, or nearly
SECOND = {"hunyuan_v1_moe": "softmax f32 | top3 | sum"}  # one k per layer


def captured(name: str, **overrides: Any) -> Subject:
    entry = zoo.get(name)
    return as_subject(captured_graph(zoo.build(entry, **overrides), **zoo.batch(entry))).copy()


def specs(graph: torch.fx.Graph) -> list[str]:
    return [str(n.args[3]) for n in nodes(graph, "route")]


@pytest.mark.parametrize(
    ("name", "dtype"),
    often(
        [(n, d) for d in (torch.float32, torch.bfloat16) for n in SPECS],
        [*((n, torch.float32) for n in SPECS if n not in ALIKE), ("deepseek_v3", torch.bfloat16)],
    ),
    ids=str,
)
def test_routers_are_raised_and_come_back(name: str, dtype: torch.dtype) -> None:
    subject = captured(name, dtype=dtype)
    done = rewrite(RaiseRouters(), subject)
    wide, low = SPECS[name]
    want = wide if dtype == torch.float32 else low or wide
    assert specs(done.graph) == [want, SECOND.get(name, want)]
    assert done.reasons == []
    expanded = rewrite(ExpandRouters(), done.subject)
    same_results(run(subject), run(expanded.subject), "exact")


def test_every_family_is_accounted_for() -> None:
    assert {*zoo.NAMES} - {*SPECS} == {"phimoe", "llama4"}  # below; and no experts are raised in Llama 4


def test_phimoe_is_outside_the_normal_form() -> None:
    done = rewrite(RaiseRouters(), captured("phimoe"))
    assert not done.changed
    assert len(done.reasons) == 2
    for why in done.reasons:
        assert "random numbers (exponential_) are drawn between the logits and the experts" in why


def test_phimoe_in_evaluation_is_outside_as_well() -> None:
    """Without the draws it still masks by a threshold, so that its weights are no softmax over all experts."""
    entry = zoo.get("phimoe")
    model = zoo.build(entry).eval()
    done = rewrite(RaiseRouters(), as_subject(captured_graph(model, **zoo.batch(entry))).copy())
    assert not done.changed
    assert len(done.reasons) == 2


@pytest.mark.parametrize("override", [{"norm_topk_prob": True}, {"num_experts": 6, "num_experts_per_tok": 3}])
def test_options_of_the_config_show_in_the_spec(override: dict[str, Any]) -> None:
    want = "softmax f32 | top2 | sum" if "norm_topk_prob" in override else "softmax f32 | top3"
    assert specs(rewrite(RaiseRouters(), captured("qwen3_moe", **override)).graph) == [want] * 2


def test_noise_on_the_hidden_states_is_none_on_the_logits() -> None:
    assert (
        specs(rewrite(RaiseRouters(), captured("mixtral", router_jitter_noise=0.1)).graph) == [SPECS["mixtral"][0]] * 2
    )


def test_the_pipeline_has_them_in_front_and_reports_them() -> None:
    entry = zoo.get("deepseek_v3")
    opt = moefx.optimize(zoo.build(entry), zoo.batch(entry), codegen="eager", verify=True)
    rows = {p.name: p for p in opt.report.passes}
    assert list(rows)[:3] == ["raise_routers", "expand_routers", "merge_routers"]
    for name in ("raise_routers", "expand_routers"):
        assert (rows[name].matched, rows[name].numerics, rows[name].error) == (2, "exact", 0.0)
    assert specs(opt.graphs["raise_routers"].graph) == [SPECS["deepseek_v3"][0]] * 2
    assert specs(opt.graphs["expand_routers"].graph) == []


def test_a_router_that_is_not_expanded_trains_all_the_same() -> None:
    entry = zoo.get("gpt_oss")
    model, inputs = zoo.build(entry), zoo.batch(entry)
    want, grads = zoo.reference_step(model, inputs)
    opt = moefx.optimize(
        model, inputs, codegen="eager", passes=moefx.pipeline("bf16", codegen="eager").remove("expand_routers")
    )
    found, mine = zoo.reference_step(opt, inputs)
    assert torch.allclose(torch.as_tensor(found), torch.as_tensor(want), atol=1e-6)
    assert mine.keys() == grads.keys()
    assert all(torch.allclose(mine[k], g, atol=1e-5, rtol=1e-3) for k, g in grads.items())
