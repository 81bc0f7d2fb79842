"""What every precision cast of a training step loses, measured on real values.

The step's training graph is interpreted up to its casts: explicit `quantize` nodes, those that an activation writes
itself, whose wide values are computed again from its inputs, and those that became a turn or a conversion of codes. The
codes that the graph makes are compared with the values that they stand for (of a turn: those of the codes it reads) by
`moefx.precision.quantize.quality`. Nothing is written back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from . import compat
from .errors import InputError
from .graph.casts import DELAYED, QUANTIZE, TURNS, Cast
from .graph.edit import arguments, copy_graph, is_backward, targets, value
from .graph.effects import is_effect, writers
from .joint import Joint
from .precision.quantize import dequantize, quality
from .tangents import like_traced, prune_tangents

Tensor = torch.Tensor
ops = torch.ops.moefx
GLU, GLU_BACKWARD = targets(ops.glu_quantize), targets(ops.glu_backward_quantize)
MEASURED = QUANTIZE | DELAYED | TURNS | GLU | GLU_BACKWARD
Row = dict[str, Any]


class Meter:
    """Measures the casts of one compiled variant. It keeps the training graph and no tensor of the model."""

    def __init__(self, joint: Joint) -> None:
        self.joint = joint
        inputs = zip(joint.graph.find_nodes(op="placeholder"), joint.inputs, strict=True)
        self.tangents = [(n.name, int(s.key), value(n)) for n, s in inputs if s.kind == "tangent"]
        self._graphs: dict[frozenset[str], fx.GraphModule] = {}

    @staticmethod
    def of(joint: Joint) -> Meter | None:
        """A meter for a training graph that all passes have run on; None when it has no casts."""
        return Meter(joint) if _casts(joint.graph) else None

    def measure(self, primals: Sequence[Any], tangents: Any = None) -> list[Row]:
        """One row per cast and spec, in graph order: `OptimizedModule.precision_metrics` says what is in it.

        Args:
            primals: values of the graph's inputs before the tangents, in order.
            tangents: as `OptimizedModule.precision_metrics` takes them.
        """
        if not self.joint.grad:
            raise InputError(
                "the call has no backward to measure", why="no parameter and no input requires gradients",
                todo="measure the model as it is trained",
            )  # fmt: skip
        given = self._default() if tangents is None else self._given(tangents)
        absent = frozenset(name for name, key, _ in self.tangents if key not in given)
        if absent not in self._graphs:
            self._graphs[absent] = _up_to_casts(self.joint.gm, absent)
        gm = self._graphs[absent]
        values = [v.detach() if isinstance(v, Tensor) else v for v in primals]
        written = writers(gm.graph)
        for i, node in enumerate(gm.graph.find_nodes(op="placeholder")[: len(values)]):
            if isinstance(values[i], Tensor) and written(node):
                values[i] = values[i].clone()
        values += [like_traced(given[key], val) for name, key, val in self.tangents if key in given]
        devices = list({v.device for v in values if isinstance(v, Tensor) and v.device.type == "cuda"})
        reader = _Reader(gm)
        with torch.random.fork_rng(devices=devices), torch.no_grad(), compat.no_fake(), compat.disable_autocast():
            reader.run(*values, enable_io_processing=False)
        return reader.rows

    def _default(self) -> dict[int, Tensor]:
        """One for the loss: the output called `loss`, without one every scalar output."""
        scalar = {key: val for _, key, val in self.tangents if not val.dim()}
        loss = self._called_loss()
        chosen = {loss: scalar[loss]} if loss in scalar else scalar
        if not chosen:
            raise InputError(
                "the model returns no scalar that could be its loss",
                todo="pass tangents=, one for each output of the model, None where an output has no gradient",
            )
        return {key: torch.ones((), dtype=val.dtype, device=val.device) for key, val in chosen.items()}

    def _called_loss(self) -> int:
        """The position of the output that a training loop finds as `.loss` or `["loss"]`; -1 for none."""
        spec = self.joint.out_spec
        marks = [torch.empty(()) for _ in range(spec.num_leaves)]
        out = pytree.tree_unflatten(marks, spec)
        loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
        found = next((i for i, mark in enumerate(marks) if mark is loss), -1)
        return self.joint.repeated.get(found, found)

    def _given(self, tangents: Any) -> dict[int, Tensor]:
        leaves = pytree.tree_leaves(tangents)
        known = {key: val for _, key, val in self.tangents}
        known |= {i: known[first] for i, first in self.joint.repeated.items() if first in known}
        if len(leaves) != (count := self.joint.out_spec.num_leaves):
            raise InputError(
                f"{len(leaves)} tangents were given for {count} outputs",
                todo="give one for each output in the order in which the model returns them, None for no gradient",
            )
        given = {i: t for i, t in enumerate(leaves) if t is not None}
        for i, t in given.items():
            if i not in known:
                raise InputError(f"output {i} has no gradient", todo="give None as its tangent")
            if not isinstance(t, Tensor) or t.dtype != known[i].dtype or not _fits(t, known[i]):
                want = f"{known[i].dtype} {tuple(known[i].shape)}"
                got = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
                raise InputError(f"the tangent of output {i} does not fit it", why=f"got {got}, want {want}")
        if not given:
            raise InputError("every tangent is None", todo="give a tangent for at least one output")
        summed: dict[int, Tensor] = {}
        for i, t in given.items():
            first = self.joint.repeated.get(i, i)
            summed[first] = summed[first] + t.detach() if first in summed else t.detach()
        return summed


class _Reader(fx.Interpreter):
    """Runs a graph and measures casts as it meets them."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.rows: list[Row] = []

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if _cast(n) is not None:
            a = fx.map_arg(arguments(n), self.env.__getitem__)
            for cast, x, specs, encoded in _encodings(n, a, out):
                self.rows += _rows(n, cast, x, specs, encoded, a["offsets"])
        # What only the output reads was there to be measured.
        return None if all(u.op == "output" for u in n.users) else out


