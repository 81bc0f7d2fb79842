"""A teacher cut off behind one of its routers: token ids -> the logits that its experts are chosen by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import compat
from ..capture import Captured, as_call, capture, check_call, distinct, warm_up
from ..dialect.route import RouteSpec
from ..errors import CaptureError, InputError
from ..graph.edit import arguments, copy_plain, find, module_path, size_node, value
from ..manager import PassManager
from ..passes import get_pass
from ..passes.raise_experts import Block, raised, to_observe
from ..raising.probe import observed
from ..report import Report
from ..train.modes import modes_kept

ops = torch.ops.moefx
RAISING = ("raise_idioms", "raise_routers")
IDS = "input_ids"
TOLERANCE = 1e-3  # of the largest logit; other rows of a batch change how a product is rounded

Batch = Tensor | Mapping[str, Tensor]


class Tap:
    """Router logits of one MoE layer; made by `tap`. Nothing behind the router runs, and no gradient is kept.

    Attributes:
        layer: which MoE layer, from 0.
        path: module path of the router.
        spec: the router's normal form, `moefx.dialect.route.RouteSpec`; `spec.k` experts per token.
        num_experts: E.
        graph: what runs, for reading.
    """

    def __init__(self, gm: fx.GraphModule, inputs: Mapping[str, str], values: Mapping[str, Any], layer: int) -> None:
        (logits,) = gm.graph.find_nodes(op="output")[0].args
        self.layer, self.path, self.spec = layer, module_path(logits), RouteSpec.parse(gm.meta["route"])
        self.num_experts = int(value(logits).shape[-1])
        self._gm, self._inputs, self._values = gm, inputs, values
        fakes = [value(n) for n in gm.graph.find_nodes(op="placeholder") if n.name in inputs]
        self._mode, self._device = compat.fake_mode_of(fakes), fakes[0].device
        self._sizes = [tuple(s if type(s) is int else None for s in f.shape) for f in fakes]
        # A size of 1 cannot stand for others in a capture: one sequence is run twice.
        self._doubles = {name for name, s in zip(inputs.values(), self._sizes, strict=True) if s and s[0] is None}
        # torch 2.11 gives sizes as inputs of their own.
        self._size_of = {
            n.name: self._shown(v.node.expr)
            for n in gm.graph.find_nodes(op="placeholder")
            if compat.is_symbol(v := value(n))
        }
        self._guard = compat.guard_expression(self._mode, fakes) if self._mode is not None else None

    @property
    def graph(self) -> fx.Graph:
        """The cut graph."""
        return self._gm.graph

    def _shown(self, symbol: Any) -> tuple[str, int]:
        """The input and axis that have a size."""
        if (found := size_node(self.graph, symbol)) is None:
            raise CaptureError(
                f"the captured teacher needs the size {symbol}, which is that of no input in front of the router",
                where=self.path,
                todo="tap it with dynamic=False, for batches of one shape",
            )
        return self._inputs[found[0].name], found[1]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Logits fp32 [B, S, E] for a batch: ids [B, S], or a dict with the inputs that the teacher was tapped with.

        Raises:
            InputError: inputs are missing, unknown, or of a shape that the captured graph is not valid for.
        """
        given = {IDS: batch} if isinstance(batch, Tensor) else dict(batch)
        # Strides and offsets are part of what was captured.
        given = {n: t.to(self._device).clone(memory_format=torch.contiguous_format) for n, t in given.items()}
        known = set(self._gm.meta["accepted"])
        if set(given) != known:
            raise InputError(
                f"the teacher was tapped with {sorted(known)}, and the batch holds {sorted(given)}",
                where="moefx.grouter.tap",
                todo="tap the teacher with example inputs of the same names as the batches",
            )
        B, S = given[IDS].shape
        if B == 1 and self._doubles:
            return self({name: torch.cat((t, t)) if name in self._doubles else t for name, t in given.items()})[:1]
        used = [given[name] for name in self._inputs.values()]
        fits = all(
            t.dim() == len(sizes) and all(want in (None, have) for want, have in zip(sizes, t.shape, strict=True))
            for t, sizes in zip(used, self._sizes, strict=True)
        )
        if not fits or (self._mode is not None and not compat.guards_hold(self._mode, self._guard, used)):
            raise InputError(
                f"the captured teacher is not valid for inputs of {[tuple(t.shape) for t in used]}",
                where="moefx.grouter.tap",
                todo="tap it with example inputs of this shape (sizes of 1 are always fixed)",
            )
        sizes = {n: given[name].shape[axis] for n, (name, axis) in self._size_of.items()}
        named = {**self._values, **sizes, **{n: given[name] for n, name in self._inputs.items()}}
        logits: Tensor = self._gm(*(named[n.name] for n in self.graph.find_nodes(op="placeholder")))
        rows = logits.shape[:-1]
        if tuple(rows) != (B, S) and tuple(rows) != (B * S,):
            raise CaptureError(
                f"the router makes logits of shape {tuple(logits.shape)} for ids of {(B, S)}",
                where=self.path,
                why=f"rows [B, S] or [B * S] of all tokens are needed, here {B * S}",
                todo="tap another layer; a model that drops or packs tokens before its router is no teacher",
            )
        return logits.float().reshape(B, S, -1)


