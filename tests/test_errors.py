"""Bad input: the right exception, and a text that says what happened, where, why and what to do."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx, nn

import moefx
from moefx.errors import first_line, nearest

from . import reference as ref

Tensor = torch.Tensor


class Mlp(nn.Module):
    """No experts anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(ref.HIDDEN, 8)

    def forward(self, x: Tensor) -> Any:
        return self.up(x).sum()


class Branches(ref.Block):
    """Its forward looks at a value."""

    def forward(self, x: Tensor) -> Any:
        y = self.moe(x)
        if y.sum() > 0:  # this line
            y = y * 2
        return y.sum()


class Breaks(ref.Block):
    """Its forward leaves the tracer."""

    def forward(self, x: Tensor) -> Any:
        y = self.moe(x)
        torch._dynamo.graph_break()  # this line
        return y.sum()


class Fails(ref.Block):
    """A fault of the model's own."""

    def forward(self, x: Tensor) -> Any:
        return self.moe(x) @ torch.ones(3, 3)


class Stores(ref.Block):
    """Its output is no tensor, container or constant."""

    def forward(self, x: Tensor) -> Any:
        return Held(self.moe(x))


class Held:
    """An object that nothing knows how to flatten."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


class Steps(ref.Block):
    """Writes into a parameter that is trained."""

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            self.moe.gate.weight.mul_(0.5)
        return self.moe(x).square().mean()


class Consumes(ref.Block):
    """Eager execution cannot differentiate this either."""

    def forward(self, x: Tensor) -> Any:
        y = self.moe(x)
        z = y.exp()
        y = z.sin()
        z.zero_()
        return y.sum()


class ReadsOff(ref.Block):
    """Returns its loss as a float, too."""

    def forward(self, x: Tensor) -> Any:
        """Both."""
        loss = super().forward(x)
        return {"loss": loss, "value": loss.item()}  # this line


@dataclass(frozen=True)
class Mine(moefx.Pass):
    """A user's pass."""

    def run(self, graph: fx.Graph, ctx: moefx.Context) -> None:
        """Nothing."""


def line_of(cls: type) -> str:
    """`file:line` of the comment `# this line` in a class."""
    lines, first = inspect.getsourcelines(cls)
    return f"{inspect.getsourcefile(cls)}:{first + next(i for i, t in enumerate(lines) if '# this line' in t)}"


def block(**options: Any) -> Any:
    return moefx.optimize(ref.Block(), (ref.hidden(),), **{"codegen": "eager", **options})


def call(model: Any, *args: Any, **kwargs: Any) -> Any:
    return moefx.optimize(model, kwargs or args, codegen="eager")


