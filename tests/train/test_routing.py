"""Routing in the training loop's records and tables, and `moefx inspect --routing`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moefx
from moefx.errors import InputError, MissingPackageError
from moefx.losses import as_losses
from moefx.train import checkpoint
from moefx.train.data import open_dataset
from moefx.train.inspect_routing import example_batches, inspect_routing, observe, together, traffic
from moefx.train.interrupt import TrainingInterrupted
from moefx.train.loop import TrainResult
from moefx.train.metrics import read_metrics
from moefx.train.models import default_model, load_weights
from moefx.train.parts import val_batches
from moefx.train.routing import with_choices
from moefx.train.story import summarize, table
from tests import command
from tests.view.made import choices, metrics

from .runs import interrupt_at, run
from .toy import ToyLM, quiet, text_of, toy_config, toy_data

SIZES = [6, 6]


class Routed(ToyLM):
    """A toy that measures: every call in training has other losses, every one in evaluation other choices."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.losses: dict[str, Tensor] = {}
        self.routing: dict[str, Tensor] = {}

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        made = metrics(choices(int(input_ids.sum()), SIZES, 2, input_ids.numel()), SIZES)
        self.routing = made
        self.losses = {"sp": input_ids.sum().float(), "total": torch.tensor(0.5)} if self.training else {}
        return super().forward(input_ids, labels)


def test_losses_are_written_with_every_step_as_means_over_microbatches(tmp_path: Path) -> None:
    cfg = toy_config(tmp_path, steps=3, grad_accum=2)
    run(cfg, Routed())
    batches = toy_data().batches("train", 4, cfg.seq, cfg.seed)
    for record in (r for r in read_metrics(tmp_path) if r["kind"] == "train"):
        assert record["loss_sp"] == pytest.approx(float(next(batches).sum()) / 2)
        assert record["loss_total"] == pytest.approx(0.5)


def expected_load(cfg: Any) -> list[list[float]]:
    """Of all validation batches together."""
    ids = list(zip(range(cfg.eval_batches), toy_data().batches("val", cfg.batch, cfg.seq, cfg.seed), strict=False))
    parts = [metrics(choices(int(b.sum()), SIZES, 2, b.numel()), SIZES)["load"] for _, b in ids]
    return (sum(parts) / len(parts)).tolist()


def test_routing_is_written_at_validation(tmp_path: Path) -> None:
    cfg = toy_config(tmp_path)
    _, result = run(cfg, Routed())
    records = [r for r in read_metrics(tmp_path) if r["kind"] == "routing"]
    assert (
        [r["step"] for r in records] == [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "val"] == [4, 8, 12]
    )
    want = expected_load(cfg)
    for i, row in enumerate(result.routing["load"]):
        assert row == pytest.approx(want[i])
        assert records[-1][f"max_violation/{i}"] == pytest.approx(max(want[i]) * 6 - 1, rel=1e-5)
    assert records[-1]["dead_experts/mean"] == result.routing["mean"]["dead_experts"] >= 1
    assert "token_entropy/mean" not in records[-1]
    json.dumps(result.routing)


def test_other_models_write_none_of_it(tmp_path: Path) -> None:
    """Also one that has something else under these names."""
    model = ToyLM()
    model.losses, model.routing = nn.ModuleList([nn.Identity()]), {"a": 1}  # type: ignore[assignment]
    _, result = run(toy_config(tmp_path), model)
    assert result.routing == {}
    assert {r["kind"] for r in read_metrics(tmp_path)} == {"train", "val"}
    assert not any(k.startswith("loss_") for r in read_metrics(tmp_path) for k in r)


def test_a_resumed_run_keeps_its_routing(tmp_path: Path) -> None:
    whole = run(toy_config(tmp_path / "a"), Routed())[1]
    with pytest.raises(TrainingInterrupted):
        run(toy_config(tmp_path / "b"), Routed(), on_step=interrupt_at(12))
    resumed = run(toy_config(tmp_path / "b"), Routed(), resume=True)[1]  # nothing is left to do
    assert resumed.routing == whole.routing != {}


