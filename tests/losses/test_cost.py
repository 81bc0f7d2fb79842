"""The paper's claim on cost, counted in graphs of the widths of Qwen3-30B-A3B: below 2 % work, below 0.3 % memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")


@pytest.mark.nightly
def test_what_losses_keep_is_what_is_counted() -> None:
    """To the byte, by what autograd holds: also of a loss that keeps much."""
    from benchmarks import losses_cost

    net, inputs = losses_cost.model(128, 64, 2, 4), losses_cost.batch(32)
    cases = ("", "sp,cp", "orth")
    none, *more = [losses_cost.count(net, inputs, losses, "eager")[1] for losses in cases]
    held, *extra = [losses_cost.kept(net, inputs, losses) for losses in cases]
    assert 0 < held <= none
    assert 0 < extra[0] - held == more[0] - none < 0.01 * held
    assert extra[1] > 1.1 * held


@pytest.mark.nightly
def test_calls_that_only_losses_make_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import losses_cost

    monkeypatch.setattr(losses_cost, "REPEATS", 1)
    net, inputs = losses_cost.model(128, 64, 2, 4, torch.float32), losses_cost.batch(32)
    none, pairs = (losses_cost.calls(net, inputs, losses) for losses in ("", "sp"))
    made = [{name: n for kind, (n, _) in c.items() if "overlap" in (name := kind.split()[0])} for c in (none, pairs)]
    assert made == [{}, {"moefx.overlap.default": 2, "moefx.overlap_backward.default": 2}]  # one of each per layer
    assert not none.keys() - pairs.keys()
    rows = losses_cost.measured_calls(net, inputs, ("", "sp"), "here")
    assert float(rows[0]["extra_percent"]) == 0 < float(rows[1]["extra_percent"])


@pytest.mark.nightly
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_pair_losses_cost_next_to_nothing(codegen: str) -> None:
    from benchmarks import losses_cost

    net, inputs = losses_cost.model(), losses_cost.batch(256)
    work, saved = losses_cost.count(net, inputs, "", codegen)
    more, kept = losses_cost.count(net, inputs, "sp,cp,lb,z", codegen)
    assert 0 < more - work < 0.02 * work
    assert kept - saved < 0.003 * saved
    # The control: the count sees a loss that keeps the experts' outputs.
    assert losses_cost.count(net, inputs, "orth", codegen)[1] > 1.2 * saved
