"""What an example does not show: capacities at other numbers of tokens, and what is one, zero or the identity in it."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moefx
from moefx.passes.raise_experts import raised
from moefx.raising.block import NotRaised, raise_block
from moefx.raising.capacity import CapacityRule, capacity_rules
from moefx.raising.fit import NoFit
from moefx.raising.probe import Seen
from moefx.raising.settle import Candidates, told_apart

from .harness import differences, distance, step

H, I, E, K = 16, 24, 4, 2


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(H, I), nn.Linear(I, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)))


class Layer(nn.Module):
    """A loop over experts, for others to be derived from."""

    experts_in_all = E

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, self.experts_in_all, bias=False)
        self.experts = nn.ModuleList(FFN() for _ in range(self.experts_in_all))

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        return F.softmax(self.gate(x_TH), dim=-1).topk(K)

    def mix(self, x_TH: Tensor, w_Tk: Tensor, idx_Tk: Tensor, rows: int | None = None) -> Tensor:
        y_TH = torch.zeros_like(x_TH)
        for e, expert in enumerate(self.experts):
            t, n = (v[:rows] for v in torch.where(idx_Tk == e))
            y_TH = y_TH.index_add(0, t, expert(x_TH[t]) * w_Tk[t, n, None])
        return y_TH


# --- capacities


class Limited(Layer):
    """Every expert keeps its first rows, as many as a formula of the caller says for T tokens."""

    experts_in_all = 6

    def __init__(self, formula: Callable[[int], int], capacity_factor: float = 1.2) -> None:
        super().__init__()
        self.formula, self.capacity_factor = formula, capacity_factor

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, H)
        return self.mix(x_TH, *self.route(x_TH), self.formula(len(x_TH))).view(x.shape)


def alike(tokens: int) -> Tensor:
    """Rows that all want the same experts."""
    gen = torch.Generator().manual_seed(1)
    return 0.01 * torch.randn(1, tokens, H, generator=gen) + torch.randn(H, generator=gen)


SIZES = (1, 7, 35, 40, 55, 80)  # among them those at which the formulas below differ


def off(layer: nn.Module, own: nn.Module) -> list[int]:
    """The numbers of tokens for which two layers differ."""
    with torch.no_grad():
        return [T for T in SIZES if distance(layer(alike(T)), own(alike(T))) > 1e-4]


FORMULAS = {
    "cf * T * k / E": lambda T: int(1.2 * T * 2 / 6),
    "T * k / E * cf": lambda T: int(T * 2 / 6 * 1.2),
    "cf * k / E * T": lambda T: int(1.2 * 2 / 6 * T),
    "at least 4": lambda T: max(4, math.ceil(T * 2 / 6 * 1.2)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_capacity_is_the_blocks_own_to_the_last_row(name: str) -> None:
    """The first three are the same number but for rounding: one row apart at 35, 40, 55 and 80 tokens."""
    rows = [tuple(FORMULAS[n](T) for T in SIZES) for n in FORMULAS]
    assert len({*rows[:3]}) == 3
    torch.manual_seed(0)
    layer = Limited(FORMULAS[name])
    own = copy.deepcopy(layer)
    with raised(layer, (torch.randn(2, 12, H),)) as (block,):
        assert block.raised, block.reason
        assert off(layer, own) == []


def test_a_capacity_that_no_rule_explains_is_refused_where_it_counts() -> None:
    """One row less from 300 tokens on: at 24 nothing shows, and in a call of 300 it does, the first or a later one."""
    layer = Limited(lambda T: int(1.2 * T * 2 / 6) - (T >= 300))
    short, long = (Seen((torch.randn(1, T, H),), {}) for T in (24, 300))
    with pytest.raises(NotRaised, match="300 tokens"):
        raise_block(layer, Seen(short.args, {}, later=[long]))


@torch.no_grad()
def test_a_capacity_is_right_for_sizes_that_stay_symbolic() -> None:
    torch.manual_seed(0)
    layer = Limited(FORMULAS["cf * T * k / E"])
    opt = moefx.optimize(layer, (alike(41),), codegen="eager", dynamic={"x": (1,)}, strict=True)
    assert [T for T in (35, 40) if distance(opt(alike(T)), layer(alike(T))) > 1e-4] == []
    assert len(opt.variants()) == 1


def chosen(rules: list[CapacityRule], agrees: Callable[[int, int], bool | None]) -> CapacityRule:
    """The rule for a block that keeps so many rows (second) of so many tokens, or cannot be run on them (None)."""
    tokens = torch.arange(1, 4097)
    table = torch.stack([r.table(tokens).minimum(tokens) for r in rules])

    def verdicts(place: int, values: Sequence[tuple[int, ...]]) -> list[bool] | None:
        found = [agrees(place + 1, c) for (c,) in values]
        return None if None in found else [bool(v) for v in found]

    return rules[told_apart([Candidates(rules, table, tokens.expand_as(table))], verdicts)[0]]


@pytest.mark.parametrize(("factor", "k", "experts"), [(1.2, 2, 6), (1.25, 1, 4), (2.4, 2, 8)])
def test_rules_are_exact_for_all_numbers_of_tokens(factor: float, k: int, experts: int) -> None:
    """The oracle is what people write, in Python, for every number of tokens up to 4096."""
    written: list[Callable[[int], float]] = [
        lambda T: factor * T * k / experts,
        lambda T: T * k / experts * factor,
        lambda T: T / experts * k * factor,
        lambda T: T / experts * factor,
        lambda T: factor * k / experts * T,
    ]
    for formula, (rounding, least) in itertools.product(written, ((int, 0), (math.ceil, 3))):
        rows = [min(T, max(least, rounding(formula(T)))) for T in range(4097)]
        rules = capacity_rules([(T, rows[T]) for T in (24, 21, 50)], experts, k, [factor, float(k)])
        rule = chosen(rules, lambda T, c, rows=rows: c == rows[T])
        assert [min(T, rule(T)) for T in range(4097)] == rows


def test_rules_that_running_does_not_tell_apart_are_refused() -> None:
    rules = [CapacityRule(("*", 1.2 * 2 / 6, "T")), CapacityRule(("/", ("*", 1.2, ("*", "T", 2)), 6))]
    assert chosen(rules, lambda T, c: c == int(1.2 * T * 2 / 6)) is rules[1]
    assert chosen(rules, lambda T, c: None if T < 70 else c == int(1.2 * 2 / 6 * T)) is rules[0]
    for verdict in (None, True):
        with pytest.raises(NoFit, match=r"int\(0.4 \* T\) or int\(1.2 \* \(T \* 2\) / 6\)"):
            chosen(rules, lambda T, c, verdict=verdict: verdict)
    with pytest.raises(NoFit, match="no known rule"):
        chosen(rules, lambda T, c: False)


# --- what is one, zero or the identity


class MaskedRows(Layer):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x_TH = (x * mask[..., None]).reshape(-1, H)
        return self.mix(x_TH, *self.route(x_TH)).view(x.shape)


class MaskedChoices(Layer):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x_TH = x.reshape(-1, H)
        w_Tk, idx_Tk = self.route(x_TH)
        return self.mix(x_TH, w_Tk, torch.where(mask.reshape(-1, 1) > 0, idx_Tk, E)).view(x.shape)


class MaskedWeights(Layer):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x_TH = x.reshape(-1, H)
        w_Tk, idx_Tk = self.route(x_TH)
        return self.mix(x_TH, w_Tk * mask.reshape(-1, 1), idx_Tk).view(x.shape)


class Added(Layer):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x_TH = (x + mask[..., None]).reshape(-1, H)
        return self.mix(x_TH, *self.route(x_TH)).view(x.shape)


class Switched(Layer):
    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        x_TH = x.reshape(-1, H)
        w_Tk, idx_Tk = self.route(x_TH)
        return self.mix(x_TH, w_Tk * gain, idx_Tk).view(x.shape)


ONES, PADDED = torch.ones(2, 7), torch.tensor([[1.0] * 7, [1.0] * 3 + [0.0] * 4])
ARGUMENTS = {
    "rows, not padded": (MaskedRows, ONES, PADDED, None),
    "rows, not padded, bool": (MaskedRows, ONES.bool(), PADDED.bool(), None),
    "choices, not padded": (MaskedChoices, ONES.long(), PADDED.long(), None),
    "weights, not padded": (MaskedWeights, ONES, PADDED, True),
    "an added mask of zeros": (Added, 0 * ONES, PADDED, True),
    "a factor of one": (Switched, torch.tensor(1.0), torch.tensor(0.3), True),
    "a factor that is no one": (Switched, torch.tensor(0.7), torch.tensor(0.3), True),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_of_one_value_is_not_lost(name: str) -> None:
    """Raised or refused with a reason (None: either), the layer is the original for other values, too."""
    cls, first, then, is_raised = ARGUMENTS[name]
    layer = cls()
    own, x = copy.deepcopy(layer), torch.randn(2, 7, H)
    with raised(layer, (x, first)) as (block,):
        assert is_raised is None or block.raised == is_raised, block.reason
        assert block.raised or "nearest to" in str(block.reason)
        for value in (first, then):
            assert differences(step(layer, (x, value)), step(own, (x, value))) == []


class Buffered(Layer):
    """Reads a buffer in one of several places."""

    def __init__(self, place: str, value: Tensor) -> None:
        super().__init__()
        self.place = place
        self.register_buffer("buffer", value)

    def forward(self, x: Tensor) -> Tensor:
        x_TH, at, buffer = x.reshape(-1, H), self.place, self.buffer
        if at == "input":
            x_TH = x_TH * buffer
        elif at == "matrix":
            x_TH = x_TH @ buffer
        elif at == "mixture":
            x_TH = x_TH + buffer * x_TH.mean(-1, keepdim=True)
        w_Tk, idx_Tk = self.route(x_TH)
        if at == "choice":
            idx_Tk = buffer[idx_Tk]
        elif at == "weight":
            w_Tk = w_Tk * buffer[idx_Tk]
        elif at == "branch" and buffer > 0:
            w_Tk = w_Tk * w_Tk
        y_TH = self.mix(x_TH, w_Tk, idx_Tk)
        return (y_TH * buffer if at == "output" else y_TH).view(x.shape)


class Doubled(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.mul_(2).reshape(-1, H)
        return self.mix(x_TH, *self.route(x_TH)).view(x.shape)


def test_an_input_that_is_written_to_is_given_to_both_forms_as_it_was() -> None:
    with raised(Doubled(), (torch.randn(2, 7, H),)) as (block,):
        assert block.raised, block.reason


BUFFERS = {
    "a scale of the input": ("input", torch.ones(H), torch.rand(H)),
    "a scale per expert": ("weight", torch.ones(E), torch.rand(E)),
    "a scale of the output": ("output", torch.tensor(1.0), torch.tensor(0.3)),
    "a constant scale": ("output", torch.tensor(0.5), torch.tensor(0.3)),
    "an identity matrix": ("matrix", torch.eye(H), torch.randn(H, H)),
    "a permutation": ("choice", torch.arange(E), torch.tensor([2, 0, 3, 1])),
    "a share of zero": ("mixture", torch.tensor(0.0), torch.tensor(0.4)),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_a_buffer_is_read_whatever_it_holds(name: str) -> None:
    place, first, then = BUFFERS[name]
    layer, x = Buffered(place, first), torch.randn(2, 7, H)
    own = copy.deepcopy(layer)
    with raised(layer, (x,)) as (block,):
        assert block.raised, block.reason
        assert torch.equal(layer.buffer, own.buffer)  # drawn anew in copies alone
        for value in (first, then):
            layer.buffer.copy_(value)
            own.buffer.copy_(value)
            assert differences(step(layer, (x,)), step(own, (x,))) == []


@pytest.mark.parametrize("value", [torch.tensor(0), torch.tensor(0.0)], ids=["integer", "float"])
def test_a_branch_on_a_buffer_refuses_a_block(value: Tensor) -> None:
    layer, x = Buffered("branch", value), torch.randn(2, 7, H)
    with raised(layer, (x,)) as (block,):
        assert not block.raised


# --- sizes that are the same by accident


class Positions(Layer):
    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        x_TH = (x + 0.1 * position[:, None]).reshape(-1, H)
        return self.mix(x_TH, *self.route(x_TH)).view(x.shape)


class Biased(Layer):
    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x_TH = x.reshape(-1, H)
        p_TE = F.softmax(self.gate(x_TH), dim=-1)
        idx_Tk = (p_TE + bias).topk(K).indices
        return self.mix(x_TH, p_TE.gather(1, idx_Tk), idx_Tk).view(x.shape)


@pytest.mark.parametrize(
    ("cls", "shape", "size"),
    [(Positions, (7, 7), 7), (Biased, (E, 7), E), (Biased, (2, E), E), (Biased, (E, E), E)],
    ids=["rows_as_many_as_tokens", "rows_as_many_as_experts", "tokens_as_many_as_experts", "all_three"],
)
def test_a_layer_is_raised_whatever_sizes_are_the_same(cls: type[Layer], shape: tuple[int, int], size: int) -> None:
    layer, args = cls(), (torch.randn(*shape, H), torch.randn(size))
    own = copy.deepcopy(layer)
    with raised(layer, args) as (block,):
        assert block.raised, block.reason
        assert differences(step(layer, args), step(own, args)) == []