@pytest.mark.parametrize("losses", ["sp,bias=0.1", "sp"])
def test_biases_are_moved_once_per_optimizer_step_where_they_are_asked_for(tmp_path: Path, losses: str) -> None:
    class Biased(ToyLM):
        def __init__(self) -> None:
            super().__init__()
            self.options = SimpleNamespace(losses=as_losses(losses))
            self.moved: list[tuple[int, bool]] = []

        def update_router_bias(self) -> None:
            self.moved.append((int(self.seen), torch.equal(self.embed.weight, ToyLM().embed.weight)))

    model = Biased()
    run(toy_config(tmp_path, steps=3, grad_accum=2), model)
    # After both microbatches of 16 tokens, and after the weights moved.
    assert model.moved == ([(32, False), (64, False), (96, False)] if "bias" in losses else [])


def test_tensorboard_has_scalars_and_histograms(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(toy_config(tmp_path), Routed())
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("routing/max_violation/mean")] == [4, 8, 12]
    assert [e.step for e in events.Scalars("routing/chance_1/0")] == [4, 8, 12]
    assert "train/loss_sp" in events.Tags()["scalars"]
    histogram = events.Histograms("routing/load/1")[-1].histogram_value
    assert histogram.num == 6
    assert histogram.sum == pytest.approx(6)  # loads are relative to their mean


