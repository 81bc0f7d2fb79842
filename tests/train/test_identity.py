"""What tells two runs apart whose tensors have the same shapes, and what does not."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import moefx
from moefx.losses import LoadBalance
from moefx.precision.recipe import get_recipe
from moefx.train.identity import digest_of, identity

from .toy import ToyLM


def configured(**changes: Any) -> ToyLM:
    model = ToyLM()
    entries = {"theta": 1e4, "dtype": torch.float32, "transformers_version": "5", "_name_or_path": "here", **changes}
    model.config = SimpleNamespace(to_dict=lambda: entries)  # type: ignore[assignment]
    return model


def table(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Embedding(16, 4)


BASE: dict[str, Any] = {"recipe": "bf16", "losses": "sp", "codegen": "inductor"}


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"recipe": "fp8_flow"}, "recipe"),
        ({"losses": "sp=1"}, "losses"),
        ({"losses": "sp,bias"}, "losses"),
        ({"router": table(0)}, "router"),
        ({"passes": ["raise_routers"]}, "passes"),
    ],
)
def test_what_differs(options: dict[str, Any], path: str) -> None:
    model = configured()
    one, two = identity(model, "spec", BASE), identity(model, "spec", {**BASE, **options})
    assert [key for key in one if one[key] != two[key]] == [path]


def test_what_does_not() -> None:
    model, want = configured(), identity(configured(), "a.json", BASE)
    harmless = {"codegen": "eager", "verify": True, "losses": [moefx.losses.Specialization(), "metrics"]}
    assert identity(model, "other/a.json", {**BASE, **harmless, "recipe": get_recipe("bf16")}) == want
    assert identity(configured(transformers_version="6", _name_or_path="there"), None, BASE) == want
    assert identity(configured(theta=7.0), None, BASE)["model"] != want["model"]


def test_specs_alone_are_the_recipe_of_these_specs() -> None:
    specs = dict(get_recipe("fp8_flow").specs)
    one, two = (identity(configured(), None, {"recipe": r}) for r in (specs, moefx.Recipe("custom", specs=specs)))
    assert one == two
    assert one["recipe"].startswith("custom ")


def test_models_without_a_configuration_are_known_by_where_they_come_from() -> None:
    assert identity(ToyLM(), "mine:make") == identity(ToyLM(seed=1), "mine:make")
    assert identity(ToyLM(), "mine:make") != identity(ToyLM(), "mine:other")
    assert identity(ToyLM()) != identity(nn.Linear(2, 2))


def test_recipes_are_known_by_name_only_where_the_name_says_all() -> None:
    model, fp8 = ToyLM(), get_recipe("fp8_flow")
    changed = [fp8.replace("fp8_flow", align=rows) for rows in (32, 64)]
    names = [identity(model, None, {"recipe": r})["recipe"] for r in ("fp8_flow", fp8, *changed)]
    assert names[0] == names[1] == "fp8_flow"
    assert names[2].startswith("fp8_flow ")
    assert len(set(names)) == 3


def test_a_router_is_its_weights_and_how_it_is_used() -> None:
    model = ToyLM()
    found = [
        identity(model, None, {"router": r})["router"]
        for r in (table(0), table(0), table(1), moefx.Routing(table(0), scale=2.0))
    ]
    assert found[0] == found[1]
    assert len({str(f) for f in found}) == 3
    assert digest_of(table(0).to(torch.bfloat16)) != digest_of(table(0))


def test_losses_of_the_users_own() -> None:
    heavier = replace(LoadBalance(), weight=3.0)
    assert identity(ToyLM(), None, {"losses": [heavier]})["losses"] == {"lb": repr(heavier)}
