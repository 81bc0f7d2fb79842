"""Tuning: the balance loss is the formula, only what is named changes, and the load spreads."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moefx.errors import InputError
from moefx.grouter import Grouter, tune
from moefx.grouter.distill import kl
from moefx.grouter.running import max_violation
from moefx.grouter.tune import balance_loss
from moefx.train.checkpoint import CheckpointError
from moefx.train.interrupt import TrainingInterrupted

from .test_network import VOCAB, E, make, some_ids

QUIET: dict[str, Any] = dict(k=2, progress=False)


def skewed(**options: Any) -> Grouter:
    """A router that prefers three experts on purpose: their rows point to the mean of the hidden states."""
    g = make(**options)
    mean = g.hidden(some_ids(8, 16)).float().mean((0, 1))
    g.score.weight[:3] += (0.6 * mean / mean.norm() ** 2).to(g.score.weight.dtype) * 3
    return g


def stream(start: int = 0) -> Iterator[Tensor]:
    step = start
    while True:
        yield some_ids(4, 16, seed=100 + step)
        step += 1


# -- the objective ---------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    B=st.integers(1, 3), S=st.integers(1, 6), experts=st.integers(2, 5), k=st.integers(1, 2), seed=st.integers(0, 99),
    objective=st.sampled_from(["sequence", "global"]), padded=st.booleans(),
)  # fmt: skip
def test_the_loss_by_counting(B: int, S: int, experts: int, k: int, seed: int, objective: str, padded: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits, bias = torch.randn(B, S, experts, generator=rng), torch.randn(experts, generator=rng) / 2
    counted = torch.rand(B, S, generator=rng) < 0.6 if padded else torch.ones(B, S, dtype=torch.bool)
    groups = [[(b, t) for t in range(S) if counted[b, t]] for b in range(B)]
    if objective == "global":
        groups = [[at for g in groups for at in g]]
    terms = []
    for tokens in groups:
        if not tokens:
            continue
        f, p = [0.0] * experts, [0.0] * experts
        for b, t in tokens:
            for e in sorted(range(experts), key=lambda e: -float(logits[b, t, e] + bias[e]))[:k]:
                f[e] += 1 / (len(tokens) * k)
            for e, x in enumerate(logits[b, t].double().softmax(-1).tolist()):
                p[e] += x / len(tokens)
        terms.append(sum(x * y for x, y in zip(f, p, strict=True)))
    want = sum(terms) / len(terms) if terms else 0.0
    assert float(balance_loss(logits, bias, counted, k, objective)) == pytest.approx(want, rel=1e-5)


def test_the_least_and_the_most() -> None:
    even = torch.eye(E).repeat(2, 1)[None] * 50
    every = torch.ones(1, 2 * E, dtype=torch.bool)
    assert float(balance_loss(even, torch.zeros(E), every, 1, "sequence")) * E == pytest.approx(1)
    one = torch.eye(E)[:1].expand(2 * E, -1)[None] * 50
    assert float(balance_loss(one, torch.zeros(E), every, 1, "sequence")) * E == pytest.approx(E)
    assert float(max_violation(torch.tensor([2, 2, 2]))) == 0
    assert float(max_violation(torch.tensor([6, 0, 0]))) == 2


# -- tuning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["sequence", "global"])
def test_a_skewed_router_is_balanced_and_keeps_its_structure(objective: str) -> None:
    g = skewed()
    before = {name: t.clone() for name, t in g.state_dict().items()}
    held_out = [some_ids(8, 16, seed=s) for s in range(8)]
    found = tune(g, stream, steps=60, lr=5e-3, objective=objective, eval_batches=held_out, **QUIET)
    assert [n for n, t in g.state_dict().items() if not torch.equal(t, before[n])] == ["score.weight"]
    assert found.maxvio_before > 0.8
    assert found.maxvio_after < 0.7 * found.maxvio_before
    assert found.sequence_maxvio_after < found.sequence_maxvio_before
    assert abs(found.balance_after - 1) < abs(found.balance_before - 1)
    assert found.overlap >= 0.5
    assert len(found.losses) == 60
    # The figures by hand.
    idx = torch.cat([g.route(ids, 2)[0].flatten() for ids in held_out])
    load = torch.bincount(idx, minlength=E).double()
    assert found.maxvio_after == pytest.approx(float(load.max() / load.mean() - 1))
    assert found.load == pytest.approx((load / load.sum()).tolist())
    was = skewed()
    same = [
        len(set(a) & set(b)) / 2
        for ids in held_out
        for a, b in zip(g.route(ids, 2)[0].view(-1, 2).tolist(), was.route(ids, 2)[0].view(-1, 2).tolist(), strict=True)
    ]
    assert found.overlap == pytest.approx(sum(same) / len(same))


@pytest.mark.parametrize("method", ["score", "bias"])
def test_no_steps_change_nothing(method: str) -> None:
    g = skewed().to(torch.bfloat16)
    before = {name: t.clone() for name, t in g.state_dict().items()}
    found = tune(g, [some_ids()], steps=0, method=method, **QUIET)
    assert all(torch.equal(t, before[name]) for name, t in g.state_dict().items())
    assert found.overlap == 1
    assert found.maxvio_before == found.maxvio_after
    assert found.balance_before == found.balance_after


def test_the_anchor_holds() -> None:
    raw, ids = skewed(), some_ids(8, 16, seed=3)
    moved = []
    for anchor in (0.0, 0.1):
        g = skewed()
        found = tune(g, stream, steps=60, lr=5e-3, anchor=anchor, **QUIET)
        moved.append((float(kl(raw(ids).flatten(0, 1), g(ids).flatten(0, 1))), found.maxvio_after))
    assert moved[1][0] < 0.7 * moved[0][0]
    assert moved[1][1] > moved[0][1]  # and costs balance


def test_the_global_objective_leaves_topics() -> None:
    """Sequences of few words each: balancing the batch leaves more imbalance within a sequence."""
    topics = [(some_ids(8, 16, seed=s) % 4 + 4 * torch.arange(8)[:, None]) % VOCAB for s in range(4)]
    found = {
        o: tune(skewed(), topics * 20, steps=60, lr=5e-3, objective=o, eval_batches=topics, **QUIET)
        for o in ("sequence", "global")
    }
    assert found["global"].sequence_maxvio_after > found["sequence"].sequence_maxvio_after
    assert found["global"].maxvio_after < 0.7 * found["global"].maxvio_before


def test_bias_moves_the_choice_alone() -> None:
    g, ids = skewed(), some_ids(8, 16, seed=3)
    logits, before = g(ids), {name: t.clone() for name, t in g.state_dict().items()}
    found = tune(g, stream, steps=60, lr=0.03, method="bias", **QUIET)
    assert [n for n, t in g.state_dict().items() if not torch.equal(t, before[n])] == ["selection_bias"]
    assert torch.equal(g(ids), logits)
    assert found.maxvio_after < 0.7 * found.maxvio_before
    idx, gates = g.route(ids, 2)
    torch.testing.assert_close(gates, logits.gather(-1, idx).softmax(-1))
    # One step by hand: the overloaded go down by lr, the underloaded up.
    g = skewed()
    load = torch.bincount(g.route(ids, 2)[0].flatten(), minlength=E).double()
    tune(g, [ids], steps=1, lr=0.03, method="bias", **QUIET)
    torch.testing.assert_close(g.selection_bias, -0.03 * (load - load.mean()).sign().float())


def test_small_steps_add_up_in_bf16() -> None:
    """Each step is far below half a bf16 unit of most weights; rounded one by one, they would be lost."""
    g = skewed().to(torch.bfloat16)
    before = g.score.weight.clone()
    tune(g, stream, steps=40, lr=2e-4, weight_decay=0.0, **QUIET)
    assert g.score.weight.dtype == torch.bfloat16
    large = before.abs() > 0.25  # units of 2^-9 or more
    assert (before + 2e-4)[large].eq(before[large]).all()
    assert (g.score.weight != before)[large].double().mean() > 0.5


def test_padding_does_not_count() -> None:
    mask = torch.ones(8, 16, dtype=torch.int64)
    mask[2:, 4:] = 0
    found = []
    for fill in (0, 7):
        ids = torch.where(mask.bool(), some_ids(8, 16), fill)
        g = skewed()
        found.append((tune(g, [{"input_ids": ids, "attention_mask": mask}] * 3, steps=3, **QUIET), g.score.weight))
    torch.testing.assert_close(found[0][1], found[1][1])
    assert found[0][0].maxvio_after == found[1][0].maxvio_after
    assert found[0][0].tokens == 3 * (2 * 16 + 6 * 4)


def test_folded_routers_are_tuned_too() -> None:
    g = make(fold_groups=((0, 1), (2, 3), (4, 5), (6, 7)))
    assert len(tune(g, stream, steps=2, **QUIET).load) == 4


def test_a_written_report_and_wrong_arguments(tmp_path: Path) -> None:
    found = tune(skewed(), stream, steps=2, report=tmp_path, **QUIET)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    assert f"{found.maxvio_before:.3f} -> {found.maxvio_after:.3f}" in (tmp_path / "report.md").read_text()
    for options, match in (
        ({"objective": "local"}, "unknown objective"),
        ({"method": "all"}, "unknown method"),
        ({"k": 9}, "top-9 of 8"),
        ({"method": "bias", "anchor": 1.0}, "anchor=1 is given for method='bias'"),
        ({"steps": -1}, "steps=-1"),
        ({"lr": math.nan}, "lr=nan is no number"),
        ({"steps": 2}, "ended after 1 of 2"),
    ):
        with pytest.raises(InputError, match=match):
            tune(make(), [some_ids()], **{**QUIET, **options})
    with pytest.raises(InputError, match="no token"):
        tune(make(), [], **QUIET)


@pytest.mark.parametrize("method", ["score", "bias"])
def test_an_error_half_way_leaves_the_grouter(method: str) -> None:
    g = skewed().train()
    g.norm.eval()
    before = {name: t.clone() for name, t in g.state_dict().items()}
    short = [*itertools.islice(stream(), 4)]
    with pytest.raises(InputError, match="ended after 4 of 9"):
        tune(g, short, steps=9, lr=0.1, method=method, **QUIET)
    padding = {"input_ids": some_ids(), "attention_mask": torch.zeros(3, 12, dtype=torch.int64)}
    with pytest.raises(InputError, match="batch of step 5 has no token"):
        tune(g, [*short, padding], steps=9, lr=0.1, method=method, **QUIET)
    assert all(torch.equal(t, before[name]) for name, t in g.state_dict().items())
    assert (g.training, g.norm.training) == (True, False)


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["score", "bias"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_is_bitwise_the_uninterrupted_tuning(
    tmp_path: Path, method: str, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = dict(steps=7, lr=0.01, anchor=0.1 * (method == "score"), method=method, **QUIET)
    listed = list(itertools.islice(stream(), 12))

    def signalling(start: int) -> Iterator[Tensor]:
        for step, ids in enumerate(listed[start:], start):
            if step == 3:
                os.kill(os.getpid(), number)
            yield ids

    whole, parted, again = skewed(), skewed(), skewed()
    want = tune(whole, listed, eval_batches=listed[8:], **options)
    kept: dict[str, Any] = dict(checkpoint=tmp_path, eval_batches=listed[8:], identity={"data": "a"}, **options)
    with pytest.raises(TrainingInterrupted) as caught:
        tune(parted, signalling, **kept)
    assert (caught.value.code, caught.value.step) == (130, 4)
    assert "--resume" in capsys.readouterr().err
    assert all(
        torch.equal(a, b) for a, b in zip(parted.state_dict().values(), again.state_dict().values(), strict=True)
    )
    # An iterator is read up to where the tuning stopped, also where its first batches are measured on.
    found = tune(again, iter(listed), resume=True, **kept)
    assert found.losses == want.losses
    assert (found.load, found.overlap) == (want.load, want.overlap)
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    # Finished is finished; another Grouter, other settings and other data are not gone on with.
    assert tune(skewed(), listed, resume=True, **kept).losses == want.losses
    for other, changed, said in (
        (whole, {}, "grouter was"),
        (skewed(), {"lr": 0.02}, "lr was"),
        (skewed(), {"identity": {"data": "b"}}, "identity.data was 'a', is 'b'"),
    ):
        with pytest.raises(CheckpointError, match=said):
            tune(other, listed, resume=True, **{**kept, **changed})


def test_resumed_with_the_first_batches_as_the_measure(tmp_path: Path) -> None:
    listed, options = list(itertools.islice(stream(), 12)), {"steps": 10, "checkpoint_every": 4, **QUIET}
    want = tune(whole := skewed(), listed, **options)

    def ending(start: int) -> Iterator[Tensor]:
        yield from listed[start:9]
        raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted):
        tune(skewed(), ending, checkpoint=tmp_path, **options)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000004", "step-00000008"]
    found = tune(again := skewed(), iter(listed), checkpoint=tmp_path, resume=True, **options)
    assert (found.losses, found.tokens) == (want.losses, want.tokens)
    assert torch.equal(again.score.weight, whole.score.weight)
    with pytest.raises(InputError, match="nothing to resume"):
        tune(skewed(), listed, resume=True, **options)
