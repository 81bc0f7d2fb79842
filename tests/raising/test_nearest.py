"""What the reasons say of modules that differ from an ordinary layer in a known way, and that they say no more."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.passes.raise_experts import raised
from moefx.raising.bank import find_banks
from moefx.raising.nearest import difference
from moefx.raising.parts import Pool
from moefx.raising.probe import Inputs, Seen, copy_of
from moefx.raising.record import Obj, Snap, record

from .ordinary import FFN, E, H, I, K, Ordinary, tokens


def built(cls: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls().train()


def reason(cls: Callable[[], nn.Module]) -> str:
    with raised(built(cls), (tokens(),), {}) as blocks:
        (row,) = blocks
    assert not row.raised
    assert row.reason is not None
    assert "nearest to" in row.reason
    return row.reason


# --- some experts, choices, tokens


class OtherExpert(Ordinary):
    """Expert 2 gets the square of its token."""

    def expert(self, e: int, x: Tensor, nth: Tensor, token: Tensor) -> Tensor:
        return self.experts[e](x.square() if e == 2 else x)


class OtherExpertAndChoice(Ordinary):
    """Two differences: expert 2, and the second choice of the others."""

    def expert(self, e: int, x: Tensor, nth: Tensor, token: Tensor) -> Tensor:
        return self.experts[e](torch.where(nth[:, None] == 1, x.tanh(), x.square() if e == 2 else x))


class ThirdPosition(Ordinary):
    """The third token of every sequence is squashed."""

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__["length"] = x.shape[1]
        out: Tensor = super().forward(x)
        del self.__dict__["length"]
        return out

    def expert(self, e: int, x: Tensor, nth: Tensor, token: Tensor) -> Tensor:
        return self.experts[e](torch.where(token[:, None] % self.length == 2, x.tanh(), x))


class SomeTokens(Ordinary):
    """Tokens with a large first feature count no expert but the token itself."""

    def expert(self, e: int, x: Tensor, nth: Tensor, token: Tensor) -> Tensor:
        return self.experts[e](torch.where(x[:, :1] > 1, x.tanh(), x))


def test_an_expert_that_differs_is_named() -> None:
    got = reason(OtherExpert)
    assert "loop over experts, but expert 2 computes something else than the others" in got
    assert "first products are not those of the token's own row" in got
    assert "choice" not in got
    assert "token 0" not in got


def test_two_differences_are_both_named() -> None:
    got = reason(OtherExpertAndChoice)
    assert "expert 2 computes something else" in got
    assert "choice 1 of every token (counted from 0) is computed in another way" in got
    assert "other outputs are missing" not in got


def test_a_position_in_the_sequence_is_told_from_a_token() -> None:
    assert "position 2 of every sequence is treated in another way" in reason(ThirdPosition)


def test_without_a_rule_only_the_count_is_given() -> None:
    got = reason(SomeTokens)
    assert "by no rule in experts, choices, tokens or loads" in got
    assert "expert 0" not in got


# --- all experts alike


class UnknownActivation(Ordinary):
    def make(self, e: int) -> nn.Module:
        return FFN(act=torch.tanh)


class NormBetween(Ordinary):
    def make(self, e: int) -> nn.Module:
        return FFN(act=lambda h: F.layer_norm(F.silu(h), (I,)))


class NormedInput(Ordinary):
    """Without parameters of its own, but after the first parameter of the experts was read."""

    def expert(self, e: int, x: Tensor, nth: Tensor, token: Tensor) -> Tensor:
        return self.experts[e](F.layer_norm(x, (H,)) + 0 * self.experts[e].up_proj.bias.sum())


class ScaledResidual(Ordinary):
    def after(self, y_TH: Tensor, x_TH: Tensor) -> Tensor:
        return torch.tanh(y_TH)


class Largest(Ordinary):
    """The maximum instead of a sum."""

    def forward(self, x: Tensor) -> Tensor:
        _, idx = self.route(x)
        z = torch.stack([f(x) for f in self.experts], dim=-2)
        return z.gather(-2, idx.unsqueeze(-1).expand(*idx.shape, H)).amax(dim=-2)


class Product(Largest):
    def forward(self, x: Tensor) -> Tensor:
        _, idx = self.route(x)
        z = torch.stack([f(x) for f in self.experts], dim=-2)
        return z.gather(-2, idx.unsqueeze(-1).expand(*idx.shape, H)).prod(dim=-2)


class Unchosen(Ordinary):
    """An equal weight for all experts, which is no softmax."""

    def forward(self, x: Tensor) -> Tensor:
        return sum(f(x) for f in self.experts) * self.gate(x).sigmoid().mean(-1, keepdim=True)  # type: ignore[no-any-return]


class DenseNegative(Ordinary):
    def forward(self, x: Tensor) -> Tensor:
        return (torch.stack([f(x) for f in self.experts], dim=-2) * self.gate(x).unsqueeze(-1)).sum(dim=-2)


class Mixed(Ordinary):
    """Every expert reads the mean of the sequence so far."""

    def expert(self, e: int, x: Tensor, nth: Tensor, token: Tensor) -> Tensor:
        return self.experts[e](self.means[token] * (1 + 0 * self.experts[e].up_proj.bias.sum()))

    def forward(self, x: Tensor) -> Tensor:
        after_reading = x + 0 * self.experts[0].up_proj.bias.sum()
        means = after_reading.cumsum(1) / torch.arange(2, x.shape[1] + 2)[:, None]
        self.__dict__["means"] = (means + after_reading.mean(1, keepdim=True)).reshape(-1, H)
        out: Tensor = super().forward(x)
        del self.__dict__["means"]
        return out


@pytest.mark.parametrize(
    ("cls", "says", "not_said"),
    [
        (
            UnknownActivation,
            "ordinary up to their first product, but what follows is no activation",
            "expert 0",
        ),
        (
            NormBetween,
            "up to their activation .silu., but the second .* made by layer_norm",
            "random",
        ),
        (
            NormedInput,
            "multiplied with a token's row .* made by .*(layer_norm|add)",
            "mixture",
        ),
        (Mixed, "mixtures of several tokens of a sequence", "norm"),
        (Largest, "of a token's 2 outputs the largest is taken in every feature", "concatenated"),
        (Product, "every choice's output .* is there, but what is made of them is no weighted sum", "largest"),
        (Unchosen, "every expert of every token has a weight above zero", "number of experts"),
        (DenseNegative, "every expert of every token has a weight that is not zero", "above"),
    ],
)
def test_the_first_part_that_is_missing_is_named(cls: type[nn.Module], says: str, not_said: str) -> None:
    got = reason(cls)
    assert re.search(says, got), got
    assert not_said not in got


# --- nothing false


def diagnosed(model: nn.Module) -> tuple[str | None, str] | None:
    copied, inputs = copy_of(model), Inputs(Seen((tokens(),), {}))
    records = [record(copied, *inputs.make(inputs.sizes(*size), 0)) for size in ((2, 12), (3, 7))]
    return difference(copied, records, find_banks(copied)[0], ())


def test_of_an_ordinary_layer_nothing_is_said() -> None:
    assert diagnosed(built(Ordinary)) is None


@pytest.mark.parametrize("act", [F.silu, F.gelu, F.relu])
def test_an_activation_is_no_difference_when_all_experts_have_it(act: Callable[[Tensor], Tensor]) -> None:
    class Other(Ordinary):
        def make(self, e: int) -> nn.Module:
            return FFN(act=act)

    assert diagnosed(built(Other)) is None


def test_looking_draws_no_random_numbers_and_changes_nothing() -> None:
    model = built(OtherExpert)
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    assert diagnosed(model) is not None
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_rows_are_found_by_direction_along_any_axis() -> None:
    gen = torch.Generator().manual_seed(0)
    values = torch.randn(3, 8, 5, generator=gen)
    pool = Pool([Snap(Obj(values, "step"), 0, values, False)])
    own = values.movedim(1, -1).reshape(-1, 8)
    assert pool.holds(own * -3).all()
    assert not pool.holds(own + 0.01 * torch.randn(own.shape, generator=gen)).any()
    assert not pool.holds(torch.zeros(2, 8)).any()
    assert not pool.holds(torch.randn(4, 7, generator=gen)).any()


def test_a_layer_of_an_ordinary_size_takes_about_a_second() -> None:
    class Large(Ordinary):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.gate = nn.Linear(128, 32, bias=False)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(128, 256), nn.SiLU(), nn.Linear(256, 128)) for _ in range(32)
            )

        def forward(self, x: Tensor) -> Tensor:
            x_TH = x.reshape(-1, 128)
            w_TK, idx_TK = F.softmax(self.gate(x_TH), dim=-1).topk(K, dim=-1)
            y_TH = torch.zeros_like(x_TH)
            for e, expert in enumerate(self.experts):
                token, nth = torch.where(idx_TK == e)
                own = x_TH[token].tanh() if e == 3 else x_TH[token]
                y_TH = y_TH.index_add(0, token, expert(own) * w_TK[token, nth, None])
            return y_TH.view(x.shape)

    copied = copy_of(built(Large))
    inputs = Inputs(Seen((torch.randn(2, 12, 128),), {}))
    records = [record(copied, *inputs.make(inputs.sizes(*size), 0)) for size in ((2, 12), (3, 7), (5, 10))]
    start = time.perf_counter()
    found = difference(copied, records, find_banks(copied)[0], ())
    took = time.perf_counter() - start
    assert found is not None
    assert "expert 3 computes something else" in found[1]
    assert took < 10, took  # about one on an idle machine


# --- without a bank


def listed(make: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(H, E), nn.ModuleList(map(make, range(E)))

        def forward(self, x: Tensor) -> Tensor:
            w = self.gate(x).softmax(-1)
            out: Tensor = sum(w[..., e, None] * f(x) for e, f in enumerate(self.experts))  # type: ignore[assignment]
            return out

    return Listed


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda e: nn.Linear(H, H), "an expert is a single matrix (experts.0, 16x16)"),
        (
            lambda e: FFN(width=8 + e),
            "width: experts.0.up_proj.weight is 8x16, experts.1.up_proj.weight 9x16",
        ),
        (lambda e: nn.Linear(H, H, bias=e > 0), "different parameters: experts.1 has bias, experts.0 has not"),
        (lambda e: nn.Sequential(*(nn.Linear(H, H) for _ in range(4))), "an expert has 4 matrices"),
        (lambda e: nn.Sequential(nn.LayerNorm(H), FFN()), "a norm of its own (experts.0.0, LayerNorm)"),
    ],
)
def test_structure_tells_what_keeps_experts_from_being_a_bank(make: Callable[[int], nn.Module], says: str) -> None:
    got = reason(listed(make))
    assert says in got, got
    assert "nearest to every expert on every token" in got