# What for, wide values, specs, codes and scales under each spec in turn.
Encoding = tuple[Cast, Tensor, Sequence[str], Sequence[Tensor]]


def _encodings(node: fx.Node, a: Mapping[str, Any], out: Sequence[Tensor]) -> Iterator[Encoding]:
    """What a node encodes, given its arguments and outputs."""
    cast = _cast(node)
    assert cast is not None
    if node.target in QUANTIZE | DELAYED:
        yield cast, a["x"], a["specs"], out
        return
    if node.target in TURNS:
        yield cast, dequantize(a["codes"], a["scales"], a["spec"], offsets=a["offsets"]), [a["to_spec"]], out
        return
    specs = list(a["specs"])
    if node.target in GLU:
        split = 2 * len(specs)
        if specs:
            yield cast, ops.glu(a["h"], a["w"], a["kind"]), specs, out[:split]
        yield dataclasses.replace(cast, role="hidden", tensor="H"), a["h"], a["h_specs"], out[split:]
        return
    h, w, kind = a["h"], a["w"], a["kind"]
    if a["h_scales"] is not None:
        h = dequantize(h, a["h_scales"], a["h_spec"], dtype=a["da"].dtype, offsets=a["offsets"])
    split = 1 + 2 * len(specs)
    yield cast, ops.glu_backward(a["da"], h, w, kind)[0], specs, out[1:split]
    if a["act_specs"]:
        act = dataclasses.replace(cast, role="input", tensor="A")
        yield act, ops.glu(h, w, kind), a["act_specs"], out[split:]


def _rows(
    node: fx.Node, cast: Cast, x: Tensor, specs: Sequence[str], encoded: Sequence[Tensor], offsets: Tensor | None
) -> Iterator[Row]:
    for i, spec in enumerate(specs):
        lost = quality(x, encoded[2 * i], encoded[2 * i + 1], spec, offsets)
        direction = "bwd" if is_backward(node) else "fwd"
        yield {
            "layer": cast.layer, "tensor": cast.tensor, "role": cast.role, "direction": direction, "spec": spec, **lost,
        }  # fmt: skip


def _cast(node: fx.Node) -> Cast | None:
    """What a measured node casts for; None for other nodes, and for codes that no recipe asked for."""
    if node.op != "call_function" or node.target not in MEASURED:
        return None
    fused = node.meta.get("moefx_fused") or (None,)
    return node.meta.get("moefx_cast") or node.meta.get("moefx_turned") or fused[0]


def _casts(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if _cast(n) is not None]


def _up_to_casts(gm: fx.GraphModule, absent: frozenset[str]) -> fx.GraphModule:
    """The part of a training graph that its casts, and random draws before them, depend on."""
    new = prune_tangents(gm, absent) if absent else copy_graph(gm)
    out = new.graph.output_node()
    out.args = (tuple(_casts(new.graph)),)
    out.meta = {}
    new.graph.eliminate_dead_code(is_effect)
    new.recompile()
    return new


def _fits(t: Tensor, val: Tensor) -> bool:
    return t.dim() == val.dim() and all(s == w or compat.is_symbol(w) for s, w in zip(t.shape, val.shape, strict=True))