def test_traffic_is_written_where_places_are_given(tmp_path: Path) -> None:
    cfg = toy_config(tmp_path / "a", places=2)
    _, result = run(cfg, Routed())
    seen = [metrics(choices(int(b.sum()), SIZES, 2, b.numel()), SIZES)["choices"] for b in val_batches(toy_data(), cfg)]
    sent = [0, 0]
    for home, batch in enumerate(seen):
        for layer in (0, 1):
            sent[layer] += sum(len({e // 3 for e in chosen} - {home}) for chosen in batch[layer].tolist())
    record = [r for r in read_metrics(cfg.out) if r["kind"] == "routing"][-1]
    tokens = len(seen) * cfg.batch * cfg.seq
    assert [record[f"traffic_remote/{i}"] for i in (0, 1)] == pytest.approx([s / tokens for s in sent])
    assert record["traffic_uniform/mean"] == pytest.approx(1 * (1 - (3 * 2) / (6 * 5)))
    assert result.routing["places"] == 2
    assert record["chance_1/0"] == result.routing["steps"][0]["chance_1"]
    assert "traffic" not in run(toy_config(tmp_path / "b"), Routed())[1].routing


def test_traffic_that_cannot_be_counted_is_refused_before_anything_is_moved_or_trained(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    for places, model, what in ((4, Routed(), "6 experts cannot be laid out on 4"), (2, ToyLM(), "cannot be counted")):
        with pytest.raises(InputError, match=what):
            run(toy_config(tmp_path, places=places), model)
        assert model.seen == 0
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    with pytest.raises(InputError, match="places=0 is out of range"):
        toy_config(tmp_path, places=0)
    with pytest.raises(InputError, match="places=2 is given without 'metrics'"):
        with_choices("sp", 2)
    assert [getattr(item, "choices", None) for item in with_choices("sp,metrics", 2)] == [None, True]


def test_the_closing_table_shows_what_is_known() -> None:
    mean = {"max_violation": 0.4567, "dead_experts": 1.5, "overlap": 0.0625}
    steps = [{"hit_rate_1": 0.75, "chance_1": 0.5}, {"hit_rate_1": 0.25, "chance_1": 0.25}]
    sent = [{"remote": 1.25, "uniform": 1.5, "max_over_mean": 2.0}]
    routing = {"mean": mean, "load": [[0.5, 0.5], [0.7, 0.3]], "steps": steps, "places": 2, "traffic": sent}
    figures = summarize(TrainResult([1.0], routing=routing), None, toy_config(Path("x")), toy_data(), None)
    assert figures["optimized"]["routing"] == routing
    console = quiet()
    console.print(table({"train": figures, "report": {}}))
    rows = {line.split("│")[1].strip(): line for line in text_of(console).splitlines() if line.startswith("│")}
    assert "0.457" in rows["MaxVio, mean over layers"]
    assert "1.500" in rows["dead experts, mean over layers"]
    assert "0.062" in rows["overlap, mean over layers"]
    assert "token entropy" not in text_of(console)
    assert "0.500 (0.375)" in rows["path stability: hit rate 1 (its chance)"]
    assert "0.600" in rows["largest share of the load, mean over layers"]
    assert "1.250 (1.500)" in rows["sends per token over 2 places (if uniform)"]


# -- inspect ---------------------------------------------------------------------------------------------------------


def test_traffic_against_counting() -> None:
    idx = choices(3, [8, 8], 3, 24)
    rows = traffic(metrics(idx, [8, 8]), batches=4, places=4)
    for layer, row in enumerate(rows):
        sent, rows_of = 0, [0] * 4
        for t, chosen in enumerate(idx[layer]):
            home = (t // 6) % 4
            sent += len({e // 2 for e in chosen} - {home})
            for e in chosen:
                rows_of[e // 2] += 1
        assert row["remote"] == pytest.approx(sent / 24)
        assert row["max_over_mean"] == pytest.approx(max(rows_of) / (3 * 24 / 4))
        assert row["uniform"] == pytest.approx(3 * (1 - (6 * 5 * 4) / (8 * 7 * 6)))
    with pytest.raises(InputError, match="8 experts cannot be laid out on 3 places"):
        traffic(metrics(idx, [8, 8]), batches=4, places=3)


def test_choices_that_no_expert_got_are_in_no_pair_and_sent_nowhere() -> None:
    idx = choices(3, [8], 3, 24)
    for t, token in enumerate(idx[0]):
        token[3 - t % 3 :] = [-1] * (t % 3)
    made = {"experts": torch.tensor([8.0]), "choices": torch.tensor(idx)}
    (row,), (pairs,) = traffic(made, batches=4, places=4), together(made)
    kept = [{e for e in token if e >= 0} for token in idx[0]]
    sent = sum(len({e // 2 for e in token} - {(t // 6) % 4}) for t, token in enumerate(kept))
    rows_of = [sum(e // 2 == p for token in kept for e in token) for p in range(4)]
    assert row["remote"] == pytest.approx(sent / 24)
    assert row["max_over_mean"] == pytest.approx(max(rows_of) / (sum(rows_of) / 4))
    want = [[sum({a, b} <= token for token in kept) if a != b else 0 for b in range(8)] for a in range(8)]
    assert pairs.tolist() == want


def test_observed_is_what_hooks_on_the_experts_see() -> None:
    pytest.importorskip("transformers")
    model = default_model(0)
    batches = example_batches(model, None, count=3, batch=2, seq=8)
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, a, n=n: seen.setdefault(n, []).append(a[1]))
        for n, m in model.named_modules() if n.endswith("mlp.experts")
    ]  # fmt: skip
    with torch.no_grad():
        for ids in batches:
            model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    found, paths = observe(model, batches, codegen="eager")
    assert model.training
    assert paths == list(seen)
    idx = torch.stack([torch.cat(v) for v in seen.values()])
    assert torch.equal(found["choices"].sort(-1).values, idx.sort(-1).values)
    for i, layer in enumerate(idx):
        assert found["load"][i].tolist() == pytest.approx((torch.bincount(layer.flatten(), minlength=8) / 96).tolist())
        pairs = np.zeros((8, 8), int)
        for a, b in layer.tolist():
            pairs[a, b] += 1
            pairs[b, a] += 1
        np.testing.assert_array_equal(together(found)[i], pairs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights as a checkpoint holds them, of another seed than `inspect` starts from."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("weights")
    checkpoint.safetensors().save_model(default_model(1), folder / checkpoint.MODEL)
    return folder


def test_inspect(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options: dict[str, Any] = {"batch": 1, "seq": 16, "batches": 4, "options": {"codegen": "eager"}}
    found, said = inspect_routing("default", weights=trained, places=2, out=tmp_path / "new", **options)
    assert (found["tokens"], len(found["layers"]), len(found["steps"]), len(found["traffic"])) == (64, 4, 3, 4)
    assert "token_entropy" in found["mean"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "load.png", "pairs.png", "routing.html", "transitions.png",
    ]  # fmt: skip
    assert "model.layers.3.mlp.experts" in said
    assert "Expert parallelism over 2 places" in said
    other = inspect_routing("default", **options)[0]
    assert other["load"] != found["load"]  # the weights were taken
    assert "files" not in other


@pytest.fixture(scope="module")
def grouter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the default model's vocabulary and number of experts."""
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32, "init_std": 0.5}
    torch.manual_seed(0)
    made = moefx.Grouter.from_config(vocab_size=256, num_experts=8, **sizes)
    return made.save_pretrained(tmp_path_factory.mktemp("grouter"))


@pytest.mark.nightly
def test_inspect_of_a_model_routed_by_a_grouter(grouter: Path) -> None:
    """The load is that of the Grouter's own choice on the same batches, in every layer, and not the model's."""
    pytest.importorskip("transformers")
    options: dict[str, Any] = {"batch": 1, "seq": 16, "batches": 4}
    made = moefx.Grouter.from_pretrained(grouter)
    routed = {"codegen": "eager", "router": made}
    found, said = inspect_routing("default", options=routed, router=str(grouter), **options)
    data = open_dataset(())
    batches = example_batches(default_model(0), data, 4, 1, 16)
    idx = torch.cat([made.route(ids, k=2)[0] for ids in batches]).flatten()
    load = (torch.bincount(idx, minlength=8) / len(idx)).tolist()
    assert len(found["load"]) == 4
    for row in found["load"]:
        assert row == pytest.approx(load)
    assert found["steps"][0]["hit_rate_1"] == 1.0
    assert f"routing of default by {grouter}" in said
    assert inspect_routing("default", options={"codegen": "eager"}, **options)[0]["load"][0] != pytest.approx(load)


@pytest.mark.parametrize("place", ["", "checkpoints", "optimized/checkpoints"])
def test_weights_of_a_run_are_found_in_its_folder(tmp_path: Path, place: str) -> None:
    for step, seed in ((1, 8), (2, 9)):
        model = ToyLM(seed=seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        checkpoint.save(tmp_path / place, step=step, model=model, optimizer=optimizer, fingerprint={}, history={})
    load_weights(found := ToyLM(), tmp_path)
    assert torch.equal(found.embed.weight, ToyLM(seed=9).embed.weight)


def test_weights_that_do_not_fit(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"weights cannot be loaded[\s\S]*embed"):
        load_weights(ToyLM(), trained)
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint"):
        load_weights(ToyLM(), tmp_path)
    (tmp_path / "optimized" / "checkpoints").mkdir(parents=True)
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint") as caught:
        load_weights(ToyLM(), tmp_path)
    assert "resuming" not in str(caught.value.todo)


def test_drawing_without_matplotlib_fails_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match="matplotlib"):
        inspect_routing("no such model", out=tmp_path)


def test_the_command(grouter: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    few = ("--batch", "1", "--seq", "16", "--router", str(grouter))
    done = command.moefx("inspect", "--routing", *few, "--json", "--batches", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 32
    assert f"by {grouter}" in (tmp_path / "routing.html").read_text()
    assert (tmp_path / "load.png").stat().st_size > 1000
    done = command.moefx("inspect", *few, "--json", "--diff", "raise_routers", "route_by_token")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert next(p for p in data["passes"] if p["name"] == "route_by_token")["matched"] == 4
    removed = [line for line in data["diff"].splitlines() if line.startswith("-")]
    assert sum("moefx.route(" in line for line in removed) == 4
    assert any("moefx.token_route" in line for line in removed)
    done = command.moefx("inspect", "--router", str(tmp_path))
    assert done.returncode == 2
    assert "no Grouter can be read from this folder" in done.stderr
    done = command.moefx("inspect", "--places", "2")
    assert done.returncode == 2
    assert "--places is given without --routing" in done.stderr
