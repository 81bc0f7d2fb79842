"""Groups, checks, saving and resuming."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moefx.errors import InputError
from moefx.optim import AdamW, LiteConfig, Muon, MuonLITE, Ramp, Soap, SoapLITE

Tensor = torch.Tensor
RAMPED = LiteConfig(Ramp(1.0, 2.0, 4, 12), -0.25, Ramp(-0.25, 1.0, 4, 12), chi_diagonal=Ramp(1.0, 4.0, 0, 9))
PARITY = LiteConfig(Ramp(1.0, 2.0, 4, 12), -0.25, Ramp(-0.25, 1.0, 4, 12), mode="parity")
MADE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "muon": lambda groups: Muon(groups, lr=0.02),
    "muon-lite": lambda groups: Muon(groups, lr=0.02, lite=RAMPED),
    "muon-parity": lambda groups: MuonLITE(groups, lr=0.02, lite=PARITY),
    "muon-callable": lambda groups: MuonLITE(groups, lr=0.02, lite=LiteConfig(lambda t: 1 + t / 10)),
    "soap": lambda groups: Soap(groups, frequency=3),
    "soap-lite": lambda groups: SoapLITE(groups, lite=RAMPED, frequency=3),
}


def problem(dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], list[dict[str, Any]]]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(*s, generator=generator).to(dtype)) for s in ((8, 12), (3, 8, 12), (12,))]
    groups = [
        {"params": params[:2], "names": ["w", "experts"]},
        {"params": params[2:], "names": ["norm"], "algorithm": "adamw", "role": "norm"},
    ]
    return params, groups


def train(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for t in steps:
        generator = torch.Generator().manual_seed(50 + t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        params[1].grad[t % 3] = 0
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(MADE))
def test_invariant_9_resuming_mid_ramp_is_the_uninterrupted_run_bitwise(kind: str, dtype: torch.dtype) -> None:
    params, groups = problem(dtype)
    optimizer = MADE[kind](groups)
    train(params, optimizer, range(15))

    first, groups = problem(dtype)
    before = MADE[kind](groups)
    train(first, before, range(7))
    saved = io.BytesIO()
    torch.save({"optimizer": before.state_dict(), "params": [p.detach() for p in first]}, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)  # tensors, numbers, strings and containers only

    second, groups = problem(dtype)
    after = MADE[kind](groups)
    train(second, after, range(20, 22))  # what it did before does not matter
    after.load_state_dict(loaded["optimizer"])
    for p, value in zip(second, loaded["params"], strict=True):
        p.data.copy_(value)
    train(second, after, range(7, 15))
    for p, q in zip(params, second, strict=True):
        assert torch.equal(p, q)
    for p, q in zip(params, second, strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, after.state[q][key]), key
            assert value.dtype == after.state[q][key].dtype
    assert [int(g["step"]) for g in after.param_groups] == [15, 15]


@pytest.mark.parametrize("kind", list(MADE))
def test_resuming_after_any_step_is_the_uninterrupted_run_bitwise(kind: str) -> None:
    params, groups = problem()
    whole, saved = MADE[kind](groups), []
    for t in range(14):
        saved.append(copy.deepcopy(([p.detach() for p in params], whole.state_dict())))
        train(params, whole, range(t, t + 1))
    for t, (values, state) in enumerate(saved):
        again, groups = problem()
        optimizer = MADE[kind](groups)
        optimizer.load_state_dict(state)
        for p, value in zip(again, values, strict=True):
            p.data.copy_(value)
        train(again, optimizer, range(t, 14))
        assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True)), t


def test_losing_the_step_is_noticed() -> None:
    # The negative control: without the counter in the state, the ramp would start again.
    results = []
    for reset in (False, True):
        params, groups = problem()
        optimizer = MADE["muon-lite"](groups)
        train(params, optimizer, range(7))
        if reset:
            for group in optimizer.param_groups:
                group["step"].zero_()
        train(params, optimizer, range(7, 12))
        results.append(params[0].detach().clone())
    assert not torch.equal(*results)


def test_state_exists_before_the_first_step() -> None:
    _, groups = problem()
    for kind, make in MADE.items():
        optimizer = make(copy.deepcopy(groups))
        keys = [sorted(s) for s in optimizer.state_dict()["state"].values()]
        train([p for g in optimizer.param_groups for p in g["params"]], optimizer, range(5))
        assert keys == [sorted(s) for s in optimizer.state_dict()["state"].values()], kind


def test_a_loaded_state_is_a_copy() -> None:
    params, groups = problem()
    optimizer = MADE["muon-lite"](groups)
    train(params, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    train(params, optimizer, range(3, 6))
    for index, state in kept["state"].items():
        for key, value in state.items():
            assert torch.equal(value, saved["state"][index][key])
    assert int(saved["param_groups"][0]["step"]) == 3


@pytest.mark.parametrize("kind", ["muon-lite", "muon-parity", "soap-lite"])
def test_a_copied_optimizer_goes_on(kind: str) -> None:
    params, groups = problem()
    optimizer = MADE[kind](groups)
    train(params, optimizer, range(5))
    copied = copy.deepcopy(optimizer)
    others = [p for g in copied.param_groups for p in g["params"]]
    train(params, optimizer, range(5, 9))
    train(others, copied, range(5, 9))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


class ReadsOfTensors(TorchDispatchMode):
    """Every tensor whose value Python asks for: on a device, each would be a wait."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "item", "equal")
        if func.overloadpacket.__name__.split(".")[-1] in waits:
            self.read.append(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", list(MADE))
def test_a_step_reads_only_counters_that_live_on_the_cpu(kind: str) -> None:
    params, groups = problem()
    optimizer = MADE[kind](groups)
    train(params, optimizer, range(7))
    counters = [g[k] for g in optimizer.param_groups for k in ("step", "projected") if k in g]
    counters += [s["calls"] for s in optimizer.state.values() if "calls" in s]
    for p in params:
        p.grad = torch.randn_like(p)
    params[1].grad[0] = 0
    with ReadsOfTensors() as mode:
        optimizer.step()
    assert mode.read
    assert {t.data_ptr() for t in mode.read} <= {t.data_ptr() for t in counters}
    for group in optimizer.param_groups:
        group["nonfinite"] = "raise"
    with ReadsOfTensors() as mode:
        optimizer.step()
    assert {t.data_ptr() for t in mode.read} - {t.data_ptr() for t in counters}  # what was asked for waits, and is seen


def test_schedulers_and_closures_work() -> None:
    params, groups = problem()
    optimizer = MADE["muon-lite"](groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    losses = []
    for _ in range(4):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses == sorted(losses, reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02 / 5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s["param_groups"].pop(), "1 groups were saved, 2 are here"),
        (lambda s: s["param_groups"][0]["params"].pop(), "1 parameters were saved, 2 are here"),
        (lambda s: s["param_groups"][0].update(names=["w", "other"]), "other"),
        (lambda s: s["param_groups"][1].update(algorithm="muon"), "algorithm"),
        (lambda s: s["param_groups"][0].update(layout="in_out"), "layout"),
        (lambda s: s["param_groups"][0].update(lite=None), "lite"),
        (lambda s: s["param_groups"][0]["lite"].update(rank_fraction=0.2), "rank_fraction"),
        (lambda s: s["state"].pop(1), "parameter 1"),
        (lambda s: s["state"][0].update(momentum_buffer=torch.zeros(8, 11)), r"momentum_buffer \[8, 11\]"),
        (lambda s: s["state"][0].pop("basis"), "basis"),
    ],
)
def test_another_optimizers_state_is_refused_and_changes_nothing(change: Callable[[Any], Any], match: str) -> None:
    params, groups = problem()
    optimizer = MADE["muon-lite"](groups)
    train(params, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(InputError, match=match):
        optimizer.load_state_dict(saved)
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, before["state"][index][key])


