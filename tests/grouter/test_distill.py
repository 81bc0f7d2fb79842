"""Distillation: the loss is the formula, the optimizer the named one, resuming is exact, and students learn."""

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
from moefx.grouter import Grouter, distill
from moefx.grouter.distill import kl
from moefx.grouter.running import overlap
from moefx.models.moe_lm import MoELM
from moefx.train.checkpoint import CheckpointError
from moefx.train.interrupt import TrainingInterrupted
from moefx.train.loop import DivergedError

from .test_network import SIZES, VOCAB, E, make, some_ids


def student(seed: int = 5, **options: Any) -> Grouter:
    return make(seed, **{"init_std": 0.1, **options}).requires_grad_(True)


def stream(start: int = 0) -> Iterator[Tensor]:
    """Batches by step."""
    step = start
    while True:
        yield some_ids(4, 16, seed=100 + step)
        step += 1


NET = make(9, num_layers=1, kind="linear", rope=False)


def teacher_of(batch: Any) -> Tensor:
    """Logits that a student can learn."""
    logits: Tensor = NET(batch) if isinstance(batch, Tensor) else NET(**batch)
    return logits


SETTINGS: dict[str, Any] = dict(k=2, progress=False)


# -- the loss and its figures ----------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 5), experts=st.integers(2, 6), T=st.floats(0.5, 4.0), seed=st.integers(0, 99))
def test_the_loss_is_the_mean_over_tokens_of_a_sum_over_experts(n: int, experts: int, T: float, seed: int) -> None:
    z, q = torch.randn(2, n, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    want = 0.0
    for t in range(n):
        a, b = ([math.exp(x / T) for x in row.tolist()] for row in (z[t], q[t]))
        want += sum(x / sum(a) * math.log((x / sum(a)) / (y / sum(b))) for x, y in zip(a, b, strict=True)) / n
    assert float(kl(z, q, T)) == pytest.approx(T * T * want, rel=1e-4, abs=1e-6)
    assert float(kl(z, z + 7)) == pytest.approx(0, abs=1e-6)


def test_figures_of_overlap() -> None:
    a = torch.tensor([[3.0, 2, 1, 0], [3, 2, 1, 0], [3, 2, 1, 0]])
    b = torch.tensor([[2.0, 3, 1, 0], [3, 0, 2, 1], [0, 1, 2, 3]])
    assert overlap(a, b, 2) == pytest.approx((1 / 3, (1 + 0.5 + 0) / 3))


def test_padding_does_not_count() -> None:
    mask = torch.ones(4, 16, dtype=torch.int64)
    mask[1, 10:] = 0
    losses = []
    for fill in (0, 7):
        ids = torch.where(mask.bool(), some_ids(4, 16), fill)

        # The teacher's logits of padding are wild.
        def wild(b: Any, fill: int = fill) -> Tensor:
            return teacher_of(b) + 50.0 * fill * (1 - b["attention_mask"])[..., None] * torch.arange(E)

        batch = [{"input_ids": ids, "attention_mask": mask}]
        losses.append(distill(wild, student(), batch, steps=1, **SETTINGS))
    assert losses[0].losses == pytest.approx(losses[1].losses, rel=1e-5)
    assert losses[0].tokens == 4 * 16 - 6


# -- training --------------------------------------------------------------------------------------------------------


def test_it_is_adamw_with_warmup_and_cosine() -> None:
    g, twin = student(), student()
    distill(teacher_of, g, stream, steps=6, lr=1e-2, warmup=2, weight_decay=0.3, **SETTINGS)
    m = {n: torch.zeros_like(p) for n, p in twin.named_parameters()}
    v = {n: torch.zeros_like(p) for n, p in twin.named_parameters()}
    for i, ids in zip(range(6), stream(), strict=False):
        lr = 1e-2 * ((i + 1) / 2 if i + 1 < 2 else 0.5 * (1 + math.cos(math.pi * (i + 1 - 2) / 5)))
        twin.zero_grad()
        p, q = teacher_of(ids).log_softmax(-1), twin(ids).log_softmax(-1)
        (p.exp() * (p - q)).sum(-1).mean().backward()
        with torch.no_grad():
            for name, w in twin.named_parameters():
                assert w.grad is not None
                m[name] = 0.9 * m[name] + 0.1 * w.grad
                v[name] = 0.999 * v[name] + 0.001 * w.grad**2
                step = (m[name] / (1 - 0.9 ** (i + 1))) / ((v[name] / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8)
                w.copy_(w * (1 - lr * 0.3) - lr * step)
    for (name, a), b in zip(g.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3, msg=name)
    assert (g.score.weight - student().score.weight).abs().max() > 1e-2


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_learns(temperature: float) -> None:
    g, held_out = student(), [some_ids(4, 16, seed=1), some_ids(4, 16, seed=2)]
    before = float(kl(teacher_of(held_out[0]).flatten(0, 1), g(held_out[0]).detach().flatten(0, 1)))
    found = distill(
        teacher_of, g, stream, steps=80, lr=1e-2, warmup=8, temperature=temperature, eval_batches=held_out, **SETTINGS
    )
    assert before > 0.5
    assert found.kl < 0.3 * before
    assert found.exact > 0.5  # by chance: 1 in 28
    assert found.recall > found.exact
    assert found.recall_curve[0] < 0.5 < found.recall_curve[-1]
    if temperature == 1:
        assert found.losses == found.kl_curve
    # The same by hand.
    a, b = (torch.cat([f(ids).detach().flatten(0, 1) for ids in held_out]) for f in (teacher_of, g))
    assert found.kl == pytest.approx(
        float((a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1).mean()), rel=1e-4
    )
    same = [set(x) == set(y) for x, y in zip(a.topk(2).indices.tolist(), b.topk(2).indices.tolist(), strict=True)]
    assert found.exact == pytest.approx(sum(same) / len(same))


def test_a_model_as_teacher() -> None:
    teacher = MoELM(VOCAB, 32, 48, 2, 4, E, 2, "C").train()
    with torch.no_grad():
        teacher.embed.weight.mul_(20.0)  # most of the routing is the token's own
        teacher.layers[0].moe.gate.weight.mul_(10.0)  # type: ignore[union-attr,operator]
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    found = distill(teacher, g := student(), stream, steps=60, lr=1e-2, warmup=6, progress=False)
    assert found.k == 2
    assert found.settings["layer"] == 0
    assert found.losses[-1] < 0.7 * found.losses[0], found.losses
    assert teacher.training
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    assert all(p.grad is None for p in (*teacher.parameters(), *g.parameters()))


def test_score_only_leaves_the_rest() -> None:
    g = student().freeze()
    before = {name: t.clone() for name, t in g.state_dict().items()}
    distill(teacher_of, g, stream, steps=3, lr=1e-2, score_only=True, **SETTINGS)
    changed = [name for name, t in g.state_dict().items() if not torch.equal(t, before[name])]
    assert changed == ["score.weight"]
    assert not any(p.requires_grad for p in g.parameters())
    assert not g.training


# -- checkpoints -----------------------------------------------------------------------------------------------------


def stopping(at: int) -> Any:
    def batches(start: int) -> Iterator[Tensor]:
        for step, ids in enumerate(stream(start), start):
            if step == at:
                raise KeyboardInterrupt
            yield ids

    return batches


def test_resuming_is_bitwise_the_uninterrupted_run(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(steps=7, lr=1e-2, **SETTINGS)
    whole, parted = student(), student()
    want = distill(teacher_of, whole, stream, **options)
    with pytest.raises(TrainingInterrupted):
        distill(teacher_of, parted, stopping(5), checkpoint=tmp_path, checkpoint_every=3, **options)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000003"]
    again = student(seed=77)  # its weights come from the checkpoint
    found = distill(teacher_of, again, stream, checkpoint=tmp_path, resume=True, **options)
    assert found.losses == want.losses
    assert found.recall_curve == want.recall_curve
    assert found.tokens == want.tokens == 7 * 64
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    # An iterable is read from where the run stopped; other data give other weights.
    listed, other = student(), student()
    ids = [x for x, _ in zip(stream(), range(7), strict=False)]
    for folder, g, data in ((tmp_path / "a", listed, ids), (tmp_path / "b", other, ids[::-1])):
        with pytest.raises(TrainingInterrupted):
            distill(teacher_of, student(), stopping(5), checkpoint=folder, checkpoint_every=3, **options)
        distill(teacher_of, g, data, checkpoint=folder, resume=True, **options)
    assert torch.equal(listed.score.weight, whole.score.weight)
    assert not torch.equal(other.score.weight, whole.score.weight)
    # Finished is finished.
    assert distill(teacher_of, again, stream, checkpoint=tmp_path, resume=True, **options).losses == want.losses
    with pytest.raises(CheckpointError, match="other settings"):
        distill(teacher_of, again, stream, checkpoint=tmp_path, resume=True, **{**options, "lr": 1e-3})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resuming_is_bitwise(
    tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    """Long before the first regular checkpoint; the process would end with 130 and says how to go on."""
    options: dict[str, Any] = dict(steps=7, lr=1e-2, checkpoint=tmp_path / "kept", **SETTINGS)
    whole, again = student(), student(seed=77)
    want = distill(teacher_of, whole, stream, **{**options, "checkpoint": None})
    handler = signal.getsignal(number)
    with pytest.raises(TrainingInterrupted) as caught:
        distill(signalling(number, at=2), student(), stream, **options)
    assert signal.getsignal(number) is handler
    assert (caught.value.code, caught.value.step) == (130, 2)
    said = capsys.readouterr().err
    assert f"interrupted at step 2; resume continues from {tmp_path / 'kept' / 'step-00000002'}" in said
    assert "--resume" in said
    found = distill(teacher_of, again, stream, resume=True, **options)
    assert (found.losses, found.tokens) == (want.losses, want.tokens)
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_signal_in_the_last_step_still_stops_what_follows(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(steps=2, checkpoint=tmp_path, **SETTINGS)
    with pytest.raises(TrainingInterrupted):
        distill(signalling(signal.SIGINT, at=2), student(), stream, report=tmp_path / "report", **options)
    assert not (tmp_path / "report").exists()


def test_without_a_folder_ctrl_c_is_what_it_is_elsewhere() -> None:
    with pytest.raises(KeyboardInterrupt):
        distill(signalling(signal.SIGINT, at=2), student(), stream, steps=4, **SETTINGS)


def signalling(number: signal.Signals, at: int) -> Any:
    """A teacher, and a signal to this process in the step `at`, counted from 1."""
    calls = itertools.count(1)

    def teach(batch: Any) -> Tensor:
        if next(calls) == at:
            os.kill(os.getpid(), number)
        return teacher_of(batch)

    return teach


def test_a_new_distillation_moves_older_checkpoints_aside(tmp_path: Path) -> None:
    """They are of higher steps: resuming would take them for those of the run that was interrupted."""
    options: dict[str, Any] = dict(steps=4, checkpoint=tmp_path, checkpoint_every=2, **SETTINGS)
    distill(lambda ids: -teacher_of(ids), student(), stream, **options)
    with pytest.raises(TrainingInterrupted):
        distill(teacher_of, student(), stopping(3), **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["previous-1", "step-00000002"]
    assert sorted(p.name for p in (tmp_path / "previous-1").iterdir()) == ["step-00000002", "step-00000004"]
    found = distill(teacher_of, student(), stream, resume=True, **options)
    assert found.losses == distill(teacher_of, student(), stream, steps=4, **SETTINGS).losses


def test_another_teacher_or_other_data_are_refused_where_they_are_named(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(steps=2, checkpoint=tmp_path, **SETTINGS)
    found = distill(teacher_of, student(), stream, identity={"teacher": "a", "seed": 0}, **options)
    assert found.settings["identity"] == {"teacher": "a", "seed": 0}
    with pytest.raises(CheckpointError, match=r"identity.teacher was 'a', is 'b', identity.seed was 0, is 1"):
        distill(teacher_of, student(), stream, resume=True, identity={"teacher": "b", "seed": 1}, **options)


def test_a_written_report(tmp_path: Path) -> None:
    found = distill(teacher_of, student(), stream, steps=3, report=tmp_path / "r", **SETTINGS)
    content = json.loads((tmp_path / "r" / "report.json").read_text())
    assert content == json.loads(json.dumps(found.to_dict()))
    assert len(content["losses"]) == 3
    text = (tmp_path / "r" / "report.md").read_text()
    assert f"{found.kl:.4f}" in text
    assert "exact top-2 set" in text


# -- errors ----------------------------------------------------------------------------------------------------------


def test_wrong_arguments(tmp_path: Path) -> None:
    def fails(
        match: str, *, teacher: Any = teacher_of, g: Grouter | None = None, batches: Any = stream, **options: Any
    ) -> None:
        with pytest.raises(InputError, match=match):
            distill(teacher, g or student(), batches, **{"steps": 2, **SETTINGS, **options})

    fails("steps=0", steps=0)
    fails("lr=-1", lr=-1)
    fails("data ended after 1 of 2", batches=[some_ids()])
    fails("Grouter's", g=student(num_experts=4))
    fails("k is 9", k=9)
    fails("per token are not known", k=None, teacher=teacher_of)
    fails("bfloat16", g=student().to(torch.bfloat16))
    fails("token id 50 is outside", batches=[some_ids() * 0 + VOCAB] * 2)
    fails("nothing to resume", resume=True)
    fails("whose first batch would be lost", teacher=MoELM(VOCAB, 32, 48, 1, 4, E, 2, "C"), batches=stream())
    fails("no token in eval_batches", eval_batches=iter([]))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        distill(teacher_of, student(), stream, steps=2, checkpoint=tmp_path, resume=True, **SETTINGS)


def test_divergence_stops_before_the_step() -> None:
    g = student()
    before = g.score.weight.clone()
    with pytest.raises(DivergedError, match="nan at step 1"):
        distill(lambda ids: teacher_of(ids) * math.nan, g, stream, steps=2, **SETTINGS)
    assert torch.equal(g.score.weight, before)
    assert SIZES["num_experts"] == E


def test_a_batch_of_padding_alone() -> None:
    padding = {"input_ids": some_ids(), "attention_mask": torch.zeros(3, 12, dtype=torch.int64)}
    g = student()
    g.norm.eval()
    with pytest.raises(InputError, match="batch of step 2 has no token"):
        distill(teacher_of, g, [some_ids(), padding], steps=2, **SETTINGS)
    assert not g.norm.training  # every part keeps its mode
    # Held-out figures are means over tokens, of which it has none.
    with_it, without = (
        distill(teacher_of, student(), stream, steps=1, eval_batches=held, **SETTINGS)
        for held in ([some_ids(), padding], [some_ids()])
    )
    assert (with_it.kl, with_it.exact, with_it.measured_on) == (without.kl, without.exact, without.measured_on)
