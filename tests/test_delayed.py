"""Delayed scaling: scales from earlier steps, remembered outside the state dict, through both halves of the graph."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moefx
from moefx.module import Variant
from moefx.precision.recipe import get_recipe
from tests import reference as ref
from tests.passes.test_casts import Layer, make_inputs, step

Tensor = torch.Tensor
T = 32
X, W1, DY = "experts/fprop/input/Xp", "experts/fprop/weight/W1", "experts/dgrad/grad/dO"


def recipe(steps: int = 3) -> moefx.Recipe:
    """The built-in one with a short memory."""
    return get_recipe("fp8_delayed").replace("short", amax_history=steps)


def made(steps: int = 3, **options: Any) -> moefx.OptimizedModule:
    pytest.importorskip("transformers")
    return moefx.optimize(Layer(), make_inputs(T), recipe=recipe(steps), **{"codegen": "eager", **options})


def scaled(by: float) -> dict[str, Tensor]:
    """The batch with tokens `by` times as large."""
    return {**make_inputs(T), "x": make_inputs(T)["x"] * by}


def history(opt: moefx.OptimizedModule, key: str) -> list[float]:
    found: list[float] = opt.precision_state()["casts"][key].tolist()
    return found


def error(opt: moefx.OptimizedModule, batch: dict[str, Tensor]) -> float:
    """Of the experts' output, which is the gradient of the sum with respect to g, against the wide model."""
    out = []
    for module in (opt, opt.original):
        g = batch["g"].clone().requires_grad_()
        out += torch.autograd.grad(module(**{**batch, "g": g}), g)
    return ref.error(*out)


def test_magnitudes_of_both_halves_are_remembered_newest_first() -> None:
    opt = made()
    factors, batch = [1.0, 4.0, 0.5, 2.0], make_inputs(T)
    top = float((batch["x"] * 1.5).abs().max())
    for f in factors:
        opt(**scaled(f)).backward()
    assert history(opt, X) == pytest.approx([f * top for f in factors[:0:-1]])  # the first of four is forgotten
    assert history(opt, W1) == pytest.approx([float(opt.experts.gate_up_proj.abs().max())] * 3)
    assert history(opt, DY) == pytest.approx([float(batch["g"].abs().max())] * 3)  # of the sum's cotangent, all routed
    assert len(opt.precision_state()["casts"]) == 6


def test_the_scale_is_that_of_the_largest_of_the_last_steps() -> None:
    opt = made()
    fresh = error(opt, scaled(1.0))  # nothing is remembered: the tensor itself is measured
    assert fresh < 0.1
    same = error(opt, scaled(1.0))
    assert same == pytest.approx(fresh)
    opt(**scaled(2.0**17)).sum()  # saturates, since the scale is that of small tokens
    coarse = error(opt, scaled(1.0))  # and now the scale is that of huge ones: everything small is zero
    assert coarse > 5 * fresh
    opt(**scaled(1.0))
    assert error(opt, scaled(1.0)) > 5 * fresh  # still among the last three
    assert error(opt, scaled(1.0)) < 1.1 * fresh


def test_values_beyond_the_remembered_ones_saturate() -> None:
    opt = made()
    opt(**scaled(1.0))
    assert error(opt, scaled(64.0)) > 0.3
    for _ in range(3):  # one cast after the other: activations behind a saturated product were too small themselves
        opt(**scaled(64.0))
    assert error(opt, scaled(64.0)) < 0.1


def test_only_training_steps_are_remembered() -> None:
    opt = made()
    opt(**scaled(1.0)).backward()
    before = opt.precision_state()
    with torch.no_grad():
        opt(**scaled(8.0))
    opt.eval()
    with torch.no_grad():
        opt(**scaled(8.0))
    opt.train()
    after = opt.precision_state()
    assert before["casts"].keys() == after["casts"].keys()
    assert all(torch.equal(before["casts"][k], after["casts"][k]) for k in before["casts"])
    opt.eval()
    opt(**scaled(8.0)).backward()  # gradients of a model that is not in training
    opt.train()
    assert (history(opt, X), history(opt, DY)) == (before["casts"][X].tolist(), before["casts"][DY].tolist())
    opt(**scaled(8.0))  # a forward alone: its casts and no others
    assert history(opt, X)[0] == pytest.approx(8 * history(opt, X)[1])
    assert history(opt, DY) == before["casts"][DY].tolist()


@pytest.mark.parametrize("name", ["x", "g"])  # forward and backward
def test_an_infinity_is_seen_in_its_step_and_forgotten(name: str) -> None:
    opt = made()
    first = step(opt, scaled(1.0))
    before = opt.precision_state()["casts"]
    bad = scaled(1.0)
    bad[name][5, 3] = torch.inf
    assert step(opt, bad)["experts.down_proj"].isnan().any()  # as a loss scaler looks for it
    assert all(t.isfinite().all() for t in opt.precision_state()["casts"].values())
    assert history(opt, W1)[:2] == [before[W1][0]] * 2  # what was finite is remembered
    again = step(opt, scaled(1.0))
    assert all(torch.equal(again[n], first[n]) for n in first)