Case = tuple[Callable[[], Any], type[moefx.MoefxError], list[str]]
CASES: dict[str, Case] = {
    # the model
    "no block": (
        lambda: call(Mlp(), ref.hidden()),
        moefx.CaptureError,
        ["no MoE block was found", "where: Mlp", "docs/models.md"],
    ),
    "no module": (
        lambda: moefx.optimize(lambda x: x, (ref.hidden(),)),
        moefx.InputError,
        ["the model is a function, not an nn.Module", "pass the module itself"],
    ),
    "a model in a wrapper": (
        lambda: call(torch.nn.DataParallel(ref.Block()), ref.hidden()),
        moefx.InputError,
        ["the model is wrapped in DataParallel", "DistributedDataParallel(moefx.optimize(model.module, ...))"],
    ),
    "a part that is optimized already": (
        lambda: call(torch.nn.Sequential(block(), torch.nn.Identity()), ref.hidden()),
        moefx.InputError,
        ["holds a module that is optimized already, 0", "where: Sequential", "`.original`"],
    ),
    "a number read off a tensor": (
        lambda: call(ReadsOff(), ref.hidden()),
        moefx.CaptureError,
        ["returns a Python number", line_of(ReadsOff), "loss.detach()"],
    ),
    "a model that fails by itself": (
        lambda: call(Fails(), ref.hidden()),
        moefx.InputError,
        ["the model itself fails on these inputs", "where: Fails", "RuntimeError: ", "mend that first"],
    ),
    "a branch on a value": (
        lambda: call(Branches(), ref.hidden()),
        moefx.CaptureError,
        [
            "Branches could not be traced",
            f"{line_of(Branches)} in forward: if y.sum() > 0:",
            "without looking at values",
        ],
    ),
    "a graph break": (
        lambda: call(Breaks(), ref.hidden()),
        moefx.CaptureError,
        ["Breaks could not be traced", f"{line_of(Breaks)} in forward", "what to do: "],
    ),
    "an output of an unknown type": (
        lambda: call(Stores(), ref.hidden()),
        moefx.CaptureError,
        ["Held", "not a known type", "outputs are tensors and plain containers"],
    ),
    "a parameter written in forward": (
        lambda: call(Steps(), ref.hidden()),
        moefx.CaptureError,
        ["moe.gate.weight, which receives gradients", "what to do: "],
    ),
    "a backward that fails in eager too": (
        lambda: call(Consumes(), ref.hidden()),
        moefx.CaptureError,
        ["could not be traced into a training graph", "modified by an inplace operation", "run without moefx"],
    ),
    # the inputs
    "inputs of a wrong type": (
        lambda: moefx.optimize(ref.Block(), "x"),
        moefx.InputError,
        ["example_inputs has type str", "pass a dict of keyword tensors"],
    ),
    "no inputs": (
        lambda: moefx.optimize(ref.Block(), ()),
        moefx.InputError,
        ["do not fit", "where: Block", "missing a required argument: 'x'", "forward(x"],
    ),
    "an unknown keyword": (
        lambda: call(ref.Two(), xs=ref.hidden()),
        moefx.InputError,
        ["where: Two", "unexpected keyword argument 'xs'|missing a required argument: 'x'", "did you mean 'x'"],
    ),
    "a mistyped keyword of a transformers model": (
        lambda: call(ref.tiny(), input_id=ref.batch()["input_ids"]),
        moefx.InputError,
        ["where: Qwen3MoeForCausalLM", "input_id", "did you mean 'input_ids'"],
    ),
    "too many positional arguments": (
        lambda: call(ref.Block(), ref.hidden(), 3),
        moefx.InputError,
        ["too many positional arguments", "the signature is forward"],
    ),
    "no tensor": (
        lambda: call(ref.Block(), 3),
        moefx.InputError,
        ["the inputs hold no tensor", "where: Block"],
    ),
    "an object among the inputs": (
        lambda: moefx.optimize(ref.tiny(), {**ref.batch(), "past_key_values": cache()}, codegen="eager"),
        moefx.InputError,
        ["DynamicCache", "opt.original(...)", "generate"],
    ),
    "an unknown dynamic name": (
        lambda: moefx.optimize(ref.tiny(), ref.batch(), codegen="eager", dynamic={"input_idx": (0,)}),
        moefx.InputError,
        ["dynamic names 'input_idx', axes [0]", "{'input_ids': (2, 8), 'labels': (2, 8)}"],
    ),
    "an unknown dynamic axis": (
        lambda: moefx.optimize(ref.tiny(), ref.batch(), codegen="eager", dynamic={"labels": (0, 2)}),
        moefx.InputError,
        ["dynamic names 'labels', axes [0, 2]", "'labels': (2, 8)"],
    ),
    "a dynamic axis that the model fixes": (
        lambda: moefx.optimize(ref.Block(), {"x": ref.hidden()}, codegen="eager", dynamic={"x": (2,)}),
        moefx.CaptureError,
        ["axis 2 of 'x' cannot be dynamic", "for size 32 alone", "dynamic={'x': ...}"],
    ),
    # the options
    "an unknown recipe": (
        lambda: block(recipe="bf61"),
        moefx.RecipeError,
        ["unknown recipe 'bf61'", "did you mean 'bf16'", "known: "],
    ),
    "a recipe that is a list": (
        lambda: block(recipe=["fp8_flow"]),
        moefx.RecipeError,
        ["the recipe is ['fp8_flow'], a list", "a dict of specs"],
    ),
    "an unknown codegen": (
        lambda: block(codegen="inducter"),
        moefx.InputError,
        ["unknown codegen 'inducter'", "did you mean 'inductor'", "known: eager, inductor"],
    ),
    "an unknown pass": (
        lambda: block(passes=["share_plan"]),
        moefx.PassError,
        ["no pass named 'share_plan'", "did you mean 'share_plans'"],
    ),
    "a pass class": (
        lambda: block(passes=[Mine]),
        moefx.PassError,
        ["Mine'> is the class, not an instance", "pass instances"],
    ),
    "something else than a pass": (
        lambda: block(passes=[3]),
        moefx.PassError,
        ["3 is not a moefx.Pass"],
    ),
    "a string of passes": (
        lambda: block(passes="share_plans"),
        moefx.PassError,
        ["passes is 'share_plans'", "list of passes"],
    ),
    "an unsatisfiable order": (
        lambda: block(passes=["fold_combine"]),
        moefx.PassError,
        ["pass fold_combine requires", "which nothing in the pipeline provides"],
    ),
    "a router": (lambda: block(router="grouter"), moefx.InputError, ["router is a str", "pass a moefx.Grouter"]),
    "losses": (lambda: block(losses=[3]), moefx.InputError, ["losses holds 3", "known: "]),
    "regions": (lambda: block(regions="moe"), moefx.InputError, ["regions='moe'", "default 'model'"]),
    "a mesh": (lambda: block(mesh=object()), moefx.InputError, ["mesh=", "default None"]),
}


def cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


@pytest.mark.parametrize("name", CASES)
def test_the_error_names_what_where_why_and_what_to_do(name: str) -> None:
    run, kind, parts = CASES[name]
    with pytest.raises(moefx.MoefxError) as caught:
        run()
    assert type(caught.value) is kind
    text = str(caught.value)
    for part in parts:
        assert any(p in text for p in part.split("|")), f"{part!r} is not in:\n{text}"
    assert caught.value.what
    assert caught.value.todo


def test_a_call_of_a_compiled_module_is_checked_too() -> None:
    opt = block()
    with pytest.raises(moefx.InputError, match=r"(?s)do not fit.*Block"):
        opt()
    with pytest.raises(moefx.InputError, match=r"(?s)unexpected keyword argument 'y'.*did you mean 'x'|known: x"):
        opt(ref.hidden(), y=3)
    with pytest.raises(moefx.InputError, match="the model itself fails"):
        opt(ref.hidden()[..., :5])
    assert opt(ref.hidden()).item() == pytest.approx(opt.original(ref.hidden()).item(), rel=1e-5)
    with pytest.raises(moefx.InputError, match=r"(?s)type Held reached an optimized model.*opt.original"):
        opt(Held(ref.hidden()))


def test_asking_for_a_cache_from_a_graph() -> None:
    with pytest.raises(moefx.CaptureError, match=r"(?s)DynamicCache.*use_cache=False"):
        moefx.optimize(ref.tiny(), {**ref.batch(), "use_cache": True}, codegen="eager")


def test_every_error_derives_from_the_base_and_keeps_its_parts() -> None:
    kinds = [getattr(moefx, n) for n in dir(moefx) if n.endswith("Error")]
    assert len(kinds) >= 6
    for kind in kinds:
        assert issubclass(kind, moefx.MoefxError)
        error = kind("what", "where", "why", "todo")
        assert str(error) == "what\n  where: where\n  why: why\n  what to do: todo"
        copied = pickle.loads(pickle.dumps(error))
        assert type(copied) is kind
        assert (copied.what, copied.where, copied.why, copied.todo) == ("what", "where", "why", "todo")
        assert str(kind("only this")) == "only this"


def test_the_nearest_name() -> None:
    assert (
        nearest("shar_plans", ["share_plans", "dead_code"])
        == "did you mean 'share_plans'? known: dead_code, share_plans"
    )
    assert nearest("zzz", ["share_plans"]) == "known: share_plans"
    assert nearest("zzz", []) == "known: none"


def test_another_librarys_error_in_a_line() -> None:
    with pytest.raises(RuntimeError) as caught:
        nn.Linear(2, 3).load_state_dict(nn.Linear(2, 4).state_dict())
    assert "size mismatch for weight" in first_line(caught.value)  # torch's first line ends in a colon
    assert first_line(ValueError("\n  \none\ntwo")) == "one"
    assert first_line(ValueError(), "ValueError") == "ValueError"
    assert len(first_line(ValueError("x" * 10_000))) < 500


def test_the_cause_is_kept() -> None:
    with pytest.raises(moefx.InputError) as caught:
        call(Fails(), ref.hidden())
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert re.search("shapes|size", str(caught.value.__cause__))