def tap(teacher: nn.Module, example_inputs: Any, *, layer: int = 0, dynamic: bool = True) -> Tap:
    """Cut a teacher off behind the router of its n-th MoE layer, by moefx's own capture.

    Any model that `moefx.optimize` can raise will do, in any of the ways to write a router that `raise_routers` knows.
    The teacher is captured in eval mode and comes back as it was; the tap shares its parameters, and reads only those
    in front of the router.

    Args:
        teacher: a transformers model or any nn.Module with raisable MoE blocks.
        example_inputs: ids [B, S], a dict with "input_ids", or a tuple whose first entry is the ids. Two sequences or
            more, or one that is doubled here, to see that the routing of one does not depend on the other.
        layer: which MoE layer, from 0. The first is what the method distils: deeper ones are less stable while the
            teacher trains.
        dynamic: batch and sequence sizes may vary between calls; False for a teacher that works for one shape alone.

    Raises:
        InputError: there is no such layer, or the inputs do not fit.
        CaptureError: the teacher cannot be captured; its router is in no normal form; the logits are not one row per
            token of a batch-major batch.
    """
    inputs = _batch(teacher, example_inputs)
    with modes_kept(teacher):
        teacher.eval()
        captured, blocks, report, values = _captured(teacher, inputs, dynamic)
    logits, spec = _router(captured.graph, blocks, report, layer, teacher)
    cut = Tap(*_cut(captured, logits, spec, inputs, values), layer)
    _check_rows(cut, inputs)
    return cut


def _batch(teacher: nn.Module, example_inputs: Any) -> dict[str, Tensor]:
    """The example as named tensors of at least two sequences."""
    args, kwargs = as_call(example_inputs)
    named = {k: v for k, v in check_call(teacher, args, kwargs).items() if isinstance(v, Tensor)}
    if not isinstance(ids := named.get(IDS), Tensor) or ids.dim() != 2:
        raise InputError(
            f"the example inputs have no {IDS!r} of shape [sequences, tokens]",
            where=type(teacher).__qualname__,
            why=f"they name {sorted(named)}",
            todo=f"give {{{IDS!r}: ids}}",
        )
    device = next((p.device for p in teacher.parameters()), ids.device)
    named = {k: v.to(device) for k, v in named.items()}
    if (B := ids.shape[0]) == 1:
        named = {k: torch.cat((v, v)) if v.dim() and v.shape[0] == B else v for k, v in named.items()}
    _, named = distinct(teacher, (), named)
    return named


@torch.no_grad()
def _captured(
    teacher: nn.Module, inputs: dict[str, Tensor], dynamic: bool
) -> tuple[Captured, list[Block], Report, dict[str, Any]]:
    B, S = inputs[IDS].shape
    # Of other inputs, the axes of the sizes of the ids: masks, positions.
    sizes = {name: [a for a, n in enumerate(t.shape) if a < 2 and n == (B, S)[a] > 1] for name, t in inputs.items()}
    with observed(to_observe(teacher)) as calls:
        warm_up(teacher, (), inputs)
    report = Report(type(teacher).__qualname__, "bf16", "eager")
    with raised(teacher, calls=calls, live=False) as blocks:
        captured = capture(teacher, (), inputs, sizes if dynamic else None)
        placeholders = captured.graph.find_nodes(op="placeholder")
        fake_mode = compat.fake_mode_of([value(n) for n in placeholders])
        passes = PassManager(tuple(get_pass(name) for name in RAISING))
        passes.run("model", captured.gm, report, fake_mode, None)
        found = compat.flat_inputs(captured.gm, (), inputs)
        values = {n.name: v for n, v in zip(placeholders, found, strict=True)}
    return captured, blocks, report, values