def test_hooks_before_loading_make_the_state_that_is_checked_and_loaded() -> None:
    params, groups = problem(torch.bfloat16)
    optimizer = MADE["muon-lite"](groups)
    train(params, optimizer, range(3))
    renamed = optimizer.state_dict()
    renamed = {
        **renamed,
        "param_groups": [{**g, "names": [f"model.{n}" for n in g["names"]]} for g in renamed["param_groups"]],
    }
    kept = copy.deepcopy(renamed)

    second, groups = problem(torch.bfloat16)
    other, calls = MADE["muon-lite"](groups), []

    def short(o: Any, saved: dict[str, Any]) -> dict[str, Any]:
        calls.append("returned")
        groups = [{**g, "names": [n.removeprefix("model.") for n in g["names"]]} for g in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    def halved(o: Any, saved: dict[str, Any]) -> None:  # in place of the copy that hooks are given, as torch allows
        calls.append("in place")
        saved["state"] = {
            i: {k: v / 2 if k in ("momentum_buffer", "exp_avg") else v for k, v in s.items()}
            for i, s in saved["state"].items()
        }

    with pytest.raises(InputError, match="names"):
        other.load_state_dict(renamed)
    other.register_load_state_dict_pre_hook(short)
    other.register_load_state_dict_pre_hook(halved)
    other.load_state_dict(renamed)
    assert calls == ["returned", "in place"]
    for p, q in zip(params, second, strict=True):
        for key, value in optimizer.state[p].items():
            want = value / 2 if key in ("momentum_buffer", "exp_avg") else value
            assert torch.equal(other.state[q][key], want), key
    assert [g["names"] for g in other.param_groups] == [["w", "experts"], ["norm"]]
    assert [g["names"] for g in renamed["param_groups"]] == [g["names"] for g in kept["param_groups"]]
    train(second, other, range(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooks_after_loading_have_the_last_word(dtype: torch.dtype) -> None:
    params, groups = problem(dtype)
    optimizer = MADE["muon"](groups)
    train(params, optimizer, range(3))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    optimizer.register_load_state_dict_post_hook(lambda o: [s.zero_() for x in o.state.values() for s in x.values()])
    optimizer.load_state_dict(saved)
    assert not any(value.any() for x in optimizer.state.values() for value in x.values())
    assert all(torch.equal(v, kept["state"][i][k]) for i, x in saved["state"].items() for k, v in x.items())


def test_the_error_for_renamed_parameters_is_short() -> None:
    names = [f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(400)]
    groups = [[{"params": [matrix(2, 2) for _ in names], "names": n}] for n in (names, [f"base_{n}" for n in names])]
    old, new = (Muon(g) for g in groups)
    with pytest.raises(InputError, match=r"layers\.2(.|\n)*and 397 more") as caught:
        new.load_state_dict(old.state_dict())
    assert "'model.layers.0.mlp.experts.gate_up_proj' was saved, 'base_model.layers.0" in str(caught.value)
    assert len(str(caught.value)) < 800
    with pytest.raises(InputError, match="None is here") as caught:
        Muon([{"params": [matrix(2, 2) for _ in names]}]).load_state_dict(old.state_dict())
    assert len(str(caught.value)) < 800
    with pytest.raises(InputError, match="no 'param_groups'"):
        new.load_state_dict({})


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=dtype))


SHARED = matrix(3, 4)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Muon([matrix(5)]), 'algorithm="adamw"'),
        (lambda: Muon([matrix(0, 5)]), "no matrix"),
        (lambda: Muon([matrix(3, 4, dtype=torch.complex64)]), "complex64"),
        (lambda: Muon([{"params": [SHARED]}, {"params": [SHARED]}]), "group 0 and again in group 1"),
        (lambda: Muon([SHARED, SHARED]), "given twice"),
        (lambda: Muon([]), "no parameters"),
        (lambda: Muon(SHARED), "is a Parameter"),
        (lambda: Muon({SHARED}), "is a set"),
        (lambda: Muon([{"params": {SHARED}}]), "no list"),
        (lambda: Muon([{"names": ["w"]}]), "no list"),
        (lambda: Muon([SHARED * 2]), "leaf"),
        (lambda: Muon(["w"]), "leaf"),
        (lambda: Muon([{"params": [SHARED], "algorithm": "moun"}]), "did you mean 'muon'"),
        (lambda: Soap([{"params": [SHARED], "algorithm": "muon"}]), "known: adamw, soap"),
        (lambda: AdamW([{"params": [SHARED], "role": "experts"}]), "did you mean 'expert'"),
        (lambda: Muon([{"params": [SHARED], "names": ["a", "b"]}]), "2 names"),
        (lambda: Muon([SHARED], layout="out"), "layout"),
        (lambda: Muon([SHARED], scale="rsm"), "did you mean 'rms'"),
        (lambda: Muon([SHARED], polar="cubic"), "polynomial"),
        (lambda: Muon([SHARED], polar_dtype="float8"), "polar_dtype"),
        (lambda: Muon([SHARED], momentum=1.0), "momentum"),
        (lambda: Muon([SHARED], lr=-1.0), "lr"),
        (lambda: Muon([SHARED], lr=float("nan")), "lr"),
        (lambda: Muon([SHARED], weight_decay=-1.0), "weight_decay"),
        (lambda: Muon([SHARED], nonfinite="ignore"), "nonfinite"),
        (lambda: Muon([SHARED], lite=2.0), "LiteConfig"),
        (lambda: Muon([{"params": [SHARED], "lite": "off"}]), "True, False"),
        (lambda: Muon([SHARED], replicas="splits"), "did you mean 'split'"),
        (lambda: Muon([nn.Parameter(torch.zeros(2, 3, 4, 5).transpose(0, 1))]), "contiguous"),
    ],
)
def test_errors(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        make()


def test_a_refused_group_is_not_added() -> None:
    optimizer = Muon([matrix(3, 4)])
    with pytest.raises(InputError, match="no matrix"):
        optimizer.add_param_group({"params": [matrix(5)]})
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.state) == 1
    optimizer.add_param_group({"params": [matrix(5)], "algorithm": "adamw"})
    assert "exp_avg" in optimizer.state[optimizer.param_groups[1]["params"][0]]


