"""Delayed scaling: scales from the largest magnitudes (amax) of earlier steps, kept between steps.

A training graph of a recipe with delayed specs has one input more, the history [C, n] of its C casts, and one output
more in each half: the amax of this step's casts, forward and backward, -1 for casts of the other half. The history
itself belongs to the `OptimizedModule`: it is no parameter and no buffer, so that `state_dict` stays the model's own,
and is saved by itself (`precision_state`). As TransformerEngine does, the scale follows the largest of the last n
magnitudes; unlike there, a cast without history measures its own tensor instead of taking the scale 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from . import compat
from .dialect.delayed import UNSEEN
from .errors import InputError
from .graph.edit import find, value
from .joint import Joint

Tensor = torch.Tensor
ops = torch.ops.moefx
NAME = "moefx_amax_history"


class AmaxHistory:
    """The last `length` magnitudes of every delayed cast of a model, newest first; 0 where there is none yet."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.row: dict[str, int] = {}
        self.table = torch.zeros(0, length)

    def index(self, keys: Sequence[str | None], device: torch.device) -> Tensor:
        """Rows of the casts named by `keys`, made where they are new; None reads any row."""
        new = [k for k in keys if k is not None and k not in self.row]
        self.row.update({k: len(self.row) + i for i, k in enumerate(new)})
        missing = max(len(self.row), 1) - self.table.shape[0]
        self.table = torch.cat([self.table.to(device), torch.zeros(missing, self.length, device=device)])
        return torch.tensor([0 if k is None else self.row[k] for k in keys], device=device)

    def read(self, index: Tensor) -> Tensor:
        """A copy of the rows [C, n] at `index`."""
        return self.table.index_select(0, index)

    def push(self, index: Tensor, amax: Tensor) -> None:
        """Add this step's magnitudes [C] to the rows at `index`; `UNSEEN` ones leave their row as it is."""
        with torch.no_grad():
            seen = amax >= 0
            rows = torch.cat([amax[:, None], self.read(index)[:, :-1]], 1)
            # Rows of casts that were not seen go to a spare one, so that no size depends on values.
            spare = torch.where(seen, index, self.table.shape[0])
            padded = torch.cat([self.table, self.table.new_zeros(1, self.length)])
            self.table = padded.index_copy(0, spare, rows)[:-1]

    def state_dict(self) -> dict[str, Any]:
        """The history by the names of its casts."""
        return {"length": self.length, "casts": {k: self.table[i].clone() for k, i in self.row.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a history that `state_dict` gave. Raises `InputError` when it has another length."""
        if state["length"] != self.length:
            raise InputError(
                f"the history holds {state['length']} steps, the recipe keeps {self.length}",
                todo="load it into a module of a recipe with the same amax_history",
            )
        self.row = {k: i for i, k in enumerate(state["casts"])}
        rows = [t.to(self.table.device) for t in state["casts"].values()]
        self.table = torch.stack(rows) if rows else torch.zeros(0, self.length, device=self.table.device)


def attach(joint: Joint, length: int) -> None:
    """Give a joint graph the input and the outputs of a history of `length` steps; `quantize` uses what it needs."""
    count = 2 * len(find(joint.graph, ops.grouped_mm, ops.grouped_wgrad))
    graph = joint.graph
    placeholders = graph.find_nodes(op="placeholder")
    device = next(v.device for n in placeholders if isinstance(v := value(n), Tensor))
    primals = sum(s.kind != "tangent" for s in joint.inputs)
    first_forward, outputs = joint.fwd_outputs, list(graph.output_node().args[0])  # type: ignore[arg-type]

    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        after_inputs = graph.call_function(torch.ops.aten.full.default, ([count], UNSEEN), {"device": device})
    with graph.inserting_after(placeholders[primals - 1]):
        history = graph.placeholder(NAME)
    with compat.propagating(joint.fake_mode):
        history.meta["val"] = torch.empty(count, length, device=device)
        half = {"val": torch.empty(count, device=device), "moefx_amax": True}
        after_inputs.meta = {**half, "partitioner_tag": "is_forward"}
    joint.inputs.insert(primals, compat.Slot("state", NAME))
    outputs.insert(first_forward, after_inputs)
    joint.outputs.insert(first_forward, compat.Slot("state", NAME))
    if joint.grad:
        with graph.inserting_before(graph.output_node()):
            unseen = graph.call_function(torch.ops.aten.full.default, ([count], UNSEEN), {"device": device})
        unseen.meta = {**half, "partitioner_tag": "is_backward"}
        outputs.append(unseen)
        joint.outputs.append(compat.Slot("grad", NAME))
    out = graph.output_node()
    out.args = (tuple(outputs),)
    if "desc" in out.meta:  # the partitioners walk outputs and descriptions side by side
        described = list(out.meta["desc"])
        described.insert(first_forward, None)
        out.meta["desc"] = [*described, None] if joint.grad else described
    joint.gm.recompile()


def keys_of(graph: fx.Graph) -> list[str | None]:
    """The casts that the rows of a graph's history belong to, None for unused rows; [] without a history."""
    found = [n for n in graph.find_nodes(op="placeholder") if n.name == NAME]
    if not found:
        return []
    keys: list[str | None] = [None] * value(found[0]).shape[0]
    for i, key in enumerate(found[0].meta.get("moefx_keys", ())):
        keys[i] = key
    return keys
