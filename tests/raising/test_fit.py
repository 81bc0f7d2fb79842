"""Which reading of a bank's parameters is tried at all: the one that computes what the block computes."""

from __future__ import annotations

import pytest
import torch

from moefx.models.moe_lm import IDIOMS
from moefx.raising.bank import find_banks
from moefx.raising.fit import NoFit, _spanning, first_use, fit
from moefx.raising.reading import Evaluator, Reading, readings
from moefx.raising.record import record

H, E, K = 24, 4, 2


def names(r: Reading) -> list[str]:
    return [role.stack.names[0].split(".")[-2] for role in (*r.up, r.down)]


def test_square_matrices_are_told_apart() -> None:
    """240 readings of three square matrices; the right one is known by the parameters' names."""
    torch.manual_seed(0)
    block = IDIOMS["A2"](H, H, E, K)
    x = torch.randn(40, H)
    bank = find_banks(block)[0]
    seen = record(block, (x,), {})
    options = list(readings(bank, H, ()))
    given = next(s for s in seen.snaps if s.value.shape == x.shape and torch.equal(s.value, x))
    later = [s for s in seen.snaps if s.time >= first_use(seen, bank)]
    left = _spanning(Evaluator(block), options, E, given, later)
    assert len(options) == 240
    assert [names(r) for r in left] == [["gate_proj", "up_proj", "down_proj"]]
    assert (str(left[0].kind), [r.turned for r in (*left[0].up, left[0].down)]) == ("silu", [False] * 3)
    # All experts at once are what the rows one by one are.
    rows, experts = x[:3, None].expand(-1, E, -1), torch.arange(E).expand(3, E)
    torch.testing.assert_close(Evaluator(block).everywhere(left[0], x[:3]), Evaluator(block)(left[0], rows, experts))


def test_a_later_record_tries_what_the_first_left() -> None:
    torch.manual_seed(0)
    block = IDIOMS["A2"](H, H, E, K)
    bank = find_banks(block)[0]
    known: set[Reading] = set()
    first = next(fit(block, record(block, (torch.randn(40, H),), {}), bank, (), known))
    assert known == {first.reading}
    again = next(fit(block, record(block, (torch.randn(30, H),), {}), bank, (), known))
    assert again.reading == first.reading
    wrong = {r for r in readings(bank, H, ()) if r != first.reading}
    with pytest.raises(NoFit):
        next(fit(block, record(block, (torch.randn(30, H),), {}), bank, (), wrong))
