"""Recipes are data: what they say, what they refuse, how rules choose."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from moefx.errors import RecipeError
from moefx.precision import builtin  # noqa: F401  registers the recipes
from moefx.precision.formats import get_format
from moefx.precision.recipe import Recipe, Rule, get_recipe, lookup, recipe_names, register_recipe
from moefx.precision.spec import QuantSpec

ROW, COL, TILE = "e4m3 1x128 po2/rceil", "e4m3 128x1 po2/rceil", "e4m3 128x128 po2/rceil"
TENSOR = "e4m3 tensor f32/exact"
GOOD = {
    "input.fprop": ROW, "input.wgrad": COL, "weight.fprop": TILE, "weight.dgrad": TILE, "grad.dgrad": ROW,
    "grad.wgrad": COL,
}  # fmt: skip


def test_every_built_in_recipe_reads_and_has_a_line_about_it() -> None:
    assert {"bf16", "fp8_naive", "fp8_flow", "fp8_blockwise", "deepseek_v3", "fp8_rowwise", "fp8_tensorwise", "mxfp8",
            "mxfp4_hopper"} <= set(recipe_names())  # fmt: skip
    for name in recipe_names():
        r = get_recipe(name)
        assert r.about
        assert all(str(QuantSpec.parse(s)) == s for s in r.specs.values()), name
        assert r.passes[-1] == "dead_code_training"


def test_naive_is_flow_without_propagation_and_fusion() -> None:
    naive, flow = get_recipe("fp8_naive"), get_recipe("fp8_flow")
    assert naive.specs == flow.specs
    assert set(flow.passes) - set(naive.passes) == {
        "propagate_scales", "fold_casts", "transpose_scales", "fuse_casts", "store_low_precision",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"spec": {}}, ["unknown field 'spec'", "did you mean 'specs'"]),
        ({"specs": {"input.fpro": ROW}}, ["'input.fpro'", "did you mean 'input.fprop'"]),
        ({"specs": {"weight.wire": ROW}}, ["specs names 'weight.wire'"]),
        ({"specs": {**GOOD, "input.fprop": "e4m3 1x128 po2/exact"}}, ["specs['input.fprop']", "rule"]),
        ({"specs": {**GOOD, "input.fprop": "e9m9 1x128 po2/rceil"}}, ["specs['input.fprop']", "e9m9"]),
        ({"specs": {**GOOD, "input.wire": COL}}, ["specs['input.wire']", "blocks span rows"]),
        ({"specs": {**GOOD, "input.fprop": COL}}, ["fprop sums over columns", "1x128"]),
        ({"specs": {**GOOD, "grad.wgrad": ROW}}, ["wgrad sums over rows", "128x1"]),
        ({"specs": {**GOOD, "input.fprop": TILE}}, ["two-dimensional blocks on both", "input.fprop, weight.fprop"]),
        ({"specs": {"input.fprop": ROW}}, ["fprop of the up product has input.fprop but no weight.fprop"]),
        ({"specs": {**GOOD, "down.grad.wgrad": TILE, "down.input.wgrad": TILE}}, ["wgrad has two-dim"]),
        ({"rules": [Rule("*", {"input.wirre": ROW})]}, ["rules['*']", "'input.wirre'"]),
        ({"specs": ["input.fprop"]}, ["specs is list, not a mapping"]),
        ({"specs": {1: ROW}}, ["specs names '1'"]),
        ({"specs": {"input.wire": None}}, ["specs['input.wire'] is None", "leave the key out"]),
        ({"specs": {"hidden.stored": f"{TENSOR} delayed"}, "amax_history": 4}, ["hidden.stored", "no history"]),
        ({"specs": {"up.input.wire": ROW}}, ["specs names 'up.input.wire'", "write 'input.wire'"]),
        ({"specs": {"down.hidden.stored": ROW}}, ["'down.hidden.stored', which nothing reads", "'hidden.stored'"]),
        ({"rules": [Rule("*", {"input.wire": None})]}, ["rules['*']['input.wire'] is None"]),  # type: ignore[dict-item]
        ({"rules": ["*.layers.0"]}, ["rules holds '*.layers.0', which is no Rule"]),
        ({"rules": None}, ["rules is None, not a list", "[Rule("]),
        ({"rules": Rule("*")}, ["rules is Rule(path='*', specs=None), not a list", "[Rule("]),
        ({"rules": "*.layers.0.*"}, ["rules is '*.layers.0.*', not a list", "[Rule("]),
        ({"rules": {Rule("*")}}, ["rules is {Rule", "not a list"]),
        ({"passes": "quantize"}, ["passes is 'quantize', not a list", "['quantize'"]),
        ({"passes": None}, ["passes is None, not a list"]),
        ({"passes": [int]}, ["passes holds <class 'int'>, which is no name", "moefx.optimize(passes"]),
        ({"about": None}, ["about is None"]),
        ({"specs": None}, ["specs is NoneType, not a mapping"]),
        ({"amax_history": -1}, ["amax_history is -1"]),
        ({"amax_history": "4"}, ["amax_history is '4'"]),
        ({"amax_history": 2.5}, ["amax_history is 2.5"]),
        ({"align": 0}, ["align is 0"]),
        ({"propagate": "no"}, ["propagate is 'no'", "True or False"]),
        ({"fuse": "false"}, ["fuse is 'false'", "True or False"]),
        ({"force": "false"}, ["force is 'false'", "True or False"]),
        ({"allow_double_quant": 1}, ["allow_double_quant is 1", "True or False"]),
        ({"accumulate": {"fprop": "fp31"}}, ["accumulate['fprop']", "'fp31'", "fp32"]),
        ({"out": {"fprob": "wide"}}, ["out names 'fprob'", "did you mean 'fprop'"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(fields: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe("mine", **fields)
    assert "'mine'" in str(caught.value)
    for name in names:
        assert name in str(caught.value)
    Recipe("mine", specs=GOOD)  # the control


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ((3,), ["path of a rule is 3", "Rule('*.layers.0.*')"]),
        ((["*"], GOOD), ["path of a rule is ['*']"]),
        (("*", ROW), ["specs of the rule for '*' is str, not a mapping"]),
    ],
)
def test_a_rule_says_what_is_wrong_with_it(args: tuple[Any, ...], names: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        Rule(*args)
    assert all(name in str(caught.value) for name in names)


def test_a_recipe_may_be_given_by_its_specs() -> None:
    assert get_recipe(GOOD) == Recipe("custom", specs=GOOD)
    with pytest.raises(RecipeError, match=r"recipe 'custom': specs names 'input.fpro'"):
        get_recipe({"input.fpro": ROW})
    for other in ([ROW], None, 3, {"input.fprop"}):
        with pytest.raises(RecipeError, match=f"a {type(other).__name__}") as caught:
            get_recipe(other)  # type: ignore[arg-type]
        assert "a dict of specs" in (caught.value.todo or "")


def test_replacing_by_what_is_no_mapping() -> None:
    with pytest.raises(RecipeError, match="recipe 'b': specs is NoneType, not a mapping"):
        Recipe("a", specs=GOOD).replace("b", specs=None)


def test_names_are_text() -> None:
    with pytest.raises(RecipeError, match="recipe 3: name is 3"):
        Recipe(3)  # type: ignore[arg-type]
    for other in (3, ["te_sm90"]):
        with pytest.raises(RecipeError, match="unknown backend"):
            Recipe("a", specs=GOOD).for_backend(other)  # type: ignore[arg-type]
        with pytest.raises(RecipeError, match="unknown number format"):
            get_format(other)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "  ", "two\nlines", "tab\tbed"])
def test_a_name_is_one_line_of_text(name: str) -> None:
    for make in (lambda: Recipe(name), lambda: Recipe("a", specs=GOOD).replace(name)):
        with pytest.raises(RecipeError, match="name is") as caught:
            make()
        assert caught.value.why
        assert caught.value.todo


@pytest.mark.parametrize("given", [{"input.fprop": ROW}, None, "bf16", Recipe])
def test_what_is_no_recipe_is_not_registered(given: Any) -> None:
    with pytest.raises(RecipeError, match="not a recipe") as caught:
        register_recipe(given)
    assert "Recipe('mine'" in str(caught.value.todo)


def test_the_first_rule_that_matches_decides() -> None:
    r = Recipe(
        "ruled",
        specs=GOOD,
        rules=[Rule("*.layers.0.*"), Rule("*.mlp.experts", {"input.wire": ROW}), Rule("*.experts", {"grad.wire": ROW})],
    )
    assert r.for_module("model.layers.0.mlp.experts") is None
    assert r.for_module("model.layers.1.mlp.experts") == {**GOOD, "input.wire": ROW}
    assert r.for_module("model.layers.1.moe.experts") == {**GOOD, "grad.wire": ROW}
    assert r.for_module("model.layers.1.moe") == GOOD
    assert get_recipe("bf16").for_module("model.layers.1.moe") is None


def test_a_key_may_name_one_product() -> None:
    specs = {**GOOD, "down.input.fprop": "e4m3 1x128 f32/exact"}
    assert lookup(specs, "down", "input.fprop") == "e4m3 1x128 f32/exact"
    assert lookup(specs, "up", "input.fprop") == ROW
    assert lookup(specs, "up", "input.wire") is None


def test_replacing_adds_specs_and_takes_them_out() -> None:
    r = Recipe("a", specs=GOOD).replace(
        "b", "about b", specs={"input.wire": ROW, "grad.wgrad": None, "input.wgrad": None}
    )
    assert (r.name, r.about) == ("b", "about b")
    assert r.specs == {**{k: v for k, v in GOOD.items() if "wgrad" not in k}, "input.wire": ROW}
    assert "quantize" in r.passes


def test_registering() -> None:
    mine = register_recipe(Recipe("test_registering", specs=GOOD))
    assert register_recipe(Recipe("test_registering", specs=GOOD)) is mine or get_recipe("test_registering") == mine
    with pytest.raises(RecipeError, match="registered already"):
        register_recipe(Recipe("test_registering"))
    with pytest.raises(RecipeError, match="did you mean 'fp8_flow'"):
        get_recipe("fp8_flo")


def test_recipes_pickle_and_compare() -> None:
    r = get_recipe("fp8_flow")
    assert pickle.loads(pickle.dumps(r)) == r
    assert hash(Recipe("a", specs=GOOD)) == hash(Recipe("a", specs=dict(reversed(GOOD.items()))))
    assert Recipe("a", specs=GOOD) != Recipe("a", specs=GOOD, propagate=False)


WRITES: dict[str, Callable[[Any], object]] = {
    "item": lambda d: d.__setitem__("input.fprop", "nonsense"),
    "del": lambda d: d.__delitem__("input.fprop"),
    "or": lambda d: d.__ior__({"input.fprop": "nonsense"}),
    "update": lambda d: d.update({"input.fprop": "nonsense"}),
    "setdefault": lambda d: d.setdefault("input.wire", "nonsense"),
    "pop": lambda d: d.pop("input.fprop"),
    "popitem": lambda d: d.popitem(),
    "clear": lambda d: d.clear(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_recipe_cannot_be_written_to(write: Callable[[Any], object]) -> None:
    ruled = Recipe("a", specs=GOOD, rules=[Rule("*", GOOD)])
    for mapping in (ruled.specs, ruled.rules[0].specs, Recipe("b").specs, Recipe("b").accumulate, ruled.out):
        before = dict(mapping or {})
        with pytest.raises(RecipeError, match="cannot be written to"):
            write(mapping)
        assert mapping == before
    assert Recipe("b").specs == get_recipe("bf16").specs == {}


def test_what_a_recipe_was_made_of_may_change_afterwards() -> None:
    specs, ruled, out, rules = dict(GOOD), dict(GOOD), {"fprop": "wide"}, [Rule("*.layers.0.*")]
    rules.append(Rule("*", ruled))
    r = Recipe("a", specs=specs, rules=rules, out=out)
    before = hash(r)
    specs["input.fprop"] = ruled["input.fprop"] = out["fprop"] = "nonsense"
    rules.clear()
    assert r.specs == r.rules[1].specs == GOOD
    assert (r.out, len(r.rules), hash(r)) == ({"fprop": "wide"}, 2, before)


def test_copies_of_a_recipe_are_equal_to_it_and_closed_too() -> None:
    r = Recipe("a", specs=GOOD, rules=[Rule("*", GOOD)], accumulate={"fprop": "fp32"})
    copies = [copy.copy(r), copy.deepcopy(r), dataclasses.replace(r, about="")]
    copies += [pickle.loads(pickle.dumps(r, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    for c in copies:
        assert c == r
        assert (hash(c), hash(c.rules), repr(c)) == (hash(r), hash(r.rules), repr(r))
        for mapping in (c.specs, c.rules[0].specs):
            with pytest.raises(RecipeError, match="cannot be written to"):
                WRITES["item"](mapping)
    assert json.loads(json.dumps(r.specs)) == {**r.specs} == GOOD
    assert dataclasses.asdict(r)["rules"] == ({"path": "*", "specs": GOOD},)


def test_how_a_recipe_prints_stays() -> None:
    """Checkpoints identify a recipe of the user's own by it (`moefx.train.identity`)."""
    r = Recipe("a", specs={"hidden.stored": ROW}, rules=[Rule("*", {"input.wire": ROW})])
    assert repr(r).startswith(
        f"Recipe(name='a', about='', specs={{'hidden.stored': '{ROW}'}}, "
        f"rules=(Rule(path='*', specs={{'input.wire': '{ROW}'}}),), align=1, accumulate={{}}, out={{}}, turn='tight'"
    )
