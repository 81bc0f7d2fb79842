"""`rows_of`: a value of a captured graph as a function of any number of rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from moefx.graph.edit import set_value
from moefx.graph.rows import NotRowwise, rows_of

Tensor = torch.Tensor
H, E = 6, 4


def graph_of(build: Callable[..., Tensor], inputs: dict[str, Tensor]) -> tuple[fx.Graph, fx.Node, fx.Node]:
    """A graph of `build`, which returns (what experts read, the value); with shapes, as a capture has them."""
    gm = fx.symbolic_trace(build)
    values = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs.values(), strict=True))

    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            out = super().run_node(n)
            if n.op != "output":
                set_value(n, out, "model")
            return out

    Noting(gm).run(*values.values())
    x, value = gm.graph.output_node().args[0]
    return gm.graph, x, value


def parameter(n: fx.Node) -> str | None:
    return str(n.target) if str(n.target) in ("weight", "gain") else None


def inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(2, 3, H, generator=g), "weight": torch.randn(E, H, generator=g),
        "gain": torch.randn(H, generator=g),
    }  # fmt: skip


def test_a_router_runs_on_other_numbers_of_rows() -> None:
    def build(hidden: Tensor, weight: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        flat = hidden.view(6, H)
        capped = torch.tanh(F.linear((hidden.reshape(6, H) * gain).float(), weight) / 3) * 3
        return flat.to(torch.float32), capped.view(2, 3, E)

    _, x, value = graph_of(build, inputs())
    given = inputs()
    rows = rows_of(value, x, parameter)
    assert set(rows.names) == {"weight", "gain"}
    other = torch.randn(5, H)
    want = torch.tanh(F.linear(other * given["gain"], given["weight"]) / 3) * 3
    torch.testing.assert_close(rows(other, given), want)
    changed = {**given, "gain": 2 * given["gain"]}  # the present values of parameters are read
    assert not torch.allclose(rows(other, changed), want)


def sums(hidden: Tensor, weight: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.view(6, H), F.linear(hidden.view(6, H).cumsum(0), weight)


def splits(hidden: Tensor, weight: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.view(6, H), F.linear(hidden.view(12, H // 2), weight[:, : H // 2])


def meets(hidden: Tensor, weight: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    x = hidden.view(6, H)
    return x, torch.matmul(x, x.t())


def reads(hidden: Tensor, weight: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.view(6, H), F.linear(hidden.view(6, H) + noise, weight)


def places(hidden: Tensor, weight: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    x = hidden.view(6, H)
    return x, F.linear(x + gain.expand(6, H).contiguous(), weight)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (sums, "cumsum .* lies between"),
        (splits, "changes what a row is"),
        (meets, "lies between"),
        (places, "gives each row something else"),
        (reads, "reads noise, which is no parameter"),
    ],
)
def test_what_is_not_made_row_by_row_is_refused(build: Callable[..., Tensor], why: str) -> None:
    _, x, value = graph_of(build, inputs())
    with pytest.raises(NotRowwise, match=why):
        rows_of(value, x, parameter)
