"""Options of optimizers and of their groups: which of two numbers counts, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moefx.errors import InputError
from moefx.optim import AdamW, LiteConfig, Muon, MuonLITE, Soap, param_groups

Tensor = torch.Tensor


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model() -> nn.Module:
    """Matrices, biases and a norm."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 8))


# -- weight decay ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "make", "default"),
    [("muon", Muon, 0.1), ("soap", Soap, 0.01), ("adamw", AdamW, 0.1), ("adamw", torch.optim.AdamW, 0.01)],
)
def test_decay_is_the_optimizers_unless_the_groups_say_it(algorithm: str, make: Any, default: float) -> None:
    def decays(given: float | None, **options: float) -> set[tuple[bool, float]]:
        groups = param_groups(model(), algorithm=algorithm, weight_decay=given, verbose=False)
        made = make(groups, lr=1e-3, **options).param_groups
        return {(g["role"] in ("norm", "bias"), g["weight_decay"]) for g in made}

    assert decays(None) == {(True, 0.0), (False, default)}
    assert decays(None, weight_decay=0.0) == {(True, 0.0), (False, 0.0)}
    assert decays(None, weight_decay=0.4) == {(True, 0.0), (False, 0.4)}
    assert decays(0.3, weight_decay=0.4) == {(True, 0.0), (False, 0.3)}
    assert decays(0.0, weight_decay=0.4) == {(True, 0.0), (False, 0.0)}


@pytest.mark.parametrize("decay", [0.0, 0.4])
def test_decay_of_the_optimizer_is_what_weights_get(decay: float) -> None:
    net = model()
    matrices = [p for p in net.parameters() if p.ndim == 2]
    alone = [nn.Parameter(p.detach().clone()) for p in matrices]
    optimizers = [Muon(x, lr=0.1, weight_decay=decay) for x in (param_groups(net, verbose=False), alone)]
    for p, q in zip(matrices, alone, strict=True):
        p.grad, q.grad = random(*p.shape), random(*p.shape)
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(matrices, alone, strict=True))


def test_the_table_says_whose_decay_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    param_groups(model())
    assert "optimizer's" in capsys.readouterr().err
    param_groups(model(), weight_decay=0.25)
    shown = capsys.readouterr().err
    assert "optimizer's" not in shown
    assert "0.25" in shown


# -- refused ---------------------------------------------------------------------------------------------------------


def matrix() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, 4))]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AdamW(matrix(), eps=-1.0), "eps=-1.0 is negative"),
        (lambda: AdamW(matrix(), eps=None), "eps=None is no number"),
        (lambda: Muon(matrix(), lr=float("inf")), "lr=inf is negative, infinite"),
        (lambda: Muon(matrix(), lr=torch.tensor([1.0, 2.0])), "lr=.* is no number"),
        (lambda: Soap(matrix(), weight_decay=float("nan")), "weight_decay=nan"),
        (lambda: Muon(matrix(), momentum=None), "momentum=None is no number"),
        (lambda: Muon(matrix(), polar_steps=0), r"polar_steps=0(.|\n)*None for 8"),
        (lambda: Muon(matrix(), polar_steps=2.5), "polar_steps=2.5 is no count"),
        (lambda: Muon(matrix(), betas=(0.9,)), "two numbers"),
        (lambda: Muon(matrix(), betas=0.9), "two numbers"),
        (lambda: AdamW(matrix(), betas=("0.9", 0.95)), "two numbers"),
        (lambda: Soap(matrix(), adamw_betas=(0.9, -0.1)), "adamw_betas"),
        (lambda: Soap(matrix(), frequency=2.5), "frequency=2.5"),
        (lambda: Soap(matrix(), shampoo_beta=1.5), "shampoo_beta=1.5 is no average"),
    ],
)
def test_options_out_of_range(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        make()


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"nonfinite": "rasie"}, r"group 1(.|\n)*did you mean 'raise'"),
        ({"maximize": True}, r"maximize=True is not supported(.|\n)*group 1(.|\n)*negative of the loss"),
        ({"amsgrad": True}, "amsgrad"),
        ({"lr": -1.0}, r"lr=-1.0(.|\n)*group 1"),
        ({"betas": (0.9,)}, "betas"),
        ({"polar_steps": 0}, "polar_steps=0"),
        ({"layout": "rows"}, "layout"),
    ],
)
def test_options_of_a_group_are_checked_too(option: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        Muon([{"params": matrix()}, {"params": matrix(), **option}])
    same = {"maximize": False, "amsgrad": False, "foreach": True, "name": "mine"}  # what changes nothing may be there
    assert len(Muon([{"params": matrix()}, {"params": matrix(), **same}]).param_groups) == 2


@pytest.mark.parametrize("cls", [Muon, MuonLITE, Soap])
@pytest.mark.parametrize("error", [InputError, RuntimeError, KeyboardInterrupt])
def test_a_refused_group_leaves_nothing_whatever_was_raised(
    cls: type[Muon | Soap], error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, more = matrix(), [*matrix(), *matrix()]
    optimizer, alone = cls(first, lr=0.1), cls(clones := matrix(), lr=0.1)
    own, made = cls.algorithms[cls.own], []

    def state(p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        if made:
            raise error("out of memory")  # with the second parameter, as memory would
        made.append(p)
        return own.state(p, group)

    with monkeypatch.context() as patch:
        patch.setitem(cls.algorithms, cls.own, own._replace(state=state))
        with pytest.raises(error, match="out of memory"):
            optimizer.add_param_group({"params": more})
    assert len(optimizer.param_groups) == 1
    assert set(optimizer.state) == set(first)
    for t in range(3):
        for p in (*first, *clones, *more):
            p.grad = random(3, 4, seed=t)
        optimizer.step()
        alone.step()
    assert torch.equal(first[0], clones[0])
    optimizer.add_param_group({"params": more})  # the same parameters, once there is room
    assert len(optimizer.state) == 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"chi": None}, "chi=None is no finite number"),
        ({"chi": "2"}, "chi='2'"),
        ({"chi": float("nan")}, "chi=nan"),
        ({"beta1": None}, "beta1=None"),
        ({"beta2": float("inf")}, "beta2=inf"),
        ({"chi_diagonal": -1.0}, "flat directions"),
        ({"kappa": "small"}, "kappa='small'"),
        ({"kappa": lambda step: 1.0}, "kappa"),
        ({"rank_fraction": lambda step: 0.1}, r"no share(.|\n)*the same in all steps"),
        ({"rank_fraction": None}, "rank_fraction=None"),
        ({"damping_steps": 2.5}, "damping_steps=2.5"),
        ({"spare": None}, "spare=None"),
    ],
)
def test_lite_takes_numbers(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        LiteConfig(**options)


def test_what_of_lite_may_follow_the_steps() -> None:
    def follow(step: int) -> float:
        return 1.0 + step

    found = LiteConfig(chi=follow, beta1=follow, beta2=follow, chi_diagonal=follow)
    assert found.values(3) == (4.0, 4.0, 4.0)
    assert found.diagonal(2) == 3.0
    assert LiteConfig(chi_diagonal=None, kappa=None) == LiteConfig()
