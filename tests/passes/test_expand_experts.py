"""`experts` markers become the ops that define them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moefx.dialect import ExpertsSpec, GluKind
from moefx.errors import InputError
from moefx.passes import ExpandExperts
from tests.passes.subject import (
    H,
    Made,
    Subject,
    T,
    count,
    failure,
    model_graph,
    nodes,
    ops,
    rand,
    rewrite,
    route,
    run,
    symbolic,
    weights,
)

Tensor = torch.Tensor


def bank(m: Any, x: Tensor, spec: str) -> Tensor:
    """Router and experts with the parameters that the spec asks for."""
    _, w, idx = route(m, x)
    ws = [m.up, m.up_bias, m.down, m.down_bias] if spec.endswith("bias") else [m.up, m.down]
    y: Tensor = ops.experts(x, idx, w, ws, spec)
    return y


def plain(m: Any, x: Tensor, spec: str) -> Tensor:
    """The same, one expert after the other, in ordinary PyTorch."""
    _, w, idx = route(m, x)
    kn, biased = " | kn" in spec, spec.endswith("bias")
    out = torch.zeros_like(x)
    for e in range(m.up.shape[0]):
        up, down = (m.up[e].t(), m.down[e].t()) if kn else (m.up[e], m.down[e])
        h = F.linear(x, up, m.up_bias[e] if biased else None)
        if spec.startswith("plain"):
            a = F.relu(h) ** 2
        elif spec.startswith("interleaved clamp"):
            g, u = h[:, ::2].clamp(max=1.0), h[:, 1::2].clamp(-1.0, 1.0)
            a = g * torch.sigmoid(1.5 * g) * (u + 1)
        else:
            g, u = h.chunk(2, -1)
            a = F.silu(g) * u
        y = F.linear(a, down, m.down_bias[e] if biased else None)
        out = out + y * (w * (idx == e)).sum(-1, keepdim=True)
    return out


SPECS = ["silu | nk", "silu | kn", "silu | nk bias", "interleaved clamp(1,1.5) | kn bias", "plain relu2 | nk"]


@pytest.mark.parametrize("spec", SPECS)
def test_equals_the_plain_definition(spec: str) -> None:
    """Bitwise what the marker computes, and numerically what a loop over experts computes, gradients included."""
    given = weights("kn" if " | kn" in spec else "nk", spec.endswith("bias"), not spec.startswith("plain"))
    done = rewrite(ExpandExperts(), model_graph(Made(lambda m, x: bank(m, x, spec), **given), rand(T, H)))
    assert done.row.matched == 1
    assert count(done.graph, "experts") == 0
    assert count(done.graph, "plan") == 1
    assert count(done.graph, "grouped_mm") == 2
    assert count(done.graph, "grouped_bias") == (2 if spec.endswith("bias") else 0)
    assert count(done.graph, "transpose") == (2 if " | kn" in spec else 0)
    assert [n.args[2] for n in nodes(done.graph, "glu")] == [spec.split(" | ")[0]]

    reference = model_graph(Made(lambda m, x: plain(m, x, spec), **given), rand(T, H))
    mine, theirs = named(done.subject), named(reference)
    assert mine.keys() == theirs.keys()
    assert {"output 0", "gradient up", "gradient down", "gradient router"} < mine.keys()
    for key, want in theirs.items():
        torch.testing.assert_close(mine[key], want, rtol=2e-5, atol=2e-5, msg=key)


def named(subject: Subject) -> dict[str, Tensor]:
    """Results by parameter name: two captures may order their inputs differently."""
    names = [n.meta["moefx_name"] for n in subject.graph.find_nodes(op="placeholder")]
    found = run(subject)
    return {k if k.startswith("output") else f"{k.split()[0]} {names[int(k.split()[1])]}": v for k, v in found.items()}


def test_several_banks_and_a_shared_input() -> None:
    def fn(m: Any, x: Tensor) -> Any:
        y = bank(m, x, "silu | nk") + x
        return bank(m, y, "silu | nk"), y

    done = rewrite(ExpandExperts(), model_graph(Made(fn, **weights()), rand(T, H)))
    assert done.row.matched == 2
    assert count(done.graph, "plan") == 2


def test_result_with_several_users() -> None:
    def fn(m: Any, x: Tensor) -> Any:
        y = bank(m, x, "silu | nk")
        return y + 1, y * 2, y.sum()

    done = rewrite(ExpandExperts(), model_graph(Made(fn, **weights()), rand(T, H)))
    (combine,) = nodes(done.graph, "combine")
    assert len(combine.users) == 3


def test_bf16_with_fp32_weights_of_the_router() -> None:
    def fn(m: Any, x: Tensor) -> Any:
        _, w, idx = route(m, x)
        return ops.experts(x.bfloat16(), idx, w, [m.up.bfloat16(), m.down.bfloat16()], "silu | nk")

    done = rewrite(ExpandExperts(), model_graph(Made(fn, **weights()), rand(T, H)))
    (unpermute,) = nodes(done.graph, "unpermute")
    assert unpermute.meta["val"].dtype is torch.bfloat16


def test_symbolic_number_of_tokens() -> None:
    subject = model_graph(Made(lambda m, x: bank(m, x, "silu | nk"), **weights()), rand(T, H), dynamic={"x": (0,)})
    done = rewrite(ExpandExperts(), subject)
    assert symbolic(done.graph, "unpermute")
    assert symbolic(done.graph, "grouped_mm")
    assert not symbolic(done.graph, "plan")  # its offsets have one entry per expert


def test_no_experts_no_change() -> None:
    assert not rewrite(
        ExpandExperts(), model_graph(Made(lambda m, x: route(m, x)[1] * 2, **weights()), rand(T, H))
    ).changed


def test_unreadable_spec_names_the_node() -> None:
    subject = model_graph(Made(lambda m, x: bank(m, x, "silu | nk"), **weights()), rand(T, H)).copy()
    (node,) = nodes(subject.graph, "experts")
    node.args = (*node.args[:-1], "silu | xx")
    e = failure(ExpandExperts(), subject)
    assert "expand_experts" in e.what
    assert node.name in str(e.where)
    assert "test_expand_experts.py" in str(e.where)
    assert "unreadable experts spec" in str(e.why)
    assert isinstance(e.__cause__, Exception)
    with pytest.raises(InputError):
        ExpertsSpec.parse("silu | xx")


def test_spec_prints_as_it_is_read() -> None:
    assert str(ExpertsSpec(GluKind("silu"), "nk")) == SPECS[0]
    assert all(str(ExpertsSpec.parse(s)) == s for s in SPECS)


def test_real_model(qwen: Subject) -> None:
    done = rewrite(ExpandExperts(), qwen)
    assert done.row.matched == 2
    assert count(done.graph, "experts") == 0
    paths = {n.meta["nn_module_stack"] and n.name: None for n in done.new()}
    assert len(paths) == len(done.new())


def test_real_model_with_biases_and_the_other_layout(gpt_oss: Subject) -> None:
    done = rewrite(ExpandExperts(), gpt_oss)
    assert done.row.matched == 2
    assert count(done.graph, "grouped_bias") == 4
    assert all("clamp" in str(n.args[2]) for n in nodes(done.graph, "glu"))
    shapes = {tuple(n.meta["val"].shape) for n in nodes(done.graph, "glu")}
    assert all(s[1] * 2 == nodes(done.graph, "grouped_mm")[0].meta["val"].shape[1] for s in shapes)
