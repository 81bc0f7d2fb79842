"""What the stages of a compilation took, in the report and on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import fx, nn

from .report import Report


class Stages:
    """Times stages into the report, and says on standard error what is going on once it takes over two seconds."""

    def __init__(self, report: Report, show: str) -> None:
        self.report, self.show, self.start = report, show, time.perf_counter()

    @property
    def total(self) -> float:
        """Seconds since the first stage began."""
        return time.perf_counter() - self.start

    @contextmanager
    def __call__(self, name: str) -> Iterator[Any]:
        begin, nodes = time.perf_counter(), [0]

        def done(result: Any) -> Any:
            graph = getattr(result, "graph", None)
            nodes[0] = len(graph.nodes) if isinstance(graph, fx.Graph) else 0
            return result

        yield done
        row = self.report.stages.setdefault(name, {"seconds": 0.0, "nodes": 0})
        row["seconds"], row["nodes"] = row["seconds"] + time.perf_counter() - begin, nodes[0] or row["nodes"]
        if self.total > 2:
            took = f"{row['seconds']:.1f} s, {row['nodes']} nodes ({self.total:.1f} s so far)"
            _say(f"moefx: {self.show}: {name} {took}")

    def backward(self, gm: fx.GraphModule, seconds: float) -> None:
        """Add the compilation of a backward variant, which happens at the first backward."""
        row = self.report.stages.setdefault("codegen backward", {"seconds": 0.0, "nodes": 0})
        row["seconds"], row["nodes"] = row["seconds"] + seconds, len(gm.graph.nodes)
        if seconds > 2:
            _say(f"moefx: {self.show}: codegen backward {seconds:.1f} s")


def _say(text: str) -> None:
    with suppress(OSError):  # nobody reads it any more; what is compiled is worth more
        print(text, file=sys.stderr)


def describe(model: nn.Module, leaves: Sequence[torch.Tensor], grad: bool, seconds: float) -> dict[str, Any]:
    """A signature for the report."""
    mode = "train" if model.training else "eval"
    return {"mode": mode, "grad": grad, "inputs": shapes(leaves), "seconds": seconds}


def shapes(leaves: Sequence[torch.Tensor]) -> list[str]:
    """Tensors as `int64[2, 16]`."""
    return [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in leaves]