@pytest.mark.parametrize("cls", [Muon, Soap, AdamW])
def test_sparse_gradients_are_refused(cls: type[torch.optim.Optimizer]) -> None:
    embedding = nn.Embedding(5, 4, sparse=True)
    optimizer = cls([("table", embedding.weight)])
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(InputError, match=r"table(.|\n)*sparse=False"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)


def test_complex_gradients_do_not_reach_the_optimizer() -> None:
    p = matrix(3, 4)
    Muon([p])
    with pytest.raises(RuntimeError, match="type"):
        p.grad = torch.zeros(3, 4, dtype=torch.complex64)


@pytest.mark.parametrize("cls", [Muon, Soap, AdamW])
def test_nan_is_skipped_and_counted_or_raised(cls: type[torch.optim.Optimizer]) -> None:
    for nonfinite in ("skip", "raise"):
        p = nn.Parameter(torch.ones(3, 4))
        optimizer = cls([("w", p)], nonfinite=nonfinite)
        for t in range(3):  # SOAP's first gradient gives its bases alone
            p.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(t))
            optimizer.step()
        before = p.detach().clone()
        p.grad[1, 2] = torch.nan
        if nonfinite == "skip":
            optimizer.step()
            assert optimizer.skipped() == {"group 0: w": 1}
        else:
            with pytest.raises(InputError, match=r"w(.|\n)*1 of 12 entries"):
                optimizer.step()
        assert torch.equal(p, before)


def test_roles_choose_the_algorithm_unless_the_group_does() -> None:
    roles = ("embedding", "head", "norm", "bias", "router", "expert", "attention", "mlp", "other")
    optimizer = Muon([{"params": [matrix(3, 4)], "role": role} for role in roles])
    assert [g["algorithm"] for g in optimizer.param_groups] == ["adamw"] * 4 + ["muon"] * 5
    optimizer.add_param_group({"params": [matrix(3, 4)], "role": "head", "algorithm": "muon"})
    assert optimizer.param_groups[-1]["algorithm"] == "muon"


def test_a_group_may_have_its_own_lite_or_none() -> None:
    own = LiteConfig(3.0)
    groups = [{"params": [matrix(3, 4)], "lite": x} for x in (True, False, own)]
    groups.append({"params": [matrix(3, 4)], "role": "router", "lite": True})
    optimizer = Muon(groups, lite=RAMPED)
    assert [g["lite"] for g in optimizer.param_groups] == [RAMPED, None, own, RAMPED]
    assert [g["lite"] for g in Muon([{"params": [matrix(3, 4)], "lite": True}]).param_groups] == [None]