def _router(
    graph: fx.Graph, blocks: list[Block], report: Report, layer: int, teacher: nn.Module
) -> tuple[fx.Node, str]:
    """The logits of the router in front of the n-th experts, and its normal form."""
    cls = type(teacher).__qualname__
    layers = find(graph, ops.experts)
    if not layers:
        left = next((b for b in blocks if not b.raised), None)
        raise CaptureError(
            "the teacher has no MoE layer that moefx can raise",
            where=cls if left is None else f"{left.path or 'the model itself'} ({left.cls})",
            why="none was found" if left is None else left.reason,
            todo="see docs/models.md for what is recognised",
        )
    if not 0 <= layer < len(layers):
        raise InputError(f"there is no MoE layer {layer}", where=cls, todo=f"choose one of 0..{len(layers) - 1}")
    node: Any = arguments(layers[layer])["idx"]
    while isinstance(node, fx.Node) and node.target not in (ops.route, ops.route.default):
        node = node.args[0] if node.args else None
    if not isinstance(node, fx.Node):
        why = [r for row in report.passes if row.name == "raise_routers" for r in row.rejected]
        mine = [r["why"] for r in why if r["node"] == layers[layer].name] or [r["why"] for r in why]
        raise CaptureError(
            f"the router of MoE layer {layer} is in no normal form, so its logits are not known",
            where=module_path(layers[layer]) or cls,
            why=mine[0] if mine else "the experts are not chosen by a top-k of scores",
            todo="tap another layer, or give distill a function from a batch to logits [B, S, E]",
        )
    call = arguments(node)
    return call["logits"], str(call["spec"])


def _cut(
    captured: Captured, logits: fx.Node, spec: str, inputs: dict[str, Tensor], values: dict[str, Any]
) -> tuple[fx.GraphModule, dict[str, str], dict[str, Any]]:
    """What the logits are made of, as a module; its input placeholders by name, and the teacher's tensors."""
    graph = copy_plain(captured.graph)
    order = list(graph.nodes)
    at = next(i for i, n in enumerate(order) if n.name == logits.name)
    (output,) = graph.find_nodes(op="output")
    output.args = (order[at],)
    open_regions = set(order[:at])
    for node in reversed(order[at + 1 : -1]):
        # The end of an autocast region that began before the cut stays.
        if not (node.args and node.args[0] in open_regions and "exit_autocast" in str(node.target)):
            graph.erase_node(node)
    gm = fx.GraphModule(captured.gm, graph)
    gm.meta["route"], gm.meta["accepted"] = spec, sorted(inputs)
    fake_mode = compat.fake_mode_of([value(n) for n in graph.find_nodes(op="placeholder")])
    PassManager((get_pass("dead_code"),)).run("model", gm, Report(), fake_mode, None)
    names, kept = {}, {}
    for node in graph.find_nodes(op="placeholder"):
        name = captured.names.get(node.name, node.name)
        if not node.users:
            graph.erase_node(node)
        elif name in inputs:
            names[node.name] = name
        else:
            v = values[node.name]
            kept[node.name] = v.detach() if isinstance(v, Tensor) else v
    if IDS not in names.values():
        raise CaptureError("the router logits do not depend on the token ids", where=module_path(logits))
    gm.recompile()
    return gm, names, kept


def _check_rows(cut: Tap, inputs: dict[str, Tensor]) -> None:
    """Perturb the first sequence: its own rows must change, and no others."""
    ids = inputs[IDS]
    other = ids.clone()
    other[0] = ids[0].flip(0) if not torch.equal(ids[0], ids[0].flip(0)) else (ids[0] == 0).to(ids.dtype)
    before, after = cut(inputs), cut({**inputs, IDS: other})
    scale = before.abs().max()
    if (strangers := (before - after)[1:].abs().max() / scale) > TOLERANCE:
        raise CaptureError(
            "changing one sequence of a batch changes the router logits of another",
            where=cut.path,
            why=f"by {float(strangers):.1e} of the largest logit",
            todo="the rows must be batch-major [B, S], and sequences independent of each other",
        )
    if not (before - after)[0].abs().max() > 0:
        raise CaptureError("the router logits do not depend on the token ids", where=cut.path, todo="tap another layer")
