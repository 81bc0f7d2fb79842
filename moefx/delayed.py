"""Delayed scaling: scales from the largest magnitudes (amax) of earlier steps, kept between steps.

A training graph of a recipe with delayed specs has one input more, the history [C, n] of its C casts, and one output
more in each half: the amax of this step's casts, forward and backward, -1 for casts of the other half. The history
itself belongs to the `OptimizedModule`: it is no parameter and no buffer, so that `state_dict` stays the model's own,
and is saved by itself (`precision_state`). As TransformerEngine does, the scale follows the largest of the last n
magnitudes; unlike there, a cast without history measures its own tensor instead of taking the scale 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

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
        """Add this step's magnitudes [C] to the rows at `index`; `UNSEEN` ones leave their row as it is.

        So do those that are not finite: a step whose loss scale overflowed says nothing about the steps behind it.
        """
        with torch.no_grad():
            seen = (amax >= 0) & amax.isfinite()
            rows = torch.cat([amax[:, None], self.read(index)[:, :-1]], 1)
            # Rows of casts that were not seen go to a spare one, so that no size depends on values.
            spare = torch.where(seen, index, self.table.shape[0])
            padded = torch.cat([self.table, self.table.new_zeros(1, self.length)])
            self.table = padded.index_copy(0, spare, rows)[:-1]

    def state_dict(self) -> dict[str, Any]:
        """The history by the names of its casts."""
        return {"length": self.length, "casts": {k: self.table[i].clone() for k, i in self.row.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a history that `state_dict` gave; casts that it does not name start without one.

        Rows stay those of the casts that they were made for, so that a call under way still finds its own.

        Raises:
            InputError: a history of another length, or no history at all; nothing is changed then.
        """
        casts = self._checked(state)
        device = self.table.device
        self.table = torch.zeros_like(self.table)
        index = self.index(list(casts), device)
        if casts:
            rows = torch.stack([t.detach().to(device, torch.float32) for t in casts.values()])
            self.table = self.table.index_copy(0, index, rows)

    def _checked(self, state: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The rows of a state by cast."""

        def refuse(why: str) -> NoReturn:
            raise InputError(
                "this is no history of delayed scaling",
                why=why,
                todo="give what precision_state() returned, of a module of the same recipe",
            )

        if not isinstance(state, Mapping):
            refuse(f"it is {type(state).__name__}, not a dict of 'length' and 'casts'")
        if lacking := [key for key in ("length", "casts") if key not in state]:
            refuse(f"it has no {lacking[0]!r}")
        if state["length"] != self.length:
            raise InputError(
                f"the history holds {state['length']} steps, the recipe keeps {self.length}",
                todo="load it into a module of a recipe with the same amax_history",
            )
        casts = state["casts"]
        if not isinstance(casts, Mapping):
            refuse(f"'casts' is {type(casts).__name__}, not a dict of tensors")
        for name, row in casts.items():
            if not isinstance(row, Tensor) or not row.is_floating_point() or tuple(row.shape) != (self.length,):
                got = f"{row.dtype} {tuple(row.shape)}" if isinstance(row, Tensor) else type(row).__name__
                refuse(f"of {name!r} it has {got}, not {self.length} floating-point magnitudes")
        return casts


def attach(joint: Joint, length: int, training: bool = True) -> None:
    """Give a joint graph the input and the outputs of a history of `length` steps; `quantize` uses what it needs.

    Outside of `training`, the history is read alone: no magnitude is returned.
    """
    count = 2 * len(find(joint.graph, ops.grouped_mm, ops.grouped_wgrad))
    graph = joint.graph
    placeholders = graph.find_nodes(op="placeholder")
    device = next(v.device for n in placeholders if isinstance(v := value(n), Tensor))
    primals = sum(s.kind != "tangent" for s in joint.inputs)
    first_forward, outputs = joint.fwd_outputs, list(graph.output_node().args[0])  # type: ignore[arg-type]

    with graph.inserting_after(placeholders[primals - 1]):
        history = graph.placeholder(NAME)
    with compat.propagating(joint.fake_mode):
        history.meta["val"] = torch.empty(count, length, device=device)
        amax = torch.empty(count, device=device)
    joint.inputs.insert(primals, compat.Slot("state", NAME))

    def unseen(before: fx.Node, half: str) -> fx.Node:
        with graph.inserting_before(before):
            made = graph.call_function(torch.ops.aten.full.default, ([count], UNSEEN), {"device": device})
        made.meta = {"val": amax, "moefx_amax": True, "partitioner_tag": half}
        return made

    out = graph.output_node()
    described = list(out.meta.get("desc", ()))
    if training:
        outputs.insert(first_forward, unseen(next(n for n in graph.nodes if n.op != "placeholder"), "is_forward"))
        joint.outputs.insert(first_forward, compat.Slot("state", NAME))
        described.insert(first_forward, None)
    if joint.grad:
        outputs.append(unseen(out, "is_backward") if training else None)
        joint.outputs.append(compat.Slot("grad", NAME))
        described.append(None)
    out.args = (tuple(outputs),)
    if "desc" in out.meta:  # the partitioners walk outputs and descriptions side by side
        out.meta["desc"] = described
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


def refuse_recompute() -> None:
    """Raise `InputError` for a forward of a training step inside of a running backward.

    Activation checkpointing around an optimized module runs its forward a second time there, when the history holds
    the magnitudes of the first: it would scale otherwise than the first did, and the gradients would be of another
    function. Inside the model, where checkpoints become part of the graph, nothing runs twice.
    """
    if torch._C._current_graph_task_id() != -1:
        raise InputError(
            "an optimized module with delayed scaling was called inside of a backward",
            why="activation checkpointing around it runs its forward again, and by now its history holds the "
            "magnitudes of the first run: the second would scale its tensors otherwise",
            todo="checkpoint inside of the model (moefx keeps those checkpoints), or use a recipe that measures its "
            "tensors, such as fp8_tensorwise",
        )
