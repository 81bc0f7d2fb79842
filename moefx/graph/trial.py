"""Running a model graph on real inputs up to some of its nodes, to see what their values depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from moefx import compat

from .effects import name_of

Tensor = torch.Tensor


def values_of(gm: fx.GraphModule, values: Sequence[Any], wanted: Sequence[fx.Node]) -> dict[fx.Node, Tensor]:
    """Values of some nodes; nothing behind the last of them runs. Random numbers are the same in every run.

    Args:
        values: of the placeholders. Tensors that the graph writes into are written to.
    """
    devices = list({v.device for v in values if isinstance(v, Tensor) and v.device.type == "cuda"})
    run = _Until(gm, wanted)
    with torch.random.fork_rng(devices=devices), torch.no_grad(), compat.no_fake():
        torch.manual_seed(0)
        try:
            run.run(*values, enable_io_processing=False)
        except _Reached:
            return run.found
        finally:
            run.leave()
    raise AssertionError("the nodes are in the graph")


class _Reached(BaseException):
    """All wanted nodes were computed."""


class _Until(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, wanted: Sequence[fx.Node]) -> None:
        super().__init__(gm)
        self.missing, self.found = set(wanted), dict[fx.Node, Tensor]()
        self.entered: dict[fx.Node, Any] = {}

    def leave(self) -> None:
        """Leave the regions (autocast) that the run ended in."""
        for enter, region in reversed(self.entered.items()):
            exits = [u.target for u in enter.users if name_of(u).startswith("_exit")]
            for leave in exits[:1]:
                leave(region)  # type: ignore[operator]

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if name_of(n).startswith("_enter"):
            self.entered[n] = out
        elif name_of(n).startswith("_exit"):
            self.entered.pop(n.args[0], None)  # type: ignore[arg-type]
        if n in self.missing:
            self.missing.discard(n)
            self.found[n] = out.clone()
            if not self.missing:
                raise _Reached
        return out
