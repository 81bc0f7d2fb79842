"""The paper's claim on cost, counted in graphs of the widths of Qwen3-30B-A3B: below 2 % work, below 0.3 % memory."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")


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