def test_an_infinity_of_an_older_state_is_no_history() -> None:
    opt, fresh = made(), made()
    first = step(opt, scaled(1.0))
    state = opt.precision_state()
    for row in state["casts"].values():
        row[0] = torch.inf
    fresh.load_precision_state(state)
    got = step(fresh, scaled(1.0))
    assert all(torch.equal(got[n], first[n]) for n in first)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_that_would_run_again_in_the_backward_is_refused(reentrant: bool) -> None:
    """It would read a history with its own magnitudes in it."""
    opt, batch = made(), scaled(1.0)
    x = batch["x"].requires_grad_()

    def run(x: Tensor) -> Any:
        return opt(**{**batch, "x": x})

    loss = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=reentrant)
    with pytest.raises(moefx.InputError, match=r"inside of a backward[^§]*checkpoint inside of the model"):
        loss.backward()
    run(x).backward()  # the control
    opt.eval()  # where nothing is remembered, both runs read the same
    (want,) = torch.autograd.grad(run(x), x)
    (got,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False), x)
    assert torch.equal(got, want)


def test_microbatches_are_steps_of_their_own() -> None:
    opt = made()
    (opt(**scaled(1.0)) + opt(**scaled(2.0))).backward()
    assert history(opt, X)[:2] == pytest.approx([2 * history(opt, X)[1], history(opt, X)[1]])
    assert history(opt, DY)[2] == 0
    assert min(history(opt, DY)[:2]) > 0


def test_the_state_dict_is_the_models_own() -> None:
    opt = made()
    opt(**scaled(1.0)).backward()
    assert list(opt.state_dict()) == list(opt.original.state_dict())
    assert [n for n, _ in opt.named_buffers()] == []


@pytest.mark.parametrize("how", ["state", "deepcopy", "pickle"])
def test_a_copy_goes_on_as_the_original(how: str) -> None:
    opt = made()
    for f in (1.0, 64.0):
        opt(**scaled(f)).backward()
    opt.zero_grad()
    if how == "state":
        other = moefx.optimize(copy.deepcopy(opt.original), make_inputs(T), recipe=recipe(), codegen="eager")
        assert ref.differ(ref.step(other, scaled(1.0)), ref.step(copy.deepcopy(opt), scaled(1.0)))  # the control
        other.load_precision_state(opt.precision_state())
    else:
        other = copy.deepcopy(opt) if how == "deepcopy" else pickle.loads(pickle.dumps(opt))
    for f in (1.0, 2.0):
        got, want = ref.step(other, scaled(f)), ref.step(opt, scaled(f))
        assert torch.equal(got.value, want.value)
        assert all(torch.equal(got.grads[n], want.grads[n]) for n in want.grads)
    before = opt.precision_state()
    other(**scaled(3.0))
    assert torch.equal(opt.precision_state()["casts"][X], before["casts"][X])  # a copy remembers by itself


def test_a_history_of_another_length_is_refused() -> None:
    state = made(2).precision_state()
    with pytest.raises(moefx.InputError, match="holds 2 steps, the recipe keeps 3"):
        made(3).load_precision_state(state)


BROKEN: dict[str, Any] = {
    "no history": (lambda s: [1, 2], "it is list"),
    "no length": (lambda s: {"casts": s["casts"]}, "it has no 'length'"),
    "no casts": (lambda s: {"length": 3}, "it has no 'casts'"),
    "casts in a row": (lambda s: {**s, "casts": list(s["casts"].values())}, "'casts' is list"),
    "a row too long": (lambda s: {**s, "casts": {**s["casts"], W1: torch.zeros(7)}}, f"{W1}.*float32 .7,., not 3"),
    "whole numbers": (lambda s: {**s, "casts": {X: torch.zeros(3, dtype=torch.int64)}}, f"{X}.*int64 .3,., not 3"),
    "no tensor": (lambda s: {**s, "casts": {X: 1.0}}, f"{X}.* it has float"),
}


def test_what_is_no_history_is_refused_and_changes_nothing() -> None:
    opt = made()
    opt(**scaled(1.0)).backward()
    before = opt.precision_state()
    for broken, text in BROKEN.values():
        with pytest.raises(moefx.InputError, match=f"no history of delayed scaling[^§]*{text}"):
            opt.load_precision_state(broken(dict(reversed(before.items()))))
        after = opt.precision_state()
        assert after["casts"].keys() == before["casts"].keys()
        assert all(torch.equal(after["casts"][k], before["casts"][k]) for k in before["casts"])
    opt(**scaled(1.0)).backward()


