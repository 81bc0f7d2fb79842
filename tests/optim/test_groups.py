"""Which parameter gets which role: tables written by hand, models whose names lie, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moefx.errors import InputError
from moefx.optim import ROLES, Muon, Soap, param_groups
from tests import reference
from tests.family import zoo

H, I, E, V = 16, 24, 4, 40


def roles(module: nn.Module, **options: Any) -> dict[str, str]:
    """Name -> role."""
    return {n: g["role"] for g in param_groups(module, verbose=False, **options) for n in g["names"]}


def patterns(module: nn.Module) -> dict[str, set[str]]:
    """Role -> names, with layer numbers and what every name of the model has in common taken out."""
    found: dict[str, set[str]] = {}
    for name, role in roles(module).items():
        found.setdefault(role, set()).add(re.sub(r"^model\.(layers\.\d+\.)?", "", name))
    return found


# -- families
# --------------------------------------------------------------------------------------------------------------------

QKVO = {f"self_attn.{x}_proj.weight" for x in "qkvo"}
MLA = {f"self_attn.{x}.weight" for x in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
STACKS = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight"}


def glu(path: str) -> set[str]:
    return {f"{path}.{x}_proj.weight" for x in ("gate", "up", "down")}


USUAL: dict[str, set[str]] = {"embedding": {"embed_tokens.weight"}, "head": {"lm_head.weight"}, "attention": QKVO}
EXPECTED: dict[str, dict[str, set[str]]] = {
    "qwen2_moe": {
        **USUAL,
        "router": {"mlp.gate.weight"},
        "norm": NORMS,
        "bias": {f"self_attn.{x}_proj.bias" for x in "qkv"},
        "expert": STACKS,
        "mlp": glu("mlp.shared_expert"),
        "other": {"mlp.shared_expert_gate.weight"},
    },
    "qwen3_moe": {
        **USUAL,
        "router": {"mlp.gate.weight"},
        "norm": NORMS | {"self_attn.q_norm.weight", "self_attn.k_norm.weight"},
        "expert": STACKS,
        "mlp": glu("mlp"),
    },
    "mixtral": {**USUAL, "router": {"mlp.gate.weight"}, "norm": NORMS, "expert": STACKS},
    "deepseek_v3": {
        **USUAL,
        "router": {"mlp.gate.weight"},
        "norm": NORMS | {"self_attn.q_a_layernorm.weight", "self_attn.kv_a_layernorm.weight"},
        "expert": STACKS,
        "attention": MLA,
        "mlp": glu("mlp") | glu("mlp.shared_experts"),
    },
    "gpt_oss": {
        **USUAL,
        "router": {"mlp.router.weight"},
        "norm": NORMS,
        "bias": {f"self_attn.{x}_proj.bias" for x in "qkvo"}
        | {"mlp.router.bias", "mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"},
        "expert": STACKS,
        "other": {"self_attn.sinks"},
    },
    "phimoe": {
        **USUAL,
        "router": {"mlp.router.weight"},
        "norm": NORMS | {n.replace("weight", "bias") for n in NORMS},
        "expert": STACKS,
    },
    "jamba": {
        **USUAL,
        "router": {"feed_forward.router.weight"},
        "norm": {"input_layernorm.weight", "pre_ff_layernorm.weight", "final_layernorm.weight"}
        | {f"mamba.{x}_layernorm.weight" for x in ("dt", "b", "c")},
        "bias": {"mamba.conv1d.bias", "mamba.dt_proj.bias"},
        "expert": {"feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"},
        "mlp": glu("feed_forward") | {f"mamba.{x}_proj.weight" for x in ("in", "x", "dt", "out")},
        "other": {"mamba.A_log", "mamba.D", "mamba.conv1d.weight"},
    },
    "hunyuan_v1_moe": {
        **USUAL,
        "router": {"mlp.gate.wg.weight"},
        "norm": NORMS | {"self_attn.query_layernorm.weight", "self_attn.key_layernorm.weight"},
        "expert": STACKS,
        "mlp": glu("mlp.shared_mlp"),
    },
    "minimax": {
        **USUAL,
        "router": {"mlp.gate.weight"},
        "norm": NORMS | {"self_attn.norm.weight"},
        "expert": STACKS,
        "attention": QKVO | {f"self_attn.{x}.weight" for x in ("qkv_proj", "out_proj", "output_gate")},
    },
    "ernie4_5_moe": {
        "embedding": {"embed_tokens.weight"},  # the head is tied; the score corrections are frozen
        "attention": QKVO,
        "router": {"mlp.gate.weight"},
        "norm": NORMS,
        "expert": STACKS,
        "mlp": glu("mlp") | glu("mlp.shared_experts"),
    },
    "nemotron_h": {
        "embedding": {"embeddings.weight"},
        "head": {"lm_head.weight"},
        "attention": {f"mixer.{x}_proj.weight" for x in "qkvo"},
        "router": {"mixer.gate.weight"},
        "norm": {"norm.weight", "mixer.norm.weight", "norm_f.weight"},
        "bias": {"mixer.conv1d.bias"},
        "expert": {"mixer.experts.up_proj", "mixer.experts.down_proj"},
        "mlp": {f"mixer.{x}.weight" for x in ("in_proj", "out_proj")}
        | {f"mixer.shared_experts.{x}_proj.weight" for x in ("up", "down")},
        "other": {"mixer.A_log", "mixer.D", "mixer.dt_bias", "mixer.conv1d.weight"},
    },
    "llama4": {
        **USUAL,
        "router": {"feed_forward.router.weight"},
        "norm": NORMS,
        "expert": {"feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"},
        "mlp": glu("feed_forward") | glu("feed_forward.shared_expert"),
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_families(name: str) -> None:
    model = zoo.build(zoo.get(name))
    assert patterns(model) == EXPECTED[name]
    names = [n for g in param_groups(model, verbose=False) for n in g["names"]]
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("name", sorted(set(zoo.NAMES) - set(EXPECTED)))
def test_other_families_have_nothing_unexpected(name: str) -> None:
    found = patterns(zoo.build(zoo.get(name)))
    assert {"router", "expert", "attention", "embedding", "norm"} <= set(found)
    assert found.get("other", set()) <= {"conv.conv.weight"}


# -- plain PyTorch
# --------------------------------------------------------------------------------------------------------------------


class RMS(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Any) -> Any:
        return self.scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class Gated(nn.Module):
    def __init__(self, inner: int = I) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(*d, bias=False) for d in ((H, inner), (inner, H), (H, inner)))

    def forward(self, x: Any) -> Any:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MoE(nn.Module):
    """Dense routing: every expert runs, the gate weighs."""

    def __init__(self, experts: Any = None) -> None:
        super().__init__()
        self.pick = nn.Linear(H, E)
        self.bank = experts or nn.ModuleList([Gated() for _ in range(E)])

    def forward(self, x: Any) -> Any:
        weights = self.pick(x).softmax(-1)
        return sum(weights[..., i : i + 1] * e(x) for i, e in enumerate(self.bank))


class Fused(nn.Module):
    """Attention with one matrix for queries, keys and values."""

    def __init__(self, kv: int = H) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(H, H + 2 * kv), nn.Linear(H, H)

    def forward(self, x: Any) -> Any:
        q, k, v = self.a(x).split([H, H, H], -1)
        return self.b(F.scaled_dot_product_attention(q, k, v))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2, self.mix, self.ff = RMS(H), RMS(H), Fused(), MoE()

    def forward(self, x: Any) -> Any:
        x = x + self.mix(self.n1(x))
        return x + self.ff(self.n2(x))


class LM(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(V, H)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.last = RMS(H)
        self.out = nn.Linear(H, V, bias=False)
        if tied:
            self.out.weight = self.table.weight

    def forward(self, ids: Any) -> Any:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.out(self.last(x)).flatten(0, 1), ids.flatten())


def test_plain_model() -> None:
    layer = {"n1.scale": "norm", "n2.scale": "norm", "mix.a.weight": "attention", "mix.a.bias": "bias"}
    layer |= {"mix.b.weight": "attention", "mix.b.bias": "bias", "ff.pick.weight": "router", "ff.pick.bias": "bias"}
    layer |= {f"ff.bank.{e}.w{i}.weight": "expert" for e in range(E) for i in (1, 2, 3)}
    want = {f"layers.{i}.{n}": r for i in (0, 1) for n, r in layer.items()}
    assert roles(LM()) == {**want, "table.weight": "embedding", "last.scale": "norm", "out.weight": "head"}


class Stacks(nn.Module):
    """Stacked experts whose router is a child, or a matrix of their own, or missing."""

    def __init__(self, router: str, bias: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.zeros(E, I, H)), nn.Parameter(torch.zeros(E, H, I))
        if bias:
            self.b1, self.b2 = nn.Parameter(torch.zeros(E, I)), nn.Parameter(torch.zeros(E, H))
        if router == "child":
            self.norm = nn.Linear(H, E, bias=False)
        elif router:
            self.w = nn.Parameter(torch.zeros(*((E, H) if router == "rows" else (H, E))))


STACKED = {"up": "expert", "down": "expert"}


@pytest.mark.parametrize(
    ("module", "want"),
    [
        (Stacks("child"), {**STACKED, "norm.weight": "router"}),
        (Stacks("rows"), {**STACKED, "w": "router"}),
        (Stacks("columns"), {**STACKED, "w": "router"}),
        (Stacks("", bias=True), {**STACKED, "b1": "bias", "b2": "bias"}),
        (Stacks("child", bias=True), {**STACKED, "b1": "bias", "b2": "bias", "norm.weight": "router"}),
    ],
)
def test_stacked_experts(module: nn.Module, want: dict[str, str]) -> None:
    assert roles(module) == want


def module(**parts: nn.Module | nn.Parameter) -> nn.Module:
    """A module with these children and parameters."""
    made = nn.Module()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def lin(read: int, out: int) -> nn.Linear:
    return nn.Linear(read, out, bias=False)


@pytest.mark.parametrize(
    ("block", "want"),
    [
        (module(a=lin(H, 16), b=lin(H, 8), c=lin(H, 8), d=lin(16, H)), {"attention"}),
        (module(a=lin(H, 8), b=lin(H, 8), c=lin(H, 8), d=lin(8, H)), {"attention"}),
        (Fused(kv=4), {"attention", "bias"}),  # grouped queries
        (module(a=lin(H, 16), b=lin(H, 8), d=lin(16, H)), {"attention"}),  # queries, and fused keys and values
        (module(a=module(q=lin(H, H), k=lin(H, H), v=lin(H, H)), b=module(dense=lin(H, H))), {"attention"}),
        (module(a=lin(H, I), b=lin(H, I), c=lin(I, H)), {"mlp"}),
        (module(a=lin(H, H), b=lin(H, H), c=lin(H, H)), {"mlp"}),
        (module(a=lin(H, 2 * I), c=lin(I, H)), {"mlp"}),  # fused gate and up
        (module(a=lin(H, I), c=lin(I, H)), {"mlp"}),
        (nn.Sequential(lin(H, H), nn.ReLU(), lin(H, H), nn.ReLU(), lin(H, H), nn.ReLU(), lin(H, H)), {"mlp"}),
        (module(a=lin(H, 48), conv=nn.Conv1d(H, H, 3, bias=False), c=lin(H, H)), {"mlp", "other"}),
        (module(a=nn.ModuleList([Gated(), Gated()]), b=lin(H, 1)), {"mlp", "other"}),  # no router, no experts
        (module(a=lin(3, H), b=nn.ModuleList([Gated(), Gated()]), c=lin(H, 3)), {"mlp", "other"}),
        (lin(H, H), {"other"}),
        (module(a=nn.Parameter(torch.zeros(H))), {"other"}),
        (nn.Conv1d(H, I, 3), {"other", "bias"}),
        (nn.LSTM(H, H), {"other", "bias"}),
        (nn.GroupNorm(2, H), {"norm"}),
        (nn.BatchNorm1d(H), {"norm"}),
    ],
)
def test_blocks(block: nn.Module, want: set[str]) -> None:
    assert set(roles(block).values()) == want


def test_torch_transformer() -> None:
    found = roles(nn.TransformerEncoderLayer(H, 2, I))
    assert {n for n, r in found.items() if r == "attention"} == {
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
    }
    assert {n for n, r in found.items() if r == "mlp"} == {"linear1.weight", "linear2.weight"}
    assert {found["self_attn.in_proj_bias"], found["self_attn.out_proj.bias"], found["linear1.bias"]} == {"bias"}
    assert {found["norm1.weight"], found["norm1.bias"]} == {"norm"}


def test_names_that_lie() -> None:
    """Every name here says something else than what the module is."""
    lying = module(
        router=nn.Embedding(V, H),
        lm_head=module(embed_tokens=lin(H, I), gate=lin(I, H)),
        experts=module(norm=lin(H, 8), bias=lin(H, 8), mlp=lin(H, 8), layernorm=lin(8, H)),
        self_attn=module(up_proj=lin(H, E), embedding=nn.ModuleList([Gated() for _ in range(E)])),
        o_proj=RMS(H),
        head=nn.LayerNorm(H),
        norm=lin(H, V),
    )
    found = roles(lying)
    assert found.pop("router.weight") == "embedding"
    assert found.pop("norm.weight") == "head"
    assert found.pop("self_attn.up_proj.weight") == "router"
    assert {found.pop(n) for n in ("o_proj.scale", "head.weight", "head.bias")} == {"norm"}
    assert {found.pop(f"lm_head.{n}.weight") for n in ("embed_tokens", "gate")} == {"mlp"}
    assert {found.pop(f"experts.{n}.weight") for n in ("norm", "bias", "mlp", "layernorm")} == {"attention"}
    assert len(found) == 3 * E
    assert set(found.values()) == {"expert"}


# -- groups
# --------------------------------------------------------------------------------------------------------------------


def test_options_of_groups() -> None:
    model = LM()
    groups = {g["role"]: g for g in param_groups(model, algorithm="soap", weight_decay=0.3, verbose=False)}
    assert list(groups) == [r for r in ROLES if r in groups]
    assert {r for r, g in groups.items() if g["algorithm"] == "soap"} == {"router", "expert", "attention"}
    assert {r for r, g in groups.items() if g["lite"]} == {"embedding", "norm", "expert", "attention"}
    assert {r: g["weight_decay"] for r, g in groups.items() if g["weight_decay"] != 0.3} == {"norm": 0.0, "bias": 0.0}
    order = [n for n, _ in model.named_parameters()]
    for g in groups.values():
        assert list(g) == ["params", "names", "role", "algorithm", "weight_decay", "lite"]
        assert g["names"] == sorted(g["names"], key=order.index)
        assert all(p is model.get_parameter(n) for n, p in zip(g["names"], g["params"], strict=True))
    plain = param_groups(model, lite=False, decay_norms=True, algorithm="adamw", verbose=False)
    assert {g["algorithm"] for g in plain} == {"adamw"}
    assert not any(g["lite"] for g in plain)
    assert {g["role"] for g in plain if "weight_decay" in g} == {"bias"}


def test_optimized_is_grouped_as_the_original() -> None:
    model = reference.tiny()
    want, got = param_groups(model, verbose=False), param_groups(reference.optimize(model), verbose=False)
    assert [g["names"] for g in got] == [g["names"] for g in want]
    assert [g["role"] for g in got] == [g["role"] for g in want]
    assert all(a is b for g, w in zip(got, want, strict=True) for a, b in zip(g["params"], w["params"], strict=True))


def test_tied_head_is_the_embedding() -> None:
    found = roles(LM(tied=True))
    assert found["table.weight"] == "embedding"
    assert "out.weight" not in found
    assert "head" not in found.values()
    first = module(head=lin(H, V), table=nn.Embedding(V, H), tail=lin(H, 5))  # not the last: only the tie can tell
    assert roles(first) == {"head.weight": "other", "table.weight": "embedding", "tail.weight": "other"}
    first.table.weight = first.head.weight
    assert roles(first) == {"head.weight": "embedding", "tail.weight": "other"}


def test_shared_layers_count_once() -> None:
    shared = Gated()
    found = roles(module(a=module(ff=shared), b=module(ff=shared)))
    assert found == {f"a.ff.w{i}.weight": "mlp" for i in (1, 2, 3)}


def test_frozen_parameters_are_left_out_but_seen() -> None:
    model = LM()
    model.layers[0].ff.bank.requires_grad_(False)
    found = roles(model)
    assert set(roles(LM())) - set(found) == {f"layers.0.ff.bank.{e}.w{i}.weight" for e in range(E) for i in (1, 2, 3)}
    assert found["layers.0.ff.pick.weight"] == "router"


def test_overrides() -> None:
    model = LM()
    chosen = {"layers.0.mix": "mlp", "layers.0.mix.b": "other", "layers.1.n1.scale": "other", "layers.1.ff.pick": "mlp"}
    got, plain = roles(model, overrides=chosen), roles(model)
    changed = {n: r for n, r in got.items() if plain[n] != r}
    assert changed == {
        "layers.0.mix.a.weight": "mlp",
        "layers.0.mix.b.weight": "other",
        "layers.0.mix.b.bias": "other",
        "layers.1.n1.scale": "other",
        "layers.1.ff.pick.weight": "mlp",
    }


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"overrides": {"layers.0.mx": "mlp"}}, "did you mean 'layers.0.mix'"),
        ({"overrides": {"mix": "mlp"}}, "neither a module nor a parameter"),
        ({"overrides": {"layers.0.mix": "attn"}}, "did you mean 'attention'"),
        ({"overrides": {"last": "mlp"}}, "nothing under 'last' can be 'mlp'"),
        ({"algorithm": "moun"}, "did you mean 'muon'"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"weight_decay": float("nan")}, "weight_decay"),
    ],
)
def test_wrong_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        param_groups(LM(), verbose=False, **options)


def test_nothing_to_train() -> None:
    with pytest.raises(InputError, match="no trainable parameters"):
        param_groups(nn.ReLU())
    with pytest.raises(InputError, match="are frozen"):
        param_groups(LM().requires_grad_(False))
    with pytest.raises(InputError, match="no shape yet"):
        param_groups(nn.LazyLinear(3))


def test_contradiction_is_named_and_can_be_overridden() -> None:
    shared = module(ff=module(a=lin(H, H), b=lin(H, H)), mix=module(a=lin(H, H), b=lin(H, H), c=lin(H, H), d=lin(H, H)))
    shared.mix.a.weight = shared.ff.a.weight
    with pytest.raises(InputError, match="shared by two roles") as caught:
        param_groups(shared, verbose=False)
    assert "ff.a.weight is 'mlp', mix.a.weight is 'attention'" in str(caught.value)
    assert roles(shared, overrides={"mix.a": "attention"})["ff.a.weight"] == "attention"
    with pytest.raises(InputError, match="give one override"):
        param_groups(shared, verbose=False, overrides={"mix.a": "attention", "ff.a": "mlp"})


def test_table_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    model = LM()
    model.table.requires_grad_(False)
    param_groups(model)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "expert" in shown.err
    assert f"{2 * E * 3 * H * I:,}" in shown.err
    assert "1 frozen" in shown.err
    param_groups(model, verbose=False)
    assert capsys.readouterr().err == ""


def test_adamw_takes_the_groups_and_makes_a_step() -> None:
    torch.manual_seed(0)
    model = LM()
    optimizer = torch.optim.AdamW(param_groups(model, verbose=False), lr=1e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(torch.randint(0, V, (2, 8))).backward()
    optimizer.step()
    assert all(
        not torch.equal(p, before[n]) for n, p in model.named_parameters() if p.grad is not None and p.grad.any()
    )
    assert sum(p.grad is not None for p in model.parameters()) == len(before)
    assert [g["role"] for g in optimizer.state_dict()["param_groups"]][:2] == ["router", "embedding"]


def test_groups_for_another_optimizer_are_refused_with_the_call_that_makes_them() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    with pytest.raises(
        InputError, match=r"Soap has no algorithm 'muon'[\s\S]*param_groups\(model, algorithm=\"soap\"\)"
    ):
        Soap(param_groups(model, verbose=False), lr=1e-3)
    Soap(param_groups(model, algorithm="soap", verbose=False), lr=1e-3)


@pytest.mark.parametrize("lr", ["1e-3", None])
def test_a_learning_rate_that_is_no_number_is_refused(lr: Any) -> None:
    with pytest.raises(InputError, match=r"lr=.* is no number"):
        Muon([torch.nn.Parameter(torch.ones(2, 2))], lr=lr)
