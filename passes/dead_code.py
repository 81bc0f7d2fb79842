"""Nodes that nobody reads go."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from moefx.graph.effects import erase_unread
from moefx.manager import Context, Pass


@dataclass(frozen=True)
class DeadCode(Pass):
    """Remove nodes without users, except those with an effect: in-place writes, random draws, assertions.

    Random draws stay even when unread, so that those behind them draw the same numbers.
    """

    level: str = "model"  # type: ignore[misc]

    @property
    def name(self) -> str:
        """`dead_code`, or `dead_code_training` on the training level."""
        return "dead_code" if self.level == "model" else "dead_code_training"

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        ctx.row.matched += erase_unread(graph)