def test_rows_of_the_history_are_forgotten_with_the_programs_that_read_them() -> None:
    """They are kept by the ids of programs; those of freed ones come again."""
    options: Any = SimpleNamespace(recipe=SimpleNamespace(amax_history=4), routing=None, over_ranks=False)
    program: Any = SimpleNamespace(history_keys=[None])
    model, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    opt = moefx.OptimizedModule(model, lambda *_: Variant(program, {}), options, None)
    for i in range(3):
        opt.prepare((x,), {})
        opt._index(program)
        opt.prepare((x,), {})
        assert list(opt._indices) == [id(program)]  # kept as long as the modules are
        opt._indices[i] = torch.zeros(1)
        model.register_buffer(f"more{i}", torch.zeros(1))
    opt.prepare((x,), {})
    assert not opt._indices


def test_a_state_loaded_between_forward_and_backward() -> None:
    """The backward adds to the rows of its own casts, whatever the order in the state; those it lacks begin anew."""
    opt = made()
    opt(**scaled(1.0)).backward()
    state = opt.precision_state()["casts"]
    loss = opt(**scaled(1.0))
    given = {k: torch.full((3,), float(i)) for i, k in enumerate(reversed(state)) if k != W1}
    opt.load_precision_state({"length": 3, "casts": given})
    loss.backward()
    after = opt.precision_state()["casts"]
    half = [k for k in state if "dgrad" in k or "wgrad" in k]
    assert DY in half
    for name, row in after.items():
        old = given.get(name, torch.zeros(3))
        want = torch.cat([state[name][:1], old[:2]]) if name in half and "weight" not in name else old
        assert torch.equal(row, want), name


def test_shapes_share_what_is_remembered() -> None:
    opt = made()
    opt(**scaled(1.0)).backward()
    small = {k: v[:16] for k, v in scaled(2.0).items()}
    opt(**small).backward()
    assert len(ref.programs(opt)) == 2
    top = float((small["x"] * 1.5).abs().max())
    assert history(opt, X)[:2] == pytest.approx([top, history(opt, X)[1]])
    assert history(opt, X)[1] > 0


def test_inductor_gives_the_same() -> None:
    a, b = made(), made(codegen="inductor")
    for f in (1.0, 4.0):
        got, want = ref.step(b, scaled(f)), ref.step(a, scaled(f))
        ref.assert_same(got, want)
    for key in (X, W1, DY):
        assert history(b, key) == pytest.approx(history(a, key), rel=1e-5)


def test_verification_and_the_ledger() -> None:
    opt = made(verify=True)
    c = opt.report.casts
    assert (c["before"], c["after"], c["weights_after"]) == (4, 4, 2)
    assert {r["kept_because"] for r in c["rows"] if r["role"] != "weight"} == {
        "its scale comes from earlier steps, which no fused op takes"
    }


def test_what_contradicts_itself_is_refused() -> None:
    with pytest.raises(moefx.RecipeError, match="amax_history is 0") as caught:
        get_recipe("fp8_delayed").replace("none", amax_history=0)
    assert "1024 for example" in str(caught.value)
    with pytest.raises(moefx.RecipeError, match="no spec is delayed"):
        get_recipe("fp8_flow").replace("some", amax_history=4)


@pytest.mark.parametrize(
    "specs",
    [
        {"input.wgrad": "e4m3 tensor f32/exact"},  # measured, of a tensor that is stored under a delayed scale
        {"grad.wgrad": "e2m1 16x1 e4m3+f32/exact"},  # two levels of scales, beside the delayed one of dgrad
    ],
)
def test_delayed_and_measured_scales_of_one_tensor(specs: dict[str, str]) -> None:
    pytest.importorskip("transformers")
    mixed = recipe().replace("mixed", specs=specs)
    opt = moefx.optimize(Layer(), make_inputs(T), recipe=mixed, codegen="eager", verify=True)
    got, want = step(opt, scaled(1.0)), step(opt.original, scaled(1.0))
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        assert 1e-3 < ref.error(got[name], want[name]) < 0.2  # E2M1 keeps a bit of mantissa


def test_a_checkpoint_holds_it(tmp_path: Any) -> None:
    from moefx.train import checkpoint

    opt = made()
    optim = torch.optim.SGD(opt.parameters(), lr=1e-3)
    for f in (1.0, 64.0):
        opt(**scaled(f)).backward()
    checkpoint.save(tmp_path, step=2, model=opt, optimizer=optim, fingerprint={}, history={})
    other = made()
    checkpoint.load(checkpoint.latest(tmp_path), model=other, optimizer=torch.optim.SGD(other.parameters(), lr=1e-3),
                    fingerprint={})  # fmt: skip
    assert history(other, X) == history(opt, X)
    assert torch.equal(other(**scaled(1.0)), opt(**scaled(1.0)))


def test_metrics_show_what_a_scale_from_earlier_steps_saturates() -> None:
    opt = made()
    opt(**scaled(1.0))
    rows = {(r["tensor"], r["direction"]): r for r in opt.precision_metrics(**scaled(64.0))}
    assert rows["Xp", "fwd"]["saturation"] > 0.1
    assert rows["W1", "fwd"]["saturation"] == 0
    assert history(opt, X)[0] == pytest.approx(float((make_inputs(T)["x"] * 1.5).abs().max()))  # measuring is no step
